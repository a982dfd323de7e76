"""Fills an empty database: products, users with posts, organizations with plans, orders. Always the same data."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from demo_app.models import Base
from demo_app.settings import ORDERS, ORGANIZATIONS, PRODUCTS, USERS, shop_settings

PLANS = (("free", 0, 3), ("team", 4_900, 25), ("business", 19_900, 200), ("enterprise", 99_900, 5_000))
_MATERIALS = ("oak", "steel", "linen", "cork", "glass", "wool", "paper", "copper")
_THINGS = ("lamp", "desk", "chair", "shelf", "mug", "notebook", "blanket", "clock", "basket", "tray")
_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


async def seed() -> None:
    """Create the tables and copy the rows in. Does nothing when there are products already."""
    url = make_url(shop_settings().database_url)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        async with connection.transaction():
            if await connection.fetchval("SELECT count(*) FROM products"):
                return
            for table, columns, rows in _tables(random.Random(7)):
                await connection.copy_records_to_table(table, records=rows, columns=columns)
                await connection.execute(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) FROM {table}))"
                )
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def _tables(rng: random.Random) -> list[tuple[str, list[str], list[tuple[Any, ...]]]]:
    """Return (table, columns, rows) in the order in which they refer to each other."""
    prices = [rng.randrange(300, 50_000) for _ in range(PRODUCTS)]
    products = [
        (
            n,
            f"{rng.choice(_MATERIALS)} {rng.choice(_THINGS)} {n}",
            "Made to last. " * rng.randrange(3, 20),
            price,
            10_000,
        )
        for n, price in enumerate(prices, 1)
    ]
    plans = [(n, *plan) for n, plan in enumerate(PLANS, 1)]
    organizations = [(n, f"Organization {n}", rng.randrange(1, len(PLANS) + 1)) for n in range(1, ORGANIZATIONS + 1)]
    users = [
        (n, f"User {n}", f"user{n}@shop.example", rng.randrange(1, ORGANIZATIONS + 1)) for n in range(1, USERS + 1)
    ]
    posts = [
        (user, f"About purchase {k + 1}", "It does what it should. " * rng.randrange(2, 12), _moment(rng))
        for user in range(1, USERS + 1)
        for k in range(rng.randrange(1, 6))
    ]
    items = [
        (order, product, rng.randrange(1, 4), prices[product - 1])
        for order in range(1, ORDERS + 1)
        for product in rng.sample(range(1, PRODUCTS + 1), rng.randrange(1, 5))
    ]
    totals = dict.fromkeys(range(1, ORDERS + 1), 0)
    for order, _, quantity, price in items:
        totals[order] += quantity * price
    orders = [(n, rng.randrange(1, USERS + 1), total, _moment(rng)) for n, total in totals.items()]
    return [
        ("products", ["id", "name", "description", "price_cents", "stock"], products),
        ("plans", ["id", "name", "monthly_cents", "seats"], plans),
        ("organizations", ["id", "name", "plan_id"], organizations),
        ("users", ["id", "name", "email", "organization_id"], users),
        ("posts", ["id", "user_id", "title", "body", "created_at"], [(n, *post) for n, post in enumerate(posts, 1)]),
        ("orders", ["id", "user_id", "total_cents", "created_at"], orders),
        (
            "order_items",
            ["id", "order_id", "product_id", "quantity", "price_cents"],
            [(n, *item) for n, item in enumerate(items, 1)],
        ),
    ]


def _moment(rng: random.Random) -> datetime:
    return _BEGINNING + timedelta(seconds=rng.randrange(200 * 86_400))
