"""Headers as ASGI hands them over: pairs of bytes, in order, names repeated at will."""

from __future__ import annotations

from collections.abc import Iterable

Headers = Iterable[tuple[bytes, bytes]]


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first value of a header; names in ASGI are lower case, but apps may send others."""
    for key, value in headers:
        if key == name or (len(key) == len(name) and key.lower() == name):
            return value
    return None


def length(headers: Headers, digits: int) -> int:
    """Return what a Content-Length says, 0 where there is none or one of more digits than are believed."""
    value = header(headers, b"content-length")
    return int(value) if value and value.isdigit() and len(value) <= digits else 0
