"""Positions of keys that take many words are found to hold values; few words stay what they are."""

from __future__ import annotations

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_headroom.probes.cache_patterns import MAX_PATTERNS, MAX_PATTERNS_EVER, Patterns
from fastapi_headroom.probes.key_learning import MAX_FIRST_WORDS, MAX_NODES, MAX_WORDS, FullError, Learned
from fastapi_headroom.probes.key_pattern import fold
from fastapi_headroom.store.writer import Writer
from tests.support.cache_counts import results

NAMES = ["".join(letters) for letters in itertools.product("klmnop", "aeiou", "klmn", "aeiou")]
"""600 words of four letters that no rule can tell from literals."""


def patterns_of(keys: list[str]) -> list[str]:
    learned = Learned()
    return [learned(fold(key)) for key in keys]


def test_names_fold_once_there_are_many() -> None:
    """user:alice, user:bob ...: from the twenty-first on the name is a placeholder, and stays one for all."""
    learned = Learned()
    shown = [learned(f"user:{name}") for name in NAMES[:MAX_WORDS]]
    assert shown == [f"user:{name}" for name in NAMES[:MAX_WORDS]]
    for name in NAMES[MAX_WORDS:] + NAMES[:MAX_WORDS]:
        assert learned(f"user:{name}") == "user:{}"
    assert learned("plan:free") == "plan:free"
    assert learned.folds == 1


def test_what_stands_behind_a_value_is_kept() -> None:
    """The words behind a folded position stay: user:{}:cart and user:{}:profile are two patterns."""
    shown = patterns_of([f"user:{name}:{what}" for name in NAMES for what in ("cart", "profile")])
    assert set(shown[2 * MAX_WORDS + 2 :]) == {"user:{}:cart", "user:{}:profile"}


def test_words_with_a_beginning_in_common() -> None:
    """user-alice, user-bob ... fold to user-{}, and their neighbours stay."""
    shown = patterns_of(["settings", "plan-free", *(f"user-{name}" for name in NAMES), "settings", "plan-free"])
    assert shown[-2:] == ["settings", "plan-free"]
    assert set(shown[MAX_FIRST_WORDS + 2 : -2]) == {"user-{}"}


def test_names_in_the_first_position() -> None:
    """alice:cart, bob:cart ... fold too, with more words, as an app may have as many name spaces."""
    shown = patterns_of([f"{name}:cart" for name in NAMES])
    assert set(shown[MAX_FIRST_WORDS:]) == {"{}:cart"}


def test_an_ordinary_app_learns_nothing() -> None:
    """Forty name spaces with fifteen fields each keep all their words."""
    learned = Learned()
    keys = [f"{space}:{{}}:{field}" for space in NAMES[:40] for field in NAMES[100:115]]
    assert [learned(key) for key in keys] == keys
    assert learned.folds == 0


def test_memory_is_bounded() -> None:
    """Words at every position in any number are refused in the end, never remembered."""
    learned = Learned()
    with pytest.raises(FullError):
        for parts in itertools.product(NAMES[:20], repeat=4):
            learned(":".join(parts))
    assert learned._root.size() <= MAX_NODES + 1


def test_series_are_bounded_and_useful_after_learning() -> None:
    """When names had taken all the patterns, what was learned makes room: the right pattern has its series."""
    writer = Writer.in_memory()
    series = Patterns(writer, "main")
    for name in NAMES:
        for field in ("cart", "plan", "orders", "profile", "mails", "stock"):
            found = series.look_up(f"tenant:{name}:{field}")
            assert found is not None
            found.miss.inc()
    counted = results(writer)
    assert len(counted) <= MAX_PATTERNS_EVER + 1
    for field in ("cart", "plan", "orders", "profile", "mails", "stock"):
        assert counted["tenant:{}:" + field, "miss"] > 500
    assert sum(counted.values()) == 6 * len(NAMES)
    assert len(series._shown) <= MAX_PATTERNS + 1


def test_names_that_the_app_gives_are_not_learned_from() -> None:
    """A name given for what was looked up stays, however many there are, up to the bound."""
    writer = Writer.in_memory()
    series = Patterns(writer, "functions")
    for name in NAMES[:90]:
        series.given(f"get_{name}").hit.inc()
    assert results(writer, "functions") == {(f"get_{name}", "hit"): 1 for name in NAMES[:90]}
    for name in NAMES:
        series.given(f"user:{name}").hit.inc()
    assert results(writer, "functions")["user:{}", "hit"] > 500


WORD = st.text(alphabet=string.ascii_lowercase, min_size=1, max_size=6)


@given(st.lists(st.lists(WORD, min_size=1, max_size=4).map(":".join), max_size=300))
def test_learning_is_stable(keys: list[str]) -> None:
    """A pattern that was learned is its own pattern from then on, and holds as many parts as the key."""
    learned = Learned()
    for key in keys:
        pattern = learned(fold(key))
        assert learned(pattern) == pattern
        assert pattern.count(":") == key.count(":")
