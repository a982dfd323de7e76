"""What a read of the store returns: families of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]
"""Sample name, label pairs sorted by name, value."""


@dataclass(slots=True, eq=False)
class Rows:
    """The series of a family, in order, without their values.

    One object serves read after read until a series comes or goes. So what is derived from it can be kept on
    it: ``prefixes`` is left for the exposition to fill with the start of each line.
    """

    series: tuple[tuple[str, Labels], ...]
    prefixes: tuple[str, ...] = ()


class Family:
    """A metric with its samples; histograms are cumulative, with ``_bucket``, ``_sum`` and ``_count``.

    ``name`` is without ``_total``. ``samples`` is for convenience; whoever must be fast takes ``rows`` and
    ``values``, which run in parallel.
    """

    __slots__ = ("_samples", "help", "kind", "name", "rows", "values")

    def __init__(self, name: str, kind: str, help: str, samples: Iterable[Sample]) -> None:  # noqa: A002
        self._samples: list[Sample] | None = list(samples)
        self.name, self.kind, self.help = name, kind, help
        self.rows = Rows(tuple((sample, labels) for sample, labels, _ in self._samples))
        self.values: Sequence[float] = [value for _, _, value in self._samples]

    @classmethod
    def of_rows(cls, name: str, kind: str, help_text: str, rows: Rows, values: Sequence[float]) -> Family:
        """Make a family from rows that are kept and the values of one read."""
        family = cls.__new__(cls)
        family.name, family.kind, family.help = name, kind, help_text
        family.rows, family.values, family._samples = rows, values, None
        return family

    @property
    def samples(self) -> list[Sample]:
        """The samples; built when first asked for."""
        if self._samples is None:
            pairs = zip(self.rows.series, self.values, strict=True)
            self._samples = [(name, labels, value) for (name, labels), value in pairs]
        return self._samples

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Family({self.name!r}, {self.kind!r}, {len(self)} samples)"


@dataclass(slots=True)
class Snapshot:
    """One read of the store."""

    families: list[Family] = field(default_factory=list)
    """Sorted by name."""
    unreadable: list[str] = field(default_factory=list)
    """Names of files that were skipped; why is in the log, once per file."""
    alive: list[int] = field(default_factory=list)
    """Slots whose worker lives, ascending."""

    def values(self) -> dict[tuple[str, Labels], float]:
        """Return every sample by its name and label pairs, for tests and the doctor."""
        samples: dict[tuple[str, Labels], float] = {}
        for family in self.families:
            samples.update(zip(family.rows.series, family.values, strict=True))
        return samples
