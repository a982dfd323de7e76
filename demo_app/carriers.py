"""Carriers that the shop asks what a delivery costs: somebody else's service, as slow as those are.

Run it with ``uvicorn demo_app.carriers:app``.
"""

from __future__ import annotations

import asyncio
import random
from typing import Annotated, Final, Literal

from fastapi import FastAPI, Query
from pydantic import BaseModel

Carrier = Literal["bicycle", "van"]
_MEDIAN_SECONDS: Final = {"bicycle": 0.015, "van": 0.030}

app = FastAPI(title="Carriers")


class Quote(BaseModel):
    """What a delivery costs, and how long it takes."""

    carrier: Carrier
    price_cents: int
    days: int


@app.get("/healthz", include_in_schema=False)
async def healthz() -> dict[str, str]:
    """Say that the carriers answer."""
    return {"status": "ok"}


@app.get("/{carrier}/quote")
async def quote(carrier: Carrier, product_id: Annotated[int, Query(ge=1)]) -> Quote:
    """Return a quote, mostly soon and seldom late."""
    await asyncio.sleep(_MEDIAN_SECONDS[carrier] * random.lognormvariate(0, 0.5))
    return Quote(carrier=carrier, price_cents=300 + product_id % 7 * 50, days=1 if carrier == "bicycle" else 3)
