"""Any range of any part is read out of whatever parts a checkpoint holds: right, and no more bytes than that."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.checkpoint import layout, reader, shard_reader
from trainer.checkpoint.reader import CheckpointReader
from trainer.core.errors import CheckpointError
from trainer.parallel.cut import Cut

pytestmark = pytest.mark.fast

Slices = list[list[Any]]


def commit(run: Path, shape: tuple[int, ...], dtype: str, slices: Slices, files: list[str]) -> Path:
    """Write the manifest of a checkpoint that holds one tensor, over shards that are there."""
    directory = layout.step_directory(run, 1)
    facts = {name: {"bytes": (directory / name).stat().st_size, "xxh3_64": "0" * 16} for name in files}
    tensors = {"w": {"shape": list(shape), "states": {"weight": {"dtype": dtype, "slices": slices}}}}
    manifest = {
        "format": layout.FORMAT, "version": 2, "step": 1, "world_size": len(files), "shards": files, "files": facts,
        "tensors": tensors, "state": {}, "model": {},
    }  # fmt: skip
    layout.manifest_path(directory).write_text(json.dumps(manifest))
    return directory


def part_of(whole: np.ndarray, cut: Cut | None) -> np.ndarray:
    """What a cut means, by NumPy's own indexing."""
    if cut is None:
        return whole
    shape, dim = whole.shape, cut.dim
    size = shape[dim] // (cut.parts * cut.chunks)
    split = whole.reshape(*shape[:dim], cut.chunks, cut.parts, size, *shape[dim + 1 :])
    return split.take(cut.part, axis=dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])


@st.composite
def cuttings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(dim, parts, chunks) that divide the shape, or None."""
    dim = draw(st.integers(-1, len(shape) - 1))
    if dim < 0:
        return None
    pairs = [(p, c) for p in range(1, 7) for c in range(1, 4) if shape[dim] % (p * c) == 0]
    return (dim, *draw(st.sampled_from(pairs)))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), max_size=4)))
    held, wanted = draw(cuttings(shape)), draw(cuttings(shape))
    cut = Cut(wanted[0], draw(st.integers(0, wanted[1] - 1)), *wanted[1:]) if wanted else None
    count = math.prod(shape) // (cut.parts if cut else 1)
    start = draw(st.integers(0, count))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "int64", "bool"]))
    num_shards = draw(st.integers(1, 5))
    case = {"shape": shape, "held": held, "cut": cut, "start": start, "dtype": dtype, "num_shards": num_shards}
    return case | {"count": draw(st.integers(0, count - start)), "seed": draw(st.integers(0, 999))}


def hold(run: Path, case: dict[str, Any]) -> tuple[Path, np.ndarray]:
    """Write a checkpoint that holds the tensor in flat slices of its parts, in no order, in random shards."""
    draw = np.random.default_rng(case["seed"])
    shape = case["shape"]
    whole = draw.permutation(math.prod(shape)).reshape(shape)
    dim, parts, chunks = case["held"] or (0, 1, 1)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(case["num_shards"])]
    slices: Slices = []
    for part in range(parts):
        cut = Cut(dim, part, parts, chunks) if case["held"] else None
        flat = part_of(whole, cut).ravel()
        free = [index for index, shard in enumerate(shards) if not shard]
        # A key of a shard is one slice, so each part has shards of its own; when they run out, one more.
        mine = draw.permutation(free)[: draw.integers(1, 4)].tolist() or [len(shards)]
        shards += [{} for _ in range(max(mine) + 1 - len(shards))]
        ends = np.sort(draw.integers(0, len(flat) + 1, len(mine) - 1)).tolist()
        for shard, low, high in zip(mine, [0, *ends], [*ends, len(flat)], strict=True):
            shards[shard]["w::weight"] = torch.tensor(flat[low:high]).to(getattr(torch, case["dtype"]))
            slices.append([shard, low, high - low, *([[cut.dim, cut.part, cut.parts, cut.chunks]] if cut else [])])
    directory = layout.step_directory(run, 1)
    directory.mkdir(parents=True)
    files = [f"rank-{index:05d}.safetensors" for index in range(len(shards))]
    for name, shard in zip(files, shards, strict=True):
        save_file(shard, directory / name)
    order = draw.permutation(len(slices)).tolist()
    return commit(run, shape, case["dtype"], [slices[index] for index in order], files), whole


def wanted_of(whole: np.ndarray, case: dict[str, Any]) -> torch.Tensor:
    flat = part_of(whole, case["cut"]).ravel()[case["start"] : case["start"] + case["count"]]
    return torch.tensor(flat).to(getattr(torch, case["dtype"]))


@pytest.mark.parametrize("page_bytes", [0, 4096, 40])
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_a_range_of_any_part_is_what_numpy_says(page_bytes: int, case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_reader, "_PAGE_BYTES", page_bytes)
        patch.setattr(shard_reader, "_BLOCK_BYTES", 5000)
        patch.setattr("trainer.checkpoint.pieces._AT_A_TIME", 7)
        patch.setattr(reader, "_OPEN_FILES", 1)
        directory, whole = hold(Path(folder), case)
        opened = CheckpointReader(directory)
        found = opened.read("w", "weight", case["start"], case["count"], case["cut"])
        assert torch.equal(found, wanted_of(whole, case))
        if page_bytes == 0:  # nothing is read for being near
            assert opened.bytes_read == found.numel() * found.itemsize
        assert sum(shard._file is not None for shard in opened._readers.values()) <= 1


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_what_is_missing_is_named(case: dict[str, Any]) -> None:
    if not case["count"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        directory, whole = hold(Path(folder), case)
        manifest = json.loads(layout.manifest_path(directory).read_text())
        kept = manifest["tensors"]["w"]["states"]["weight"]["slices"]
        lost = kept.pop(case["seed"] % len(kept))
        layout.manifest_path(directory).write_text(json.dumps(manifest))
        damaged = CheckpointReader(directory)
        with contextlib.suppress(CheckpointError):  # unless it is not needed
            found = damaged.read("w", "weight", case["start"], case["count"], case["cut"])
            assert torch.equal(found, wanted_of(whole, case))
        if lost[2]:
            with pytest.raises(CheckpointError, match="'w' 'weight'"):
                damaged.whole("w")


@pytest.mark.parametrize(
    "slices",
    [
        [[0, 0, 8], [1, 0, 8]],  # no such shard
        [[0, -4, 12]],
        [[0, 0, 8, [0, 0, 3, 1]]],  # 8 rows in 3 parts
        [[0, 0, 4, [0, 2, 2, 1]]],
        [[0, 0, 4, [0, 0, 2, 1]], [0, 0, 4, [0, 1, 4, 1]]],  # halves and quarters
        [["0", 0, 8]],
        [[0, 0]],
        [],
        [[0, 0, 4]],
        [[0, 4, 4]],
        [[0, -1, 9]],
    ],
)
def test_a_manifest_that_can_not_be_true_is_refused(tmp_path: Path, slices: Slices) -> None:
    directory = layout.step_directory(tmp_path, 1)
    directory.mkdir(parents=True)
    save_file({"w::weight": torch.arange(8.0)}, directory / "a.safetensors")
    path = commit(tmp_path, (8,), "float32", slices, ["a.safetensors"])
    with pytest.raises(CheckpointError):
        CheckpointReader(path).whole("w")


def test_a_range_beyond_the_tensor_is_refused(tmp_path: Path) -> None:
    directory = layout.step_directory(tmp_path, 1)
    directory.mkdir(parents=True)
    save_file({"w::weight": torch.arange(4.0)}, directory / "a.safetensors")
    opened = CheckpointReader(commit(tmp_path, (8,), "float32", [[0, 0, 8]], ["a.safetensors"]))
    for start, count in ((0, 9), (-1, 4), (4, -1), (0, 8)):  # the shard holds 4 of the 8
        with pytest.raises(CheckpointError):
            opened.read("w", "weight", start, count)
    with pytest.raises(CheckpointError):
        opened.read("w", "weight", 0, 5, Cut(0, 0, 2))


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    directory = layout.step_directory(tmp_path, 1)
    directory.mkdir(parents=True)
    path = directory / "a.safetensors"
    save_file({"w::weight": torch.arange(8.0)}, path)
    for dtype, slices, message in (
        ("bfloat16", [[0, 0, 8]], "torch.float32, the manifest says torch.bfloat16"),
        ("float16x", [[0, 0, 8]], "unknown dtype"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(commit(tmp_path, (8,), dtype, slices, ["a.safetensors"])).whole("w")
    opened = CheckpointReader(commit(tmp_path, (8,), "float32", [[0, 0, 8]], ["a.safetensors"]))
    content = path.read_bytes()
    opened.read("w", "weight", 0, 1)
    path.write_bytes(content[:-4])  # cut off while it is open
    with pytest.raises(CheckpointError, match="cut off"):
        opened.whole("w")
    for text in (b"", b"\0" * 40, content[:60], (9).to_bytes(8, "little") + b"[" * 9, content.replace(b"32]", b"99]")):
        path.write_bytes(text)
        with pytest.raises(CheckpointError):
            CheckpointReader(commit(tmp_path, (8,), "float32", [[0, 0, 8]], ["a.safetensors"])).whole("w")


MEASURE = """
import re, sys
from pathlib import Path
from trainer.checkpoint.reader import CheckpointReader
from trainer.parallel.cut import Cut

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

reader = CheckpointReader(Path(sys.argv[1]))
reader.read("w", "weight", 0, 100, Cut(1, 3, 16))
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
found = reader.read("w", "weight", 0, 2**22, Cut(1, 3, 16))
print(resident("VmHWM") - before, reader.bytes_read - 400, found.sum().item())
"""


def test_a_part_of_a_large_tensor_takes_the_memory_of_the_part(tmp_path: Path) -> None:
    shape = (8192, 8192)  # 256 MiB, of which a sixteenth is wanted: 2 KiB of every row
    directory = layout.step_directory(tmp_path, 1)
    directory.mkdir(parents=True)
    header = {"w::weight": {"dtype": "F32", "shape": [2**26], "data_offsets": [0, 2**28]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "a.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(3 * 2048, 1)
        file.write(np.ones(1, np.float32).tobytes())
        file.truncate(8 + len(text) + 2**28)  # a hole: takes no disk
    commit(tmp_path, shape, "float32", [[0, 0, 2**26]], ["a.safetensors"])
    command = [sys.executable, "-c", MEASURE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    peak, num_bytes, total = map(float, done.stdout.split())
    assert num_bytes == 2**24
    assert total == 1.0
    assert 2**24 <= peak < 2**24 + 8 * 2**20
