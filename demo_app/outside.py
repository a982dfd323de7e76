"""Calls to other services: one client for all requests of a worker, with time-outs, and independent calls at once."""

from __future__ import annotations

import asyncio
from typing import get_args

import httpx

from demo_app.carriers import Carrier, Quote
from demo_app.settings import shop_settings

client = httpx.AsyncClient(
    base_url=shop_settings().carriers_url,
    timeout=httpx.Timeout(0.5, pool=0.2),
    limits=httpx.Limits(max_connections=40, max_keepalive_connections=20),
)


async def quotes(product_id: int) -> list[Quote]:
    """Return the quotes of the carriers that answered in time; none when none did."""
    asked = (_ask(carrier, product_id) for carrier in get_args(Carrier))
    return [quote for quote in await asyncio.gather(*asked) if quote is not None]


async def _ask(carrier: str, product_id: int) -> Quote | None:
    try:
        response = await client.get(f"/{carrier}/quote", params={"product_id": product_id})
        return Quote.model_validate_json(response.raise_for_status().content)
    except httpx.HTTPError:
        return None  # a delivery more or less is no reason for an error
