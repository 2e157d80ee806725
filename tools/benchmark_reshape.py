"""Measure what it takes to load a checkpoint at another shape than it was written at.

usage: python tools/benchmark_reshape.py [--repeats 3] [--csv FILE]

Four ranks of ZeRO-3 write a checkpoint of a Llama of 135 M parameters with AdamW's moments (1.6 GB). Then ranks of
other layouts load it: engines are built as for a resume, and only the loading is timed, until the slowest rank is done.
Before each load the same ranks read the same files in plain reads of 16 MiB, each its share: that is the peer; one pass
before it warms the page cache. *Reading* ends with the last read, *all* when weights have been exchanged and every rank
is done. *Peaks*: how far the resident memory of the fullest rank rises above what it holds with its engine built.
Interleaved repeats, medians; prints a Markdown table and writes every row.
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

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
WRITTEN: dict[str, Any] = {"base": "zero3", "parallel": {}, "world": 4}
SUBJECTS: dict[str, dict[str, Any]] = {
    "ZeRO-3, 4 ranks (as written)": WRITTEN,
    "ZeRO-1, 2 ranks": {"base": "zero1", "parallel": {}, "world": 2},
    "2 tensor ranks, ZeRO-1": {"base": "zero1", "parallel": {"tensor": 2}, "world": 2},
    "2 pipeline stages, ZeRO-1": {"base": "zero1", "parallel": {"pipeline": 2}, "world": 2},
}
STEP = 1
CHUNK_BYTES = 16 * 2**20


def main() -> None:
    """Write the checkpoint, let every subject load it in turn, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        work(**json.loads(options.job))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-reshape-") as folder:
        run_ranks(WRITTEN, "write", Path(folder))
        for repeat in range(options.repeats):
            for name, subject in SUBJECTS.items():
                found = run_ranks(subject, "load", Path(folder))
                rows += [{"repeat": repeat, "subject": name, "rank": rank, **one} for rank, one in enumerate(found)]
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    report(rows)


def run_ranks(subject: dict[str, Any], what: str, folder: Path) -> list[dict[str, Any]]:
    """Run the ranks of a layout and return what each found."""
    from trainer.launch.ports import free_port

    port = free_port("127.0.0.1")
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(subject["world"]):
        job = {"rank": rank, "port": port, "what": what, "folder": str(folder), **subject}
        with Path(folder, f"log-{rank}").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait() for process in ranks]
    if any(codes):
        sys.exit("\n".join(Path(folder, f"log-{rank}").read_text()[-2000:] for rank in range(len(ranks))))
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(len(ranks))]


def work(rank: int, port: int, what: str, folder: str, base: str, parallel: dict[str, int], world: int) -> None:
    """Write or load as one of the ranks."""
    import torch

    from trainer.config.deepspeed_json import resolve_deepspeed
    from trainer.config.derive import derive
    from trainer.config.run import Recipe
    from trainer.core import environ
    from trainer.core.environ import RankEnvironment
    from trainer.engine.build import build_engine, join_group
    from trainer.models.config import hugging_face_config
    from trainer.tasks.pretrain import loss_spec

    os.umask(0o077)
    torch.set_num_threads(1)
    place = RankEnvironment(rank, world, rank, world, 0, "127.0.0.1", port, "environment")
    environ.export(place, os.environ)
    join_group(place)
    recipe = Recipe.model_validate(
        {
            "run": {"directory": str(Path(folder, "run")), "steps": 2},
            "model": {"config": CONFIG, "dtype": "float32"},
            "data": {"train": [{"path": "unused"}], "sequence_length": 128},
            "batch": {"global_size": 4, "micro_size": 1},
            "parallel": parallel,
            "deepspeed": {"base": base},
            "launch": {"processes": world},
        }
    )
    resolved = resolve_deepspeed(recipe, derive(recipe, world))
    started = _resident("VmRSS")
    config = hugging_face_config(recipe.model)
    engine = build_engine(recipe, config, resolved, loss_spec(), place, from_scratch=what == "load")
    if what == "write":
        _write(engine, recipe)
    else:
        Path(folder, f"{rank}.json").write_text(json.dumps(_load(engine, Path(folder), rank, world, started)))
    if what == "write":
        Path(folder, f"{rank}.json").write_text("{}")
    os._exit(0)


def _write(engine: Any, recipe: Any) -> None:
    from trainer.checkpoint.writer import CheckpointWriter
    from trainer.config.checkpoint import CheckpointConfig

    Path(recipe.run.directory).mkdir(exist_ok=True)
    writer = CheckpointWriter(Path(recipe.run.directory), attempt="0001", settings=CheckpointConfig(asynchronous=False))
    facts: dict[str, Any] = {"state": {}, "model": {}}
    saved = writer.save(STEP, engine.iterate_state(), facts, wait=True)
    assert saved is not None
    assert saved.error is None, saved.error


def _load(engine: Any, folder: Path, rank: int, world: int, started: int) -> dict[str, Any]:
    from torch import distributed

    from trainer.checkpoint import layout
    from trainer.checkpoint.reader import CheckpointReader

    directory = layout.step_directory(folder / "run", STEP)
    files = sorted(directory.glob("*.safetensors"))
    _plain(files, 0, 1)  # into the page cache, by every rank: the share of none is cold
    distributed.barrier()
    begun = time.perf_counter()
    plain_bytes = _plain(files, rank, world)
    distributed.barrier()
    plain_seconds = time.perf_counter() - begun
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    rest = _resident("VmRSS")
    distributed.barrier()
    begun = time.perf_counter()
    reader = CheckpointReader(directory)
    watched = _Watched(reader)
    engine.load_state(watched, STEP)
    peak = _resident("VmHWM")
    distributed.barrier()
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds, "read_seconds": watched.read_until - begun, "bytes_read": reader.bytes_read,
        "plain_seconds": plain_seconds, "plain_bytes": plain_bytes, "peak_reading_bytes": watched.peak - rest,
        "peak_bytes": peak - rest, "held_bytes": rest - started,
    }  # fmt: skip


class _Watched:
    """Passes reads on, and notes when the last one was done and what memory had peaked at then."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.read_until, self.peak = 0.0, 0

    def read(self, *arguments: Any) -> Any:
        values = self._reader.read(*arguments)
        self.read_until, self.peak = time.perf_counter(), _resident("VmHWM")
        return values


def _plain(files: list[Path], rank: int, world: int) -> int:
    """Read a rank's share of every file, as fast as one process reads; return its bytes."""
    buffer = bytearray(CHUNK_BYTES)
    total = 0
    for path in files:
        size = path.stat().st_size
        low, high = size * rank // world, size * (rank + 1) // world
        with path.open("rb", buffering=0) as file:
            while low < high:
                got = os.preadv(file.fileno(), [memoryview(buffer)[: high - low]], low)
                low, total = low + got, total + got
    return total


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table; of the ranks of a load the slowest and the fullest count."""
    head = ["loaded at", "GB read", "reading, s/GB", "all, s/GB", "plain reads, s/GB", "reading / plain"]
    head += ["peak above held: reading, MB", "all, MB", "held, MB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in SUBJECTS:
        loads = [
            [row for row in rows if row["subject"] == name and row["repeat"] == repeat]
            for repeat in sorted({row["repeat"] for row in rows})
        ]
        read = sum(row["bytes_read"] for row in loads[0]) / 1e9
        plain_gb = sum(row["plain_bytes"] for row in loads[0]) / 1e9

        def worst(field: str, loads: list[list[dict[str, Any]]] = loads) -> float:
            return statistics.median(max(row[field] for row in load) for load in loads)

        reading, plain = worst("read_seconds") / read, worst("plain_seconds") / plain_gb
        times = f"{reading:.2f} | {worst('seconds') / read:.2f} | {plain:.2f} | {reading / plain:.1f}"
        memory = " | ".join(f"{worst(name) / 1e6:,.0f}" for name in ("peak_reading_bytes", "peak_bytes", "held_bytes"))
        print(f"| {name} | {read:.2f} | {times} | {memory} |")


if __name__ == "__main__":
    main()
