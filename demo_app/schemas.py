"""What the shop says and hears."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")


class Model(BaseModel):
    """Reads from rows as well as from JSON."""

    model_config = ConfigDict(from_attributes=True)


class Page(BaseModel, Generic[Item]):
    """A part of a list. ``next_after`` asks for the following part, and is empty on the last one."""

    items: list[Item]
    next_after: int | None


class Paging(BaseModel):
    """Which part of a list is wanted: so many items whose ids come after one."""

    after: int = Field(0, ge=0)
    limit: int = Field(20, ge=1, le=100)


PagingDep = Annotated[Paging, Query()]


class ProductOut(Model):
    id: int
    name: str
    price_cents: int
    stock: int


class ProductDetails(ProductOut):
    description: str


class Bestsellers(BaseModel):
    products: list[ProductOut]


class PriceChange(BaseModel):
    price_cents: int = Field(gt=0, le=10_000_000)


class PlanOut(Model):
    id: int
    name: str
    monthly_cents: int
    seats: int


class OrganizationPlan(BaseModel):
    organization_id: int
    organization: str
    plan: PlanOut


class PlanChange(BaseModel):
    plan_id: int


class PostOut(Model):
    id: int
    title: str
    body: str
    created_at: datetime


class PostIn(BaseModel):
    title: str = Field(min_length=1, max_length=120)
    body: str = Field(min_length=1, max_length=5_000)


class UserOut(Model):
    id: int
    name: str
    organization_id: int


class UserWithPosts(UserOut):
    posts: list[PostOut]


class OrderLine(BaseModel):
    product_id: int
    quantity: int = Field(ge=1, le=100)


class OrderIn(BaseModel):
    user_id: int
    lines: list[OrderLine] = Field(min_length=1, max_length=20)


class OrderItemOut(Model):
    product: ProductOut
    quantity: int
    price_cents: int


class OrderOut(Model):
    id: int
    user_id: int
    total_cents: int
    created_at: datetime


class OrderDetails(OrderOut):
    items: list[OrderItemOut]


class Campaign(BaseModel):
    subject: str = Field(min_length=1, max_length=120)
    recipients: list[int] = Field(min_length=1, max_length=100)


class MailOut(Model):
    id: int
    recipient_id: int
    subject: str
    sent_at: datetime


class Accepted(BaseModel):
    """Work that a queue has taken over."""

    id: str
    jobs: int


class ReportOut(Model):
    id: int
    kind: str
    requested_at: datetime
    result: dict[str, Any] | None
