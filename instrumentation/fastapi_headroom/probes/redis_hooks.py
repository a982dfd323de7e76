"""The places of redis-py where the cache probe listens.

No single place sees both command and reply, so ``execute_command`` of the clients is wrapped (sync, async, cluster)
and ``execute`` of the pipelines, where replies belong to commands by their position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi_headroom import ledger
from fastapi_headroom.ledger import CACHE
from fastapi_headroom.probes.patches import Patches

if TYPE_CHECKING:
    from fastapi_headroom.probes.cache import CacheProbe

PIPELINE = "pipeline"
"""The operation of a pipeline or transaction as a whole."""


class RedisHooks:
    """The wraps of one probe."""

    def __init__(self, probe: CacheProbe, patches: Patches, operations: Mapping[Any, str]) -> None:
        """``operations`` gives the commands that are known at once the names under which they are timed."""
        self.probe = probe
        self.operations = operations
        self._patches = patches

    def attach(self) -> None:
        """Wrap redis-py's clients and pipelines."""
        import redis.asyncio.client
        import redis.asyncio.cluster
        import redis.client
        import redis.cluster

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

    def _wrap_command(self, original: Any) -> Any:
        probe, operations, current, now = self.probe, self.operations, ledger.current.get, perf_counter

        @wraps(original)
        def execute_command(client: Any, *args: Any, **options: Any) -> Any:
            try:
                operation = operations[args[0]] if probe.writer is not None else ""
            except Exception:  # lower case, bytes, or a command that we do not know
                operation = probe.operation(args)
            if not operation:
                return original(client, *args, **options)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                reply = original(client, *args, **options)
            except Exception:
                probe.command_failed(client, operation, args, now() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            probe.command_done(client, operation, args, now() - started, reply)
            return reply

        return execute_command

    def _wrap_async_command(self, original: Any) -> Any:
        probe, operations, current, now = self.probe, self.operations, ledger.current.get, perf_counter

        @wraps(original)
        async def execute_command(client: Any, *args: Any, **options: Any) -> Any:
            try:
                operation = operations[args[0]] if probe.writer is not None else ""
            except Exception:  # lower case, bytes, or a command that we do not know
                operation = probe.operation(args)
            if not operation:
                return await original(client, *args, **options)
            request = current()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = now()
            try:
                reply = await original(client, *args, **options)
            except Exception:  # a cancelled command is neither an error of the cache nor an answer
                probe.command_failed(client, operation, args, now() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            probe.command_done(client, operation, args, now() - started, reply)
            return reply

        return execute_command

    def _wrap_pipeline(self, original: Any) -> Any:
        probe = self.probe

        @wraps(original)
        def execute(pipeline: Any, *args: Any, **options: Any) -> Any:
            commands = probe.commands(pipeline)
            if not commands:
                return original(pipeline, *args, **options)
            request = ledger.current.get()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = perf_counter()
            try:
                replies = original(pipeline, *args, **options)
            except Exception:
                probe.pipeline_failed(pipeline, commands, perf_counter() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            probe.pipeline_done(pipeline, commands, perf_counter() - started, replies)
            return replies

        return execute

    def _wrap_async_pipeline(self, original: Any) -> Any:
        probe = self.probe

        @wraps(original)
        async def execute(pipeline: Any, *args: Any, **options: Any) -> Any:
            commands = probe.commands(pipeline)
            if not commands:
                return await original(pipeline, *args, **options)
            request = ledger.current.get()
            if request is not None:
                request.cache_calls += 1
                request.enter(CACHE)
            started = perf_counter()
            try:
                replies = await original(pipeline, *args, **options)
            except Exception:
                probe.pipeline_failed(pipeline, commands, perf_counter() - started)
                raise
            finally:
                if request is not None:
                    request.leave(CACHE)
            probe.pipeline_done(pipeline, commands, perf_counter() - started, replies)
            return replies

        return execute


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
