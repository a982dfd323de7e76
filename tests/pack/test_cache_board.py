"""What the cache board's queries answer, evaluated by Prometheus on series that are known."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pack import support

BOARD = support.ROOT / "dashboards" / "headroom-cache.json"
SHOP = 'job="shop", instance="{}:9464"'


def counter(name: str, rate: int, labels: str, instance: str = "a") -> dict[str, str]:
    """Return a counter that grows by ``rate`` a second."""
    return {"series": f"{name}{{{SHOP.format(instance)}, {labels}}}", "values": f"0+{30 * rate}x120"}


def gauge(name: str, value: int, labels: str, instance: str) -> dict[str, str]:
    """Return a gauge that stays the same."""
    return {"series": f"{name}{{{SHOP.format(instance)}, {labels}}}", "values": f"{value}x120"}


REQUESTS, HTTP = "headroom_cache_requests_total", "http_server_request_duration_seconds_count"
INPUT = [
    counter(REQUESTS, 6, 'cache="redis", key_pattern="a:{}", result="hit"'),
    counter(REQUESTS, 2, 'cache="redis", key_pattern="a:{}", result="miss"'),
    counter(REQUESTS, 90, 'cache="shop.price", result="hit"'),
    counter(REQUESTS, 10, 'cache="shop.price", result="miss"'),
    counter("headroom_cache_operation_duration_seconds_count", 8, 'cache="redis", operation="get"'),
    counter(HTTP, 3, 'http_request_method="GET", http_route="/plans", http_response_status_code="304"'),
    counter(HTTP, 1, 'http_request_method="GET", http_route="/plans", http_response_status_code="200"'),
    counter(HTTP, 50, 'http_request_method="GET", http_route="/users", http_response_status_code="200"'),
    counter("headroom_response_cache_policies_total", 2, 'http_route="/plans", policy="public"'),
    counter("headroom_response_cache_policies_total", 1, 'http_route="/plans", policy="revalidate"'),
    counter("headroom_response_max_age_seconds_total", 128, 'http_route="/plans"'),
    *(
        counter(
            "headroom_cache_sampled_keys_total", 1, f'cache="redis", key_pattern="{it}:{{}}", expires="{end}"', sidecar
        )
        for it, end in (("a", "never"), ("b", "within_minute"))
        for sidecar in "ab"
    ),
    *(
        counter("headroom_cache_sampled_bytes_total", size, f'cache="redis", key_pattern="{it}:{{}}"', sidecar)
        for it, size in (("a", 3), ("b", 1))
        for sidecar in "ab"
    ),
    *(gauge("headroom_cache_memory_bytes", 40, 'cache="redis"', it) for it in "ab"),
    *(gauge("headroom_cache_memory_limit_bytes", 100, 'cache="redis"', it) for it in "ab"),
    *(gauge("headroom_cache_entries", 7, 'cache="redis"', it) for it in "ab"),
    *(gauge("headroom_cache_server_info", 1, 'cache="redis", eviction_policy="allkeys-lru"', it) for it in "ab"),
    *(counter("headroom_cache_evictions_total", 5, 'cache="redis"', it) for it in "ab"),
    gauge("headroom_cache_entries", 30, 'cache="shop.price"', "a"),
    gauge("headroom_cache_entries_limit", 40, 'cache="shop.price"', "a"),
]
"""One app (instance a) with a Redis, an lru_cache and clients that cache; two sidecars (a, b) poll the Redis."""


def queries(title: str) -> list[str]:
    """Return the queries of a panel, with Grafana's variables put in."""
    (panel,) = (it for it in support.panels(BOARD) if it["title"] == title)
    filled = [target["expr"] for target in panel["targets"]]
    for variable, value in {
        "$__rate_interval": "5m",
        "$__range": "30m",
        "$job": ".+",
        "$instance": ".+",
        "$cache": ".+",
    }.items():
        filled = [query.replace(variable, value) for query in filled]
    return filled


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        # the lru_cache's hundred look-ups a second do not drown those of the server
        ("Hit ratio", ["{} 0.75"]),
        ("Misses", ["{} 2"]),
        ("Hit ratio by level", ["{} 0.75", "{} 0.9", "{} 0.75"]),
        ("What passes each level", ["{} 1", "{} 10", "{} 2", None]),
        ("HTTP: routes that clients may cache", ['{http_route="/plans"} 4', '{http_route="/plans"} 0.75']),
        (
            "HTTP: what clients and proxies may keep",
            [
                '{http_route="/plans"} 4 | {http_route="/users"} 50',
                '{http_route="/plans"} 0.5 | {http_route="/users"} 0',
                '{http_route="/plans"} 0.25 | {http_route="/users"} 0',
                '{http_route="/plans"} 0 | {http_route="/users"} 0',
                '{http_route="/plans"} 64',
            ],
        ),
        (
            "What fills the server, by random keys in the time shown",
            [
                '{cache="redis", key_pattern="a:{}"} 0.75 | {cache="redis", key_pattern="b:{}"} 0.25',
                '{cache="redis", key_pattern="a:{}"} 3600 | {cache="redis", key_pattern="b:{}"} 3600',
                '{cache="redis", key_pattern="a:{}"} 1 | {cache="redis", key_pattern="b:{}"} 0',
                '{cache="redis", key_pattern="a:{}"} 0 | {cache="redis", key_pattern="b:{}"} 1',
                None,
            ],
        ),
        # two sidecars that poll one server do not multiply it
        ("Memory", ['{cache="redis"} 40']),
        ("Memory, of the limit", ['{cache="redis"} 0.4']),
        ("Entries of the server", ['{cache="redis"} 7']),
        ("Evicted and expired", ['{cache="redis"} 5', None]),
        (
            "Caches in the process, in the time shown",
            [
                '{cache="shop.price"} 180000',
                '{cache="shop.price"} 0.9',
                '{cache="shop.price"} 30',
                '{cache="shop.price"} 0.75',
                None,
            ],
        ),
    ],
)
def test_panels_tell_levels_apart_and_count_servers_once(
    title: str, expected: list[str | None], tmp_path: Path
) -> None:
    """Each query gives the value that its series add up to: by level, and once per server."""
    cases: list[dict[str, Any]] = []
    for query, wanted in zip(queries(title), expected, strict=True):
        samples = []
        if wanted is not None:
            rows = (row.rpartition(" ") for row in wanted.split(" | "))
            samples = [{"labels": labels, "value": float(value)} for labels, _, value in rows]
        cases.append({"expr": query, "eval_time": "45m", "exp_samples": samples})
    test = {"interval": "30s", "input_series": INPUT, "promql_expr_test": cases}
    path = tmp_path / "board.test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(
        [support.tool("promtool"), "test", "rules", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
