"""Write a checkpoint anew for another number of ranks, or its weights alone, offline and in bounded memory."""

from __future__ import annotations

import math
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import layout
from trainer.checkpoint.commit import Commit
from trainer.checkpoint.doctor import damage
from trainer.checkpoint.locate import checkpoint_of
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.scan import chunk_ranges, state_dtypes
from trainer.checkpoint.sections import Holding, Plan, Slice, make_plan
from trainer.checkpoint.shard_file import Entry, streamed, write_section
from trainer.checkpoint.space import lacks_space
from trainer.checkpoint.survey import mapping
from trainer.checkpoint.writer import slice_key
from trainer.config.checkpoint import CheckpointConfig
from trainer.core.errors import CheckpointError, Problem, RefusedError

_MOST_RANKS = 2**16
_WRITTEN_ANEW = ("format", "version", "step", "world_size", "shards", "files", "tensors")


@dataclass(frozen=True)
class Reshaping:
    """What is asked for."""

    num_ranks: int
    weights_only: bool = False
    dtype: torch.dtype | None = None
    """Of weights alone; None: as they are."""


@dataclass(frozen=True)
class Reshaped:
    """What was written."""

    directory: Path
    num_bytes: int
    seconds: float
    generators: bool
    """Whether the states of random generators came along."""


@dataclass(frozen=True)
class _Part:
    """One rank's slice of a state."""

    name: str
    key: str
    stored: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    count: int


def refuse_bad_request(num_ranks: int | None, weights_only: bool, dtype: str | None) -> None:
    """Raise RefusedError for what can't be asked of any checkpoint."""
    problems: list[Problem] = []
    if num_ranks is not None and not 1 <= num_ranks <= _MOST_RANKS:
        problems.append(Problem("--ranks", num_ranks, f"must be 1 to {_MOST_RANKS}", "give a number of ranks"))
    if dtype is not None and dtype not in ("float32", "bfloat16"):
        problems.append(Problem("--dtype", dtype, "must be one of float32, bfloat16", "leave it out for the same"))
    if dtype is not None and not weights_only:
        rule = "optimizer state stays as it is: a run that continues needs it in float32"
        problems.append(Problem("--dtype", dtype, rule, "give --weights-only too"))
    if problems:
        raise RefusedError(problems)


def open_source(run_directory: Path, step: int | None, output: Path) -> CheckpointReader:
    """Return a reader of the checkpoint to rewrite, once all of it was read. Raises RefusedError or CheckpointError."""
    if output.is_symlink() and not output.exists():
        raise RefusedError(Problem("--output", str(output), "is a link to nothing", "give the directory itself"))
    if output.exists() and not _is_free(output):
        raise RefusedError(Problem("--output", str(output), "is not empty", "give another directory"))
    if output.resolve().is_relative_to(run_directory.resolve()):
        raise RefusedError(Problem("--output", str(output), "lies in RUN_DIR", "give a directory outside of it"))
    directory = checkpoint_of(run_directory, step)
    problems = damage(directory)
    if problems:
        raise CheckpointError(f"{directory} can't be rewritten: " + "; ".join(problems))
    return CheckpointReader(directory)


def reshape(reader: CheckpointReader, output: Path, wanted: Reshaping) -> Reshaped:
    """Write the checkpoint into the run directory ``output`` as ``wanted`` says; it exists whole or not at all.

    Raises CheckpointError if it does not fit there, OSError.
    """
    started = time.perf_counter()
    generators = not wanted.weights_only and wanted.num_ranks == reader.world_size
    states, ranks = state_dtypes(reader.directory), range(wanted.num_ranks)
    drawn = [reader.random_states(rank) if generators else {} for rank in ranks]
    extras = [[Entry.of(key, tensor) for key, tensor in held.items()] for held in drawn]
    holdings = [_holding(_parts(reader, states, wanted, rank), extras[rank]) for rank in ranks]
    plan = make_plan(holdings, "rank")
    _refuse_short_of_space(output, plan)
    made = _first_missing(output)
    commit = Commit(output, "reshape", CheckpointConfig(), lambda: None)
    try:
        commit.reap()
        commit.begin(reader.step, plan)
        written = [
            write_section(
                commit.temporary(reader.step) / section.file,
                section.start,
                streamed(section.header, [*_chunks(reader, _parts(reader, states, wanted, rank)), *extras[rank]]),
                lambda: None,
            )
            for rank, section in enumerate(plan.sections)
        ]
        _copy_tokenizer(reader, output)
        commit.commit(reader.step, plan, written, _facts(reader, wanted))
        commit.finish(reader.step, ())
    except BaseException:
        if layout.newest(output) is None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    seconds = time.perf_counter() - started
    return Reshaped(commit.directory(reader.step), sum(size for size, _ in written), seconds, any(extras))


def _parts(
    reader: CheckpointReader, dtypes: Mapping[str, Mapping[str, str]], wanted: Reshaping, rank: int
) -> Iterator[_Part]:
    """Yield what a rank holds: its equal, contiguous part of every state, as ZeRO-3 divides tensors."""
    for name, states in dtypes.items():
        shape = reader.shape(name)
        size = math.prod(shape)
        each = -(-size // wanted.num_ranks)
        start = min(size, rank * each)
        count = min(each, size - start)
        for key, stored in states.items():
            if not count or (wanted.weights_only and key != "weight"):
                continue
            held: torch.dtype = getattr(torch, stored)
            dtype = wanted.dtype if wanted.dtype and held.is_floating_point else held
            yield _Part(name, key, held, dtype, shape, start, count)


def _holding(found: Iterator[_Part], extra: list[Entry]) -> Holding:
    parts = list(found)
    slices: list[Slice] = [
        (p.name, p.key, str(p.dtype).removeprefix("torch."), p.shape, p.start, p.count, None) for p in parts
    ]
    entries = [Entry(slice_key(p.name, p.key), p.dtype, p.count, lambda: torch.empty(0)) for p in parts] + extra
    return Holding(
        host=socket.gethostname(),
        places=tuple(entry.place for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        slices=tuple(slices),
        free_memory_bytes=0,
        buffered=False,
    )


def _chunks(reader: CheckpointReader, parts: Iterator[_Part]) -> Iterator[Entry]:
    """Yield the parts in pieces of bounded size, which follow each other in the file."""
    for part in parts:
        for start, count in chunk_ranges(part.count):

            def read(part: _Part = part, start: int = start, count: int = count) -> torch.Tensor:
                return reader.read(part.name, part.key, part.start + start, count).to(part.dtype)

            yield Entry(part.name, part.dtype, count, read)


def _facts(reader: CheckpointReader, wanted: Reshaping) -> dict[str, Any]:
    """Return the manifest's other fields: the old ones, but for what is no longer true."""
    manifest = layout.read_manifest(reader.directory) or {}
    facts = {key: value for key, value in manifest.items() if key not in _WRITTEN_ANEW}
    topology = dict(mapping(manifest.get("topology")))
    if wanted.num_ranks != reader.world_size and topology:
        whole = dict.fromkeys(("pipeline", "tensor", "sequence", "expert", "nodes"), 1)
        facts["topology"] = topology | whole | {"world_size": wanted.num_ranks, "data": wanted.num_ranks}
    if wanted.weights_only:
        facts.pop("optimizer", None)
    facts["reshaped"] = {
        "world_size": reader.world_size,
        "topology": topology or None,
        "weights_only": wanted.weights_only,
    }
    return facts


def _refuse_short_of_space(output: Path, plan: Plan) -> None:
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    lacks = lacks_space(existing, plan.num_bytes, len(set(plan.shards)) + 8)
    if lacks:
        raise CheckpointError(lacks)


def _first_missing(path: Path) -> Path:
    """Return the topmost directory that making ``path`` makes, or its directory of checkpoints."""
    missing = [layout.checkpoints_directory(path)]
    missing += [parent for parent in (path, *path.parents) if not parent.exists()]
    return missing[-1]


def _copy_tokenizer(reader: CheckpointReader, output: Path) -> None:
    """Copy the run's tokenizer, so that the result can be exported like the original."""
    kept = reader.directory.absolute().parents[1] / "tokenizer"
    if kept.is_dir() and not kept.is_symlink():
        shutil.copytree(kept, output / "tokenizer", dirs_exist_ok=True)


def _is_free(output: Path) -> bool:
    """Return whether a directory is empty, or holds only what an interrupted command of this kind left."""
    if not output.is_dir():
        return False
    inside = layout.checkpoints_directory(output)
    leftovers = [*layout.temporary_directories(output)]
    held = set(output.iterdir())
    return not held or (
        bool(leftovers) and held <= {inside, output / "tokenizer"} and set(inside.iterdir()) == set(leftovers)
    )
