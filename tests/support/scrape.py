"""Reads an exposition the way Prometheus does."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [
            (sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with that name and at least these labels; KeyError when there is none."""
        found = [value for n, have, value in self.samples if n == name and labels.items() <= have.items()]
        if not found:
            raise KeyError(f"{name}{labels}")
        return sum(found)

    def values(self, name: str, label: str) -> set[str]:
        """Return the values of one label over the samples with that name."""
        return {have[label] for n, have, _ in self.samples if n == name and label in have}


def scrape(url: str, timeout: float = 30.0) -> Scrape:
    """Scrape ``url`` (an exporter's root) once."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout) as response:
        return Scrape(response.read().decode())


def scrape_until(url: str, condition: Callable[[Scrape], bool], seconds: float = 60.0) -> Scrape:
    """Scrape until the condition holds and return that scrape; AssertionError with the last text otherwise."""
    deadline = time.monotonic() + seconds
    text = "nothing was scraped"
    while time.monotonic() < deadline:
        try:
            seen = scrape(url)
            text = seen.text
            if condition(seen):
                return seen
        except (OSError, KeyError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s; the last scrape:\n{text}")
