"""The shop itself: two uvicorn workers on real servers with seeded data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import create_engine

from demo_app import jobs
from demo_app.faults import Switches
from demo_app.stack.process import wait_until
from demo_app.stack.servers import Postgres
from demo_app.stack.servers import Redis as RedisServer
from tests.support.serving import ROOT, serve


@dataclass
class Shop:
    """The running shop and what it stands on."""

    url: str
    database: psycopg.Connection[Any]
    engine_url: str
    broker: redis.Redis
    switches: Switches

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request; return status, headers in lower case, and body."""
        data = None if body is None else json.dumps(body).encode()
        names = {key.replace("_", "-"): value for key, value in headers.items()} | {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, {key.lower(): it for key, it in response.headers.items()}, response.read()
        except urllib.error.HTTPError as error:
            return error.code, {key.lower(): it for key, it in error.headers.items()}, error.read()

    def get(self, path: str) -> Any:
        """Return the JSON behind a path."""
        return json.loads(self.request("GET", path)[2])

    def count(self, table: str) -> int:
        """Return how many rows a table has."""
        row = self.database.execute(f"SELECT count(*) FROM {table}").fetchone()  # type: ignore[call-overload]
        return int(row[0])


@pytest.fixture(scope="module")
def shop(postgres: Postgres, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A seeded shop with a database of its own."""
    with psycopg.connect(postgres.dsn, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS shop")
        admin.execute("CREATE DATABASE shop")
    run, base = tmp_path_factory.mktemp("shop"), f"redis://127.0.0.1:{redis_server.port}"
    environment = {
        "SHOP_DATABASE_URL": postgres.url("asyncpg", "shop"),
        "SHOP_CACHE_URL": f"{base}/8",
        "SHOP_CACHE_WEST_URL": f"{base}/7",
        "SHOP_BROKER_URL": f"{base}/9",
        "SHOP_RUN_DIRECTORY": str(run),
    }
    command = [sys.executable, "-m", "demo_app", "seed"]
    for _ in range(2):  # the second time changes nothing
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment}, timeout=60)
    dsn = postgres.dsn.removesuffix("postgres") + "shop"
    with (
        serve("uvicorn", "demo_app.carriers:app") as carriers,
        serve(
            "uvicorn", "demo_app.app:app", workers=2, env={**environment, "SHOP_CARRIERS_URL": carriers.url}
        ) as serving,
        psycopg.connect(dsn, autocommit=True) as database,
        redis.Redis.from_url(f"{base}/9") as broker,
    ):
        yield Shop(serving.url, database, postgres.url("psycopg", "shop"), broker, Switches(run / "faults.json"))


def test_the_seed_is_there_once(shop: Shop) -> None:
    """1,000 products, 5,000 users who all wrote something, and orders with lines; seeding twice adds nothing."""
    assert (shop.count("products"), shop.count("users")) == (1_000, 5_000)
    assert shop.count("users WHERE id NOT IN (SELECT user_id FROM posts)") == 0
    assert shop.count("orders WHERE id NOT IN (SELECT order_id FROM order_items)") == 0


def test_every_kind_of_request_is_served(shop: Shop) -> None:
    """Reads and writes of all routers answer as they should."""
    order = {"user_id": 7, "lines": [{"product_id": 1, "quantity": 2}]}
    for method, path, body, expected in [
        ("GET", "/products", None, 200),
        ("GET", "/products/3", None, 200),
        ("GET", "/products/0", None, 404),
        ("GET", "/products?limit=1000", None, 422),
        ("GET", "/products/export", None, 200),
        ("PUT", "/products/3/price", {"price_cents": 700}, 204),
        ("GET", "/users?limit=5", None, 200),
        ("GET", "/users/9", None, 200),
        ("GET", "/users/9/posts", None, 200),
        ("POST", "/users/9/posts", {"title": "t", "body": "b"}, 201),
        ("GET", "/orders?user_id=7", None, 200),
        ("GET", "/orders/7", None, 200),
        ("GET", "/orders/7/invoice", None, 200),
        ("POST", "/orders", order, 201),
        ("POST", "/orders", {**order, "user_id": 0}, 404),
        ("GET", "/plans", None, 200),
        ("GET", "/organizations/3/plan", None, 200),
        ("PUT", "/organizations/3/plan", {"plan_id": 2}, 204),
        ("POST", "/reports", None, 202),
        ("GET", "/reports/1", None, 200),
        ("POST", "/mail/campaigns", {"subject": "s", "recipients": [1, 2]}, 202),
        ("GET", "/mail?recipient_id=1", None, 200),
        ("GET", "/healthz", None, 200),
    ]:
        assert shop.request(method, path, body)[0] == expected, (method, path)


def test_a_carrier_that_does_not_answer_is_left_out(shop: Shop) -> None:
    """Quotes come from both carriers; the shop waits half a second at most for one, and answers without it."""
    quotes = [{quote["carrier"] for quote in shop.get("/products/3/delivery")} for _ in range(5)]
    assert {"bicycle", "van"} in quotes
    with serve("uvicorn", "demo_app.app:app", env={"SHOP_CARRIERS_URL": "http://127.0.0.1:9"}) as lonely:
        assert json.loads(lonely.get("/products/3/delivery")) == []


def test_pages_cover_the_whole_list(shop: Shop) -> None:
    """Turning pages to the end shows every product once."""
    seen, after = [], 0
    while after is not None:
        page = shop.get(f"/products?limit=100&after={after}")
        seen += [item["id"] for item in page["items"]]
        after = page["next_after"]
    assert seen == list(range(1, 1_001))


def test_an_update_is_seen_at_once(shop: Shop) -> None:
    """A price and a plan that were cached are fresh after their update, from either worker."""
    for price in (1_111, 2_222):
        shop.get("/products/5")
        shop.request("PUT", "/products/5/price", {"price_cents": price})
        assert [shop.get("/products/5")["price_cents"] for _ in range(6)] == [price] * 6
    for plan in (1, 4):
        shop.get("/organizations/5/plan")
        shop.request("PUT", "/organizations/5/plan", {"plan_id": plan})
        assert [shop.get("/organizations/5/plan")["plan"]["id"] for _ in range(6)] == [plan] * 6


def test_plans_are_cached_by_clients(shop: Shop) -> None:
    """Plans carry Cache-Control and an ETag, and who has them already gets 304 without a body."""
    _, headers, _ = shop.request("GET", "/plans")
    assert "max-age" in headers["cache-control"]
    status, _, body = shop.request("GET", "/plans", if_none_match=headers["etag"])
    assert (status, body) == (304, b"")


def test_only_large_bodies_are_compressed(shop: Shop) -> None:
    """Bodies over 1 kB are compressed for clients that take it, small ones are not."""
    assert shop.request("GET", "/products", accept_encoding="gzip")[1].get("content-encoding") == "gzip"
    assert "content-encoding" not in shop.request("GET", "/users/9", accept_encoding="gzip")[1]


def test_confirmations_overtake_campaigns(shop: Shop) -> None:
    """A campaign's mails lie in the lowest priority, the confirmation of an order in the highest."""
    shop.broker.flushdb()
    shop.request("POST", "/mail/campaigns", {"subject": "s", "recipients": [1, 2, 3, 3]})
    shop.request("POST", "/orders", {"user_id": 7, "lines": [{"product_id": 1, "quantity": 1}]})
    assert shop.broker.llen("mail") == 1
    assert shop.broker.llen("mail\x06\x169") == 3


def test_a_fault_comes_and_goes_while_the_shop_runs(shop: Shop) -> None:
    """error_burst makes requests fail within a moment of its switch, and stops with it."""

    def statuses() -> set[int]:
        return {shop.request("GET", "/users/9")[0] for _ in range(20)}

    assert statuses() == {200}
    shop.switches.set("error_burst", True)
    wait_until(lambda: statuses() == {200, 500}, 60, "errors")
    shop.switches.set("error_burst", False)
    wait_until(lambda: statuses() == {200}, 60, "no errors")


def test_jobs_may_run_twice(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mail with the same key goes out once, and a report that is done is not computed again."""
    engine = create_engine(shop.engine_url)
    monkeypatch.setattr(jobs, "job_engine", lambda: engine)
    try:
        assert [jobs.send_mail("twice", 1, "s") for _ in range(2)] == [True, False]
        report = int(json.loads(shop.request("POST", "/reports")[2])["id"])
        jobs.build_report(report)
        first = shop.get(f"/reports/{report}")["result"]
        assert len(first["best"]) == 20
        shop.request("POST", "/orders", {"user_id": 7, "lines": [{"product_id": 1, "quantity": 1}]})
        jobs.build_report(report)
        assert shop.get(f"/reports/{report}")["result"] == first
    finally:
        engine.dispose()


def test_the_connection_budget_is_kept() -> None:
    """Workers times (size and overflow) stays within the budget, whatever the number of workers."""
    from demo_app.settings import ShopSettings

    for workers in (1, 2, 3, 4, 8, 16):
        settings = ShopSettings(workers=workers, connection_budget=16)
        assert settings.pool_size >= 1
        assert workers * (settings.pool_size + settings.max_overflow) <= 16
        assert 1 <= settings.pool_minimum <= settings.pool_size
