"""Every limit that a rule, a board or a doctor check compares with. Changed here, changed everywhere."""

from __future__ import annotations

from typing import Final

AVAILABILITY_OBJECTIVE: Final = 0.999
"""Share of requests that must not end in an error (5xx or an unhandled exception)."""
LATENCY_OBJECTIVE: Final = 0.99
"""Share of requests that must be faster than LATENCY_THRESHOLD."""
LATENCY_THRESHOLD: Final = 0.5
"""Seconds, as the client felt them; a bound of H14."""
BURN_WINDOWS: Final = (
    # long, short, factor, for, severity: the SRE workbook's multi-window, multi-burn-rate alerts
    ("1h", "5m", 14.4, "2m", "critical"),
    ("6h", "30m", 6.0, "15m", "critical"),
    ("1d", "2h", 3.0, "1h", "warning"),
    ("3d", "6h", 1.0, "3h", "warning"),
)
LOOP_LAG_WARNING: Final = 0.25
"""Seconds of p99 event-loop delay; a bound of W."""
LOOP_LAG_CRITICAL: Final = 1.0
LOOP_BLOCKED_SHARE: Final = 0.05
"""Share of time that one site may block the loop (seconds of blocking per second)."""
LOOP_BLOCK_SECONDS: Final = 0.1
"""The watchdog reports a block from this length on."""
BLOCKING_CALL_SECONDS: Final = 0.01
"""A call that is fast as a rule (a file, a name's address, a process that has ended) blocks from this length on."""
LOOP_SATURATED: Final = 0.9
POOL_WAIT_P95: Final = 0.1
"""Seconds; a bound of W."""
POOL_IDLE_SHARE: Final = 0.25
"""Share of a pool's limit that one route may hold while no statement runs."""
REPEATED_STATEMENTS: Final = 10
"""Times that one request runs a statement, differing only in values, from which on it is an N+1."""
REPEATED_RATE: Final = 0.05
"""Such statements per second of one route from which on they are a habit."""
POOL_TARGET_WAIT_P95: Final = 0.01
"""Seconds that one checkout in twenty may wait with the pool size that is recommended; a bound of W."""
CONNECTION_BYTES: Final = {"postgresql": 2e6, "mysql": 0.25e6, "mariadb": 0.25e6}
"""Memory that one connection takes on its server, by SQLAlchemy's name of the dialect. Measured on PostgreSQL 15
(proportional set size: 1.5 MB fresh, 2.1 after ten tables, 3.7 after thirty and ninety prepared statements) and
MariaDB 10.11 (0.1 MB fresh, 0.26 after ten tables)."""
POOL_ADVICE_CHECKOUTS: Final = 200.0
"""Checkouts of one worker within the advisor's window under which nothing is said of its pool."""
POOL_ADVICE_SECONDS: Final = 60.0
"""Seconds that must have been observed before anything is said."""
CACHE_DROP: Final = 0.5
"""A hit ratio under this share of a day ago's is a fault."""
CACHE_LOOKUPS_FLOOR: Final = 1.0
"""Look-ups per second under which a hit ratio means nothing."""
CACHE_STALE_SHARE: Final = 0.05
"""Share of a key pattern's look-ups that may be answered out of date."""
CACHE_DUPLICATE_SHARE: Final = 0.25
"""Share of a key pattern's misses that may come while another request is filling the same key."""
CACHE_DUPLICATES_FLOOR: Final = 0.5
"""Such misses per second under which nobody is hurt by them."""
CACHE_ERROR_SHARE: Final = 0.05
"""Share of look-ups that may fail."""
CACHE_MEMORY_SHARE: Final = 0.9
"""Share of its memory limit that a cache server may hold that refuses writes at it."""
QUEUE_AGE_SECONDS: Final = 60.0
MEMORY_SHARE: Final = 0.9
DESCRIPTOR_SHARE: Final = 0.9
REMAINING_LOW: Final = 0.1
TRAFFIC_FLOOR: Final = 0.05
"""Requests per second under which an error ratio means nothing."""
UNHANDLED_RATE: Final = 0.01
"""Unhandled exceptions per second of one kind on one route (three in five minutes)."""
THREADS_WAITING: Final = 1.0
"""Tasks that wait for a thread of AnyIO's pool, on average, from which on the pool counts as saturated."""
QUEUE_BACKLOG_JOBS: Final = 10.0
"""Jobs that a queue always has ready while it grows: fewer are no backlog."""
JOB_FAILURE_SHARE: Final = 0.1
"""Share of a task's runs that may end in an error, retries among them."""
JOB_FAILURE_RATE: Final = 0.01
"""Failed runs of one task per second under which nothing is said (three in five minutes)."""
