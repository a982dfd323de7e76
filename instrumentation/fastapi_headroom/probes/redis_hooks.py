"""The places of redis-py where the cache probe listens.

No single place sees both command and reply, so ``execute_command`` of the clients is wrapped (sync, async, cluster)
and ``execute`` of the pipelines, where replies belong to commands by their position. The sync and the async wrap are
twins on purpose: a helper between them would cost each cached read a call.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import wraps
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE
from fastapi_headroom.probes.cache_commands import Command
from fastapi_headroom.probes.patches import Patches

if TYPE_CHECKING:
    from fastapi_headroom.probes.cache import CacheProbe


class RedisHooks:
    """The wraps of one probe."""

    def __init__(self, probe: CacheProbe, patches: Patches, commands: Mapping[Any, Command | None]) -> None:
        """``commands`` are known at once by their first argument."""
        self.probe = probe
        self.commands = commands
        self._patches = patches

    def attach(self) -> None:
        """Wrap redis-py's clients and pipelines."""
        import redis.asyncio.client
        import redis.asyncio.cluster
        import redis.client
        import redis.cluster
        import redis.connection

        wrap = self._patches.wrap
        wrap(redis.client.Redis, "execute_command", self._wrap_command)
        wrap(redis.client.Pipeline, "immediate_execute_command", self._wrap_command)
        wrap(redis.cluster.RedisCluster, "execute_command", self._wrap_command)
        wrap(redis.client.Pipeline, "execute", self._wrap_pipeline)
        wrap(redis.cluster.ClusterPipeline, "execute", self._wrap_pipeline)
        wrap(redis.asyncio.client.Redis, "execute_command", self._wrap_async_command)
        wrap(redis.asyncio.client.Pipeline, "immediate_execute_command", self._wrap_async_command)
        wrap(redis.asyncio.cluster.RedisCluster, "execute_command", self._wrap_async_command)
        wrap(redis.asyncio.client.Pipeline, "execute", self._wrap_async_pipeline)
        wrap(redis.asyncio.cluster.ClusterPipeline, "execute", self._wrap_async_pipeline)
        # Older versions have no transactions of a cluster, and no word of what the client's own cache answers.
        transaction = getattr(redis.cluster, "TransactionStrategy", None)
        if hasattr(transaction, "_immediate_execute_command"):
            wrap(transaction, "_immediate_execute_command", self._wrap_command)
        transaction = getattr(redis.asyncio.cluster, "TransactionStrategy", None)
        if hasattr(transaction, "_immediate_execute_command"):
            wrap(transaction, "_immediate_execute_command", self._wrap_async_command)
        if hasattr(redis.connection, "record_csc_request"):
            wrap(redis.connection, "record_csc_request", _wrap_local_result)

    def _wrap_command(self, original: Any) -> Any:
        probe, commands, current, now = self.probe, self.commands, ledger.current.get, perf_counter

        @wraps(original)
        def execute_command(client: Any, *args: Any, **options: Any) -> Any:
            try:
                command = commands[args[0]] if probe.writer is not None else None
            except Exception:  # a command that we do not know, or know otherwise written
                command = probe.command(args)
            if command is None:
                return original(client, *args, **options)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                reply = original(client, *args, **options)
            except Exception as error:
                probe.command_failed(client, command, args, error, now() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = now()
            probe.command_done(client, command, args, reply, ended - started, ended, request)
            return reply

        return execute_command

    def _wrap_async_command(self, original: Any) -> Any:
        probe, commands, current, now = self.probe, self.commands, ledger.current.get, perf_counter

        @wraps(original)
        async def execute_command(client: Any, *args: Any, **options: Any) -> Any:
            try:
                command = commands[args[0]] if probe.writer is not None else None
            except Exception:  # a command that we do not know, or know otherwise written
                command = probe.command(args)
            if command is None:
                return await original(client, *args, **options)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                reply = await original(client, *args, **options)
            except Exception as error:  # a cancelled command is neither an error of the cache nor an answer
                probe.command_failed(client, command, args, error, now() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = now()
            probe.command_done(client, command, args, reply, ended - started, ended, request)
            return reply

        return execute_command

    def _wrap_pipeline(self, original: Any) -> Any:
        probe = self.probe

        @wraps(original)
        def execute(pipeline: Any, *args: Any, **options: Any) -> Any:
            queued = probe.commands(pipeline)
            if not queued:
                return original(pipeline, *args, **options)
            request = ledger.current.get()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = perf_counter()
            try:
                replies = original(pipeline, *args, **options)
            except Exception as error:
                probe.pipeline_failed(pipeline, queued, error, perf_counter() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = perf_counter()
            probe.pipeline_done(pipeline, queued, replies, ended - started, ended, request)
            return replies

        return execute

    def _wrap_async_pipeline(self, original: Any) -> Any:
        probe = self.probe

        @wraps(original)
        async def execute(pipeline: Any, *args: Any, **options: Any) -> Any:
            queued = probe.commands(pipeline)
            if not queued:
                return await original(pipeline, *args, **options)
            request = ledger.current.get()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = perf_counter()
            try:
                replies = await original(pipeline, *args, **options)
            except Exception as error:
                probe.pipeline_failed(pipeline, queued, error, perf_counter() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            ended = perf_counter()
            probe.pipeline_done(pipeline, queued, replies, ended - started, ended, request)
            return replies

        return execute


class _LocalResult(threading.local):
    served: bool | None = None


_local = _LocalResult()


def _wrap_local_result(original: Any) -> Any:
    """Listen to what redis-py says of its client-side cache, in the thread whose command it answers."""

    @wraps(original)
    def record_csc_request(*args: Any, **options: Any) -> Any:
        result = options.get("result", args[-1] if args else None)
        _local.served = getattr(result, "name", "") == "HIT"
        return original(*args, **options)

    return record_csc_request


def answered_locally() -> bool | None:
    """Return whether the client's own cache answered this thread's last command; None when it was not asked."""
    served, _local.served = _local.served, None
    return served


def keeps_local_cache(owner: Any) -> bool:
    """Return whether the clients of a connection pool or cluster keep a cache of their own (CacheConfig)."""
    return (getattr(owner, "cache", None) or getattr(owner, "_cache", None)) is not None


def queued_commands(pipeline: Any) -> list[Sequence[Any]]:
    """Return the commands, with their arguments, that a pipeline is about to send."""
    strategy = getattr(pipeline, "_execution_strategy", pipeline)  # cluster pipelines keep them there
    for attribute in ("command_stack", "_command_queue", "_command_stack"):
        queue = getattr(strategy, attribute, None)
        if queue is not None:
            return [entry[0] if isinstance(entry, tuple) else entry.args for entry in queue]
    return []


def owner_of(client: Any) -> Any:
    """Return what a client shares with its pipelines and nothing else: the connection pool, or the cluster."""
    client = getattr(client, "_pipe", client)  # a cluster's transaction
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        return pool
    cluster = getattr(client, "cluster_client", client)
    if type(cluster).__module__.startswith("redis.asyncio"):
        return cluster
    return getattr(cluster, "nodes_manager", cluster)


def address_of(client: Any) -> str:
    """Return where a client's server is: ``host:port/db``, ``unix/db``, ``cluster@host:port`` or ``service/db``."""
    owner = owner_of(client)
    manager = getattr(owner, "nodes_manager", owner)
    nodes = getattr(manager, "startup_nodes", None)
    if nodes:
        node = next(iter(nodes.values()))
        return f"cluster@{node.host}:{node.port}"
    arguments = getattr(owner, "connection_kwargs", {})
    database = arguments.get("db") or 0
    service = getattr(owner, "service_name", None)
    if service:
        return f"{service}/{database}"
    if "path" in arguments:
        return f"unix/{database}"
    return f"{arguments.get('host') or 'localhost'}:{arguments.get('port') or 6379}/{database}"
