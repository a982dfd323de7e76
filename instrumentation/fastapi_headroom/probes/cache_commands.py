"""The commands that are known: the name under which each is timed, how it is judged, and what it does to entries."""

from __future__ import annotations

from typing import Any, Final

from fastapi_headroom.probes.cache_effects import EFFECTS, Effect
from fastapi_headroom.probes.cache_rules import LOOKUPS, ONE, SKIPPED, SKIPPED_FAMILIES, TIMED, Rule

TELLS_LEFT: Final = ("ttl", "pttl")


class Command:
    """One command of Redis that is looked at."""

    __slots__ = ("effect", "name", "plain", "rule")

    def __init__(self, name: str, rule: Rule | None = None, effect: Effect | None = None) -> None:
        self.name = name
        """The operation under which it is timed."""
        self.rule = rule
        """None for what is no look-up."""
        self.effect = effect
        self.plain = rule is ONE and effect is None
        """A look-up of one key and nothing else: GET."""


PIPELINE: Final = Command("pipeline")
"""A pipeline or transaction as a whole."""
_OTHER: Final = Command("other")


def _all() -> dict[Any, Command | None]:
    commands: dict[Any, Command | None] = {}
    for word in (*LOOKUPS, *TIMED, *SKIPPED):
        skipped = word in SKIPPED
        command = None if skipped else Command(word.lower(), LOOKUPS.get(word), EFFECTS.get(word))
        for form in (word, word.lower()):
            commands[form] = commands[form.encode()] = command
    return commands


COMMANDS: Final = _all()
"""By the first argument, as redis-py and people write it. None for what is left alone."""


def command_of(word: Any) -> Command | None:
    """Return the command that a first argument names, however it is written; None for one that is left alone."""
    text = (word.decode("ascii", "replace") if isinstance(word, bytes) else str(word)).upper()
    family = text.partition(" ")[0]
    if family in SKIPPED_FAMILIES:
        return None
    return COMMANDS.get(text, COMMANDS.get(family, _OTHER))
