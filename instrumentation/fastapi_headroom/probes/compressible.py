"""Which responses went out larger than they had to: text, not compressed, for a client that takes compressed ones.

Asked once per response, and only for those of more than SMALLEST bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from fastapi_headroom.probes.headers import Headers

SMALLEST: Final = 1000
"""Bytes up to which compressing is not worth its CPU time; Starlette's GZipMiddleware begins at 500."""
_TYPES: Final = frozenset(
    {
        b"application/json",
        b"application/javascript",
        b"application/x-javascript",
        b"application/xml",
        b"application/x-ndjson",
        b"application/jsonl",
        b"image/svg+xml",
    }
)
_CODINGS: Final = frozenset({b"gzip", b"x-gzip", b"br", b"zstd", b"deflate", b"*"})
_READ: Final = 512
"""Bytes of a header that are looked at: browsers send about 30 of Accept-Encoding."""
_LENGTHS: Final = frozenset({len("content-type"), len("content-range"), len("content-encoding")})


def compressible(request: Headers, response: Headers) -> bool:
    """Return whether a response with these headers could have been compressed for the client that asked.

    Not so for a part of a file (206: the client counts bytes of the plain one) and for server-sent events, where
    a compressor would hold events back.
    """
    text = False
    for name, value in response:
        if len(name) in _LENGTHS:
            name = name.lower()
            if name == b"content-type":
                text = _is_text(bytes(value[:_READ]))
            elif name == b"content-range" or (name == b"content-encoding" and value.strip().lower() != b"identity"):
                return False
    return text and accepts(request)


def accepts(request: Headers) -> bool:
    """Return whether a client takes a compressed response: one coding with a weight above 0 in any Accept-Encoding."""
    for name, value in request:
        named = name == b"accept-encoding" or (len(name) == 15 and name.lower() == b"accept-encoding")
        if named and _names_a_coding(bytes(value[:_READ])):
            return True
    return False


# Both are asked with few values in practice, again and again; hostile ones only push each other out.
@lru_cache(maxsize=64)
def _names_a_coding(value: bytes) -> bool:
    for item in value.lower().split(b","):
        coding, _, weight = item.partition(b";")
        if coding.strip() in _CODINGS and weight.replace(b" ", b"").strip(b"\t0.") != b"q=":
            return True
    return False


@lru_cache(maxsize=64)
def _is_text(content_type: bytes) -> bool:
    media = content_type.partition(b";")[0].strip().lower()
    if media.startswith(b"text/"):
        return media != b"text/event-stream"
    return media in _TYPES or media.endswith((b"+json", b"+xml"))
