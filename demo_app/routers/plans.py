"""Plans: the catalogue hardly changes, and every request of an organization asks for its plan."""

from __future__ import annotations

import hashlib

import redis
from fastapi import APIRouter, Header, HTTPException, Response, status
from pydantic import TypeAdapter
from sqlalchemy import select
from sqlalchemy.orm import joinedload

from demo_app.cache import LocalCache, cache, near, west
from demo_app.database import Session, SessionDep
from demo_app.faults import strikes
from demo_app.models import Organization, Plan
from demo_app.schemas import OrganizationPlan, PlanChange, PlanOut
from demo_app.settings import shop_settings

router = APIRouter(tags=["plans"])
_catalogue = LocalCache("catalogue", ttl=30.0)
_plans = TypeAdapter(list[PlanOut])
_news = redis.Redis.from_url(shop_settings().cache_url)


@router.get("/plans", response_model=list[PlanOut])
async def list_plans(if_none_match: str = Header("")) -> Response:
    """List the plans, out of the process's memory; 304 when the client has the same list."""

    async def load() -> tuple[bytes, str]:
        async with Session() as session:
            plans = _plans.validate_python(list(await session.scalars(select(Plan).order_by(Plan.id))))
        body = _plans.dump_json(plans)
        return body, f'"{hashlib.sha256(body).hexdigest()[:20]}"'

    body, etag = await _catalogue.get(load)
    headers = {"Cache-Control": "public, max-age=300", "ETag": etag}
    if etag in if_none_match:
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/organizations/{organization_id}/plan")
async def get_plan(organization_id: int, x_region: str = Header("east")) -> OrganizationPlan:
    """Return what an organization has booked: from the worker's memory, else from the region's Redis."""
    if strikes("sync_call", share=0.2):
        _wait_for_news()

    async def load() -> OrganizationPlan | None:
        async with Session() as session:
            organization = await session.get(Organization, organization_id, options=[joinedload(Organization.plan)])
        if organization is None:
            return None
        plan = PlanOut.model_validate(organization.plan)
        return OrganizationPlan(organization_id=organization_id, organization=organization.name, plan=plan)

    if x_region == "west":
        return _found(await west.get("org:{}:plan", organization_id, OrganizationPlan, load))
    key = f"org:{organization_id}:plan"
    booked = near.get(key)
    if not isinstance(booked, OrganizationPlan):
        booked = near[key] = _found(await cache.get("org:{}:plan", organization_id, OrganizationPlan, load))
    return booked


@router.put("/organizations/{organization_id}/plan", status_code=status.HTTP_204_NO_CONTENT)
async def change_plan(organization_id: int, change: PlanChange, session: SessionDep) -> Response:
    """Book another plan; what the cache holds is dropped after the commit."""
    organization = await session.get(Organization, organization_id)
    if organization is None or await session.get(Plan, change.plan_id) is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such organization or plan")
    organization.plan_id = change.plan_id
    await session.commit()
    await cache.drop("org:{}:plan", organization_id)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


def _found(booked: OrganizationPlan | None) -> OrganizationPlan:
    if booked is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such organization")
    return booked


def _wait_for_news() -> None:
    """Wait for Redis by its synchronous client, as the fault ``sync_call`` does on the event loop."""
    _news.blpop(["plan-news"], timeout=0.4)
