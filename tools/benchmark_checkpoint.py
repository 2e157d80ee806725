"""Measure what a save costs training, against DeepSpeed's synchronous save of the same state in the same run.

usage: python tools/benchmark_checkpoint.py [--directory DIR] [--repeats 7] [--stage 1] [--csv FILE]

Two ranks, each pinned to a core of its own, train a model of 135M parameters (SmolLM2's shape, bfloat16). In turn,
``--repeats`` times: plain steps; DeepSpeed's ``save_checkpoint``; our save in the background and the steps beside it;
our save while training waits. Blocked is what the loop stands still for; lost is that and what the steps beside the
save take longer than the plain ones around them. DeepSpeed's files are not synced to disk, ours are. Files of the turn
before are deleted before a turn, and all is synced before each measurement. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 2
LENGTH = 128
PLAIN_STEPS = 3
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Start the ranks and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("."), help="where checkpoints are written")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        Ranks(options).measure()
        return
    from trainer.launch.ports import free_port

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        own = [sys.executable, "-W", "ignore", __file__, "--port", str(free_port("127.0.0.1")), "--directory", folder]
        own += ["--repeats", str(options.repeats), "--stage", str(options.stage)]
        processes = [
            subprocess.Popen(
                [*own, "--rank", str(rank)],
                stdout=os.open(Path(folder, f"log-{rank}"), os.O_CREAT | os.O_WRONLY), stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("\n".join(Path(folder, f"log-{rank}").read_text()[-2000:] for rank in range(RANKS)))
        rows = json.loads(Path(folder, "result.json").read_text())
    report(rows, options.csv)


class Ranks:
    """One rank's part; all time the slowest rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.sched_setaffinity(0, {options.rank % (os.cpu_count() or 1)})
        import torch

        from trainer.checkpoint.writer import CheckpointWriter
        from trainer.config.checkpoint import CheckpointConfig
        from trainer.core import environ
        from trainer.core.environ import RankEnvironment
        from trainer.data.batches import MicroBatch
        from trainer.engine.build import join_group

        torch.set_num_threads(1)
        self.options, self.directory, self.rank = options, options.directory, options.rank
        place = RankEnvironment(self.rank, RANKS, self.rank, RANKS, 0, "127.0.0.1", options.port, "environment")
        environ.export(place, os.environ)
        join_group(place)
        self.engine = _engine(place, options.stage)
        tokens = torch.randint(
            CONFIG["vocab_size"], (1, LENGTH + 1), generator=torch.Generator().manual_seed(self.rank)
        )
        self.batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self.writer = CheckpointWriter(
            self.directory / "run", attempt="0001", settings=CheckpointConfig(keep_last=1, asynchronous=True)
        )
        self.seconds = _Seconds()
        self.writer.prepare(self.engine.iterate_state())
        self.step_number = 0

    def measure(self) -> None:
        """Take turns; rank 0 writes the rows."""
        rows: list[dict[str, Any]] = []
        for _ in range(2):
            self.step()
        for repeat in range(self.options.repeats + 1):
            row = {"repeat": repeat, **self.turn()}
            if repeat:  # the first one warms up
                rows.append(row)
        if self.rank == 0:
            (self.directory / "result.json").write_text(json.dumps(rows))
        from trainer.engine.build import leave_group

        leave_group()
        os._exit(0)

    def turn(self) -> dict[str, Any]:
        """Measure each way to save once."""
        before = [self.step() for _ in range(PLAIN_STEPS)]
        self.quiet()
        theirs = self.slowest(self.deepspeed)
        their_bytes = sum(path.stat().st_size for path in (self.directory / "deepspeed").rglob("*") if path.is_file())
        self.quiet()
        blocked = self.slowest(lambda: self.save(wait=False))
        beside: list[float] = []
        while self.any_rank(self.writer.finished() is None):
            beside.append(self.step())
        done = self.writer.finish()
        assert done is not None
        assert done.error is None, done.error
        after = [self.step() for _ in range(PLAIN_STEPS)]
        plain = statistics.median(before + after)
        self.quiet()
        self.seconds.reset()
        waited = self.slowest(lambda: self.save(wait=True))
        return {
            "plain_step": plain, "deepspeed_sync": theirs, "deepspeed_bytes": their_bytes, "blocked": blocked,
            "durable": done.seconds, "steps_beside": len(beside), "lost": blocked + sum(beside) - plain * len(beside),
            "waited": waited, "bytes": done.num_bytes, **self.seconds.of,
        }  # fmt: skip

    def step(self) -> float:
        """Return the seconds of one optimizer step."""
        from trainer.engine.base import Requests

        self.step_number += 1
        return self.slowest(lambda: self.engine.train_batch([self.batch], lambda preview: True, 1e-4, Requests()))

    def deepspeed(self) -> None:
        """Save with DeepSpeed's own engine."""
        self.engine._engine.save_checkpoint(str(self.directory / "deepspeed"), tag=f"step{self.step_number}")

    def save(self, *, wait: bool) -> None:
        """Save with ours."""
        facts: dict[str, Any] = {"state": {}, "model": {}}
        done = self.writer.save(self.step_number, self.engine.iterate_state(), facts, wait=wait)
        assert done is None or done.error is None, done.error

    def quiet(self) -> None:
        """Have nothing left to be written, neither here nor in the kernel."""
        if self.rank == 0:
            shutil.rmtree(self.directory / "deepspeed", ignore_errors=True)
            os.sync()
        self.step()

    def slowest(self, action: Any) -> float:
        """Return how long ``action`` takes until the last rank is through."""
        from torch import distributed

        distributed.barrier()
        started = time.perf_counter()
        action()
        mine = time.perf_counter() - started
        found: list[Any] = [None] * RANKS
        distributed.all_gather_object(found, mine)
        return max(found)

    def any_rank(self, value: bool) -> bool:
        """Return whether it is true of any rank."""
        from torch import distributed

        found: list[Any] = [None] * RANKS
        distributed.all_gather_object(found, value)
        return any(found)


class _Seconds:
    """What hashing, fsync and commit take in a save, on this rank."""

    def __init__(self) -> None:
        import xxhash

        from trainer.checkpoint import commit, shard_file

        self.of: dict[str, float] = {}
        self.reset()
        fsync, update, commits = os.fsync, xxhash.xxh3_64, commit.Commit.commit
        seconds = self

        class Timed:
            """A digest that times itself."""

            def __init__(self) -> None:
                self._digest = update()

            def update(self, data: Any) -> None:
                """Hash."""
                seconds.timed("hash", lambda: self._digest.update(data))

            def hexdigest(self) -> str:
                """Return the digest."""
                return self._digest.hexdigest()

        shard_file.xxhash = type("xxhash", (), {"xxh3_64": Timed})
        setattr(os, "fsync", lambda descriptor: self.timed("fsync", lambda: fsync(descriptor)))  # noqa: B010 - as above
        setattr(commit.Commit, "commit", lambda *given: self.timed("commit", lambda: commits(*given)))  # noqa: B010 - a method of another signature

    def reset(self) -> None:
        """Begin anew."""
        self.of = {"hash": 0.0, "fsync": 0.0, "commit": 0.0}

    def timed(self, name: str, action: Any) -> Any:
        """Do it and add its time."""
        started = time.perf_counter()
        try:
            return action()
        finally:
            self.of[name] += time.perf_counter() - started


def _engine(place: Any, stage: int) -> Any:
    from trainer.config.deepspeed_json import resolve_deepspeed
    from trainer.config.derive import derive
    from trainer.config.run import Recipe
    from trainer.engine.build import build_engine
    from trainer.models.config import hugging_face_config
    from trainer.tasks.pretrain import loss_spec

    recipe = Recipe.model_validate(
        {
            "run": {"directory": "unused", "steps": 100},
            "model": {"config": CONFIG, "dtype": "bfloat16"},
            "data": {"train": [{"path": "unused"}], "sequence_length": LENGTH},
            "batch": {"global_size": RANKS, "micro_size": 1},
            "deepspeed": {"base": f"zero{stage}"},
            "launch": {"processes": RANKS},
        }
    )
    resolved = resolve_deepspeed(recipe, derive(recipe, RANKS))
    return build_engine(recipe, hugging_face_config(recipe.model), resolved, loss_spec(), place)


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print the table of medians."""
    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    def ratio(key: str) -> float:
        return statistics.median(row[key] / row["deepspeed_sync"] for row in rows)

    print(f"plain step {median('plain_step'):.2f} s, {len(rows)} turns")
    print("| save | GB | training stood, s | / DeepSpeed | lost in all, s | / DeepSpeed | durable after, s |")
    print("|---|---|---|---|---|---|---|")
    theirs = median("deepspeed_sync")
    print(f"| DeepSpeed, synchronous | {median('deepspeed_bytes') / 1e9:.2f} | {theirs:.2f} | 1 | {theirs:.2f} | 1 | |")
    print(
        f"| in the background | {median('bytes') / 1e9:.2f} | {median('blocked'):.3f} | {ratio('blocked'):.3f} "
        f"| {median('lost'):.2f} | {ratio('lost'):.2f} | {median('durable'):.2f} |"
    )
    print(
        f"| training waits | {median('bytes') / 1e9:.2f} | {median('waited'):.2f} | {ratio('waited'):.3f} "
        f"| {median('waited'):.2f} | {ratio('waited'):.2f} | {median('waited'):.2f} |"
    )
    parts = ", ".join(f"{name} {median(name):.3f} s" for name in ("hash", "fsync", "commit"))
    print(f"of a save that waits, on rank 0: {parts} (commit: manifest, renames and their fsyncs)")


if __name__ == "__main__":
    main()
