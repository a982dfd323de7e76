"""Keys fold to patterns that name what was looked up and carry nothing of it."""

from __future__ import annotations

import hashlib
import re
import string
import uuid

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastapi_headroom.probes.key_pattern import fold


class Session:
    """An object whose default repr carries its address."""


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("product:5", "product:{}"),
        (b"product:5", "product:{}"),
        ("org:5f0c2a9e:plan", "org:{}:plan"),
        ("org:{}:plan", "org:{}:plan"),
        ("user-{}", "user-{}"),
        ("feature_flags", "feature_flags"),
        ("user-123", "user-{}"),
        (f"session_{uuid.UUID(int=7)}", "session_{}"),
        (f"session:{uuid.UUID(int=2**127).hex}:cart", "session:{}:cart"),
        ("deadbeef-cafe-babe-face-abcdefabcdef", "{}"),
        ("mail:jane.doe@example.com", "mail:{}"),
        ("get_product:():{'product_id': 5}", "get_product:{}"),
        pytest.param(f"plan:({Session()!r},):{{}}", "plan:{}", id="object-among-arguments"),
        pytest.param(f"cache:{Session()!r}", "cache:{}", id="object"),
        ("user:{123}:name", "user:{}:name"),
        ("{user:123}:name", "user:{}:name"),
        ("products/5/reviews", "products/{}/reviews"),
        (":1:views.page", ":{}:views.page"),
        ("fastapi-cache:" + hashlib.md5(b"x").hexdigest(), "fastapi-cache:{}"),
        ("token:dGhpc0lzQVRva2VuWWVz", "token:{}"),
        ("getProductDetails:7", "getProductDetails:{}"),
        ("имя:5", "{}:{}"),
        ("42", "{}"),
        (42, "{}"),
        ("", ""),
        ("a:b:c:d:e:f:g:h:i:j:k:l", "a:b:c:d:e:f:g:h:i:j:{}"),
    ],
)
def test_known_shapes(key: object, pattern: str) -> None:
    """Each shape of key that caches use folds to what a person would write."""
    assert fold(key) == pattern
    assert fold(key) == pattern  # the second time takes the short cut


@given(st.text())
@example("١٢٣")
@example("a:²:b")
def test_no_digit_ever_leaks(key: str) -> None:
    """A pattern holds no digit of any script, whatever the key."""
    assert not any(character.isdigit() for character in fold(key))


@given(st.lists(st.sampled_from(["product", "user", "org", "plan"]), min_size=1), st.uuids(), st.sampled_from(":/_-.|"))
def test_no_uuid_ever_leaks(words: list[str], secret: uuid.UUID, separator: str) -> None:
    """No part of a uuid is in the pattern, in whatever place and form it stands."""
    for form in (str(secret), secret.hex, str(secret).upper()):
        for key in (separator.join([*words, form]), separator.join([form, *words])):
            leaked = set(re.split(r"[^A-Za-z0-9]+", fold(key).lower())) - {*words, ""}
            assert leaked == set()


@given(st.text(alphabet=string.ascii_letters + string.digits + "-_", min_size=24, max_size=64))
def test_tokens_fold(token: str) -> None:
    """Random URL-safe tokens with a digit, of the length that secrets have, leave nothing but a placeholder."""
    if any(character.isdigit() for character in token) and not re.fullmatch(r"[A-Za-z_-]+[_-]\d+", token):
        assert fold(f"session:{token}") == "session:{}"


@given(st.text(max_size=2000))
def test_folding_is_stable_and_short(key: str) -> None:
    """Folding a pattern gives the pattern again, and none is longer than what is looked at."""
    pattern = fold(key)
    assert fold(pattern) == pattern
    assert len(pattern) <= 520
