"""URLs that name several hosts, on any release of Python."""

from __future__ import annotations

import pytest

from fastapi_headroom.errors import SettingsError
from fastapi_headroom.exporter.cache_servers import cache_poller_for
from fastapi_headroom.probes.queue_adapters import poller_for
from fastapi_headroom.urls import scheme_of, split


@pytest.mark.parametrize(
    ("url", "netloc", "path", "query"),
    [
        ("redis://u:p@a:1/0?q=1", "u:p@a:1", "/0", "q=1"),
        ("rq+redis://u:p,w@a:1,[::1]:2,b/0?sentinel=s", "u:p,w@a:1,[::1]:2,b", "/0", "sentinel=s"),
        ("redis://[::1]:1,[::2]:2?sentinel=s", "[::1]:1,[::2]:2", "", "sentinel=s"),
        ("redis://a,[::1]", "a,[::1]", "", ""),
        ("postgresql://a:1,[::1]:2/shop#x", "a:1,[::1]:2", "/shop", ""),
    ],
)
def test_hosts_stay_together(url: str, netloc: str, path: str, query: str) -> None:
    """All hosts are in the network location, be one an IPv6 address or not."""
    parts = split(url)
    assert (parts.netloc, parts.path, parts.query) == (netloc, path, query)
    assert parts.scheme == scheme_of(url)


@pytest.mark.parametrize("url", ["redis://[::1", "redis://u:p,w@[secret]:1"])
def test_what_python_refuses_is_refused(url: str) -> None:
    """One host that is none is an error, as with Python's own function."""
    with pytest.raises(ValueError):
        split(url)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("RQ+Redis://a", "rq+redis"),
        ("u:p@host", ""),
        ("redis:/a", ""),
        ("", ""),
        ("u:p://a", ""),
        ("redis://[x]", "redis"),
    ],
)
def test_scheme(url: str, scheme: str) -> None:
    """It is what stands before ``://``, whatever comes after it: no part of a password."""
    assert scheme_of(url) == scheme


@pytest.mark.parametrize("make", [poller_for, cache_poller_for])
@pytest.mark.parametrize(
    "url", ["redis://:[secret]@a:6379/0", "list+redis://:[secret]@a:6379/0?queues=mail", "[secret]://a"]
)
def test_no_part_of_a_password_is_shown(make: object, url: str) -> None:
    """Python's own error shows what stands in brackets."""
    with pytest.raises(SettingsError) as refused:
        make(url)  # type: ignore[operator]
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None
