"""Pages of long lists: so many rows whose ids come after one, never all at once."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from demo_app.faults import strikes
from demo_app.schemas import Model, Page, Paging

Out = TypeVar("Out", bound=Model)


async def page_of(
    session: AsyncSession, query: Select[Any], id_column: Any, paging: Paging, model: type[Out]
) -> Page[Out]:
    """Run a query for the part that is wanted, and for one row more: it tells whether there is another part."""
    if strikes("slow_database"):
        await session.execute(select(func.pg_sleep(0.7)))
    query = query.where(id_column > paging.after).order_by(id_column).limit(paging.limit + 1)
    rows = list(await session.scalars(query))
    items = [model.model_validate(row) for row in rows[: paging.limit]]
    return Page(items=items, next_after=items[-1].id if len(rows) > paging.limit else None)
