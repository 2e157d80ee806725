"""What ``benchmark_data.py`` compares, the rows it writes and the table it prints."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
WORKERS = 2
MISSING = "missing: "


@dataclass(frozen=True)
class Subject:
    """One side of a comparison."""

    name: str
    what: str
    key: str
    is_ours: bool = False
    counts: str = "seconds"
    """Which of a row's times its tokens per second are of."""
    in_this_python: bool = False
    """A peer that is also a dependency of ours: measured with our version of it."""


@dataclass(frozen=True)
class Row:
    """One measurement; a subject that can't be measured has one row without numbers."""

    benchmark: str
    subject: str
    repeat: int
    seconds: float | None
    """Wall clock of the whole process, seen from outside."""
    deliver_seconds: float | None
    """From opening to the last sample, building an index included, imports excluded."""
    steady_seconds: float | None
    """Delivering alone."""
    tokens: int | None
    tokens_per_second: float | None
    max_rss_bytes: int | None
    """Of the largest process that the kernel counts: datatrove's workers, children of a fork server, are not."""
    growth_bytes: int | None
    versions: str
    cores: int


_STEADY, _DELIVER = "steady_seconds", "deliver_seconds"

BENCHMARKS: dict[str, tuple[str, list[Subject]]] = {
    "tokenize": (
        "tokenizers, raw",
        [
            Subject("tokenizers, raw", "encode_batch on all cores, texts in memory, encoding alone", "tokenizers_raw",
                    counts=_STEADY, in_this_python=True),
            Subject("trainer", f"`trainer data tokenize --workers {WORKERS}`", "cli", True),
            Subject("datasets", f"map(batched, num_proc={WORKERS}) to arrow", "datasets_map"),
            Subject("datatrove", f"DocumentTokenizer, {WORKERS} workers, no shuffle", "datatrove_tokenize"),
        ],
    ),
    "read": (
        "megatron-core, same",
        [
            Subject("np.memmap", "floor: permutation, inputs and labels", "memmap", False, _STEADY, True),
            Subject("megatron-core", "GPTDataset, plain", "megatron_plain", False, _STEADY),
            Subject("megatron-core, same", "the same, positions restart at documents", "megatron_same", False, _STEADY),
            Subject("datatrove", "DatatroveFolderDataset, inputs and labels", "datatrove_plain", False, _STEADY),
            Subject("datatrove, positions", "the same, positions restart at documents", "datatrove_positions", False,
                    _STEADY),
            Subject("trainer, plain", "inputs and targets, workers 0", "plain", True, _STEADY),
            Subject("trainer, plain, ahead", "the same, workers 2", "plain_ahead", True, _STEADY),
            Subject("trainer", "positions and document ids too, workers 0", "same", True, _STEADY),
            Subject("trainer, ahead", "the same, workers 2", "same_ahead", True, _STEADY),
        ],
    ),
    "open": (
        "megatron-core",
        [
            Subject("trainer, set", "open a shard set, plan, locate the first step", "open_set", True, _DELIVER),
            Subject("trainer, folder", "the same without the set's manifest", "open_folder", True, _DELIVER),
            Subject("trainer, checked", "the set, and read the sampled checksums", "open_checked", True, _DELIVER),
            Subject("megatron-core", "IndexedDataset of each, no plan", "megatron_open", False, _DELIVER),
        ],
    ),
    "memory": ("trainer, epoch 1", [Subject("trainer", "shuffled epochs, workers 2", "epochs", True, _STEADY)]),
}  # fmt: skip


def empty_row(benchmark: str, subject: str, reason: str) -> Row:
    """Return the row of a subject that can't be measured here."""
    return Row(benchmark, subject, 0, None, None, None, None, None, None, None, MISSING + reason, os.cpu_count() or 1)


def table(rows: Sequence[Row], command: str, sizes: Mapping[str, int]) -> str:
    """Return the medians as markdown, with what is needed to repeat them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [
        f"Command: `{command}`  ",
        f"Hardware: {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory; commit {_commit()}  ",
        f"Medians of {max(row.repeat for row in rows)}. Sizes: {', '.join(f'{k} {v:,}' for k, v in sizes.items())}",
    ]
    for benchmark, (reference, subjects) in BENCHMARKS.items():
        kept: dict[str, list[Row]] = {}
        for row in rows:
            if row.benchmark == benchmark:
                kept.setdefault(row.subject, []).append(row)
        if not kept:
            continue
        base = _median(kept.get(reference, []), lambda row: row.tokens_per_second)
        heads = ["subject", "what", "process s", "deliver s", "steady s", "M tokens/s", f"x {reference}"]
        heads += ["max RSS MB", "growth MB"]
        lines += ["", f"### {benchmark}", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for subject in subjects:
            names = [name for name in kept if name == subject.name or name.startswith(f"{subject.name}, epoch ")]
            lines += [_line(name, subject.what, kept[name], base) for name in names]
    return "\n".join(lines) + "\n"


def _line(name: str, what: str, rows: list[Row], base: float | None) -> str:
    if rows[0].seconds is None:
        return f"| {name} | {what} | {rows[0].versions} |" + " |" * 6
    rate = _median(rows, lambda row: row.tokens_per_second)
    cells = [
        name,
        what,
        _number(_median(rows, lambda row: row.seconds)),
        _number(_median(rows, lambda row: row.deliver_seconds)),
        _number(_median(rows, lambda row: row.steady_seconds)),
        _number(rate and rate / 1e6),
        _number(rate and base and rate / base),
        _number(_median(rows, lambda row: row.max_rss_bytes and row.max_rss_bytes / 1e6)),
        _number(_median(rows, lambda row: row.growth_bytes and row.growth_bytes / 1e6)),
    ]
    return "| " + " | ".join(cells) + " |"


def _median(rows: list[Row], value: Callable[[Row], float | None]) -> float | None:
    found = [number for row in rows if (number := value(row)) is not None]
    return statistics.median(found) if found else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=TOOLS, capture_output=True, text=True, check=False
        ).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if git("status", "--short") else "")
