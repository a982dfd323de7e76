"""Workers share a budget by a file: the sum of what they may open never exceeds it, however they end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastapi_headroom.store import claims as claims_module
from fastapi_headroom.store.claims import BusyError, Claims
from fastapi_headroom.store.slot import byte_is_held, give_byte, take_byte

BUDGET = 16


def opened(path: Path) -> Claims:
    claims = Claims(path)
    claims.open()
    return claims


def claim(claims: Claims, number: int, floor: int = 1) -> int:
    with claims.change() as change:
        return change.write(number, number, floor, BUDGET).claimed


def test_nobody_gets_more_than_the_others_leave(tmp_path: Path) -> None:
    """Of a budget of 16 the second worker gets what the first one left, and more as soon as that gives some back."""
    first, second = opened(tmp_path / "claims"), opened(tmp_path / "claims")
    assert claim(first, 12) == 12
    assert claim(second, 9) == 4
    assert claim(first, 14) == 12
    assert claim(first, 5) == 5
    assert claim(second, 20) == 11
    second.close()
    assert claim(first, 20) == 16
    first.close()


def test_what_a_dead_worker_claimed_lingers_and_its_successor_starts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead worker's 12 are not free for others for a moment; whoever takes its place gets its floor of 2 at once."""
    monkeypatch.setattr(claims_module, "LINGER", 0.2)
    survivor, dead = opened(tmp_path / "claims"), opened(tmp_path / "claims")
    assert claim(survivor, 4) == 4
    assert claim(dead, 12) == 12
    dead.abandon()  # as the operating system does: the lock is gone and the claim still written
    assert claim(survivor, 16) == 4
    successor = opened(tmp_path / "claims")
    assert claim(successor, 10, floor=2) == 2
    assert claim(survivor, 16) == 4
    time.sleep(0.25)
    assert claim(survivor, 16) == 14
    survivor.close(), successor.close()


def test_a_file_that_was_deleted_is_made_anew_and_claimed_again(tmp_path: Path) -> None:
    """After the directory was emptied each writes its claim to the new file; when that was, they can tell."""
    first, second = opened(tmp_path / "claims"), opened(tmp_path / "claims")
    assert (claim(first, 10), claim(second, 6)) == (10, 6)
    (tmp_path / "claims").unlink()
    assert (claim(first, 10), claim(second, 6)) == (10, 6)
    assert claim(first, 16) == 10
    assert time.monotonic() - first.lost_at < 5
    first.close(), second.close()


def test_a_worker_that_hangs_with_the_file_holds_nobody_up_for_long(tmp_path: Path) -> None:
    """A lock that is not let go of ends in a clear error within a moment, and the next change works again."""
    claims = opened(tmp_path / "claims")
    fd = os.open(tmp_path / "claims", os.O_RDWR)
    take_byte(fd, claims_module._MUTEX)
    assert byte_is_held(claims._fd, claims_module._MUTEX)
    began = time.monotonic()
    with pytest.raises(BusyError, match="locked by another worker"), claims.change():
        pass
    assert time.monotonic() - began < 2
    give_byte(fd, claims_module._MUTEX)
    assert claim(claims, 3) == 3
    os.close(fd)
    claims.close()


def test_a_forked_child_does_not_keep_its_parents_place(tmp_path: Path) -> None:
    """A child that abandons what it inherited leaves the place locked by the parent, and free when that is gone."""
    claims = opened(tmp_path / "claims")
    assert claim(claims, 9) == 9
    other = opened(tmp_path / "claims")
    pid = os.fork()
    if pid == 0:
        claims.abandon()
        os._exit(0)
    os.waitpid(pid, 0)
    assert claim(other, 16) == 7
    claims.close()
    assert claim(other, 16) == 16
    other.close()


def test_the_sum_stays_within_the_budget_while_workers_are_killed_at_random(tmp_path: Path) -> None:
    """Five processes claim and give back as fast as they can and are killed in between: no look ever finds over 16."""
    script = (
        "import random, sys, time; from pathlib import Path; from fastapi_headroom.store.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); claims.open(); rng = random.Random()\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    with claims.change() as change:\n"
        f"        wanted = rng.randint(1, 16); change.write(wanted, wanted, 1, {BUDGET})\n"
        f"        total = change.taken + change.mine.claimed + change.mine.lingering\n"
        f"        assert total <= {BUDGET}, total\n"
        "    time.sleep(0.002)  # as they poll for the lock, one that never rests would starve the others\n"
    )
    path, rng = tmp_path / "claims", random.Random(5)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    workers = [start() for _ in range(5)]
    watcher = opened(path)
    looks, most = 0, 0
    try:
        for _ in range(12):
            victim = rng.randrange(5)
            assert workers[victim].stdout.readline() == "ready\n"  # type: ignore[union-attr]
            until = time.monotonic() + rng.random() * 0.2
            while time.monotonic() < until:
                with watcher.change() as change:
                    assert change.taken <= BUDGET
                    looks, most = looks + 1, max(most, change.taken)
                time.sleep(0.001)
            workers[victim].kill()
            _, errors = workers[victim].communicate()
            assert "Traceback" not in errors, errors
            workers[victim] = start()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert looks > 20
    assert most == BUDGET
    watcher.close()
