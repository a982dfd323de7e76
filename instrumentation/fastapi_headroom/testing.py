"""Helpers for the tests of apps that use fastapi-headroom."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.store.writer import Samples, Writer, redirect, redirected

if TYPE_CHECKING:
    from fastapi_headroom.probes.blocks import Block
    from fastapi_headroom.probes.vigil import Vigil

LEAST_THRESHOLD_MS: Final = 10
"""Milliseconds below which a block cannot be told from a timer that is late."""
_NOT_THE_CODES_FAULT: Final = ("starved", "gc")
_REMEDIES: Final = {
    "python": "it computes: move the work to a process or a queue, or divide it",
    "native": "a call in C: use run_in_threadpool where it lets go of the GIL, else a process",
    "io": "a blocking call: use the async client of that library, or run_in_threadpool",
    "gil": "a thread that keeps the GIL: move its work to a process",
}


class CapturedMetrics:
    """What was written while metrics were captured."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        """The writer in memory, for code that takes one."""

    def value(self, name: str, /, **labels: str) -> float:
        """Return the value of one sample, such as ``headroom_requests_total``, given by all its labels.

        Raises KeyError when there is none; it says which samples of that name there are, or what is named alike.
        """
        try:
            return self.writer.value(name, **labels)
        except KeyError:
            raise KeyError(self._lacking(name, labels)) from None

    def samples(self) -> Samples:
        """Return every sample: (sample name, label pairs sorted by name) to value."""
        return self.writer.samples()

    def __contains__(self, name: str) -> bool:
        return any(sample == name for sample, _ in self.samples())

    def _lacking(self, name: str, labels: Mapping[str, str]) -> str:
        values = {pairs: value for (sample, pairs), value in self.samples().items() if sample == name}
        given = set(labels.items())  # first what shares most labels with what was asked for, then what counted
        series = sorted(values, key=lambda pairs: (-len(given & set(pairs)), values[pairs] == 0, pairs))
        if series:
            found = [_as_series(name, pairs) for pairs in series[:_MOST_SHOWN]]
            found += [f"and {len(series) - _MOST_SHOWN} more"] if len(series) > _MOST_SHOWN else []
            remedy = "value() wants all labels of a sample; there are " + ", ".join(found)
        else:
            near = difflib.get_close_matches(name, {sample for sample, _ in self.samples()}, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else "nothing of that name was measured in this block"
        return f"no sample {_as_series(name, labels.items())}: {remedy}"


_MOST_SHOWN: Final = 5


def _as_series(name: str, labels: Iterable[tuple[str, str]]) -> str:
    return name + "{" + ", ".join(f"{label}={value!r}" for label, value in labels) + "}"


@contextmanager
def capture_metrics(*, max_series: int = 20_000) -> Iterator[CapturedMetrics]:
    """Collect everything that is measured inside the block in memory, without files, slots or a port.

    Works for apps that are initialised inside the block and for those that were before: what is bound to the
    shared files is bound to the captured ones, and back at the end. Raises RuntimeError for a block inside another.

        with capture_metrics() as metrics:
            client.get("/orders/7")
            assert metrics.value("headroom_requests_total", http_route="/orders/{order_id}", outcome="ok") == 1
    """
    if redirected() is not None:
        raise RuntimeError("capture_metrics() is in use already: ask the outer block's metrics, blocks do not nest")
    captured = CapturedMetrics(Writer.in_memory(max_series=max_series))
    redirect(captured.writer)
    try:
        yield captured
    finally:
        redirect(None)


class assert_no_blocking:  # noqa: N801 (reads as the assertion that it is)
    """Fail when code inside the block holds an event loop for ``threshold_ms`` milliseconds or longer in one go.

    Watches the loop that runs and those of other threads, such as TestClient's; needs no ``init``. Raises
    AssertionError at the end of the block with the site, duration, cause and stack of the longest hold. Time in which
    the process got no CPU or collected garbage never fails. Works with ``with`` and ``async with``, and nests.

        async def test_quote() -> None:
            with assert_no_blocking(threshold_ms=50):
                await quote("desk")

    Raises SettingsError for a threshold that is no number, or below 10.
    """

    def __init__(self, threshold_ms: float = 50) -> None:
        if isinstance(threshold_ms, bool) or not isinstance(threshold_ms, int | float):
            kind = type(threshold_ms).__name__
            raise SettingsError(f"threshold_ms must be a number of milliseconds, got {kind}: assert_no_blocking(50)")
        if not LEAST_THRESHOLD_MS <= threshold_ms < float("inf"):
            raise SettingsError(
                f"threshold_ms must be {LEAST_THRESHOLD_MS} milliseconds or more, got {threshold_ms}: timers of an "
                "event loop are late by a few by themselves; the default is 50"
            )
        self.threshold_ms = threshold_ms
        self._vigil: Vigil | None = None

    def __enter__(self) -> Self:
        """Watch from now on."""
        from fastapi_headroom.probes.vigil import Vigil

        if self._vigil is not None:
            raise RuntimeError("this assert_no_blocking() is in use: make a new one for each block")
        self._vigil = Vigil(self.threshold_ms / 1e3)
        self._vigil.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Watch no longer. An error that the block itself raised is the one that is seen."""
        vigil, self._vigil = self._vigil, None
        if vigil is None:
            return
        found = vigil.stop()
        blocks = sorted((b for b in found if b.cause not in _NOT_THE_CODES_FAULT), key=_held, reverse=True)
        if blocks and error is None:
            raise AssertionError(self._message(blocks))

    async def __aenter__(self) -> Self:
        """Watch from now on."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self.__exit__(kind, error, traceback)

    def _message(self, blocks: list[Block]) -> str:
        worst, *others = blocks
        lines = [
            f"the event loop was blocked {_held(worst):.3f} s by {worst.site} ({worst.cause}), "
            f"at most {self.threshold_ms / 1e3:g} s is allowed",
            f"  {_REMEDIES[worst.cause]}",
        ]
        if worst.sample is not None:
            lines += ["  stack, innermost first:", *(f"    {line}" for line in worst.sample.stack)]
        lines += [f"  and {_held(block):.3f} s by {block.site} ({block.cause})" for block in others[:5]]
        if len(others) > 5:
            lines.append(f"  and {len(others) - 5} more")
        return "\n".join(lines)


def _held(block: Block) -> float:
    """Return the seconds that code held the loop: on a busy machine it takes longer, which is not its fault."""
    return block.seconds - block.starved
