"""Ways to damage the checkpoints of a run of two ranks, and `trainer checkpoint` run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import torch

from trainer.checkpoint import layout
from trainer.checkpoint.commit import Commit
from trainer.checkpoint.sections import Holding, make_plan
from trainer.checkpoint.shard_file import Entry, hash_file, streamed, write_section
from trainer.cli.main import main
from trainer.config.checkpoint import CheckpointConfig


def cli(*arguments: object) -> tuple[int, str]:
    """Run `trainer checkpoint` in this process; return exit code and output, stderr included."""
    return command_line("checkpoint", *arguments)


def command_line(*arguments: object) -> tuple[int, str]:
    """Run `trainer` in this process; return exit code and output, stderr included."""
    said = io.StringIO()
    before, sys.argv = sys.argv, ["trainer", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.argv = before
    return code, said.getvalue()


def step_of(run: Path, step: int) -> Path:
    return layout.step_directory(run, step)


def shard_of(run: Path, step: int, rank: int = 0) -> Path:
    return step_of(run, step) / f"rank-{rank:05d}.safetensors"


def edit_manifest(run: Path, step: int, change: Callable[[dict], None]) -> None:
    path = layout.manifest_path(step_of(run, step))
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def overwrite(path: Path, key: str, place: int, values: torch.Tensor) -> None:
    """Write ``values`` over those of a shard's tensor ``key`` from element ``place`` on; the hash stays the old one."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    low = start + json.loads(content[8:start])[key]["data_offsets"][0] + place * values.element_size()
    content[low : low + values.nbytes] = values.numpy().tobytes()
    path.write_bytes(content)


def rehash(run: Path, step: int, name: str) -> None:
    """Let the manifest state what a changed shard holds."""
    facts = {"bytes": (step_of(run, step) / name).stat().st_size, "xxh3_64": hash_file(step_of(run, step) / name)[0]}
    edit_manifest(run, step, lambda manifest: manifest["files"].update({name: facts}))


def slices(manifest: dict, name: str = "lm_head.weight", key: str = "weight") -> list:
    return manifest["tensors"][name]["states"][key]["slices"]


def cut_off(run: Path) -> None:
    os.truncate(shard_of(run, 8), 1000)


def swap(run: Path) -> None:
    shutil.copy(shard_of(run, 6, 1), shard_of(run, 8, 1))


def repeat(manifest: dict) -> None:
    slices(manifest).append([1 - slices(manifest)[0][0], 5, 10])


def newer(run: Path) -> None:
    edit_manifest(run, 8, lambda manifest: manifest.update(version=99))


def reshaped(world: Path, name: str, output: Path, *options: object) -> Path:
    code, said = cli("reshape", world / "runs" / name, "--output", output, *options)
    assert code == 0, said
    assert re.search(r"\n[\d.]+ KiB, peak memory [\d.]+ [MG]iB\n$", said), said
    assert cli("verify", output) == (0, "step 8: ok\n")
    return output


def write_large(run: Path, like: Path) -> None:
    """Write step 8 with one tensor of 400 MB and the state of the run ``like``."""
    count = 100_000_000
    manifest = layout.read_manifest(step_of(like, 8))
    assert manifest is not None
    slices = (("w", "weight", "float32", (count // 10, 10), 0, count, None),)
    holding = Holding("here", (("w::weight", "F32", count),), 4 * count, slices, 0, False)
    plan = make_plan([holding], "rank")
    commit = Commit(run, "test", CheckpointConfig(), lambda: None)
    commit.reap()
    commit.begin(8, plan)
    entries = [Entry.of("", torch.full((count // 10,), float(number))) for number in range(10)]
    path = commit.temporary(8) / plan.sections[0].file
    written = write_section(path, 0, streamed(plan.sections[0].header, entries), lambda: None)
    commit.commit(8, plan, [written], {"state": manifest["state"], "model": manifest["model"] | {"config": {}}})


def peak(run: Path, output: Path) -> float:
    """Return the MiB that rewriting, comparing and scanning took at most."""
    commands = (["reshape", run, "--output", output, "--ranks", 1], ["diff", run, output, "--tensors"],
                ["verify", output, "--nan-scan"])  # fmt: skip
    peaks = []
    for arguments in commands:
        process = subprocess.Popen(
            tiny.command("checkpoint", *arguments), env=tiny.environment(), stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, arguments
        peaks.append(usage.ru_maxrss / 1024)
    return max(peaks)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut_off, r"rank-00000\.safetensors: cut off: 1,000 bytes, the manifest says [\d,]+"),
    "flipped": (lambda run: flip(shard_of(run, 8, 1)), r"rank-00001\.safetensors: contents changed"),
    "empty": (lambda run: shard_of(run, 8).write_bytes(b""), r"rank-00000\.safetensors: empty"),
    "missing": (lambda run: shard_of(run, 8, 1).unlink(), r"rank-00001\.safetensors: missing"),
    "of another checkpoint": (swap, r"rank-00001\.safetensors: is rank-00001\.safetensors of step 6"),
    "no manifest": (
        lambda run: layout.manifest_path(step_of(run, 8)).unlink(),
        r"manifest\.json: No such file or directory: its shards can't be told apart",
    ),
    "garbled manifest": (
        lambda run: os.truncate(layout.manifest_path(step_of(run, 8)), 500),
        r"manifest\.json: 500 bytes that are no JSON",
    ),
    "empty manifest": (lambda run: layout.manifest_path(step_of(run, 8)).write_text(""), r"manifest\.json: empty"),
    "manifest of another step": (
        lambda run: edit_manifest(run, 8, lambda manifest: manifest.update(step=7)),
        r"manifest\.json: is that of step 7",
    ),
    "flipped manifest": (
        lambda run: layout.manifest_path(step_of(run, 8)).write_bytes(
            layout.manifest_path(step_of(run, 8)).read_bytes().replace(b'"tokens":', b'"tokenz":', 1)
        ),
        r"manifest\.json: changed \(the hash that it holds of itself is another\)",
    ),
    "no counter": (
        lambda run: edit_manifest(run, 8, lambda manifest: manifest["state"]["train"].update(tokens=-1)),
        r"manifest\.json: state\.train\.tokens is '-1', no count",
    ),
    "gap": (
        lambda run: edit_manifest(run, 8, lambda manifest: slices(manifest)[-1].__setitem__(2, 1000)),
        r"lm_head\.weight weight: elements 1,000\.\.16,383 are in no shard",
    ),
    "twice": (
        lambda run: edit_manifest(run, 8, repeat),
        r"lm_head\.weight weight: elements 5\.\.14 are in two shards",
    ),
    "another dtype": (
        lambda run: edit_manifest(
            run, 8, lambda manifest: manifest["tensors"]["lm_head.weight"]["states"]["weight"].update(dtype="float16")
        ),
        r"lm_head\.weight::weight is [\d,]+ x float32, the manifest says [\d,]+ x float16",
    ),
}
"""Damage to step 8, and what verify says."""
HARMLESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "stray file": (
        lambda run: (step_of(run, 8) / "notes.txt").write_text("x"),
        r"notes\.txt: the manifest does not list it\n",
    ),
    "stray shard": (
        lambda run: shutil.copy(shard_of(run, 6), step_of(run, 8) / "rank-00002.safetensors"),
        r"rank-00002\.safetensors: the manifest does not list it: it is rank-00000\.safetensors of step 6",
    ),
    "newer": (newer, r"has format version 99, this trainer reads up to 3: upgrade it"),
    "pointer to an absent one": (
        lambda run: layout.pointer_path(run).write_text("step-00000010\n"),
        "latest names step 10, which is not there",
    ),
    "garbled pointer": (
        lambda run: layout.pointer_path(run).write_bytes(b"\xff\xfe../../etc"),
        "which is no checkpoint",
    ),
    "no pointer": (lambda run: layout.pointer_path(run).unlink(), "latest: No such file or directory"),
}
