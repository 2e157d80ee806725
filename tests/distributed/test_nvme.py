"""State on NVMe: runs go on bit for bit, checkpoints are those of any other layout, and upstream still needs us.

Files below a megabyte stay in memory, so the model has an embedding whose halves are larger.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packages
import pytest
from forked_runs import STEPS, Trainer

# The first start compiles DeepSpeed's async_io: minutes.
pytestmark = [pytest.mark.sweep, pytest.mark.timeout(900)]

CONFIG = {"model_type": "gpt2", "vocab_size": 24_000, "n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 64}
NVME = {"base": "zero3_offload_nvme", "override": {"zero_optimization": {"sub_group_size": 400_000}}}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    probe = "from deepspeed.ops.op_builder import AsyncIOBuilder as b; raise SystemExit(not b().is_compatible())"
    packages.require(["libaio-dev"], lambda: run(probe).returncode == 0)
    built = run("from deepspeed.ops.op_builder import AsyncIOBuilder as b; b().load(verbose=False)")
    assert built.returncode == 0, built.stderr[-2000:]
    with Trainer(tmp_path_factory.mktemp("nvme")) as made:
        yield made


def run(code: str, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def settings(dtype: str, **sections: Any) -> dict[str, Any]:
    return {"model": {"config": CONFIG, "dtype": dtype}, "deepspeed": NVME, **sections}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_undisturbed(trainer: Trainer, dtype: str) -> None:
    straight = trainer.recipe(f"{dtype}-straight", **settings(dtype))
    trainer.check(trainer.train(straight), straight)
    killed = trainer.recipe(f"{dtype}-killed", **settings(dtype))
    assert trainer.train(killed, faults="train.step:*:13:kill") == [-9, -9]
    lying = {path.parent.name for path in (trainer.directory / f"{dtype}-killed" / "offload").rglob("*.swp")}
    assert lying == {"rank0", "rank1"}
    trainer.check(trainer.train(killed), killed)
    assert trainer.metrics(f"{dtype}-killed") == trainer.metrics(f"{dtype}-straight")
    assert trainer.status(f"{dtype}-killed")["resumed_step"] == 10
    assert not (trainer.directory / f"{dtype}-killed" / "offload").exists()


def test_a_padded_vocabulary_fits_the_buffers(trainer: Trainer) -> None:
    model = {"config": CONFIG, "dtype": "float32", "vocabulary_multiple": 20_000}  # 40,000 of 24,000
    recipe = trainer.recipe("padded", model=model, deepspeed=NVME)
    trainer.check(trainer.train(recipe, "run.steps=2"), recipe)


def test_verification_leaves_the_files_of_a_run_alone(trainer: Trainer) -> None:
    recipe = trainer.recipe("verified", **settings("float32"))
    held = trainer.directory / "verified" / "offload" / "zero_stage_3" / "optimizer" / "rank0" / "0_1.tensor.swp"
    held.parent.mkdir(parents=True)
    held.write_text("of a run that is going on")
    command = [sys.executable, "-W", "ignore", "-m", "trainer", "verify", str(recipe), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "passed: " in done.stdout, done.stdout + done.stderr
    assert [path for path in (trainer.directory / "verified").rglob("*") if path.is_file()] == [held]


def test_checkpoints_are_those_of_memory(trainer: Trainer) -> None:
    """The same run without offload, and one that goes on from NVMe's checkpoint without it."""
    model = {"config": CONFIG | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "dtype": "float32"}
    there = trainer.recipe("there", model=model, deepspeed=NVME)
    trainer.check(trainer.train(there), there)
    here = trainer.recipe("here", model=model, deepspeed={"base": "zero1"})
    trainer.check(trainer.train(here), here)
    shutil.copytree(trainer.directory / "there", trainer.directory / "moved")
    shutil.rmtree(trainer.directory / "moved" / "checkpoints" / f"step-{STEPS:08d}")
    moved = trainer.recipe("moved", model=model, deepspeed={"base": "zero1"})
    trainer.check(trainer.train(moved), moved)
    assert trainer.status("moved")["resumed_step"] == 10
    expected = trainer.metrics("here")
    for name in ("there", "moved"):
        found = trainer.metrics(name)
        assert found.keys() == expected.keys()
        assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5


def test_reads_to_odd_places_still_fail_without_a_word_upstream(trainer: Trainer) -> None:
    code = """
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from trainer.engine.upstream.nvme_swapping import read_buffered
from pathlib import Path
handle = AsyncIOBuilder().load(verbose=False).aio_handle(1048576, 8, False, True, 1)
buffer = handle.new_cpu_locked_tensor(1 << 20, torch.zeros(1)).fill_(3.0)
path = "PATH"
handle.async_pwrite(buffer.narrow(0, 0, 1 << 19), path, 0); handle.wait()
buffer.zero_()
place = buffer.narrow(0, 4, 1 << 19)
handle.async_pread(place, path, 0)
buffered = read_buffered(Path(path), 1 << 19, torch.float32)
print("done:", handle.wait(), "read:", float(place.sum()), float(buffered.sum()))
"""
    done = run(code.replace("PATH", str(trainer.directory / "odd")))
    assert f"done: 1 read: 0.0 {3.0 * (1 << 19)}" in done.stdout, done.stdout + done.stderr


def test_a_killed_build_still_blocks_upstream_and_not_us(trainer: Trainer) -> None:
    code = """
from pathlib import Path
from torch.utils import cpp_extension
from deepspeed.ops.op_builder import AsyncIOBuilder
{setup}
with {manager}:
    AsyncIOBuilder().load(verbose=False)
print("loaded")
"""
    place = run("from torch.utils import cpp_extension as c; print(c._get_build_directory('async_io', False))")
    lock = Path(place.stdout.split()[-1], "lock")
    upstream = code.format(setup="import contextlib", manager="contextlib.nullcontext()")
    ours = code.format(
        setup="from trainer.engine.upstream.stale_build_lock import building", manager="building('async_io')"
    )
    lock.touch()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            run(upstream, timeout=30)
        done = run(ours)
        assert "loaded" in done.stdout, done.stderr
    finally:
        lock.unlink(missing_ok=True)


def test_a_parameter_twice_in_the_order_is_still_refused_upstream() -> None:
    code = """
from types import SimpleNamespace as N
import torch
import deepspeed.runtime.swap_tensor.partitioned_param_swapper as module
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper as S
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
module.print_rank_0 = print
def swapper():
    made = S.__new__(S)
    made.param_id_to_numel, made.param_id_to_buffer_id, made.param_id_to_swap_buffer = {7: 4}, {}, {}
    made.available_buffer_ids, made.id_to_path, made.numel_alignment = [0, 1], {7: "x"}, 4
    made.buffers, made.aligned_elements_per_buffer = torch.zeros(8), 4
    return made
twice = [N(ds_id=7, ds_tensor=N(status=PartitionedParamStatus.NOT_AVAILABLE))] * 2
try:
    swapper()._allocate_and_return_buffers_for_swap_in(twice)
except AssertionError as error:
    print("refused:", error)
"""
    done = run(code)
    assert "refused: param 7 already assigned" in done.stdout, done.stdout + done.stderr
