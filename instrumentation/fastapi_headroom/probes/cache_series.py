"""The series of one cache, and what is remembered of its keys: patterns, fills and ages. The hot path of the probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi_headroom import catalog
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.cache_ages import Ages
from fastapi_headroom.probes.cache_commands import Command
from fastapi_headroom.probes.cache_effects import size_of
from fastapi_headroom.probes.cache_fills import Fills
from fastapi_headroom.probes.cache_patterns import NEW, Patterns, Results
from fastapi_headroom.probes.cache_rules import EACH_KEY, ONE, Rule
from fastapi_headroom.store.writer import Counter, Histogram, Writer


class CacheSeries:
    """The series of one cache, with their handles resolved once."""

    __slots__ = (
        "_age", "_durations", "_known", "_timeouts", "ages",
        "fills", "local", "name", "patterns", "read_bytes", "writer", "written_bytes",
    )  # fmt: skip

    def __init__(self, writer: Writer, name: str) -> None:
        self.writer = writer
        self.name = name
        self.local: CacheSeries | None = None
        """The client's own cache in front of this one, where it keeps one."""
        self.ages = Ages()
        self.patterns = Patterns(writer, name)
        self._known = self.patterns.known
        self._durations: dict[Command, Histogram] = {}
        self._age: Histogram | None = None
        self._timeouts: Counter | None = None
        self.fills: Fills
        self.read_bytes: Histogram
        self.written_bytes: Histogram

    def connected(self) -> CacheSeries:
        """Make the series that only a cache has to which commands are sent; return itself. Idempotent."""
        if self._timeouts is None:
            self.fills = Fills(self.writer.gauge(catalog.CACHE_CONCURRENT_FILLS, self.name))
            self.read_bytes = self.writer.histogram(catalog.CACHE_PAYLOAD, self.name, "read")
            self.written_bytes = self.writer.histogram(catalog.CACHE_PAYLOAD, self.name, "write")
            self._timeouts = self.writer.counter(catalog.CACHE_TIMEOUTS, self.name)
        return self

    @property
    def is_connected(self) -> bool:
        """Whether commands are sent to this cache: its look-ups count by themselves."""
        return self._timeouts is not None

    def keep_local(self) -> None:
        """Make the series of the cache that the client keeps in front of this one; ages and fills are the same."""
        local = self.local = CacheSeries(self.writer, f"{self.name}:local")
        local.ages, local.fills = self.ages, self.fills
        local.read_bytes = self.writer.histogram(catalog.CACHE_PAYLOAD, local.name, "read")

    def sweep(self, now: float) -> None:
        """Drop what ended without a word."""
        if self._timeouts is not None:
            self.fills.sweep(now)

    # ------------------------------------------------------------------ what was answered
    def answered(
        self, command: Command, args: Sequence[Any], reply: Any, seconds: float, now: float, request: Ledger | None
    ) -> None:
        """Record a command and its reply. ``now`` is the time of ``perf_counter`` when it came."""
        duration = self._durations.get(command)
        if duration is None:
            self.observe(command, seconds)
        else:
            duration.observe(seconds)
        if command.plain:
            self._judge_one(args[1], reply, now, request)
        else:
            self.judge(command, args, reply, now, request)

    def observe(self, command: Command, seconds: float) -> None:
        """Record how long a command took."""
        handle = self._durations.get(command)
        if handle is None:
            handle = self.writer.histogram(catalog.CACHE_OPERATION_DURATION, self.name, command.name)
            self._durations[command] = handle
        handle.observe(seconds)

    def judge(self, command: Command, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        """Count the hits and misses that a reply tells, and take note of what the command did."""
        rule = command.rule
        if rule is ONE:
            self._judge_one(args[1], reply, now, request)
        elif rule is not None:
            self._judge_many(rule, args, reply, now, request)
        effect = command.effect
        if effect is not None:
            effect(self, args, reply, now, request)

    def _judge_one(self, key: Any, reply: Any, now: float, request: Ledger | None) -> None:
        try:
            results = self._known.get(key, NEW)
        except TypeError:  # a bytearray
            key, results = bytes(key), NEW
        if results is NEW:
            results = self.patterns.look_up_new(key)
        if results is None:
            return
        if reply is None:
            self._missed(results, key, now, request)
            return
        results.hit.inc()
        kind = type(reply)
        if kind is bytes or kind is str:
            self.read_bytes.observe(len(reply))
        ages = self.ages.entries
        if ages and hash(key) in ages:
            self._served(key, now)
        if self.fills.open:
            self.fills.ended(key, request, written=False)

    def _judge_many(self, rule: Rule, args: Sequence[Any], reply: Any, now: float, request: Ledger | None) -> None:
        known, ages, fills, served = self._known, self.ages.entries, self.fills.open, False
        verdicts = [value is not None for value in reply] if rule is EACH_KEY else rule.found(args, reply)
        for key, found in zip(rule.keys(args), verdicts, strict=False):
            try:
                results = known.get(key, NEW)
            except TypeError:
                key, results = bytes(key), NEW
            if results is NEW:
                results = self.patterns.look_up_new(key)
            if results is None:
                continue
            if found:
                served = True
                results.hit.inc()
                if ages and hash(key) in ages:
                    self._served(key, now)
                if fills:
                    self.fills.ended(key, request, written=False)
            else:
                self._missed(results, key, now, request)
        if served and rule.sized:
            size = size_of(reply)
            if size:
                self.read_bytes.observe(size)

    def _missed(self, results: Results, key: Any, now: float, request: Ledger | None) -> None:
        results.miss.inc()
        duplicates = results.duplicates()
        if self.fills.missed(key, request, now):
            duplicates.inc()

    def _served(self, key: Any, now: float) -> None:
        age = self.ages.of(key, now)
        if age is None:
            return
        if self._age is None:
            self.serve(age)
        else:
            self._age.observe(age)

    def serve(self, age: float) -> None:
        """Record the age in seconds of an entry that was served."""
        if self._age is None:
            self._age = self.writer.histogram(catalog.CACHE_ENTRY_AGE, self.name)
        self._age.observe(age)

    def missed_all(self, command: Command, args: Sequence[Any]) -> None:
        """Count the look-ups of a command that this cache could not answer."""
        if command.rule is not None:
            for key in command.rule.keys(args):
                results = self.patterns.look_up(key)
                if results is not None:
                    results.miss.inc()

    # ------------------------------------------------------------------ what failed
    def count_errors(self, command: Command, args: Sequence[Any]) -> None:
        """Count the look-ups of a command that raised."""
        if command.rule is not None:
            for key in command.rule.keys(args):
                results = self.patterns.look_up(key)
                if results is not None:
                    results.other("error").inc()

    def count_timeout(self) -> None:
        """Count an operation that gave up waiting for the server."""
        if self._timeouts is not None:
            self._timeouts.inc()

    # ------------------------------------------------------------------ what was written
    def wrote(self, key: Any, seconds: float, now: float, request: Ledger | None) -> None:
        """Take note of an entry that was written, with a time to live of so many seconds."""
        if self.fills.open:
            self.fills.ended(key, request, written=True)
        self.ages.wrote(key, now, seconds)
        if seconds > 0:
            results = self.patterns.look_up(key)
            if results is not None:
                results.lifetime.saw(seconds)

    def wrote_bytes(self, number: int) -> None:
        """Record the bytes of the values that one command wrote."""
        self.written_bytes.observe(number)

    def left(self, key: Any, seconds: float, now: float) -> None:
        """Conclude the age of an entry from the seconds that it has left."""
        if seconds > 0:
            results = self.patterns.look_up(key)
            if results is not None:
                self.ages.left(key, now, seconds, results.lifetime.seconds)
