"""What the tests of caches of other libraries share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.probe import LocalCachesProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer


@pytest.fixture
def probe(writer: Writer) -> Iterator[LocalCachesProbe]:
    """The probe of local caches beside that of Redis, of which neither must have failed by the end."""
    cache = CacheProbe(load({}))
    probe = LocalCachesProbe(cache)
    cache.bind(writer)
    probe.bind(writer)
    yield probe
    assert writer.value("headroom_probe_up", probe="cache") == 1.0
    probe.close()
    cache.close()
