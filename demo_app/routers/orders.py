"""Orders: the writes that matter, in short transactions."""

from __future__ import annotations

import asyncio
import hashlib
import time
import zlib

from fastapi import APIRouter, HTTPException, Query, Response, status
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from demo_app import jobs
from demo_app.database import Session, SessionDep
from demo_app.faults import strikes
from demo_app.models import Order, OrderItem, Product, User
from demo_app.paging import page_of
from demo_app.schemas import OrderDetails, OrderIn, OrderOut, Page, PagingDep

router = APIRouter(prefix="/orders", tags=["orders"])
_left_open: list[AsyncSession] = []


@router.get("")
async def list_orders(session: SessionDep, paging: PagingDep, user_id: int = Query(gt=0)) -> Page[OrderOut]:
    """List the orders of a user, a page at a time."""
    return await page_of(session, select(Order).where(Order.user_id == user_id), Order.id, paging, OrderOut)


@router.get("/{order_id}")
async def get_order(order_id: int, session: SessionDep) -> OrderDetails:
    """Return an order with its lines and their products: three statements, however many lines."""
    await _track_parcels()
    await _log_the_look(order_id)
    order = await _load(order_id, session)
    await _ask_carrier()
    await _ask_for_position()
    return OrderDetails.model_validate(order)


@router.get("/{order_id}/invoice")
async def get_invoice(order_id: int, session: SessionDep) -> Response:
    """Return the invoice. Rendering is synchronous and takes its time, so it runs in the threadpool."""
    order = OrderDetails.model_validate(await _load(order_id, session))
    await session.close()  # the connection is not needed while the invoice is rendered
    document = await run_in_threadpool(_render_invoice, order.model_dump_json())
    return Response(document, media_type="application/octet-stream")


@router.post("", status_code=status.HTTP_201_CREATED)
async def place_order(wish: OrderIn, session: SessionDep) -> OrderOut:
    """Place an order; the confirmation goes out by mail, ahead of all campaigns."""
    if await session.get(User, wish.user_id) is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such user")
    wanted = {line.product_id for line in wish.lines}
    query = select(Product.id, Product.price_cents).where(Product.id.in_(wanted))
    prices = {row.id: row.price_cents for row in await session.execute(query)}
    if len(prices) < len(wanted):
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such product")
    items = [
        OrderItem(product_id=line.product_id, quantity=line.quantity, price_cents=prices[line.product_id])
        for line in wish.lines
    ]
    order = Order(
        user_id=wish.user_id, items=items, total_cents=sum(item.quantity * item.price_cents for item in items)
    )
    session.add(order)
    await session.flush()
    await _ask_carrier()
    await session.commit()
    await jobs.publish(
        jobs.send_mail, f"order:{order.id}", order.user_id, f"Your order {order.id}", priority=jobs.URGENT
    )
    return OrderOut.model_validate(order)


async def _load(order_id: int, session: SessionDep) -> Order:
    query = select(Order).where(Order.id == order_id).options(selectinload(Order.items).selectinload(OrderItem.product))
    order = await session.scalar(query)
    if order is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such order")
    return order


async def _ask_carrier() -> None:
    """Wait for an outside service while a connection is held, as the fault ``pool_exhaustion`` does."""
    if strikes("pool_exhaustion"):
        await asyncio.sleep(4.0)


async def _ask_for_position() -> None:
    """Wait for an outside service between the statements and the end of the session: the fault ``held_idle``."""
    if strikes("held_idle"):
        await asyncio.sleep(2.4)


async def _log_the_look(order_id: int) -> None:
    """Open a session that nobody closes, one per worker, as the fault ``session_leak`` does; healed, it is closed."""
    if strikes("session_leak"):
        if not _left_open:
            _left_open.append(Session())
            await _left_open[0].scalar(select(Order.id).where(Order.id == order_id))
    elif _left_open:
        await _left_open.pop().close()


async def _track_parcels() -> None:
    """Take more threads than one request should, as the fault ``threadpool_starved`` does."""
    if strikes("threadpool_starved"):
        await asyncio.gather(*(run_in_threadpool(_track_parcel) for _ in range(20)))


def _track_parcel() -> None:
    """Wait for a synchronous service for two seconds, or until the fault is healed."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and strikes("threadpool_starved"):
        time.sleep(0.1)


def _render_invoice(text: str) -> bytes:
    """Seal and pack an invoice: some milliseconds of work that release the interpreter's lock."""
    seal = hashlib.pbkdf2_hmac("sha256", text.encode(), b"invoice", 5_000)
    return zlib.compress(text.encode() * 20, 6) + seal
