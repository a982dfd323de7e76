"""Every metric that fastapi-headroom writes: the one place where names, labels and buckets live.

Probes write only rows of this catalog, boards and rules may name only these, and
``docs/metrics.md`` is generated from it. Names follow OpenTelemetry's semantic conventions in
their Prometheus form where they have one, and start with ``headroom_`` where they have none.
Units are base units (seconds, bytes, ratios from 0 to 1); counters end in ``_total``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]
# Rows of kind "summary" and stem "user" are made at run time, for metrics that the app makes with prometheus_client.
Stem = Literal["request", "pool", "cache", "loop", "queue", "runtime", "self", "user"]
Mode = Literal["all", "liveall", "sum", "livesum", "max", "livemax", "min", "livemin", "mostrecent", "livemostrecent"]

H14 = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Bounds for requests and jobs, in seconds (OpenTelemetry's advice for HTTP durations)."""
W = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0)
"""Bounds for waits, in seconds: from a free connection to a pool time-out."""
SIZES = (100.0, 1e3, 1e4, 1e5, 1e6, 1e7)
"""Bounds for bodies, in bytes."""
HOLDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
OPERATIONS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
QUERY_COUNTS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
ROW_COUNTS = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
QUEUE_WAITS = (*H14, 30.0, 60.0, 300.0, 1800.0)
DEMANDS = tuple(float(n) for n in (*range(11), 12, 14, 16, 18, 20, 25, 30, 35, 40, 50, 60, 80, 100, 150, 200, 500))
"""Bounds for numbers of connections: exact up to 10, then within a quarter."""
AGES = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0)
"""Bounds for the ages of cache entries, in seconds: from a second to a day."""
LIFETIMES = (1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One row of the contract.

    ``mode`` says how the values of several workers become one (gauges only; prometheus_client's
    multiprocess modes). ``buckets`` are upper bounds in the metric's unit, without ``+Inf``.
    """

    name: str
    kind: Kind
    stem: Stem
    labels: tuple[str, ...]
    help: str
    unit: str = ""
    buckets: tuple[float, ...] = ()
    mode: Mode = "livesum"
    see_also: tuple[str, ...] = field(default=())

    @property
    def family(self) -> str:
        """The name without ``_total``: how prometheus_client and OpenMetrics call a counter."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


ALL: list[Metric] = []


def _add(metric: Metric) -> Metric:
    ALL.append(metric)
    return metric


def _counter(name: str, stem: Stem, labels: tuple[str, ...], text: str, unit: str = "") -> Metric:
    return _add(Metric(name, "counter", stem, labels, text, unit))


def _gauge(name: str, stem: Stem, labels: tuple[str, ...], text: str, unit: str = "", mode: Mode = "livesum") -> Metric:
    return _add(Metric(name, "gauge", stem, labels, text, unit, mode=mode))


def _histogram(
    name: str, stem: Stem, labels: tuple[str, ...], text: str, buckets: tuple[float, ...], unit: str = "seconds"
) -> Metric:
    return _add(Metric(name, "histogram", stem, labels, text, unit, buckets))


# ------------------------------------------------------------------ request
_METHOD, _ROUTE = "http_request_method", "http_route"
REQUEST_DURATION = _histogram(
    "http_server_request_duration_seconds",
    "request",
    (_METHOD, _ROUTE, "http_response_status_code", "error_type"),
    "Time from the call of the app to the last byte of the body; streams are left out.",
    H14,
)
REQUEST_LATENCY = _histogram(
    "headroom_request_latency_seconds",
    "request",
    (_ROUTE,),
    "Latency as the client felt it: the wait in the accept queue and the duration.",
    H14,
)
REQUESTS_ACTIVE = _gauge("http_server_active_requests", "request", (_METHOD,), "Requests in flight.", "requests")
REQUEST_BODY_SIZE = _histogram(
    "http_server_request_body_size_bytes", "request", (_METHOD, _ROUTE), "Size of request bodies.", SIZES, "bytes"
)
RESPONSE_BODY_SIZE = _histogram(
    "http_server_response_body_size_bytes", "request", (_METHOD, _ROUTE), "Size of response bodies.", SIZES, "bytes"
)
REQUESTS = _counter(
    "headroom_requests_total",
    "request",
    (_ROUTE, "outcome"),
    "Requests by outcome: ok, client_error or error. There from the start with 0 for every route.",
    "requests",
)
WORKER_REQUESTS = _counter(
    "headroom_worker_requests_total", "request", ("worker",), "Requests by worker slot: shows skew.", "requests"
)
TIME_TO_FIRST_BYTE = _histogram(
    "headroom_request_time_to_first_byte_seconds",
    "request",
    (_ROUTE,),
    "Time from the call of the app to the first byte of the response, streams too.",
    H14,
)
WEBSOCKET_CONNECTIONS = _gauge(
    "headroom_websocket_connections", "request", (_ROUTE,), "Open WebSocket connections.", "connections"
)
WEBSOCKET_MESSAGES = _counter(
    "headroom_websocket_messages_total", "request", (_ROUTE, "direction"), "WebSocket messages.", "messages"
)
WEBSOCKET_CLOSES = _counter(
    "headroom_websocket_closes_total",
    "request",
    (_ROUTE, "reason"),
    "Ends of WebSockets, by reason: normal, abnormal (cut off, or the client closed with an error), error (the app "
    "raised, or closed with an error) or rejected (not accepted, or closed for what the client sent).",
    "connections",
)
STREAM_LIFETIME = _histogram(
    "headroom_stream_lifetime_seconds",
    "request",
    (_ROUTE, "kind"),
    "How long streams stayed open, by kind: sse, stream or websocket.",
    LIFETIMES,
)
REQUEST_STAGE = _counter(
    "headroom_request_stage_seconds_total",
    "request",
    (_ROUTE, "stage"),
    "The wait ledger: where the time of requests went. The stages sum to their durations.",
    "seconds",
)
LOOP_HOLD = _histogram(
    "headroom_request_loop_hold_seconds",
    "request",
    (_ROUTE,),
    "The longest time that a request held the event loop in one go.",
    W,
)
REQUEST_QUERIES = _histogram(
    "headroom_request_queries", "request", (_ROUTE,), "SQL statements per request.", QUERY_COUNTS, ""
)
REQUEST_ROWS = _histogram(
    "headroom_request_rows",
    "request",
    (_ROUTE,),
    "Rows that the statements of a request gave back. Only requests with a statement whose driver tells the number at "
    "once: no server-side cursors, no SQLite.",
    ROW_COUNTS,
    "rows",
)
REQUEST_DISCONNECTS = _counter(
    "headroom_request_disconnects_total",
    "request",
    (_ROUTE,),
    "Requests whose client went away before the response was complete.",
    "requests",
)
COMPRESSIBLE_BYTES = _counter(
    "headroom_response_compressible_bytes_total",
    "request",
    (_ROUTE,),
    "Bytes of text bodies over 1 kB sent without Content-Encoding to clients that accept one.",
    "bytes",
)
RESPONSE_CACHE_POLICIES = _counter(
    "headroom_response_cache_policies_total",
    "request",
    (_ROUTE, "policy"),
    "Answers of 2xx and 3xx to GET and HEAD that have a Cache-Control, by what it lets clients and proxies do: public, "
    "private, revalidate, no_store or no_lifetime. Answers without one are not counted.",
    "responses",
)
RESPONSE_MAX_AGE = _counter(
    "headroom_response_max_age_seconds_total",
    "request",
    (_ROUTE,),
    "Lifetimes that responses were sent with, added up; divided by those of policy public and private it is the mean.",
    "seconds",
)
HTTP_CLIENT_DURATION = _histogram(
    "http_client_request_duration_seconds",
    "request",
    (_METHOD, "server_address", "http_response_status_code", "error_type"),
    "Time of calls to other services, by host name; see the page on requests for where it ends.",
    H14,
)

# --------------------------------------------------------------------- pool
_POOL = "db_client_connection_pool_name"
POOL_WAIT = _histogram(
    "db_client_connection_wait_time_seconds",
    "pool",
    (_POOL,),
    "Time that a checkout waited for a connection, without connecting and pre-ping.",
    W,
)
POOL_CREATE = _histogram(
    "db_client_connection_create_time_seconds", "pool", (_POOL,), "Time to open a new connection.", W
)
POOL_USE = _histogram(
    "db_client_connection_use_time_seconds", "pool", (_POOL,), "Time from checkout to checkin.", HOLDS
)
POOL_COUNT = _gauge(
    "db_client_connection_count",
    "pool",
    (_POOL, "db_client_connection_state"),
    "Connections of the pool by state: idle or used.",
    "connections",
)
POOL_MAX = _gauge(
    "db_client_connection_max",
    "pool",
    (_POOL,),
    "Connections that the pool may open: size and overflow. No series where there is no limit.",
    "connections",
)
POOL_IDLE_MAX = _gauge(
    "db_client_connection_idle_max", "pool", (_POOL,), "Connections that the pool keeps open: its size.", "connections"
)
POOL_PENDING = _gauge(
    "db_client_connection_pending_requests", "pool", (_POOL,), "Checkouts that wait for a connection now.", "requests"
)
POOL_TIMEOUTS = _counter(
    "db_client_connection_timeouts_total", "pool", (_POOL,), "Checkouts that gave up after pool_timeout.", "timeouts"
)
POOL_OVERFLOW = _gauge(
    "headroom_pool_overflow", "pool", (_POOL,), "Connections open beyond the pool's size.", "connections"
)
POOL_INVALIDATIONS = _counter(
    "headroom_pool_invalidations_total", "pool", (_POOL,), "Connections thrown away as broken.", "connections"
)
POOL_PING_FAILURES = _counter(
    "headroom_pool_ping_failures_total",
    "pool",
    (_POOL,),
    "Connections that failed the check before a checkout (pre-ping); they are among the invalidations.",
    "connections",
)
POOL_RECYCLES = _counter(
    "headroom_pool_recycles_total",
    "pool",
    (_POOL, "reason"),
    "Connections that a checkout replaced in good order: for their age (pool_recycle), or as invalidated because they "
    "were opened before the pool, or they, were declared invalid.",
    "connections",
)
POOL_WAIT_BY_ROUTE = _counter(
    "headroom_pool_wait_seconds_total", "pool", (_POOL, _ROUTE), "Time waited for connections: the victims.", "seconds"
)
POOL_HOLD_BY_ROUTE = _counter(
    "headroom_pool_hold_seconds_total", "pool", (_POOL, _ROUTE), "Time connections were held: the culprits.", "seconds"
)
POOL_IDLE_HOLD_BY_ROUTE = _counter(
    "headroom_pool_idle_hold_seconds_total",
    "pool",
    (_POOL, _ROUTE),
    "Time connections were held while no statement ran on them.",
    "seconds",
)
POOL_LONG_HOLDS = _counter(
    "headroom_pool_long_holds_total",
    "pool",
    (_POOL, _ROUTE),
    "Connections held longer than the threshold, leaked ones among them; the log names where they were checked out.",
    "connections",
)
POOL_LEAKED = _gauge(
    "headroom_pool_leaked_connections",
    "pool",
    (_POOL, _ROUTE),
    "Connections held longer than the threshold, now, that nobody is left to give back: the task or thread that took "
    "them has ended, so has its request, and no statement runs on them.",
    "connections",
)
REPEATED_STATEMENTS = _counter(
    "headroom_repeated_statements_total",
    "pool",
    (_ROUTE,),
    "Statements that one request ran ten times or more, differing only in their values (N+1); once per request.",
    "statements",
)
POOL_DEMAND = _histogram(
    "headroom_pool_demand",
    "pool",
    (_POOL,),
    "Connections in use and checkouts waiting that a checkout found in its worker when it asked for a connection.",
    DEMANDS,
    "connections",
)
POOL_WORKERS = _gauge(
    "headroom_pool_workers",
    "pool",
    (_POOL,),
    "Workers that have the pool: the limit over this is the limit of one worker.",
    "workers",
    "livemax",
)
POOL_PEAK = _gauge(
    "headroom_pool_peak_connections",
    "pool",
    (_POOL,),
    "The most connections that one worker needed at once within the advisor's window: in use, and waited for. "
    "Exact up to 11, above that the bound of a bucket.",
    "connections",
    "livemax",
)
POOL_RECOMMENDED = _gauge(
    "headroom_pool_recommended_size",
    "pool",
    (_POOL,),
    "Connections per worker (pool_size and max_overflow) with which 95 % of the checkouts wait 10 ms or less, "
    "within the database's limit.",
    "connections",
    "livemax",
)
POOL_PREDICTED_WAIT = _gauge(
    "headroom_pool_predicted_wait_seconds",
    "pool",
    (_POOL, "size"),
    "The 95th percentile of the wait that is predicted at a size: a multiple of the recommended one (0.5x to 2x), or "
    "actual. No series where the wait would grow without bound.",
    "seconds",
    "livemax",
)
POOL_AUTOSIZE_MINIMUM = _gauge(
    "headroom_pool_autosize_minimum",
    "pool",
    (_POOL,),
    "The least that autosize leaves the pools of all workers; db_client_connection_max is where they are.",
    "connections",
)
POOL_AUTOSIZE_MAXIMUM = _gauge(
    "headroom_pool_autosize_maximum",
    "pool",
    (_POOL,),
    "The most that autosize would give the pools of all workers, were it not for the budget.",
    "connections",
)
POOL_AUTOSIZE_BUDGET = _gauge(
    "headroom_pool_autosize_budget",
    "pool",
    (_POOL,),
    "Connections that the pools of all workers of this host share under autosize.",
    "connections",
    "livemax",
)
POOL_AUTOSIZE_WANTED = _gauge(
    "headroom_pool_autosize_wanted",
    "pool",
    (_POOL,),
    "Connections that the checkouts of the last seconds asked for, within the patience of autosize; without bounds.",
    "connections",
)
POOL_AUTOSIZE_CHANGES = _counter(
    "headroom_pool_autosize_changes_total",
    "pool",
    (_POOL, "direction", "reason"),
    "Changes of the limit by autosize: grow or shrink, for demand, idle, trial or budget.",
    "changes",
)
POOL_AUTOSIZE_HELD_BACK = _counter(
    "headroom_pool_autosize_held_back_seconds_total",
    "pool",
    (_POOL, "reason"),
    "Time for which the pool's checkouts asked for more and did not get it: maximum, budget, cpu or database.",
    "seconds",
)
DATABASE_CONNECTIONS_MAX = _gauge(
    "headroom_database_connections_max",
    "pool",
    (_POOL,),
    "Connections that the database server lets the app open, over all its workers and instances: max_connections "
    "less what is reserved, or the tighter limit of the role or database.",
    "connections",
    "livemax",
)
CONNECTION_BYTES = _gauge(
    "headroom_database_connection_bytes",
    "pool",
    (_POOL,),
    "Memory that an open connection takes on the database server: an estimate for the kind of server.",
    "bytes",
    "livemax",
)
DB_OPERATION_DURATION = _histogram(
    "db_client_operation_duration_seconds",
    "pool",
    ("db_system_name", "db_operation_name", "error_type"),
    "Time of SQL statements.",
    OPERATIONS,
)

# -------------------------------------------------------------------- cache
CACHE_REQUESTS = _counter(
    "headroom_cache_requests_total",
    "cache",
    ("cache", "key_pattern", "result"),
    "Cache look-ups by result: hit, miss, stale or error. Keys are folded to patterns.",
    "requests",
)
CACHE_ENTRIES = _gauge(
    "headroom_cache_entries",
    "cache",
    ("cache",),
    "What a cache holds: entries, or what its own measure of size says; in-process caches summed over the workers.",
    "entries",
)
CACHE_ENTRIES_LIMIT = _gauge(
    "headroom_cache_entries_limit",
    "cache",
    ("cache",),
    "What an in-process cache may hold, summed over the workers. No series where it may hold any number.",
    "entries",
)
CACHE_EVICTIONS = _counter(
    "headroom_cache_evictions_total",
    "cache",
    ("cache",),
    "Entries thrown away to make room for others.",
    "entries",
)
CACHE_EXPIRATIONS = _counter(
    "headroom_cache_expirations_total",
    "cache",
    ("cache",),
    "Entries of a cache server whose time to live was over.",
    "entries",
)
CACHE_MEMORY = _gauge("headroom_cache_memory_bytes", "cache", ("cache",), "Memory that a cache server holds.", "bytes")
CACHE_MEMORY_LIMIT = _gauge(
    "headroom_cache_memory_limit_bytes",
    "cache",
    ("cache",),
    "Memory that a cache server may hold; at the limit it evicts or refuses. No series where it has no limit.",
    "bytes",
)
CACHE_CLIENTS = _gauge("headroom_cache_clients", "cache", ("cache",), "Connections to a cache server.", "connections")
CACHE_CLIENTS_LIMIT = _gauge(
    "headroom_cache_clients_limit", "cache", ("cache",), "Connections that a cache server accepts.", "connections"
)
CACHE_SERVER_LOOKUPS = _counter(
    "headroom_cache_server_lookups_total",
    "cache",
    ("cache", "result"),
    "Look-ups that a cache server counted itself, of all clients and databases: hit or miss.",
    "requests",
)
CACHE_SERVER_INFO = _gauge(
    "headroom_cache_server_info",
    "cache",
    ("cache", "server", "version", "eviction_policy"),
    "1: what a cache server is, and what it does at its memory limit.",
)
CACHE_SAMPLED_KEYS = _counter(
    "headroom_cache_sampled_keys_total",
    "cache",
    ("cache", "key_pattern", "expires"),
    "Random keys of a cache server that the exporter looked at, by when they expire: never, within_minute, "
    "within_hour, within_day or later.",
    "entries",
)
CACHE_SAMPLED_BYTES = _counter(
    "headroom_cache_sampled_bytes_total",
    "cache",
    ("cache", "key_pattern"),
    "Memory of those keys and what they hold; a pattern's share of it is its share of the server's entries in bytes.",
    "bytes",
)
CACHE_SAMPLED_IDLE = _counter(
    "headroom_cache_sampled_idle_seconds_total",
    "cache",
    ("cache", "key_pattern"),
    "Time since those keys were last used, added up. No series where the eviction policy counts uses instead (LFU).",
    "seconds",
)
CACHE_OPERATION_DURATION = _histogram(
    "headroom_cache_operation_duration_seconds", "cache", ("cache", "operation"), "Time of cache operations.", W
)
CACHE_ENTRY_AGE = _histogram(
    "headroom_cache_entry_age_seconds",
    "cache",
    ("cache",),
    "Age of entries when they were served: since this process wrote them with a time to live, or as the app says.",
    AGES,
)
CACHE_CONCURRENT_FILLS = _gauge(
    "headroom_cache_concurrent_fills",
    "cache",
    ("cache",),
    "Misses of keys that somebody is filling already, now: the stampede. 0 when each missed key is filled once.",
    "requests",
)
CACHE_DUPLICATE_FILLS = _counter(
    "headroom_cache_duplicate_fills_total",
    "cache",
    ("cache", "key_pattern"),
    "Misses that came while another request of the same worker was filling the same key.",
    "requests",
)
CACHE_PAYLOAD = _histogram(
    "headroom_cache_payload_bytes",
    "cache",
    ("cache", "direction"),
    "Size of the values that were read and written: of one reply, or of the values of one command.",
    SIZES,
    "bytes",
)
CACHE_TIMEOUTS = _counter(
    "headroom_cache_timeouts_total",
    "cache",
    ("cache",),
    "Cache operations that gave up because the server did not answer in time; they are errors too.",
    "timeouts",
)
CACHE_INVALIDATIONS = _counter(
    "headroom_cache_invalidations_total",
    "cache",
    ("cache", "key_pattern"),
    "Entries that the app threw away because what they hold had changed, as it says by cache_invalidated().",
    "entries",
)

# --------------------------------------------------------------------- loop
LOOP_DELAY = _histogram(
    "headroom_event_loop_delay_seconds",
    "loop",
    ("worker",),
    "How late the event loop runs what is due; beats that a stuck loop missed are filled in.",
    W,
)
LOOP_DELAY_MAX = _gauge(
    "headroom_event_loop_delay_max_seconds", "loop", ("worker",), "Longest delay of the last 15 seconds.", "seconds"
)
LOOP_UTILIZATION = _gauge(
    "headroom_event_loop_utilization_ratio", "loop", ("worker",), "Share of time that the loop was held.", "ratio"
)
LOOP_CPU = _gauge(
    "headroom_event_loop_cpu_ratio", "loop", ("worker",), "CPU share of the event loop's thread.", "ratio"
)
LOOP_BLOCKED = _counter(
    "headroom_event_loop_blocked_seconds_total",
    "loop",
    ("site", "cause"),
    "Time that the loop was blocked, by the code that held it and what it did: python, native, io, gil, gc, starved.",
    "seconds",
)
LOOP_BLOCKS = _counter(
    "headroom_event_loop_blocks_total", "loop", ("site", "cause"), "How often the loop was blocked.", "blocks"
)
BLOCKING_CALLS = _counter(
    "headroom_blocking_calls_total",
    "loop",
    ("kind", "site"),
    "Blocking calls made on the event loop: sync_db, sync_redis, sync_http, sleep, subprocess, dns, file.",
    "calls",
)
LOOP_TASKS = _gauge("headroom_event_loop_tasks", "loop", ("worker",), "Tasks alive on the loop.", "tasks")
THREADPOOL_TOKENS = _gauge(
    "headroom_threadpool_tokens",
    "loop",
    ("state",),
    "AnyIO's threadpool for sync endpoints: used, limit, and tasks waiting for a thread.",
    "tokens",
)
THREADPOOL_WAIT = _histogram(
    "headroom_threadpool_wait_seconds", "loop", (), "Time that a task waited for a thread of AnyIO's pool.", W
)

# -------------------------------------------------------------------- queue
_SYSTEM, _QUEUE = "messaging_system", "messaging_destination_name"
QUEUE_DEPTH = _gauge(
    "headroom_queue_depth", "queue", (_SYSTEM, _QUEUE, "priority"), "Jobs ready to run.", "jobs", "livemax"
)
QUEUE_IN_PROGRESS = _gauge(
    "headroom_queue_in_progress",
    "queue",
    (_SYSTEM, _QUEUE, "priority"),
    "Jobs handed to a consumer and not yet acknowledged.",
    "jobs",
    "livemax",
)
QUEUE_DELAYED = _gauge(
    "headroom_queue_delayed",
    "queue",
    (_SYSTEM, _QUEUE, "priority"),
    "Jobs that are not ready yet: due later, or waiting for another job to end.",
    "jobs",
    "livemax",
)
QUEUE_FAILED = _gauge(
    "headroom_queue_failed",
    "queue",
    (_SYSTEM, _QUEUE, "priority"),
    "Jobs that failed for good and are kept for somebody to look at.",
    "jobs",
    "livemax",
)
QUEUE_CONSUMERS = _gauge(
    "headroom_queue_consumers",
    "queue",
    (_SYSTEM, _QUEUE, "priority"),
    "Consumers that take jobs from the queue: as the broker says, or else the workers that take from it.",
    "consumers",
)
QUEUE_OLDEST_AGE = _gauge(
    "headroom_queue_oldest_age_seconds",
    "queue",
    (_SYSTEM, _QUEUE, "priority"),
    "Age of the oldest job that is ready to run; 0 when there is none.",
    "seconds",
    "livemax",
)
QUEUE_WAIT = _histogram(
    "headroom_queue_wait_seconds", "queue", (_SYSTEM, _QUEUE), "Time from enqueue to start.", QUEUE_WAITS
)
PROCESS_DURATION = _histogram(
    "messaging_process_duration_seconds",
    "queue",
    (_SYSTEM, _QUEUE, "headroom_task", "error_type"),
    "Run time of jobs.",
    H14,
)
PUBLISH_DURATION = _histogram(
    "messaging_client_operation_duration_seconds",
    "queue",
    (_SYSTEM, "messaging_operation_name", _QUEUE),
    "Time to hand a job to the queue.",
    H14,
)
QUEUE_RETRIES = _counter(
    "headroom_queue_retries_total", "queue", (_SYSTEM, _QUEUE, "headroom_task"), "Jobs that asked for a retry.", "jobs"
)
BACKGROUND_TASKS = _gauge(
    "headroom_background_tasks", "queue", ("headroom_task",), "BackgroundTasks that run now.", "tasks"
)
BACKGROUND_TASK_DURATION = _histogram(
    "headroom_background_task_duration_seconds", "queue", ("headroom_task",), "Run time of BackgroundTasks.", H14
)
BACKGROUND_TASK_WAIT = _histogram(
    "headroom_background_task_wait_seconds",
    "queue",
    ("headroom_task",),
    "Time from when a request made a BackgroundTask to its start: the rest of the request, and the tasks before it.",
    QUEUE_WAITS,
)
BACKGROUND_TASK_FAILURES = _counter(
    "headroom_background_task_failures_total",
    "queue",
    ("headroom_task",),
    "BackgroundTasks that ended in an error; those of the same response that stood behind them never ran.",
    "tasks",
)

# ------------------------------------------------------------------ runtime
PROCESS_MEMORY = _gauge(
    "process_resident_memory_bytes", "runtime", ("worker",), "Resident memory of the worker.", "bytes"
)
PROCESS_MEMORY_LIMIT = _gauge(
    "headroom_process_memory_limit_bytes",
    "runtime",
    ("worker",),
    "Memory that the worker may use: its control group's limit, else the machine's memory.",
    "bytes",
)
PROCESS_CPU = _counter(
    "process_cpu_seconds_total", "runtime", ("worker",), "CPU time of the worker, user and system.", "seconds"
)
PROCESS_FDS = _gauge("process_open_fds", "runtime", ("worker",), "Open file descriptors.", "descriptors")
PROCESS_MAX_FDS = _gauge("process_max_fds", "runtime", ("worker",), "Limit of file descriptors.", "descriptors")
PROCESS_START = _gauge(
    "process_start_time_seconds", "runtime", ("worker",), "Start of the worker, in seconds since 1970.", "seconds"
)
GC_PAUSE = _histogram(
    "headroom_gc_pause_seconds", "runtime", ("worker",), "Time that a garbage collection stopped the worker.", W
)
GC_COLLECTIONS = _counter(
    "cpython_gc_collections_total",
    "runtime",
    ("cpython_gc_generation",),
    "Garbage collections by generation.",
    "collections",
)
WORKERS = _gauge(
    "headroom_workers",
    "runtime",
    ("state",),
    "Workers: alive, and expected where their number is known.",
    "workers",
    "livemax",
)
WORKER_RESTARTS = _counter(
    "headroom_worker_restarts_total", "runtime", (), "Workers that took over a slot another one had left.", "restarts"
)
ACCEPT_BACKLOG = _gauge(
    "headroom_accept_backlog",
    "runtime",
    ("port",),
    "Connections that wait to be accepted (Linux).",
    "connections",
    "livemax",
)
REMAINING = _gauge(
    "headroom_remaining_ratio",
    "runtime",
    ("resource", "name"),
    "What is left of a limit, from 1 (idle) to 0 (exhausted).",
    "ratio",
    "livemax",
)
APP_INFO = _gauge(
    "headroom_app_info",
    "runtime",
    ("service_name", "service_version", "python", "fastapi", "headroom"),
    "1; its labels say what runs. A change is a deploy.",
    "",
    "livemax",
)

# --------------------------------------------------------------------- self
PROBE_UP = _gauge("headroom_probe_up", "self", ("probe",), "1 while a probe works, 0 after it failed.", "", "livemin")
PROBE_ERRORS = _counter(
    "headroom_probe_errors_total", "self", ("probe",), "Errors that a probe swallowed to spare the app.", "errors"
)
LABEL_OVERFLOW = _counter(
    "headroom_label_overflow_total", "self", (), "Label sets folded into `_overflow` by the cap on series.", "series"
)
STORE_DEGRADED = _gauge(
    "headroom_store_degraded", "self", (), "Workers that count in memory only, for want of space or rights.", "workers"
)
SLOTS_UNREADABLE = _gauge(
    "headroom_slots_unreadable", "self", (), "Files of the store that the last scrape had to skip.", "files"
)
SCRAPE_DURATION = _gauge(
    "headroom_scrape_duration_seconds", "self", (), "Time to read and render the last scrape.", "seconds"
)
SERIES = _gauge("headroom_series", "self", (), "Series in the last scrape.", "series")

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in ALL}


def of_stem(stem: Stem) -> tuple[Metric, ...]:
    """Return the rows of one stem, in the order of the contract."""
    return tuple(metric for metric in ALL if metric.stem == stem)
