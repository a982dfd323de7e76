"""Caches inside the process: what lru_cache and cachetools answered is what the series say."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cachetools
import pytest
import redis
from fastapi import FastAPI
from fastapi.testclient import TestClient

import fastapi_headroom as headroom
from demo_app.stack.servers import Redis
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.probes.caches.finder import Finder
from fastapi_headroom.probes.caches.probe import MAX_NAMES, LocalCachesProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer
from tests.support.measured import eventually

REQUESTS = "headroom_cache_requests_total"
ENTRIES = "headroom_cache_entries"
LIMIT = "headroom_cache_entries_limit"
EVICTIONS = "headroom_cache_evictions_total"


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


@pytest.fixture
def probe(writer: Writer) -> Iterator[LocalCachesProbe]:
    probe = LocalCachesProbe(CacheProbe(load({})))
    probe.bind(writer)
    yield probe
    probe.close()
    assert writer.value("headroom_probe_up", probe="cache") == 1.0


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """Write a module of the app's own and import it; it is forgotten in the end."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(name: str, text: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)
        return importlib.import_module(name)

    yield make
    for name in made:
        del sys.modules[name]


def counts(writer: Writer, cache: str) -> tuple[float, float]:
    """Return hits and misses of a cache."""
    hit, miss = (writer.value(REQUESTS, cache=cache, key_pattern="", result=it) for it in ("hit", "miss"))
    return hit, miss


def names(writer: Writer) -> set[str]:
    """Return the caches that have series."""
    return {dict(labels)["cache"] for sample, labels in writer.samples() if sample == ENTRIES}


def test_lru_caches_of_own_modules_are_found(
    probe: LocalCachesProbe, writer: Writer, imported: Callable[[str, str], ModuleType]
) -> None:
    """Functions, methods and what lies under other decorators are found, once, whoever imports them."""
    shop = imported(
        "shop_prices",
        """
import functools

def traced(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)
    return call

@functools.lru_cache(maxsize=2)
def price(number):
    return number

@functools.cache
def rate(number):
    return number

@traced
@functools.lru_cache
def tax(number):
    return number

class Shop:
    @staticmethod
    @functools.lru_cache
    def of(number):
        return number

double = functools.lru_cache(lambda number: 2 * number)
""",
    )
    imported("shop_views", "from shop_prices import price, rate")
    probe.sample()
    found = {name for name in names(writer) if name.startswith("shop_")}
    assert found == {
        "shop_prices.price",
        "shop_prices.rate",
        "shop_prices.tax",
        "shop_prices.Shop.of",
        "shop_prices.double",
    }
    for number in (1, 1, 2, 3, 1):
        shop.price(number)
    shop.Shop.of(1), shop.Shop.of(1), shop.tax(1), shop.tax(1)
    probe.sample()
    assert counts(writer, "shop_prices.price") == (1, 4)
    assert counts(writer, "shop_prices.Shop.of") == counts(writer, "shop_prices.tax") == (1, 1)
    assert writer.value(ENTRIES, cache="shop_prices.price") == writer.value(LIMIT, cache="shop_prices.price") == 2
    assert (LIMIT, (("cache", "shop_prices.rate"),)) not in writer.samples()


def test_what_was_counted_before_the_first_look_counts(
    probe: LocalCachesProbe, writer: Writer, imported: Callable[[str, str], ModuleType]
) -> None:
    """A module that is imported late is found, with all that its cache has answered."""
    probe.sample()
    late = imported("shop_late", "import functools\n@functools.lru_cache\ndef late(number): return number")
    late.late(1), late.late(1)
    probe.sample()
    assert counts(writer, "shop_late.late") == (1, 1)


def test_a_function_without_arguments_is_no_cache_unless_named(
    probe: LocalCachesProbe, writer: Writer, imported: Callable[[str, str], ModuleType]
) -> None:
    """What holds one object for good, such as the settings, stays off the board until the app names it."""
    shop = imported(
        "shop_settings",
        """
import functools

@functools.lru_cache
def settings():
    return object()

@functools.cache
def price(number=1):
    return number

class Shop:
    @staticmethod
    @functools.cache
    def limits():
        return object()

    @functools.cache
    def of(self):
        return self
""",
    )
    probe.sample()
    assert {name for name in names(writer) if name.startswith("shop_settings")} == {
        "shop_settings.price",
        "shop_settings.Shop.of",
    }
    assert probe.name_caches({"settings": shop.settings}) == {}
    shop.settings(), shop.settings(), shop.settings()
    probe.sample()
    assert counts(writer, "settings") == (2, 1)


def test_an_emptied_cache_goes_on_counting(probe: LocalCachesProbe, writer: Writer) -> None:
    """cache_clear() sets lru_cache's own counts to 0; ours never fall."""

    @functools.lru_cache
    def answer(number: int) -> int:
        return number

    assert probe.name_caches({"answers": answer}) == {}
    for _ in range(5):
        answer(1)
    probe.sample()
    answer.cache_clear()
    answer(1)
    answer(1)
    probe.sample()
    assert counts(writer, "answers") == (5, 2)
    assert writer.value(ENTRIES, cache="answers") == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: cachetools.Cache(8),
        lambda: cachetools.FIFOCache(8),
        lambda: cachetools.LFUCache(8),
        lambda: cachetools.LRUCache(8),
        lambda: cachetools.RRCache(8),
        lambda: cachetools.TTLCache(8, ttl=60),
        lambda: cachetools.TLRUCache(8, ttu=lambda key, value, now: now + 60),
    ],
    ids=["Cache", "FIFO", "LFU", "LRU", "RR", "TTL", "TLRU"],
)
def test_every_cachetools_cache_counts_as_its_user_does(
    probe: LocalCachesProbe, writer: Writer, make: Callable[[], Any]
) -> None:
    """Over 3,000 random calls hits, misses and evictions equal those that the caller saw; writes are no look-ups."""
    cache, plain = make(), type(make())
    probe.name_caches({"all": cache})
    probe.sample()
    assert isinstance(cache, plain) and type(cache).__name__ == plain.__name__
    dice = random.Random(7)
    hits = misses = stored = 0
    for _ in range(3_000):
        key = dice.randrange(12)
        match dice.randrange(7):
            case 0 | 1:
                try:
                    hits += cache[key] == key
                except KeyError:
                    misses += 1
                    stored += 1
                    cache[key] = key
            case 2:
                found = cache.get(key)
                hits, misses = hits + (found == key), misses + (found is None)
            case 3:
                stored += key not in cache
                assert cache.setdefault(key, key) == key
            case 4:
                stored -= key in cache
                assert cache.pop(key, None) in (key, None)
            case 5:
                assert cache.get(99, "nothing") == "nothing"
                misses += 1
            case 6:
                stored += key not in cache
                cache[key] = key
    probe.sample()
    assert counts(writer, "all") == (hits, misses)
    assert writer.value(EVICTIONS, cache="all") == stored - len(cache)
    assert (writer.value(ENTRIES, cache="all"), writer.value(LIMIT, cache="all")) == (len(cache), 8)
    probe.close()
    assert type(cache) is plain


def test_a_cache_that_loads_what_it_lacks_counts_its_loads_as_misses(probe: LocalCachesProbe, writer: Writer) -> None:
    """A subclass with __missing__ answers every look-up; those that it had to load are misses."""

    class Loading(cachetools.LRUCache):
        def __missing__(self, key: int) -> int:
            self[key] = key
            return key

    cache = Loading(4)
    probe.name_caches({"loading": cache})
    probe.sample()
    assert [cache[key] for key in (1, 1, 2, 1)] == [1, 1, 2, 1]
    probe.sample()
    assert counts(writer, "loading") == (2, 2)


def test_expired_entries_are_misses_and_reading_throws_out_nothing(probe: LocalCachesProbe, writer: Writer) -> None:
    """An entry whose time is over is a miss. Our look at sizes expires nothing: another thread may use the cache."""
    now = [0.0]
    cache = cachetools.TTLCache(8, ttl=10, timer=lambda: now[0])
    probe.name_caches({"timed": cache})
    probe.sample()
    cache[1] = 1
    cache[1]
    now[0] = 11
    assert cache.get(1) is None
    with pytest.raises(KeyError):
        cache[1]
    probe.sample()
    assert counts(writer, "timed") == (1, 2)
    assert writer.value(ENTRIES, cache="timed") == 1
    cache.expire()
    probe.sample()
    assert writer.value(ENTRIES, cache="timed") == writer.value(EVICTIONS, cache="timed") == 0


def test_decorated_functions_of_cachetools_are_found(
    probe: LocalCachesProbe, writer: Writer, imported: Callable[[str, str], ModuleType]
) -> None:
    """A decorated function has the name, with or without info and lock, and its cache is not measured twice."""
    shop = imported(
        "shop_tools",
        """
import threading
import cachetools, cachetools.func

plans_cache = cachetools.TTLCache(10, ttl=60)
loose = cachetools.LRUCache(5)

@cachetools.cached(plans_cache, lock=threading.Lock())
def plans(number):
    return number

@cachetools.cached({}, info=True)
def taxes(number):
    return number

@cachetools.cached({})
def untold(number):
    return number

@cachetools.func.ttl_cache(maxsize=3)
def rates(number):
    return number
""",
    )
    probe.sample()
    assert {name for name in names(writer) if name.startswith("shop_tools.")} == {
        "shop_tools.plans", "shop_tools.taxes", "shop_tools.rates", "shop_tools.loose",
    }  # fmt: skip
    for function in (shop.plans, shop.taxes, shop.rates):
        assert [function(number) for number in (1, 1, 2)] == [1, 1, 2]
    probe.sample()
    for name in ("plans", "taxes", "rates"):
        assert counts(writer, f"shop_tools.{name}") == (1, 2), name
    assert writer.value(LIMIT, cache="shop_tools.rates") == 3


def test_a_measured_cache_is_copied_and_pickled_as_what_it_is(probe: LocalCachesProbe) -> None:
    """Copies, shallow, deep or pickled, are of the plain class, have the entries, and are not counted."""
    cache = cachetools.LRUCache(4)
    cache["a"] = 1
    probe.name_caches({"copied": cache})
    probe.sample()
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(other) is cachetools.LRUCache and dict(other) == {"a": 1}
    assert repr(cache) == repr(copy.copy(cache))


def test_caches_that_are_gone_leave_no_entries(probe: LocalCachesProbe, writer: Writer) -> None:
    """The probe keeps no cache alive that it found; of one that is gone the counts stay and the entries are 0."""
    module = ModuleType("shop_brief")
    module.__file__ = "/srv/shop/brief.py"
    brief = cachetools.LRUCache(4)
    brief["a"] = 1
    vars(module)["brief"] = brief
    sys.modules["shop_brief"] = module
    try:
        probe.sample()
        assert brief["a"] == 1
        probe.sample()
        assert writer.value(ENTRIES, cache="shop_brief.brief") == 1
    finally:
        del sys.modules["shop_brief"]
    vars(module).clear()
    del brief
    probe.sample()
    assert writer.value(ENTRIES, cache="shop_brief.brief") == 0
    assert counts(writer, "shop_brief.brief") == (1, 0)


def test_names_are_bounded(probe: LocalCachesProbe, writer: Writer) -> None:
    """Caches beyond the limit share one name, and their counts add up there."""

    def make() -> Any:
        return functools.lru_cache(lambda number: number)

    caches = {f"cache-{number}": make() for number in range(MAX_NAMES + 3)}
    probe.name_caches(caches)
    for function in caches.values():
        function(1)
    probe.sample()
    found = names(writer)
    assert len(found) == MAX_NAMES + 1 and counts(writer, "_OTHER")[1] >= 3


def test_proxies_and_odd_modules_are_let_be(
    probe: LocalCachesProbe, imported: Callable[[str, str], ModuleType]
) -> None:
    """An object that computes its attributes is not asked for any, and what is no module is passed by."""
    shop = imported(
        "shop_odd",
        """
class Proxy:
    asked = []
    def __getattribute__(self, name):
        object.__getattribute__(self, "asked").append(name)
        raise RuntimeError("no request here")
proxy = Proxy()
""",
    )
    sys.modules["shop_strange"] = proxy = object()  # type: ignore[assignment]
    try:
        probe.sample()
    finally:
        assert sys.modules.pop("shop_strange") is proxy
    assert type(shop.proxy).asked == []


def test_libraries_caches_are_not_the_apps() -> None:
    """Nothing is found in the standard library or in installed packages, which have caches of their own."""
    own = {name.partition(".")[0] for name, _ in Finder().look()}
    assert own <= {"tests", "demo_app", "benchmarks", "conftest"}, own


def test_a_forked_child_counts_its_own(probe: LocalCachesProbe) -> None:
    """What the parent's cache had answered is not counted again by a child that is measured."""

    @functools.lru_cache
    def answer(number: int) -> int:
        return number

    probe.name_caches({"answers": answer})
    for _ in range(10):
        answer(1)
    probe.sample()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mine = Writer.in_memory()
            probe.bind(mine)
            answer(1)
            probe.sample()
            os.write(writing, repr(counts(mine, "answers")).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"(1.0, 0.0)"
    os.close(reading)


def test_threads_lose_no_count(probe: LocalCachesProbe, writer: Writer) -> None:
    """Four threads that hold the cache's lock, as cachetools demands, lose nothing."""
    cache, lock = cachetools.LRUCache(4), threading.Lock()
    cache[1] = 1
    probe.name_caches({"shared": cache})
    probe.sample()

    def read() -> None:
        for _ in range(5_000):
            with lock:
                cache[1]

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    probe.sample()
    assert counts(writer, "shared") == (20_000, 0)


def test_init_names_caches_of_every_kind(tmp_path: Path, redis_server: Redis) -> None:
    """One ``caches=`` names Redis clients, cachetools' caches and cached functions; the series appear by themselves."""
    client = redis.Redis.from_url(redis_server.url)
    plans = cachetools.LRUCache(4)
    app = FastAPI()

    @functools.lru_cache
    def tax(number: int) -> int:
        return number

    @app.get("/")
    def look() -> int:
        client.get("product:7")
        return plans.get("a", 0) + tax(1)

    handle = headroom.init(
        app,
        caches={"main": client, "plans": plans, "taxes": tax},
        directory=tmp_path,
        exporter=False,
        sample_interval=0.02,
    )
    try:
        with TestClient(app) as web:
            eventually(lambda: handle.writer is not None)
            writer = handle.writer
            assert writer is not None
            web.get("/")
            eventually(lambda: counts(writer, "plans") == (0, 1))
            eventually(lambda: counts(writer, "taxes") == (0, 1))
            assert writer.value(REQUESTS, cache="main", key_pattern="product:{}", result="miss") == 1
    finally:
        handle.shutdown()
        client.close()
    assert type(plans) is cachetools.LRUCache
