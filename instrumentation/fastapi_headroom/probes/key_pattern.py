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
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{15,}={1,2}(?![\w=])")
"""Ends as only base64 does: what is before its slashes is a part of it, and no word."""
_REPEATED: Final = re.compile(r"(.)\1\1\1")
"""No word has the same letter four times in a row; the base64 of small numbers has."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")
_WORDS: Final = re.compile(r"[A-Za-z]+(?:[_\-.][A-Za-z]+)*")
_NUMBERED: Final = re.compile(r"([A-Za-z]+(?:[_\-.][A-Za-z]+)*[_\-.])(?:\d+|\{\})")
_LETTERS_OF_HEX: Final = re.compile(r"[a-fA-F]{8,}")
_CASES: Final = re.compile(
    rf"[A-Z]{{1,{_MAX_RUN}}}|[a-z]{{1,{_MAX_RUN}}}|(?:[A-Z]{{2,4}}|[A-Z]?[a-z]+)(?:[A-Z][a-z]+)*"
)
"""How words are written: in one case, or in humps that begin with a capital."""
_MIXED: Final = re.compile(r"[A-Z].*[a-z]|[a-z].*[A-Z]")
_JOINTS: Final = re.compile(r"[_\-.]")
_VOWELS: Final = re.compile(r"[aeiouy]", re.IGNORECASE)
_CONSONANTS: Final = re.compile(r"[b-df-hj-np-tv-xz]{5}", re.IGNORECASE)
_HUMP: Final = re.compile(r"[A-Z]+[a-z]*|[a-z]+")

_words: set[str] = set()
"""Parts that were found to be words: a short cut that holds nothing but what patterns show."""


def fold(key: object) -> str:
    """Return the pattern of a key (str, bytes or anything redis-py takes as one).

    Examples: ``product:5`` is ``product:{}``; ``get_product:():{'product_id': 5}`` is ``get_product:{}``;
    ``session_0b7e...`` is ``session_{}``; a key of digits alone is ``{}``.
    """
    if type(key) is str:
        text = key
    elif isinstance(key, str):
        text = key[:]  # what it holds: a subclass may say something else of itself
    elif isinstance(key, bytes | bytearray | memoryview):
        text = bytes(key).decode("utf-8", "replace")
    else:
        text = str(key)
    if len(text) > MAX_KEY:
        text = text[:MAX_KEY]
    parts, words, index = text.split(":", MAX_PARTS), _words, 0
    for part in parts:
        if part not in words:
            if not part.isdigit():
                return _fold_slowly(text)
            parts[index] = PLACE
        index += 1  # noqa: SIM113 - on the path of every new key, and cheaper than enumerate
    if len(parts) > MAX_PARTS:
        parts[MAX_PARTS] = PLACE
    return ":".join(parts)


def _fold_slowly(text: str) -> str:
    text = _BASE64.sub(PLACE, text)
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
    if _WORDS.fullmatch(part) and _are_words(part):
        if len(_words) < _MAX_KNOWN:
            _words.add(part)
        return part
    numbered = _NUMBERED.fullmatch(_UUID.sub(PLACE, part))
    if numbered and _are_words(numbered[1][:-1]):
        return numbered[1] + PLACE
    return PLACE


def _are_words(part: str) -> bool:
    """Tell words from a token: the case does not jump as it does in base64, and each word may be one."""
    humps = _HUMP.findall(part)
    letters = sum(map(len, humps))
    short = letters <= _MAX_LETTERS and 4 * len(humps) <= letters
    if letters >= 8 and _MIXED.search(part) and not (short and _can_be_spoken(part, letters)):
        return False
    return all(map(_is_word, _JOINTS.split(part)))


def _is_word(letters: str) -> bool:
    """Tell a word from a token by its length, its case and its vowels; hexadecimal is none."""
    if len(letters) > _MAX_LETTERS or _LETTERS_OF_HEX.fullmatch(letters) or not _CASES.fullmatch(letters):
        return False
    if max(map(len, _HUMP.findall(letters))) > _MAX_RUN or _REPEATED.search(letters):
        return False
    return len(letters) < 12 or _can_be_spoken(letters, len(letters))


def _can_be_spoken(text: str, letters: int) -> bool:
    return not _CONSONANTS.search(text) and 4 * len(_VOWELS.findall(text)) >= letters
