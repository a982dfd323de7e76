"""The hand-over of a job, as every adapter times it."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Generator

import pytest

from fastapi_headroom import ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.queue_adapters import publishing
from fastapi_headroom.probes.queue_adapters.publishing import Publication, Publishing
from fastapi_headroom.store.writer import Writer

COUNT = "messaging_client_operation_duration_seconds_count"


@pytest.fixture
def timed() -> Publishing:
    """What a library's hooks time with, bound to a store in memory."""
    made = Publishing(Guard("queue"))
    made.bind(Writer.in_memory())
    return made


@pytest.fixture
def request_ledger() -> ledger.Ledger:
    """The ledger of a request whose route is known."""
    made = ledger.Ledger("POST")
    made.route = "/orders"
    return made


def test_what_a_library_does_to_publish_is_the_publish_stage_alone(
    timed: Publishing, request_ledger: ledger.Ledger
) -> None:
    """A cache or pool wait within a hand-over takes nothing from its stage, and other probes still learn the route."""

    def endpoint() -> None:
        ledger.current.set(request_ledger)
        with Publication(timed, "redis", "mail"):
            inner = ledger.current.get()
            assert inner is not None
            assert (inner.method, inner.route, inner.finished) == ("POST", "/orders", True)
            inner.enter(ledger.CACHE)
            time.sleep(0.05)
            inner.leave(ledger.CACHE)
        assert ledger.current.get() is request_ledger

    contextvars.copy_context().run(endpoint)
    seconds = request_ledger.seconds
    assert seconds[ledger.PUBLISH] >= 0.05
    assert seconds[ledger.CACHE] == 0.0


def test_a_hand_over_that_is_thrown_away_in_another_context_raises_nothing(
    timed: Publishing, request_ledger: ledger.Ledger
) -> None:
    """A coroutine that is closed by somebody else while it publishes ends without an error of ours."""

    def publish() -> Generator[None, None, None]:
        with Publication(timed, "redis", "mail"):
            yield

    def endpoint() -> Generator[None, None, None]:
        ledger.current.set(request_ledger)
        coroutine = publish()
        next(coroutine)
        return coroutine

    contextvars.copy_context().run(endpoint).close()
    assert ledger.current.get() is publishing.current.get() is None, "who closes it takes nothing of it over"
    assert timed.writer is not None
    assert timed.writer.value(COUNT, messaging_destination_name="mail", messaging_system="redis",
                              messaging_operation_name="publish") == 1.0  # fmt: skip


def test_a_hand_over_without_a_queue_is_not_counted_and_names_are_bounded(timed: Publishing) -> None:
    """What failed before there was a message has no queue; queues beyond the limit share one name."""
    with Publication(timed, "redis"):
        assert publishing.current.get() is not None
    assert publishing.current.get() is None
    for number in range(150):
        with Publication(timed, "redis", f"queue-{number}"):
            pass
    assert timed.writer is not None
    names = {dict(labels)["messaging_destination_name"] for name, labels in timed.writer.samples() if name == COUNT}
    assert len(names) == 101
    assert "_OTHER" in names
