"""Saves, checks and waits that take long and move on: the board shows it, and what is stuck still looks stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed

from trainer.checkpoint import writer as writer_module
from trainer.checkpoint.shard_file import CHUNK_BYTES, hash_file
from trainer.checkpoint.writer import CheckpointWriter, Saved
from trainer.config.checkpoint import CheckpointConfig
from trainer.core import phases
from trainer.data.shard_set import ShardSet
from trainer.data.shards import ShardWriter
from trainer.engine.base import StateSlice
from trainer.telemetry.record import CheckpointRecord
from trainer.telemetry.sinks.base import Fanout
from trainer.training.rank import leaving_seconds, meeting_seconds
from trainer.training.saving import Saver
from trainer.training.state import TrainState

pytestmark = pytest.mark.fast
FACTS: dict[str, Any] = {"state": {}, "model": {}}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def board() -> Iterator[phases.Board]:
    before = phases.board
    yield phases.new_board(start_seconds=1000, slow_seconds=20)
    phases.board = before


def changes(board: phases.Board, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return what every sign of progress is added to."""
    seen: list[float] = []
    advance = board.advance

    def note() -> None:
        advance()
        seen.append(board.snapshot().changed_at)

    monkeypatch.setattr(board, "advance", note)
    return seen


def three_chunks() -> StateSlice:
    tensor = torch.zeros(CHUNK_BYTES * 5 // 8, dtype=torch.float32)
    return StateSlice("w", "weight", (tensor.numel(),), 0, tensor, primary=True)


def test_each_chunk_that_is_written_or_hashed_is_a_sign(
    tmp_path: Path, board: phases.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.mark("save", detail="writing the checkpoint", allowed_seconds=77)
    seen = changes(board, monkeypatch)
    saved = CheckpointWriter(tmp_path, attempt="0001", settings=CheckpointConfig()).save(
        1, [three_chunks()], FACTS, wait=True
    )
    assert saved is not None
    assert saved.error is None
    assert len(seen) == 3
    assert seen == sorted(set(seen)), "each is later than the one before"
    assert (board.snapshot().phase, board.snapshot().allowed_seconds) == ("save", 77), "it is the same phase"
    seen.clear()
    hash_file(saved.directory / "rank-00000.safetensors")
    assert len(seen) == 3


def test_who_waits_for_a_save_in_the_background_moves_as_it_does(
    tmp_path: Path, board: phases.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_LOOK_SECONDS", 0.01)
    go = threading.Semaphore(0)
    monkeypatch.setattr(
        writer_module.faults, "reach", lambda point, **_: go.acquire() if point == "checkpoint.in_shard" else None
    )
    writer = CheckpointWriter(tmp_path, attempt="0001", settings=CheckpointConfig(asynchronous=True))
    assert writer.save(1, [three_chunks()], FACTS, wait=False) is None
    deadline = time.monotonic() + 20
    while board.advances_beside < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    board.mark("save", allowed_seconds=77)
    marked = board.snapshot().changed_at
    assert writer.finish(0.1) is None
    assert board.snapshot().changed_at == marked, "a thread that is stuck is no progress"
    go.release()
    assert writer.finish(0.5) is None
    assert board.snapshot().changed_at > marked, "a chunk was written meanwhile"
    go.release(2)
    saved = writer.finish()
    assert saved is not None
    assert saved.error is None


class SlowWriter:
    """A save of 10 minutes is in flight; the next one writes in the foreground."""

    busy = True

    def __init__(self) -> None:
        self.allowed: list[float] = []

    def finish(self) -> Saved | None:
        self.allowed.append(phases.board.snapshot().allowed_seconds)
        self.busy = False
        time.sleep(0.05)
        return Saved(5, Path("step-00000005"), 1, 0.07, 600.0)

    def finished(self) -> Saved | None:
        return None

    def save(self, *_: Any, **__: Any) -> Saved:
        self.allowed.append(phases.board.snapshot().allowed_seconds)
        return Saved(6, Path("step-00000006"), 1, 3.0, 3.0)


def test_the_last_save_may_take_as_long_as_saves_do_and_counts_its_own_time_alone(board: phases.Board) -> None:
    board.mark("save")
    board.mark("data", step=1)  # training stood still for moments: a save of this phase would be given 20 s
    assert board.patience(0.0) == 1000
    slow, said = SlowWriter(), list[CheckpointRecord]()
    sinks = cast("Fanout", SimpleNamespace(checkpoint=said.append, message=lambda text: None))
    engine = cast("Any", SimpleNamespace(iterate_state=list))
    state, settings = TrainState(step=6), CheckpointConfig()
    saver = Saver(cast("CheckpointWriter", slow), engine, state, dict, settings, sinks, None, 0, good_step=0)
    saver.save(final=True)
    assert slow.allowed == [1000, 1800]
    assert [(record.step, record.blocked_seconds) for record in said] == [(5, 0.07), (6, 3.0)]


def test_parts_with_a_time_limit_of_their_own_are_given_it() -> None:
    def recipe(rendezvous: float, hook: tuple[str, ...]) -> Any:
        return SimpleNamespace(
            launch=SimpleNamespace(rendezvous_timeout_seconds=rendezvous),
            checkpoint=SimpleNamespace(hook=hook, hook_timeout_seconds=500.0),
            resilience=SimpleNamespace(watchdog=SimpleNamespace(start_seconds=1800.0, slow_seconds=300.0)),
        )

    assert meeting_seconds(recipe(600, ())) == 1800
    assert meeting_seconds(recipe(7200, ())) == 7260
    assert leaving_seconds(recipe(600, ())) == 300
    assert leaving_seconds(recipe(600, ("upload",))) == 1300, "one hook runs, and one is next"


def test_each_block_of_data_that_is_checked_is_a_sign(
    tmp_path: Path, board: phases.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path / "a", 100, block_bytes=64) as made:
        made.add(list(range(96)))
    seen = changes(board, monkeypatch)
    assert ShardSet(str(tmp_path / "a")).check_blocks(0, 1, full=True) == []
    assert len(seen) == 3
