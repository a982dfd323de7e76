"""Raw keys never leave the process: whatever shape a key has, no label, log line or error text of ours holds it."""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import secrets
import string
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

import fastapi_headroom as headroom
from fastapi_headroom.probes.cache import CacheProbe
from fastapi_headroom.settings import load
from fastapi_headroom.store.writer import Writer

LEAST = 16
"""Characters of a secret from which on nothing of it may be seen."""


class Session:
    """An object that is part of a key by its repr, which holds its address."""


def _from_bytes(data: bytes) -> dict[str, str]:
    number = int.from_bytes(data, "big")
    return {
        "hexadecimal": data.hex(),
        "upper hexadecimal": data.hex().upper(),
        "base64": base64.b64encode(data).decode(),
        "url-safe base64": base64.urlsafe_b64encode(data).decode().rstrip("="),
        "base32": base64.b32encode(data).decode(),
        "base85": base64.b85encode(data).decode(),
        "uuid": str(uuid.UUID(bytes=data[:16])),
        "bare uuid": uuid.UUID(bytes=data[:16]).hex,
        "md5": hashlib.md5(data).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "number": str(number + 10**LEAST),
        "token": f"eyJhbGciOiJIUzI1NiJ9.{base64.urlsafe_b64encode(data).decode()}.x-y",
    }


LETTERS = st.text(alphabet=string.ascii_letters, min_size=20, max_size=64)
LOWER = st.text(alphabet=string.ascii_lowercase, min_size=LEAST, max_size=64)
ENCODED = st.tuples(st.binary(min_size=16, max_size=32), st.integers(0, 11)).map(
    lambda drawn: list(_from_bytes(drawn[0]).values())[drawn[1]]
)
NAMES = st.text(alphabet=string.ascii_lowercase, min_size=8, max_size=14)
EMAILS = st.builds("{}.{}@{}.example".format, NAMES, NAMES, NAMES)
SECRETS = st.one_of(LETTERS, LOWER, ENCODED, EMAILS)
SHAPES = st.sampled_from([
    "{}", "session:{}", "{}:cart", "org:{}:plan", "user/{}/reviews", "token|{}", "get_user:({!r},):{{}}",
    "get_user:():{{'token': {!r}}}", "app.services:get_user:(<Session object at {}>,)", "user-{}", "user:{{{}}}:name",
    ":1:views:{}", "mail {}", "{}={}".format("token", "{}"), "a:b:c:d:e:f:g:h:i:j:k:{}",
])  # fmt: skip


class Reader(redis.Redis):
    """A client whose replies come from a function, so that a property can be tried on thousands of keys."""

    reply: Any = None

    def _execute_command(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


@contextmanager
def everything_we_say(caplog: pytest.LogCaptureFixture) -> Iterator[tuple[Any, Any]]:
    """Give a client, and a function that returns all the labels and log lines that its commands have led to."""
    writer, client = Writer.in_memory(), Reader()
    probe = CacheProbe(load({}), names={"main": client})
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        probe.bind(writer)

        def said() -> str:
            labels = [value for _, pairs in writer.samples() for name, value in pairs if name == "key_pattern"]
            return "\n".join([*labels, caplog.text])

        yield client, said
        probe.close()


def seen(secret: str, text: str) -> str:
    """Return what of a secret can be seen: eight characters of it in a row, if any."""
    lower = text.lower()
    for start in range(len(secret) - 7):
        piece = secret[start : start + 8].lower()
        if piece in lower:
            return piece
    return ""


@pytest.mark.parametrize("as_bytes", [False, True], ids=["text", "bytes"])
def test_no_secret_is_seen(caplog: pytest.LogCaptureFixture, as_bytes: bool) -> None:
    """Ids, hashes, tokens and e-mail addresses, in every shape of key, by every way into the probe."""

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(SHAPES, SECRETS), min_size=1, max_size=5))
    def prove(drawn: list[tuple[str, str]]) -> None:
        with everything_we_say(caplog) as (client, said):
            for shape, secret in drawn:
                text = shape.format(secret)
                key: Any = text.encode() if as_bytes else text
                client.reply = None
                client.get(key), client.hget(key, secret)
                client.reply = b"x"
                client.get(key), client.set(key, secret, ex=5), client.hgetall(key)
                client.reply = [b"x", None]
                client.mget(key, secret)
                client.reply = redis.ResponseError(f"wrong: {text}")
                with pytest.raises(redis.ResponseError):
                    client.get(key)
                headroom.cache_result("plans", hit=True, key_pattern=text)
                headroom.cache_invalidated("plans", key_pattern=text)
            found = said()
            for shape, secret in drawn:
                assert seen(secret, found) == "", (shape, secret)

    prove()


def test_no_secret_is_seen_when_the_probe_fails(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error within the probe whose text holds a key is logged without that text, and with the place."""
    secret = secrets.token_hex(16)

    def broken(key: Any) -> str:
        raise KeyError(key)

    monkeypatch.setattr("fastapi_headroom.probes.cache_patterns.fold", broken)
    with everything_we_say(caplog) as (client, said):
        client.get(f"session:{secret}")
        headroom.cache_result("plans", hit=True, key_pattern=secret)
        found = said()
    assert "KeyError" in found
    assert "cache_patterns.py" in found
    assert seen(secret, found) == ""


def test_tokens_by_the_thousand(caplog: pytest.LogCaptureFixture) -> None:
    """Of 15,000 tokens such as apps make, by random bytes that are the same in each run, none is seen."""
    chance = random.Random(7)
    with everything_we_say(caplog) as (client, said):
        made = []
        for _ in range(3000):
            made += [
                base64.urlsafe_b64encode(chance.randbytes(24)).decode(), chance.randbytes(8).hex(),
                str(uuid.UUID(bytes=chance.randbytes(16))), base64.urlsafe_b64encode(chance.randbytes(16)).decode(),
                "".join(chance.choices(string.ascii_letters, k=20)),
            ]  # fmt: skip
        client.reply = b"x"
        for token in made:
            client.get(f"session:{token}")
        found = said()
    assert [piece for token in made if (piece := seen(token, found))] == []
