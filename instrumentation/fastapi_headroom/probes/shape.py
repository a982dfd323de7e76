"""The shape of a statement: its text without values, for people to read. Pure.

Values are numbers and quoted strings that were written into the text, and lists of placeholders of any length. What
could be a value but need not be is folded too: a shape that says too little is a nuisance, a shown password is not.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

LONGEST: Final = 4_000
"""Characters of a statement that are looked at."""
SHOWN: Final = 300
"""Characters of a shape."""
_IDENTIFIERS: Final = frozenset({"postgresql", "oracle", "mssql"})
"""Database systems in which double quotes hold names; MySQL has values there, and SQLite may."""

_COMMON: Final = r"""
    --[^\n]* | /\*.*?(?:\*/|\Z)                                    # comments may hold anything
  | \$(?P<tag>[A-Za-z_]\w*|)\$.*?(?:\$(?P=tag)\$|\Z)              # PostgreSQL's $$ ... $$
  | (?:[NEXB]|U&)?'(?:[^']|'')*(?:'|\Z)
"""
_NAMES: Final = r""" | (?P<name>"(?:[^"]|"")*(?:"|\Z)) """
_DOUBLE: Final = r""" | \#[^\n]* | "(?:[^"]|"")*(?:"|\Z) | (?P<name>`[^`]*(?:`|\Z)) """
_PLACEHOLDERS: Final = r"""
  | %\(\w+\)s | %s | \$\d+ | (?<![:\w]):\w+ | \?                 # placeholders of every style
  | (?<![\w.$"`\]])(?:0x[0-9a-f]+|\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)(?!\w)
"""
_FLAGS: Final = re.VERBOSE | re.IGNORECASE | re.DOTALL
_VALUES: Final = re.compile(_COMMON + _DOUBLE + _PLACEHOLDERS, _FLAGS)
_VALUES_BUT_NAMES: Final = re.compile(_COMMON + _NAMES + _PLACEHOLDERS, _FLAGS)
_QUOTE: Final = re.compile(r"""['"]""")
_CAST: Final = re.compile(r"\?::[A-Za-z_]\w*(?:\s\w+)?(?:\[\])?(?=\s*[,)])")
_LIST: Final = re.compile(r"\?(?:\s*,\s*\?)+")
_ROWS: Final = re.compile(r"(\(\?(?:, \.\.\.)?\))(?:\s*,\s*\1)+")


def shape_of(text: str, system: str) -> str:
    """Return the statement's shape, at most SHOWN characters long. ``system`` is the dialect's name."""
    return _shape_of(text if len(text) <= LONGEST else text[:LONGEST], system)


@lru_cache(maxsize=256)
def _shape_of(text: str, system: str) -> str:
    quote = _QUOTE.search(text)
    rest = ""
    if quote is not None and "\\" in text:
        # Whether a backslash hides the next quote depends on the server's settings: nothing behind it is certain.
        text, rest = text[: quote.start()], " ?"
    values = _VALUES_BUT_NAMES if system in _IDENTIFIERS else _VALUES
    text = values.sub(_folded, text) + rest
    text = _ROWS.sub(r"\1, ...", _LIST.sub("?, ...", _CAST.sub("?", text)))
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _folded(match: re.Match[str]) -> str:
    if match["name"] is not None:
        return match[0]
    return " " if match[0].startswith(("--", "/*", "#")) else "?"
