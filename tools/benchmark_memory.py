"""Measure how much memory a step on long sequences takes, with and without loss and MLPs in tiles.

usage: python tools/benchmark_memory.py [--length 8192] [--tile 512] [--repeats 3] [--csv FILE]

Two sequence ranks of a Llama with a vocabulary of 32,000, ZeRO-3, on the CPU. Each measurement is a run of its own: two
steps, of which the second is measured: how far the resident memory of a rank rises above what it holds between steps,
and how long the step takes. Prints a Markdown table of medians and writes every row.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS = 2
VOCABULARY = 32000
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 1 << 20, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    """Run every subject in turn and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        measure(**json.loads(options.job))
        return
    subjects: dict[str, dict[str, Any]] = {
        "whole": {},
        "loss in tiles": {"tiled_loss": options.tile},
        "MLP in tiles": {"tiled_mlp": options.tile},
        "loss and MLP in tiles": {"tiled_loss": options.tile, "tiled_mlp": options.tile},
        "blocks recomputed": {"activation_checkpointing": "full"},
        "blocks recomputed, loss and MLP in tiles": {
            "activation_checkpointing": "full", "tiled_loss": options.tile, "tiled_mlp": options.tile,
        },
    }  # fmt: skip
    rows = [
        (repeat, name, *ranks_of(memory, options.length))
        for repeat in range(options.repeats)
        for name, memory in subjects.items()
    ]
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            head = ["repeat", "subject", "peak_bytes", "step_seconds", "loss"]
            csv.writer(file, lineterminator="\n").writerows([head, *rows])
    print("| | peak above rest, MB | step, s | loss |\n|---|---|---|---|")
    for name in subjects:
        mine = [row for row in rows if row[1] == name]
        peak, seconds = statistics.median(row[2] for row in mine), statistics.median(row[3] for row in mine)
        print(f"| {name} | {peak / 1e6:,.0f} | {seconds:.1f} | {mine[0][4]:.6f} |")


def ranks_of(memory: dict[str, Any], length: int) -> tuple[int, float, float]:
    """Return the larger peak of the ranks, the seconds of the step and its loss."""
    from trainer.launch.ports import free_port

    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[subprocess.Popen[bytes]] = []
        for rank in range(RANKS):
            job = {"rank": rank, "port": port, "memory": memory, "length": length, "output": folder}
            with Path(folder, f"log-{rank}").open("w") as log:
                # Freed blocks go back to the system at once, so that what is resident is what is held.
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
                command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
                ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit("\n".join(Path(folder, f"log-{rank}").read_text()[-2000:] for rank in range(RANKS)))
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    return max(one["peak"] for one in found), max(one["seconds"] for one in found), found[0]["loss"]


def measure(rank: int, port: int, memory: dict[str, Any], length: int, output: str) -> None:
    """Take two steps as one of the ranks and write what the second one took."""
    import torch

    from trainer.config.deepspeed_json import resolve_deepspeed
    from trainer.config.derive import derive
    from trainer.config.run import Recipe
    from trainer.core import environ
    from trainer.core.environ import RankEnvironment
    from trainer.data.batches import MicroBatch
    from trainer.engine.base import Requests
    from trainer.engine.build import build_engine, join_group
    from trainer.models.config import hugging_face_config
    from trainer.tasks.pretrain import loss_spec

    torch.set_num_threads(1)
    place = RankEnvironment(rank, RANKS, rank, RANKS, 0, "127.0.0.1", port, "environment")
    environ.export(place, os.environ)
    join_group(place)
    recipe = Recipe.model_validate(
        {
            "run": {"directory": "unused", "steps": 2},
            "model": {"config": CONFIG, "dtype": "float32"},
            "data": {"train": [{"path": "unused"}], "sequence_length": length},
            "batch": {"global_size": 1},
            "memory": memory,
            "parallel": {"sequence": RANKS},
            "deepspeed": {"base": "zero3"},
            "launch": {"processes": RANKS},
        }
    )
    resolved = resolve_deepspeed(recipe, derive(recipe, RANKS))
    engine = build_engine(recipe, hugging_face_config(recipe.model), resolved, loss_spec(), place)
    tokens = torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    engine.train_batch([batch], lambda preview: True, 1e-4, Requests())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    rest, started = _resident("VmRSS"), time.perf_counter()
    result = engine.train_batch([batch], lambda preview: True, 1e-4, Requests())
    seconds = time.perf_counter() - started
    found = {"peak": _resident("VmHWM") - rest, "seconds": seconds, "loss": result.loss}
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
