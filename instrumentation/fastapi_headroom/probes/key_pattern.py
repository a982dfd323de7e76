"""Folding cache keys to patterns: ``org:5f0c...:plan`` becomes ``org:{}:plan``.

A pattern is a label, so it must be one of few and must not carry what a key may carry: ids, uuids, hashes, e-mail
addresses, tokens, arguments. Therefore only what is plainly a word stays; everything else becomes ``{}``. A pattern
never holds a digit, nor twenty characters in a row that a separator does not divide. What looks like a word and is a
value (``user:alice``) is found by its number: see ``key_learning``.
"""

from __future__ import annotations

import re
from typing import Final

PLACE: Final = "{}"
MAX_PARTS: Final = 10
"""Parts between separators that are looked at; what follows becomes one placeholder."""
MAX_KEY: Final = 512
"""Characters that are looked at."""
_MAX_LETTERS: Final = 19
"""Letters without a separator that may be a word; a secret has more."""
_MAX_RUN: Final = 15
"""Letters of one case in a row that may be a word."""
_MAX_KNOWN: Final = 2_000

SEPARATORS: Final = re.compile(r"([:/|])")
_HASH_TAG: Final = re.compile(r"\{([\w:.\-]*)\}", re.ASCII)
"""What Redis Cluster hashes by: ``user:{123}:name``."""
_ARGUMENTS: Final = re.compile(r"[(\[{<'\"=,]")
"""Where the repr of arguments or of an object begins."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")
_WORDS: Final = re.compile(r"[A-Za-z]+(?:[_\-.][A-Za-z]+)*")
_NUMBERED: Final = re.compile(r"([A-Za-z]+(?:[_\-.][A-Za-z]+)*[_\-.])(?:\d+|\{\})")
_LETTERS_OF_HEX: Final = re.compile(r"[a-fA-F]{8,}")
_CASES: Final = re.compile(
    rf"[A-Z]{{1,{_MAX_RUN}}}|[a-z]{{1,{_MAX_RUN}}}|(?:[A-Z]{{2,4}}|[A-Z]?[a-z]+)(?:[A-Z][a-z]+)*"
)
"""How words are written: in one case, or in humps that begin with a capital."""
_HUMP: Final = re.compile(r"[A-Z]+[a-z]*|[a-z]+")

_words: set[str] = set()
"""Parts that were found to be words: a short cut that holds nothing but what patterns show."""


def fold(key: object) -> str:
    """Return the pattern of a key (str, bytes or anything redis-py takes as one).

    Examples: ``product:5`` is ``product:{}``; ``get_product:():{'product_id': 5}`` is ``get_product:{}``;
    ``session_0b7e...`` is ``session_{}``; a key of digits alone is ``{}``.
    """
    if isinstance(key, bytes):
        key = key.decode("utf-8", "replace")
    elif not isinstance(key, str):
        key = str(key)
    text = key[:MAX_KEY]
    parts = text.split(":", MAX_PARTS)
    for index, part in enumerate(parts):
        if part not in _words:
            if part.isdigit():
                parts[index] = PLACE
            else:
                return _fold_slowly(text)
    if len(parts) > MAX_PARTS:
        parts[MAX_PARTS] = PLACE
    return ":".join(parts)


def _fold_slowly(text: str) -> str:
    parts = SEPARATORS.split(_HASH_TAG.sub(lambda tag: tag[1] or PLACE, text))
    folded: list[str] = []
    for index, part in enumerate(parts):
        if index % 2:
            folded.append(part)
            continue
        if index >= 2 * MAX_PARTS:
            folded.append(PLACE)
            break
        if _ARGUMENTS.search(part.replace(PLACE, "")):
            folded.append(PLACE)
            break
        folded.append(_fold_part(part))
    return "".join(folded)


def _fold_part(part: str) -> str:
    if part in ("", PLACE) or part in _words:
        return part
    if _WORDS.fullmatch(part) and all(_is_word(word) for word in re.split(r"[_\-.]", part)):
        if len(_words) < _MAX_KNOWN:
            _words.add(part)
        return part
    numbered = _NUMBERED.fullmatch(_UUID.sub(PLACE, part))
    if numbered and all(_is_word(word) for word in re.split(r"[_\-.]", numbered[1][:-1])):
        return numbered[1] + PLACE
    return PLACE


def _is_word(letters: str) -> bool:
    """Tell a word from a token: not too long, not hexadecimal, and no case that jumps as it does in base64."""
    if len(letters) > _MAX_LETTERS or _LETTERS_OF_HEX.fullmatch(letters) or not _CASES.fullmatch(letters):
        return False
    humps = _HUMP.findall(letters)
    if max(map(len, humps)) > _MAX_RUN:
        return False
    return len(letters) < 8 or 3 * len(humps) <= len(letters)
