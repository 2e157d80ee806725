"""Disks that fill up or fail while a checkpoint is written, and checkpoints that are damaged afterwards.

A save that fails is told by name, all ranks agree on it, the checkpoint before stays, and training goes on or ends as
``checkpoint.on_error`` says. A damaged checkpoint is passed over, or refused, by all ranks together.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked_runs import STEPS, Kill, Trainer
from kill_sweep import refuse_damage, tensors
from packages import give_up

from trainer.checkpoint import layout
from trainer.core.lock_owner import Owner, Place
from trainer.core.run_lock import holder, lock_path

SAVES = {"every_steps": 5, "keep_last": 5}
WAYS = [pytest.param(False, id="synchronous"), pytest.param(True, id="asynchronous")]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture(scope="module")
def straight(trainer: Trainer) -> Path:
    """A run that nothing happens to."""
    recipe = trainer.recipe("straight", checkpoint=SAVES)
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "straight"


@pytest.fixture
def small_disk(trainer: Trainer, request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Path]]:
    """Return what mounts a file system of a given size as a run's directory."""
    mounted: list[Path] = []

    def mount(run: str, size: str) -> Path:
        path = trainer.directory / run
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            give_up(f"can't mount a small file system: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def held(run: Path, tidy: bool = True) -> list[int]:
    """Return the committed steps; each is opened and hashed, and if it should be ``tidy`` nothing else is left."""
    refuse_damage(run)
    left = [path.name for path in layout.checkpoints_directory(run).iterdir() if path.name.startswith(".")]
    assert left == [] or not tidy
    return [step for step, _ in layout.step_directories(run)]


def said(recipe: Path) -> str:
    return recipe.with_suffix(".out").read_text()


def same_end(trainer: Trainer, run: str, straight: str = "straight", steps: int = STEPS) -> None:
    """The run ended as the straight one did, to the last bit."""
    assert trainer.metrics(run) == trainer.metrics(straight)
    (_, expected), (step, found) = tensors(trainer.directory / straight), tensors(trainer.directory / run)
    assert (step, found.keys()) == (steps, expected.keys())
    assert all(bool((found[key] == expected[key]).all()) for key in expected)


CAUSES = {
    # what rank 1 meets when it writes its part of step 10; what the message says
    "fill": ("checkpoint.before_shard:1:10:fill", "No space left on device"),
    "chmod": ("checkpoint.before_shard:1:10:chmod", "Permission denied"),
    "fsize": ("checkpoint.before_shard:1:10:fsize,checkpoint.begin:1:15:nofsize", "File too large"),
    "eio": ("checkpoint.before_shard:1:10:eio", "Input/output error"),
}


def failing(
    trainer: Trainer, small_disk: Callable[[str, str], Path], cause: str, asynchronous: bool, on_error: str
) -> tuple[Path, list[int]]:
    """Train a run whose save at step 10 fails on rank 1; return recipe and exit codes."""
    run = f"{cause}-{asynchronous}-{on_error}"
    if cause == "fill":
        small_disk(run, "16m")
    recipe = trainer.recipe(run, checkpoint=SAVES | {"asynchronous": asynchronous, "on_error": on_error})
    codes = trainer.train(recipe, faults=CAUSES[cause][0], privileged=cause != "chmod")
    lines = [line for line in said(recipe).splitlines() if "checkpoint of step 10 was not written: " in line]
    assert lines, said(recipe)
    named = lines[-1].partition("rank 1: ")[2]
    assert CAUSES[cause][1] in named
    assert "rank-00001.safetensors" in named
    return recipe, codes


@pytest.mark.parametrize("asynchronous", WAYS)
@pytest.mark.parametrize("cause", CAUSES)
def test_training_goes_on_after_a_save_that_failed(
    trainer: Trainer, straight: Path, small_disk: Callable[[str, str], Path], cause: str, asynchronous: bool
) -> None:
    recipe, codes = failing(trainer, small_disk, cause, asynchronous, "continue")
    trainer.check(codes, recipe)
    assert "training goes on" in said(recipe)
    # What can't be written to can't be emptied: the next start tries again.
    assert held(trainer.directory / recipe.stem, tidy=cause != "chmod") == [5, 15, 20]
    same_end(trainer, recipe.stem)


@pytest.mark.parametrize(("cause", "asynchronous"), [("fill", True), ("chmod", False), ("fsize", True), ("eio", False)])
def test_a_run_ends_after_a_save_that_failed_if_asked_to(
    trainer: Trainer, straight: Path, small_disk: Callable[[str, str], Path], cause: str, asynchronous: bool
) -> None:
    recipe, codes = failing(trainer, small_disk, cause, asynchronous, "stop")
    assert codes == [1, 1]
    run = trainer.directory / recipe.stem
    status = trainer.status(run.name)
    assert (status["state"], status["exit_code"], status["last_checkpoint_step"]) == ("failed", 1, 5)
    assert "rank-00001.safetensors" in status["reason"]
    assert held(run, tidy=cause != "chmod") == [5]
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.status(run.name)["resumed_step"] == 5
    same_end(trainer, run.name)


@pytest.mark.parametrize("asynchronous", WAYS)
def test_a_disk_too_small_for_what_is_to_be_kept(
    trainer: Trainer, straight: Path, small_disk: Callable[[str, str], Path], asynchronous: bool
) -> None:
    run = f"small-{asynchronous}"
    path = small_disk(run, "3m")
    recipe = trainer.recipe(run, checkpoint=SAVES | {"asynchronous": asynchronous})
    assert trainer.train(recipe) == [1, 1]
    assert "for 6 checkpoints" in said(recipe)  # before the first step
    assert f"{path / 'checkpoints'} has" in trainer.status(run)["reason"]
    assert held(path) == [5, 10]
    subprocess.run(["mount", "-o", "remount,size=16m", str(path)], check=True)
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.status(run)["resumed_step"] == 10
    same_end(trainer, run)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGED = [
    ("rank-00000.safetensors", truncate),
    ("rank-00000.safetensors", Path.unlink),
    ("rank-00001.safetensors", flip),
    ("rank-00001.safetensors", empty),
    *(("manifest.json", damage) for damage in (truncate, flip, empty, Path.unlink)),
]


@pytest.fixture(scope="module")
def longer(trainer: Trainer) -> Path:
    """A straight run of 25 steps: without its last checkpoint it has something left to do at step 20."""
    recipe = trainer.recipe("longer", checkpoint=SAVES, run={"steps": STEPS + 5})
    trainer.check(trainer.train(recipe), recipe)
    return trainer.directory / "longer"


def copy(trainer: Trainer, straight: Path, run: str, *without: int) -> Path:
    """Copy the straight run as ``run``, without some of its checkpoints."""
    target = trainer.directory / run
    shutil.copytree(straight, target, symlinks=True)
    for step in without:
        shutil.rmtree(layout.step_directory(target, step))
    return target


def tree(run: Path) -> dict[str, bytes]:
    paths = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in [*paths, run / "metrics.jsonl"]}


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(
    trainer: Trainer, longer: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = copy(trainer, longer, f"damaged-{name}-{damage.__name__}", STEPS + 5)
    damage(layout.step_directory(run, 20) / name)
    recipe = trainer.recipe(run.name, checkpoint=SAVES, run={"steps": STEPS + 5})
    trainer.check(trainer.train(recipe), recipe)
    assert f"passing over damaged checkpoint step-00000020: {name}" in said(recipe)
    assert trainer.status(run.name)["resumed_step"] == 15
    assert held(run) == [5, 10, 15, 20, 25]
    same_end(trainer, run.name, "longer", STEPS + 5)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("rank-00001.safetensors", flip), ("rank-00000.safetensors", Path.unlink), ("manifest.json", truncate),
     ("manifest.json", Path.unlink)],
)  # fmt: skip
def test_a_required_checkpoint_that_is_damaged_is_refused_by_all_ranks(
    trainer: Trainer, longer: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = copy(trainer, longer, f"required-{name}-{damage.__name__}", STEPS + 5)
    damage(layout.step_directory(run, 20) / name)
    before = tree(run)
    recipe = trainer.recipe(run.name, checkpoint=SAVES | {"resume": "require"}, run={"steps": STEPS + 5})
    assert trainer.train(recipe) == [2, 2]
    assert f"step-00000020 is damaged: {name}" in said(recipe)
    assert tree(run) == before


def test_nothing_is_started_over_where_all_checkpoints_are_damaged(trainer: Trainer, longer: Path) -> None:
    run = copy(trainer, longer, "all-damaged", 5, STEPS + 5)
    (layout.step_directory(run, 10) / "manifest.json").unlink()
    truncate(layout.step_directory(run, 15) / "manifest.json")
    flip(layout.step_directory(run, 20) / "rank-00001.safetensors")
    before = tree(run)
    recipe = trainer.recipe(run.name, checkpoint=SAVES, run={"steps": STEPS + 5})
    assert trainer.train(recipe) == [1, 1]
    assert "all 3 checkpoints are damaged; nothing was changed" in said(recipe)
    assert tree(run) == before


@pytest.mark.parametrize(
    "content", [b"", b"step-0000", b"step-00000020\n", b"step-0000001\xb5\n", b"../elsewhere", None]
)
def test_a_pointer_that_names_nothing_does_not_matter(trainer: Trainer, straight: Path, content: bytes | None) -> None:
    run = copy(trainer, straight, f"pointer-{content.hex() if content is not None else None}", 20)
    pointer = layout.pointer_path(run)
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    recipe = trainer.recipe(run.name, checkpoint=SAVES)
    trainer.check(trainer.train(recipe), recipe)
    assert str(pointer) in said(recipe)
    assert trainer.status(run.name)["resumed_step"] == 15
    assert pointer.read_text() == "step-00000020\n"
    same_end(trainer, run.name)


def test_a_checkpoint_of_a_newer_format_is_refused_by_all_ranks(trainer: Trainer, straight: Path) -> None:
    run = copy(trainer, straight, "newer")
    path = layout.manifest_path(layout.step_directory(run, 20))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    before = tree(run)
    recipe = trainer.recipe(run.name, checkpoint=SAVES)
    assert trainer.train(recipe) == [2, 2]
    assert "step-00000020 has format version 99, this trainer reads up to" in said(recipe)
    assert tree(run) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_is_resumed_from_twice_with_the_same_end(trainer: Trainer, straight: Path, workers: int) -> None:
    # Step 10 was evaluated before it was saved; the straight run reads with 2 workers.
    run = copy(trainer, straight, f"again-{workers}", 15, 20)
    recipe = trainer.recipe(run.name, checkpoint=SAVES)
    trainer.check(trainer.train(recipe, f"data.workers={workers}"), recipe)
    assert trainer.status(run.name)["resumed_step"] == 10
    same_end(trainer, run.name)


@pytest.mark.parametrize("asynchronous", WAYS)
def test_a_stop_inside_an_accumulation_saves_at_its_end(trainer: Trainer, asynchronous: bool) -> None:
    """16 micro-batches a step on each rank: a signal at any moment is inside one."""
    settings = {"batch": {"global_size": 32, "micro_size": 1}, "run": {"steps": 16}}
    saves = {"checkpoint": {"every_steps": 2, "asynchronous": asynchronous}}
    undisturbed = trainer.recipe("accumulated", **settings)
    if not (trainer.directory / "accumulated").exists():
        trainer.check(trainer.train(undisturbed), undisturbed)
    recipe = trainer.recipe(f"accumulated-{asynchronous}", **settings, **saves)
    run = trainer.directory / recipe.stem
    for _ in range(2):
        before = max((step for step, _ in layout.step_directories(run)), default=0)
        stop = Kill(run=run, newer_than=before, delay_seconds=0.05, victims=[1], signal=12)  # SIGUSR2
        assert trainer.train(recipe, kill=stop) == [75, 75]
        status = trainer.status(run.name)
        assert status["step"] == status["last_checkpoint_step"] == held(run)[-1] > before
        assert max(step for step, kind in trainer.metrics(run.name) if kind == "step") == status["step"]
    trainer.check(trainer.train(recipe), recipe)
    assert trainer.metrics(run.name) == trainer.metrics("accumulated")


def stranger(**changes: Any) -> bytes:
    """Return the lock's content of a process on another host, which we would see beat four times a second."""
    place = Place(host="node3", boot_id="other", pid_namespace="")
    return Owner(**{**vars(Owner.new(place, 0.25)), "pid": 17, **changes}).record()


def test_the_lock_of_a_dead_host_is_explained_and_taken_over(trainer: Trainer, straight: Path) -> None:
    run = copy(trainer, straight, "dead-host", 20)
    lock_path(run).write_bytes(stranger())
    recipe = trainer.recipe(run.name, checkpoint=SAVES)
    trainer.check(trainer.train(recipe), recipe)
    assert "stale lock of pid 17 on node3 (no sign of life for 0.6 s) taken over" in said(recipe)
    assert lock_path(run).read_bytes() == b""
    same_end(trainer, run.name)


def test_a_second_job_is_refused_with_the_name_of_the_first(trainer: Trainer) -> None:
    recipe = trainer.recipe("two-jobs", checkpoint=SAVES, run={"steps": 60})
    run = trainer.directory / recipe.stem
    seen: dict[str, Any] = {}

    def start_second() -> None:
        deadline = time.monotonic() + 60
        while not layout.step_directories(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen["owner"] = holder(run)
        seen["second"] = tiny.run(tiny.command("train", recipe), run)

    thread = threading.Thread(target=start_second)
    thread.start()
    trainer.check(trainer.train(recipe), recipe)
    thread.join()
    assert seen["owner"].startswith("pid ")
    assert seen["second"].returncode == 2
    assert f"another job is training here ({seen['owner']})" in " ".join(seen["second"].stderr.split())
    assert trainer.status(run.name)["attempt"] == 1


@pytest.mark.parametrize("asynchronous", WAYS)
def test_a_run_whose_directory_was_taken_commits_nothing_more(
    trainer: Trainer, straight: Path, asynchronous: bool
) -> None:
    """A process that was suspended on another host for a minute wakes up: what it finds is a lock of another one."""
    recipe = trainer.recipe(
        f"taken-{asynchronous}", checkpoint=SAVES | {"asynchronous": asynchronous}, run={"steps": 400}
    )
    run = trainer.directory / recipe.stem
    seen: dict[str, Any] = {}

    def take() -> None:
        deadline = time.monotonic() + 60
        while not layout.step_directories(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        lock_path(run).write_bytes(stranger())
        seen["steps"] = [step for step, _ in layout.step_directories(run)]

    thread = threading.Thread(target=take)
    thread.start()
    codes = trainer.train(recipe)
    thread.join()
    assert codes == [1, 1], said(recipe)
    assert "another job has taken over" in said(recipe)
    # One commit may have passed the question when the lock was taken.
    assert held(run)[-1] <= seen["steps"][-1] + 5
    assert trainer.status(run.name)["state"] == "running"  # not this one's any more
    assert b"node3" in lock_path(run).read_bytes()
