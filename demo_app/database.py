"""The shop's connection pool and the session of one request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import fastapi_headroom as headroom
from demo_app.settings import shop_settings

_settings = shop_settings()

# The budget is shared: workers x (size + overflow) stays below the server's max_connections.
engine = create_async_engine(
    _settings.database_url,
    pool_size=_settings.pool_size,
    max_overflow=_settings.max_overflow,
    pool_timeout=_settings.pool_timeout,
    pool_pre_ping=True,
    pool_recycle=1800,
    pool_use_lifo=True,  # connections that nobody needs grow old and may be closed
)
# Within the budget the limit follows the load: a worker that is busy may have what the others do not need.
headroom.autosize(
    engine,
    minimum=_settings.pool_minimum,
    maximum=_settings.connection_budget,
    budget=_settings.connection_budget,
    workers=_settings.workers,
)
Session = async_sessionmaker(engine, expire_on_commit=False)


async def get_session() -> AsyncIterator[AsyncSession]:
    """Give a session; a connection is taken at the first statement and goes back at commit, rollback or close."""
    async with Session() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
"""Closed before the response is sent: a slow client does not keep a connection."""
