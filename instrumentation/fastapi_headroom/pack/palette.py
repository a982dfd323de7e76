"""One palette by meaning: a colour says the same on every board. Names are Grafana's, so both themes read well."""

from __future__ import annotations

GOOD, WARN, BAD = "green", "orange", "red"
NEUTRAL = "blue"
QUIET = "#8e8e99"
LIMIT = "red"

STATUS = {"2xx": "green", "3xx": "yellow", "4xx": "blue", "5xx": "red", "1xx": QUIET}
OUTCOMES = {"ok": "green", "client_error": "blue", "error": "red"}
QUANTILES = {"p50": "green", "p95": "orange", "p99": "red", "max": "dark-red"}
CACHE_RESULTS = {"hit": "green", "stale": "yellow", "miss": "orange", "error": "red"}
CLOSES = {"normal": "green", "abnormal": "orange", "error": "red", "rejected": "blue"}
CAUSES = {
    "python": "blue",
    "native": "purple",
    "io": "orange",
    "gil": "red",
    "gc": "yellow",
    "starved": QUIET,
}
STAGES = {
    # Warm colours are waits for something of the app's own that ran out; cool colours are work being done.
    "accept_queue": "dark-red",
    "loop_blocked": "red",
    "threadpool_wait": "yellow",
    "pool_wait": "orange",
    "on_loop": "blue",
    "threadpool": "light-blue",
    "db": "purple",
    "cache": "#3aa99f",
    "http_client": "light-purple",
    "publish": "#c27ba0",
    "other": QUIET,
}
