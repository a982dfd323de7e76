"""Learning which positions of cache keys vary, though what stands there looks like words: ``user:alice``.

``fold`` takes out what is plainly no word. A name is one, and only its company tells: where a position of otherwise
equal keys takes many different words, it holds a value, and is a placeholder from then on. A tree of the positions
keeps what was seen, within bounds: words of patterns, never more of a key.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from fastapi_headroom.probes.key_pattern import PLACE, SEPARATORS

MAX_FIRST_WORDS: Final = 50
"""Words in the first position of a cache's keys: its name spaces. With one more they are values."""
MAX_WORDS: Final = 20
"""Words in any other position behind the same beginning."""
MAX_NODES: Final = 2_000
_HEAD: Final = re.compile(r"[^_\-.]+[_\-.]")
"""``user-`` of ``user-alice``."""


class FullError(Exception):
    """More positions than are remembered."""


class _Node:
    """What was seen behind one beginning."""

    __slots__ = ("children", "folded", "heads", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.children: dict[str, _Node] = {}
        self.heads: set[str] = set()
        """Beginnings of words that are followed by values."""
        self.folded = False

    def name(self, word: str) -> str:
        """Return what stands for the word in patterns."""
        if word == PLACE or word in self.children:
            return word
        if self.folded:
            return PLACE
        head = _head_of(word)
        return head + PLACE if head in self.heads else word

    def fold(self) -> None:
        """Fold what varies: the words that begin alike if they are most of them, else all."""
        heads = Counter(filter(None, map(_head_of, self.children)))
        varying = {head for head, number in heads.items() if 2 * number > self.limit}
        self.heads |= varying
        self.folded = not varying
        self._name_anew(list(self.children.items()))

    def _name_anew(self, children: list[tuple[str, _Node]]) -> None:
        self.children = {}
        for word, node in children:
            named = self.name(word)
            if named in self.children:
                self.children[named]._absorb(node)
            else:
                self.children[named] = node
        if len(self.children) > self.limit:
            self.fold()

    def _absorb(self, other: _Node) -> None:
        """Take in what was seen behind a beginning that is no longer told from this one."""
        self.heads |= other.heads
        self.folded |= other.folded
        self._name_anew([*self.children.items(), *other.children.items()])

    def size(self) -> int:
        """Return how many positions are remembered."""
        return 1 + sum(node.size() for node in self.children.values())


class Learned:
    """The positions of one cache's keys. ``folds`` counts what was learned: patterns given before may have changed."""

    __slots__ = ("_nodes", "_root", "folds")

    def __init__(self) -> None:
        self._root = _Node(MAX_FIRST_WORDS)
        self._nodes = 1
        self.folds = 0

    def __call__(self, pattern: str) -> str:
        """Return the pattern with placeholders where values were found to stand.

        Raises FullError when there are too many positions to remember.
        """
        parts = SEPARATORS.split(pattern)
        node = self._root
        for index in range(0, len(parts), 2):
            word = node.name(parts[index])
            if word not in node.children:
                if word != PLACE and len(node.children) >= node.limit:
                    node.fold()
                    self.folds += 1
                    self._nodes = self._root.size()
                    word = node.name(word)
                if word not in node.children:
                    if self._nodes >= MAX_NODES:
                        raise FullError
                    self._nodes += 1
                    node.children[word] = _Node(MAX_WORDS)
            parts[index] = word
            node = node.children[word]
        return "".join(parts)


def _head_of(word: str) -> str:
    found = _HEAD.match(word)
    return found[0] if found else ""
