"""URLs of servers taken apart: those of libraries that let one URL name several hosts, too."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(url: str) -> str:
    """Return the scheme in lower case; nothing when there is none, or no ``://`` after it. Never raises."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def split(url: str) -> SplitResult:
    """Return the parts of a URL that may name several hosts, with commas between them, in its ``netloc``.

    Newer releases of Python refuse those where one of them is an IPv6 address in brackets. Raises ValueError as
    ``urlsplit`` does for any other URL; its text may show a part of the password.
    """
    try:
        return urlsplit(url)
    except ValueError:
        found = _SCHEME.match(url)
        place = re.split("[/?#]", url[found.end() :], maxsplit=1)[0] if found else ""
        if found is None or "," not in place.rpartition("@")[2]:
            raise
        return urlsplit(f"{found[0]}localhost{url[found.end() + len(place) :]}")._replace(netloc=place)
