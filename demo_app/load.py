"""Shoppers for locust: most of them look, some buy, a few write; some products are much more popular than others.

``locust -f demo_app/load.py --headless --host http://127.0.0.1:8000``. With the defaults of ``Visits`` about
50 requests per second arrive, in waves.
"""

from __future__ import annotations

import math
import random
from typing import ClassVar

from locust import FastHttpUser, LoadTestShape, between, task

from demo_app.settings import ORDERS, ORGANIZATIONS, PRODUCTS, USERS


def popular(count: int) -> int:
    """Return an id from 1 to ``count``, low ones far more often: half the choices fall on a few percent."""
    return min(count, int(count ** random.random()))


class Shopper(FastHttpUser):
    """Looks around, reads what others wrote, and sometimes buys."""

    weight = 9
    wait_time = between(0.2, 1.8)
    network_timeout = 15.0
    connection_timeout = 5.0
    plans_etag: str = ""

    @task(8)
    def look_at_list(self) -> None:
        """Turn the pages of the catalogue."""
        self.client.get(f"/products?after={20 * (popular(20) - 1)}", name="/products")

    @task(16)
    def look_at_product(self) -> None:
        """Look at a product and perhaps at a second one at once, as people with tabs do."""
        for _ in range(random.choice((1, 1, 2))):
            self.client.get(f"/products/{popular(PRODUCTS)}", name="/products/{id}")

    @task(6)
    def look_at_bestsellers(self) -> None:
        """See what others buy."""
        self.client.get("/products/bestsellers", name="/products/bestsellers")

    @task(3)
    def ask_for_delivery(self) -> None:
        """Ask what a delivery costs."""
        self.client.get(f"/products/{popular(PRODUCTS)}/delivery", name="/products/{id}/delivery")

    @task(4)
    def look_at_plans(self) -> None:
        """Ask for the plans as a browser does: only if they changed."""
        headers = {"If-None-Match": self.plans_etag} if self.plans_etag else {}
        with self.client.get("/plans", headers=headers, catch_response=True) as response:
            self.plans_etag = (response.headers or {}).get("ETag", "")
            if response.status_code in (200, 304):
                response.success()

    @task(8)
    def look_at_own_plan(self) -> None:
        """Ask what the organization has booked, in one of two regions."""
        region = {"X-Region": random.choice(("east", "east", "west"))}
        path = f"/organizations/{popular(ORGANIZATIONS)}/plan"
        self.client.get(path, headers=region, name="/organizations/{id}/plan")

    @task(4)
    def read_posts(self) -> None:
        """Read what a user wrote."""
        self.client.get(f"/users/{popular(USERS)}/posts", name="/users/{id}/posts")

    @task(2)
    def read_user(self) -> None:
        """Look at a user."""
        self.client.get(f"/users/{popular(USERS)}", name="/users/{id}")

    @task(2)
    def read_many_users(self) -> None:
        """Look at a page of users with all their posts."""
        self.client.get(f"/users?after={popular(USERS)}", name="/users")

    @task(1)
    def write_post(self) -> None:
        """Write about a purchase."""
        post = {"title": "About my purchase", "body": "It does what it should. " * random.randrange(1, 10)}
        self.client.post(f"/users/{popular(USERS)}/posts", json=post, name="/users/{id}/posts")

    @task(3)
    def look_at_orders(self) -> None:
        """Look at earlier orders."""
        self.client.get(f"/orders?user_id={popular(USERS)}", name="/orders")

    @task(5)
    def look_at_order(self) -> None:
        """Look at one order."""
        self.client.get(f"/orders/{popular(ORDERS)}", name="/orders/{id}")

    @task(1)
    def fetch_invoice(self) -> None:
        """Fetch an invoice."""
        self.client.get(f"/orders/{popular(ORDERS)}/invoice", name="/orders/{id}/invoice")

    @task(4)
    def buy(self) -> None:
        """Buy one to three things."""
        lines = [
            {"product_id": popular(PRODUCTS), "quantity": random.randrange(1, 4)} for _ in range(random.randrange(1, 4))
        ]
        self.client.post("/orders", json={"user_id": popular(USERS), "lines": lines}, name="/orders")

    @task(1)
    def read_mail(self) -> None:
        """Look at the mails of a user."""
        self.client.get(f"/mail?recipient_id={popular(USERS)}", name="/mail")


class Merchant(FastHttpUser):
    """Sets prices, changes plans, asks for reports, writes campaigns."""

    weight = 1
    wait_time = between(0.5, 3.0)
    network_timeout = 15.0
    connection_timeout = 5.0
    report_id: str = ""

    @task(4)
    def change_price(self) -> None:
        """Set a price, of a popular product or of any."""
        price = {"price_cents": random.randrange(300, 50_000)}
        product = random.choice((popular(PRODUCTS), random.randrange(1, PRODUCTS + 1)))
        self.client.put(f"/products/{product}/price", json=price, name="/products/{id}/price")

    @task(1)
    def change_plan(self) -> None:
        """Book another plan, for one of the smaller organizations: a region that lags serves it stale for a while."""
        organization = random.randrange(ORGANIZATIONS // 4, ORGANIZATIONS + 1)
        plan = {"plan_id": random.randrange(1, 5)}
        self.client.put(f"/organizations/{organization}/plan", json=plan, name="/organizations/{id}/plan")

    @task(2)
    def order_report(self) -> None:
        """Ask for a report."""
        self.report_id = self.client.post("/reports", name="/reports").json().get("id", "")

    @task(4)
    def read_report(self) -> None:
        """Look whether the report is there."""
        if self.report_id:
            self.client.get(f"/reports/{self.report_id}", name="/reports/{id}")

    @task(2)
    def start_campaign(self) -> None:
        """Write to ten users."""
        campaign = {"subject": "New in the shop", "recipients": random.sample(range(1, USERS + 1), 10)}
        self.client.post("/mail/campaigns", json=campaign, name="/mail/campaigns")

    @task(1)
    def export_products(self) -> None:
        """Fetch the whole catalogue."""
        self.client.get("/products/export", name="/products/export")


class Visits(LoadTestShape):
    """The number of users goes up and down in waves of half a minute, with a short burst in each."""

    users: ClassVar[int] = 48

    def tick(self) -> tuple[int, float] | None:
        """Return the number of users wanted now, and how many may come or go per second."""
        second = self.get_run_time()
        wave = 0.85 + 0.15 * math.sin(2 * math.pi * second / 30)
        burst = 1.25 if second % 30 > 26 else 1.0
        return max(1, round(self.users * wave * burst)), 10.0
