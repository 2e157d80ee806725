"""Who writes where, what a section looks like on disk, and whether there is room."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import xxhash
from safetensors import safe_open

from trainer.checkpoint import layout, select
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.commit import Commit
from trainer.checkpoint.sections import RANKS_WITH_FILES_OF_THEIR_OWN, Holding, Plan, make_plan
from trainer.checkpoint.shard_file import ALIGNMENT, CHUNK_BYTES, Entry, Image, hash_file, streamed, write_section
from trainer.checkpoint.space import free_memory_bytes, lacks_space
from trainer.config.checkpoint import CheckpointConfig

GIB = 2**30


def entries_of(rank: int, sizes: tuple[int, ...] = (3, 1000, 70_001)) -> list[Entry]:
    generator = torch.Generator().manual_seed(rank)
    floats = [torch.rand(size, generator=generator) for size in sizes]
    small = torch.arange(rank + 1, dtype=torch.uint8)
    return [*(Entry.of(f"t{index}", tensor) for index, tensor in enumerate(floats)), Entry.of("odd", small)]


def holding(entries: list[Entry], host: str = "a", free: int = GIB) -> Holding:
    places = tuple(entry.place for entry in entries)
    num_bytes = sum(entry.num_bytes for entry in entries)
    return Holding(host, places, num_bytes, (("w", "weight", "float32", (4,), 0, 4, None),), free, buffered=True)


def write(directory: Path, plan: Plan, entries: list[list[Entry]], in_memory: bool) -> list[tuple[int, str]]:
    written: list[tuple[int, str]] = []
    for section, mine in zip(plan.sections, entries, strict=True):
        padding = [Entry.of("padding", torch.zeros(section.padding, dtype=torch.uint8))] if section.padding else []
        if in_memory:
            image = Image(section.header, [*mine, *padding], pinned=False)
            image.fill([*mine, *padding])
            chunks = image.chunks()
        else:
            chunks = streamed(section.header, [*mine, *padding])
        written.append(write_section(directory / section.file, section.start, chunks, lambda: None))
    return written


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("files", ["rank", "node"])
def test_what_is_written_is_read_back_by_the_library(tmp_path: Path, files: Any, in_memory: bool) -> None:
    entries = [entries_of(rank) for rank in range(4)]
    plan = make_plan([holding(mine, host) for mine, host in zip(entries, "abab", strict=True)], files)
    written = write(tmp_path, plan, entries, in_memory)
    by_file: dict[str, list[tuple[int, str]]] = {}
    for section, part in zip(plan.sections, written, strict=True):
        by_file.setdefault(section.file, []).append(part)
    assert len(by_file) == (4 if files == "rank" else 2)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == plan.num_bytes
    for rank, (name, mine) in enumerate(zip(plan.shards, entries, strict=True)):
        with safe_open(tmp_path / name, framework="pt") as file:
            prefix = f"rank-{rank:05d}/" if files == "node" else ""
            for entry in mine:
                assert torch.equal(file.get_tensor(prefix + entry.key), entry.read())
    for name, parts in by_file.items():
        facts = layout.file_facts(parts)
        assert layout.file_parts(facts) == parts
        assert hash_file(tmp_path / name, [size for size, _ in parts]) == [digest for _, digest in parts]
        assert facts["bytes"] == (tmp_path / name).stat().st_size


def test_a_file_of_one_rank_has_one_hash_over_all_of_it(tmp_path: Path) -> None:
    entries = entries_of(0, (CHUNK_BYTES // 4, 5))  # the header and this fill more than a chunk
    plan = make_plan([holding(entries)], "auto")
    ((size, digest),) = write(tmp_path, plan, [entries], in_memory=False)
    content = (tmp_path / "rank-00000.safetensors").read_bytes()
    assert (size, digest) == (len(content), xxhash.xxh3_64(content).hexdigest())
    assert layout.file_facts([(size, digest)]) == {"bytes": size, "xxh3_64": digest}


def test_sections_begin_at_whole_blocks_and_headers_belong_to_the_first() -> None:
    plan = make_plan([holding(entries_of(rank)) for rank in range(3)], "node")
    assert [section.start % ALIGNMENT for section in plan.sections] == [0, 0, 0]
    assert [bool(section.header) for section in plan.sections] == [True, False, False]
    assert plan.any_shared


@pytest.mark.parametrize(
    ("ranks", "files", "expected"),
    [
        (RANKS_WITH_FILES_OF_THEIR_OWN, "auto", RANKS_WITH_FILES_OF_THEIR_OWN),
        (RANKS_WITH_FILES_OF_THEIR_OWN + 8, "auto", (RANKS_WITH_FILES_OF_THEIR_OWN + 8) // 8),
        (2048, "auto", 256),
        (16, "node", 2),
        (2048, "rank", 2048),
    ],
)
def test_files_stay_few_where_ranks_are_many(ranks: int, files: Any, expected: int) -> None:
    entries = [Entry.of("t", torch.zeros(2))]
    plan = make_plan([holding(entries, f"node{rank // 8}") for rank in range(ranks)], files)
    assert len(set(plan.shards)) == expected


def test_a_copy_must_fit_into_the_memory_of_every_host() -> None:
    entries = [Entry.of("t", torch.zeros(1000))]  # one block of 4096 bytes
    assert make_plan([holding(entries, "a", 14_000)] * 2, "auto").fits_in_memory
    assert not make_plan([holding(entries, "a", 14_000)] * 3, "auto").fits_in_memory
    assert not make_plan([holding(entries, "a", GIB), holding(entries, "b", 4096)], "auto").fits_in_memory


def test_room_is_asked_of_the_file_system(tmp_path: Path) -> None:
    assert lacks_space(tmp_path, 1, 1) is None
    found = os.statvfs(tmp_path)
    assert f"{tmp_path} has " in (lacks_space(tmp_path, found.f_bavail * found.f_frsize, 1) or "")
    if found.f_files:
        assert "inodes free" in (lacks_space(tmp_path, 1, found.f_favail) or "")


def test_a_link_in_the_place_of_a_shard_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "rank-00000.safetensors").symlink_to(tmp_path / "target")
    entries = entries_of(0)
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path, make_plan([holding(entries)], "auto"), [entries], in_memory=False)
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("facts", [None, {}, {"bytes": 1}, {"bytes": 3, "parts": [[1, "0" * 16]]}, {"parts": []}])
def test_facts_that_are_none(facts: object) -> None:
    assert layout.file_parts(facts) is None


def test_checkpoints_passed_over_as_damaged_push_no_good_ones_out(tmp_path: Path) -> None:
    for step in (5, 10, 15, 99):  # the run fell back from 99 and has just committed 15
        directory = layout.step_directory(tmp_path, step)
        directory.mkdir(parents=True)
        manifest = {"format": layout.FORMAT, "version": 1, "step": step}
        layout.manifest_path(directory).write_text(json.dumps(manifest))
    commit = Commit(tmp_path, "0001", CheckpointConfig(keep_last=2), lambda: None)
    commit.prune(15, ())
    assert [step for step, _ in layout.step_directories(tmp_path)] == [10, 15, 99]


def committed(run: Path, text: str) -> Commit:
    """Commit a checkpoint of step 9 without tensors whose manifest says ``text``."""
    commit = Commit(run, "0001", CheckpointConfig(), lambda: None)
    plan = make_plan([holding(entries_of(0))], "auto")
    commit.reap()
    commit.temporary(9).mkdir()
    commit.commit(9, plan, [(4096, "0" * 16)], {"text": text})
    return commit


def held_text(run: Path) -> str:
    return (layout.read_manifest(layout.step_directory(run, 9)) or {})["text"]


@pytest.mark.parametrize("fault", ["kill", "eio"])
def test_a_checkpoint_that_was_about_to_be_replaced_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    committed(tmp_path, "old")
    monkeypatch.setenv("TRAINER_ALLOW_FAULTS", "1")
    monkeypatch.setenv("TRAINER_FAULTS", f"checkpoint.in_replace:0:9:{fault}")
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            committed(tmp_path, "new")
        os._exit(0)
    assert (os.waitpid(pid, 0)[1] == signal.SIGKILL) == (fault == "kill")
    monkeypatch.delenv("TRAINER_FAULTS")
    assert layout.step_directories(tmp_path) == []
    alone = cast("Ranks", SimpleNamespace(rank=0, world_size=1, from_first=lambda value: value, gather=lambda v: [v]))
    monkeypatch.setattr(select, "damaged_files", lambda *_: [])
    assert select.choose(tmp_path, "auto", alone, print) == layout.step_directory(tmp_path, 9)
    assert held_text(tmp_path) == "old"
    Commit(tmp_path, "0002", CheckpointConfig(), lambda: None).reap()
    committed(tmp_path, "new")
    assert held_text(tmp_path) == "new"
    assert [path.name for path in layout.checkpoints_directory(tmp_path).iterdir()] == ["step-00000009"]


def test_a_failed_save_leaves_what_it_should_have_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = committed(tmp_path, "old")
    monkeypatch.setenv("TRAINER_ALLOW_FAULTS", "1")
    monkeypatch.setenv("TRAINER_FAULTS", "checkpoint.in_replace:0:9:eio")
    with pytest.raises(OSError, match="injected"):
        committed(tmp_path, "new")
    commit.discard(9)
    assert held_text(tmp_path) == "old"


def test_memory_is_what_the_groups_of_a_job_leave(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("12:cpu:/x\n0::/slurm/job_1/step_0\n")
    group = tmp_path / "fs" / "slurm" / "job_1"
    (group / "step_0").mkdir(parents=True)
    for level, limit in ((group / "step_0", "max"), (group, "1000000")):
        (level / "memory.max").write_text(f"{limit}\n")
        (level / "memory.current").write_text("700000\n")
        (level / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_memory_bytes(tmp_path / "fs", membership) == 500_000
    (group / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path / "fs", membership) > 1_000_000
    membership.write_text("9:memory:/job\n")
    old = tmp_path / "fs" / "memory" / "job"
    old.mkdir(parents=True)
    for name, value in (("limit_in_bytes", 900), ("usage_in_bytes", 300)):
        (old / f"memory.{name}").write_text(str(value))
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    assert free_memory_bytes(tmp_path / "fs", membership) == 700
    assert free_memory_bytes(tmp_path / "fs", tmp_path / "none") > 1_000_000
