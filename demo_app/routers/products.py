"""Products: read often and by everybody, so cached; priced seldom."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, BackgroundTasks, HTTPException, Response, status
from fastapi.responses import StreamingResponse
from sqlalchemy import func, select, update

from demo_app import outside
from demo_app.cache import cache, client
from demo_app.carriers import Quote
from demo_app.database import Session, SessionDep
from demo_app.faults import strikes
from demo_app.models import OrderItem, Product
from demo_app.paging import page_of
from demo_app.schemas import Bestsellers, Page, PagingDep, PriceChange, ProductDetails, ProductOut

router = APIRouter(prefix="/products", tags=["products"])


@router.get("")
async def list_products(session: SessionDep, paging: PagingDep) -> Page[ProductOut]:
    """List products, a page at a time."""
    if strikes("loop_block", share=0.2):
        _ask_price_service()
    return await page_of(session, select(Product), Product.id, paging, ProductOut)


@router.get("/export")
async def export_products() -> StreamingResponse:
    """Stream all products as CSV: a few rows in memory at a time, however many there are."""
    return StreamingResponse(_csv_rows(), media_type="text/csv")


@router.get("/bestsellers")
async def get_bestsellers() -> Bestsellers:
    """Return what sells best, from Redis: one key that everybody asks for."""
    naive = strikes("cache_stampede")

    async def load() -> Bestsellers:
        sold = func.sum(OrderItem.quantity).desc()
        query = select(Product).join(OrderItem).group_by(Product.id).order_by(sold, Product.id).limit(10)
        async with Session() as session:
            products = list(await session.scalars(query))
        if naive:
            await asyncio.sleep(0.8)  # as a table does that has grown and has no index
        return Bestsellers(products=[ProductOut.model_validate(product) for product in products])

    found = await cache.get("bestsellers", 0, Bestsellers, load, naive=naive)
    assert found is not None  # there is always a list
    return found


@router.get("/{product_id}")
async def get_product(product_id: int, background: BackgroundTasks) -> ProductDetails:
    """Return a product, from Redis when it is there."""

    async def load() -> ProductDetails | None:
        async with Session() as session:  # of its own: other requests may wait for this load
            product = await session.get(Product, product_id)
        return None if product is None else ProductDetails.model_validate(product)

    details = await cache.get("product:{}", product_id, ProductDetails, load)
    if details is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such product")
    background.add_task(_count_view, product_id)
    return details


@router.get("/{product_id}/delivery")
async def get_delivery(product_id: int) -> list[Quote]:
    """Ask all carriers at once what it costs to deliver a product."""
    return await outside.quotes(product_id)


@router.put("/{product_id}/price", status_code=status.HTTP_204_NO_CONTENT)
async def change_price(product_id: int, change: PriceChange, session: SessionDep) -> Response:
    """Set a price; what the cache holds of the product is dropped after the commit."""
    statement = update(Product).where(Product.id == product_id).values(price_cents=change.price_cents)
    changed = await session.execute(statement.returning(Product.id))
    if changed.scalar() is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such product")
    await session.commit()
    await cache.drop("product:{}", product_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


async def _count_view(product_id: int) -> None:
    """Remember that somebody looked: small enough for a background task."""
    await client.zincrby("product-views", 1, str(product_id))


async def _csv_rows() -> AsyncIterator[str]:
    query = select(Product.id, Product.name, Product.price_cents, Product.stock).order_by(Product.id)
    async with Session() as session:
        result = await session.stream(query.execution_options(yield_per=200))
        yield "id,name,price_cents,stock\r\n"
        async for rows in result.partitions():
            text = io.StringIO()
            csv.writer(text).writerows(rows)
            yield text.getvalue()


def _ask_price_service() -> None:
    """Call a service the synchronous way, as the fault ``loop_block`` does on the event loop."""
    time.sleep(0.4)
