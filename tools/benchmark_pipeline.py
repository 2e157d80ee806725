"""Measure the bubble of two pipeline stages: step time against (micro-batches + stages - 1) x the slowest stage.

usage: python tools/benchmark_pipeline.py [--repeats 5] [--csv FILE]

Two ranks, each pinned to a core of its own. First both ranks time their stage alone, at the same time: forward and
backward pass of one micro-batch without any communication; then whole optimizer steps of 2, 4, 8, 16 micro-batches.
Medians of ``--repeats`` interleaved measurements. Prints a Markdown table and writes the raw timings.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MICRO_BATCHES = (2, 4, 8, 16)
STAGES = 2
MICRO_SIZE, LENGTH = 2, 128
VOCABULARY, HIDDEN = 2048, 320
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 896,
    "num_hidden_layers": 8, "num_attention_heads": 5, "num_key_value_heads": 5,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    """Start the ranks and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        measure(options.rank, options.port, options.repeats, options.output)
        return
    from trainer.launch.ports import free_port

    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, "-W", "ignore", __file__, "--repeats", str(options.repeats), "--port", str(port)]
        ranks = [
            subprocess.Popen(
                [*own, "--rank", str(rank), "--output", folder],
                stdout=Path(folder, f"log-{rank}").open("w"), stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(STAGES)
        ]  # fmt: skip
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit("\n".join(Path(folder, f"log-{rank}").read_text()[-2000:] for rank in range(STAGES)))
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(STAGES)]
    report(results, options.csv)


def measure(rank: int, port: int, repeats: int, output: Path) -> None:
    """Take this rank's timings."""
    os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})
    import torch
    from torch import distributed

    from trainer.core import environ
    from trainer.core.environ import RankEnvironment
    from trainer.data.batches import MicroBatch
    from trainer.engine.base import Requests
    from trainer.engine.build import join_group, leave_group

    torch.set_num_threads(1)
    place = RankEnvironment(rank, STAGES, rank, STAGES, 0, "127.0.0.1", port, "environment")
    environ.export(place, os.environ)
    join_group(place)
    engines = {count: _engine(place, count) for count in MICRO_BATCHES}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (MICRO_SIZE, LENGTH + 1), generator=generator)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    timings: list[dict[str, Any]] = []
    for repeat in range(repeats + 1):
        for count, engine in engines.items():
            distributed.barrier()
            alone = _stage_alone(engine, batch)
            distributed.barrier()
            started = time.perf_counter()
            engine.train_batch([batch] * count, lambda preview: True, 1e-3, Requests())
            distributed.barrier()
            seconds = time.perf_counter() - started
            if repeat:  # the first one warms up
                timings.append({"repeat": repeat, "micro_batches": count, "stage_seconds": alone, "step": seconds})
    (output / f"{rank}.json").write_text(json.dumps(timings))
    leave_group()
    os._exit(0)


def _engine(place: Any, count: int) -> Any:
    from trainer.config.deepspeed_json import resolve_deepspeed
    from trainer.config.derive import derive
    from trainer.config.run import Recipe
    from trainer.engine.build import build_engine
    from trainer.models.config import hugging_face_config
    from trainer.tasks.pretrain import loss_spec

    recipe = Recipe.model_validate(
        {
            "run": {"directory": "unused", "steps": 100},
            "model": {"config": CONFIG, "dtype": "float32"},
            "data": {"train": [{"path": "unused"}], "sequence_length": LENGTH},
            "batch": {"global_size": MICRO_SIZE * count, "micro_size": MICRO_SIZE},
            "parallel": {"pipeline": STAGES},
            "launch": {"processes": STAGES},
        }
    )
    resolved = resolve_deepspeed(recipe, derive(recipe, STAGES))
    return build_engine(recipe, hugging_face_config(recipe.model), resolved, loss_spec(), place)


def _stage_alone(engine: Any, batch: Any) -> float:
    """Return the seconds of one forward and backward pass of this rank's stage, nothing sent or received."""
    import torch

    from trainer.models.loss import cross_entropy_by_row

    stage = next(module for module in engine._engine.module.modules() if type(module).__name__ == "Stage")
    hidden = torch.randn(MICRO_SIZE, LENGTH, HIDDEN, requires_grad=True)
    received = hidden if engine._place.stage else None
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        output = stage({"input_ids": batch.input_ids}, received)
        if engine._place.stage == STAGES - 1:
            cross_entropy_by_row(output, batch.targets).sum().backward()
        else:
            output.backward(output.detach())
        seconds.append(time.perf_counter() - started)
    for parameter in stage.parameters():
        parameter.grad = None
    return statistics.median(seconds)


def report(results: list[list[dict[str, Any]]], path: Path | None) -> None:
    """Print the table; the slower rank's time counts."""
    head = ["repeat", "micro_batches", "stage_0_seconds", "stage_1_seconds", "step_seconds"]
    rows: list[list[float]] = []
    for first, second in zip(*results, strict=True):
        step = max(first["step"], second["step"])
        rows.append([first["repeat"], first["micro_batches"], first["stage_seconds"], second["stage_seconds"], step])
    if path is not None:
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
    print("| micro-batches | slowest stage, ms | ideal, ms | step, ms | step / ideal | bubble |")
    print("|---|---|---|---|---|---|")
    for count in MICRO_BATCHES:
        mine = [row for row in rows if row[1] == count]
        slowest = max(statistics.median(row[2] for row in mine), statistics.median(row[3] for row in mine))
        step = statistics.median(row[4] for row in mine)
        ideal = (count + STAGES - 1) * slowest
        bubble = (STAGES - 1) / (count + STAGES - 1)
        numbers = f"{slowest * 1e3:.0f} | {ideal * 1e3:.0f} | {step * 1e3:.0f} | {step / ideal:.3f} | {bubble:.0%}"
        print(f"| {count} | {numbers} |")


if __name__ == "__main__":
    main()
