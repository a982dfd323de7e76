"""Which responses went out larger than they had to: text, not compressed, for a client that takes compressed ones.

Asked once per response, and only for those of more than SMALLEST bytes.
"""

from __future__ import annotations

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
"""Bytes of an Accept-Encoding header that are looked at: browsers send about 30."""


def compressible(request: Headers, response: Headers) -> bool:
    """Return whether a response with these headers could have been compressed for the client that asked.

    Not so for a part of a file (206: the client counts bytes of the plain one) and for server-sent events, where
    a compressor would hold events back.
    """
    media = b""
    for name, value in response:
        name = name.lower()
        if name == b"content-type":
            media = value.partition(b";")[0].strip().lower()
        elif name == b"content-range" or (name == b"content-encoding" and value.strip().lower() != b"identity"):
            return False
    return _is_text(media) and accepts(request)


def accepts(request: Headers) -> bool:
    """Return whether a client takes a compressed response: one coding with a weight above 0 in any Accept-Encoding."""
    for name, value in request:
        if name == b"accept-encoding" or (len(name) == 15 and name.lower() == b"accept-encoding"):
            for item in value[:_READ].lower().split(b","):
                coding, _, weight = item.partition(b";")
                if coding.strip() in _CODINGS and weight.replace(b" ", b"").strip(b"\t0.") != b"q=":
                    return True
    return False


def _is_text(media: bytes) -> bool:
    if media.startswith(b"text/"):
        return media != b"text/event-stream"
    return media in _TYPES or media.endswith((b"+json", b"+xml"))
