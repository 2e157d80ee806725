"""Starts at the same instant on one run directory: exactly one of 8 processes wins, with the system's locks or none.

Not among the fast tests: 80 rounds.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import random
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from lock_holder import no_flock

from trainer.core import run_lock
from trainer.core.errors import RefusedError
from trainer.core.lock_owner import Owner, Place
from trainer.core.run_lock import RunLock, lock_path

INTERVAL_SECONDS = 0.5
PROCESSES, ROUNDS = 8, 20


def compete(run: Path, flock: bool, barrier: Barrier, results: Any) -> None:
    read = run_lock._content

    def slow(path: Path) -> bytes:
        """Read as over a network: what was read may be old by the time it is here."""
        content = read(path)
        time.sleep(random.uniform(0, 0.01))
        return content

    run_lock._content = slow
    for number in range(ROUNDS):
        barrier.wait(30)
        try:
            lock = RunLock(
                run / str(number), say=lambda text: None, flock=fcntl.flock if flock else no_flock,
                interval_seconds=INTERVAL_SECONDS,
            )  # fmt: skip
        except RefusedError:
            lock = None
        barrier.wait(30)
        results.put((number, lock is not None, lock is not None and lock.still_mine()))
        barrier.wait(30)
        if lock is not None:
            lock.release()


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("flock", [True, False])
def test_of_starts_at_the_same_instant_exactly_one_wins(tmp_path: Path, flock: bool, stale: bool) -> None:
    dead = Owner(**{**vars(Owner.new(Place.here(), INTERVAL_SECONDS)), "pid_started_ticks": 1}).record()
    for number in range(ROUNDS):
        (tmp_path / str(number)).mkdir()
        if stale:
            lock_path(tmp_path / str(number)).write_bytes(dead)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=compete, args=(tmp_path, flock, barrier, results)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    won, kept = [0] * ROUNDS, [0] * ROUNDS
    for _ in range(PROCESSES * ROUNDS):
        number, taken, mine = results.get(timeout=60)
        won[number] += taken
        kept[number] += mine
    for process in processes:
        process.join(30)
    assert (won, kept) == ([1] * ROUNDS, [1] * ROUNDS)
