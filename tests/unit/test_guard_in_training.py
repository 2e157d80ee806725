"""What the guard needs of the run around it: documents of bad steps, and a checkpoint from before them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from trainer.checkpoint import layout
from trainer.checkpoint.writer import CheckpointWriter, Saved
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig
from trainer.core import phases
from trainer.core.errors import DataError, Problem
from trainer.data import best_fit
from trainer.data.ledger import Ledger
from trainer.data.loader import TrainLoader
from trainer.data.shards import ShardWriter
from trainer.engine.base import StepResult
from trainer.resilience.guard import Verdict
from trainer.telemetry.sinks.base import Fanout
from trainer.training.guard_log import GuardLog
from trainer.training.saving import Saver, newest_good_step
from trainer.training.state import TrainState

pytestmark = pytest.mark.fast
SPIKE = Verdict("loss spike", "apply")


def data(path: Path, lengths: list[int]) -> DataConfig:
    with ShardWriter(path, 1000) as writer:
        for length in lengths:
            writer.add(np.arange(length))
    train = [{"path": str(path)}]
    return DataConfig.model_validate({"train": train, "sequence_length": 16, "packing": "best_fit", "workers": 0})


def test_a_bad_step_costs_no_second_look_at_all_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data(tmp_path / "a", [3 + i % 20 for i in range(900)])
    expected = [
        {"sample": entry.sample, "source": entry.source, "shard": piece.shard, "document": piece.document}
        for entry in Ledger.open(config, 5).entries(8, 8)
        for piece in entry.pieces
    ]
    loader = TrainLoader(config, 5, 8, 8, 0, 1)
    for _ in range(2):
        loader.next_step()
    log = GuardLog(tmp_path, Ledger(loader.sources, loader.sampler, config.sequence_length))
    packed = list[tuple[int, ...]]()
    pack = best_fit.pack

    def count(lengths: Any, capacity: int) -> Any:
        packed.append(lengths.shape)
        return pack(lengths, capacity)

    monkeypatch.setattr(best_fit, "pack", count)
    board = phases.Board()
    monkeypatch.setattr(phases, "board", board)
    before = board.snapshot().changed_at
    said = log.note(2, "applied", SPIKE, cast("StepResult", SimpleNamespace(loss=9.0, grad_norm=1.0)), (8, 8), None)
    loader.close()
    assert 0 < len(packed) <= 8, "only the windows of the samples of this step"
    assert all(windows == 1 for windows, _ in packed)
    assert board.snapshot().changed_at > before
    (line,) = [json.loads(text) for text in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert line["documents"] == expected
    assert said.startswith(f"; documents {expected[0]['shard']} {expected[0]['document']}, ")


def test_documents_that_cannot_be_found_are_no_reason_to_stop(tmp_path: Path) -> None:
    def locate(number: int) -> tuple[int, int, int]:
        raise DataError(Problem("a.bin", number, "can't be read"), title="token shards")

    log = GuardLog(tmp_path, Ledger([], cast("Any", SimpleNamespace(locate=locate)), 16))
    result = cast("StepResult", SimpleNamespace(loss=float("nan"), grad_norm=1.0))
    assert log.note(3, "skipped", Verdict("not finite", "skip"), result, (16, 8), None) == ""
    (line,) = [json.loads(text) for text in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert (line["step"], line["loss"], line["documents"], line["num_samples"]) == (3, None, [], 8)


def commit(run: Path, step: int) -> None:
    directory = layout.step_directory(run, step)
    directory.mkdir(parents=True)
    layout.manifest_path(directory).write_text("{}")


class Writer:
    """Commits at once and remembers what had to stay."""

    busy = False

    def __init__(self) -> None:
        self.protected: list[set[int]] = []

    def finish(self) -> None: ...
    def finished(self) -> None: ...

    def save(self, step: int, *_: Any, protected: set[int], **__: Any) -> Saved:
        self.protected.append(protected)
        return Saved(step, Path(layout.step_name(step)), 1, 0.1, 0.1)


def test_a_start_among_bad_steps_keeps_the_checkpoint_from_before_them(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        commit(tmp_path, step)
    state, writer = TrainState(step=30), Writer()
    state.guard.bad_since = 21
    sinks = cast("Fanout", SimpleNamespace(checkpoint=lambda record: None, message=lambda text: None))
    engine, good = cast("Any", SimpleNamespace(iterate_state=list)), newest_good_step(tmp_path, 30, 21)
    settings = CheckpointConfig(keep_last=1)
    saver = Saver(cast("CheckpointWriter", writer), engine, state, dict, settings, sinks, None, 30, good)
    for step, bad_since in ((35, 21), (40, None), (45, 43)):
        state.step, state.guard.bad_since = step, bad_since
        saver.save(final=False)
    assert writer.protected == [{20}, set(), {40}]


def test_what_a_rewind_would_go_back_to(tmp_path: Path) -> None:
    assert newest_good_step(tmp_path, -1, None) == -1
    assert newest_good_step(tmp_path, 30, None) == 30
    assert newest_good_step(tmp_path, 30, 21) == -1
    commit(tmp_path, 21)
    commit(tmp_path, 20)
    assert newest_good_step(tmp_path, 30, 21) == 20
