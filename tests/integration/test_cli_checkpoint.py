"""`trainer checkpoint ...` on checkpoints of real runs of two ranks, whole and damaged on purpose."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from checkpoint_damage import (
    DAMAGE,
    HARMLESS,
    cli,
    command_line,
    cut_off,
    edit_manifest,
    flip,
    overwrite,
    peak,
    rehash,
    reshaped,
    shard_of,
    slices,
    step_of,
    write_large,
)
from forked_runs import Trainer
from safetensors.torch import load_file

from trainer.checkpoint import export, layout, survey
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.tensor_diff import tensor_differences
from trainer.cli.train import _launch as start
from trainer.core.errors import RefusedError
from trainer.core.run_lock import RunLock

STEPS = [4, 6, 8]
SAVES = {"every_steps": 2, "keep_last": 2, "keep_every_steps": 4}
LAYOUTS = {
    "tiny": {},
    "zero3": {"deepspeed": {"base": "zero3"}},
    "tensor": {"parallel": {"tensor": 2}},
    "node": {"checkpoint": {"files": "node"}},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tiny.write_world(tmp_path_factory.mktemp("checkpoints"))
    with Trainer(folder) as trainer:
        for name, sections in LAYOUTS.items():
            settings = SAVES | sections.get("checkpoint", {})
            given = {"run": {"directory": f"runs/{name}"}} | sections | {"checkpoint": settings}
            recipe = tiny.write_recipe(folder, f"{name}.yaml", **given)
            trainer.check(trainer.train(recipe), recipe)
        yield trainer


@pytest.fixture(scope="module")
def world(trainer: Trainer) -> Path:
    return trainer.directory


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return what copies a run, so that it can be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(world / "runs" / name, tmp_path / name))

    return make


@pytest.fixture
def run(copy: Callable[[str], Path]) -> Path:
    return copy("tiny")


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_checkpoints_are_listed_and_verified(name: str, world: Path) -> None:
    code, said = cli("list", world / "runs" / name)
    assert code == 0
    rows = said.splitlines()
    assert max(map(len, rows)) <= 100
    assert [int(row.split()[0]) for row in rows[1:]] == STEPS
    assert all("complete" in row and "float32" in row for row in rows[1:])
    assert ["milestone" in row for row in rows[1:]] == [True, False, True]
    assert ["latest" in row for row in rows[1:]] == [False, False, True]
    assert all(("tensor 2" in row) == (name == "tensor") for row in rows[1:])
    assert cli("verify", world / "runs" / name, "--nan-scan") == (0, "".join(f"step {step}: ok\n" for step in STEPS))


def test_list_as_json(world: Path) -> None:
    done = tiny.run(tiny.command("checkpoint", "list", "runs/zero3", "--json"), world)
    found = json.loads(done.stdout)
    assert [held["step"] for held in found["checkpoints"]] == STEPS
    newest = found["checkpoints"][-1]
    assert (newest["complete"], newest["latest"], newest["milestone"], newest["problems"]) == (True, True, True, [])
    assert (newest["world_size"], newest["topology"]["zero_stage"], newest["dtype"]) == (2, 3, "float32")
    assert newest["bytes"] == sum(path.stat().st_size for path in step_of(world / "runs/zero3", 8).iterdir())
    assert (found["latest"], found["latest_problem"], found["interrupted"]) == (8, None, [])


@pytest.mark.parametrize("case", [*DAMAGE, *HARMLESS])
def test_verify_names_what_is_wrong(case: str, run: Path) -> None:
    change, expected = (DAMAGE | HARMLESS)[case]
    change(run)
    code, said = cli("verify", run)
    assert code == 1
    assert re.search(expected, said), said
    assert "step 4: ok\nstep 6: ok\n" in said
    if case in DAMAGE:
        assert "step 8: 1 wrong\n" in said, said


def test_verify_passes_over_what_is_deleted_while_it_reads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that trains there deletes step 6 after the list was made."""

    def known_files_late(run_directory: Path) -> dict[str, str]:
        shutil.rmtree(step_of(run_directory, 6))
        return {}

    monkeypatch.setattr("trainer.checkpoint.doctor.known_files", known_files_late)
    assert cli("verify", run) == (0, "step 4: ok\nstep 6: deleted meanwhile\nstep 8: ok\n")


def test_list_while_a_job_saves_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer is moved on, and what it named deleted, between reading it and looking at the checkpoints."""
    layout.temporary_directory(run, 10, "0002").mkdir()
    held, moved = survey._all_held, []

    def all_held_late(run_directory: Path) -> tuple[survey.Held, ...]:
        if not moved:
            moved.append(step_of(run, 8).rename(run / "deleted"))
            layout.pointer_path(run).write_text("step-00000006\n")
        return held(run_directory)

    monkeypatch.setattr(survey, "_all_held", all_held_late)
    lock = RunLock(run)
    try:
        code, said = cli("list", run)
    finally:
        lock.release()
    assert code == 0
    assert "latest names" not in said
    assert ".step-00000010.tmp-0002: being written or deleted\n" in said


def test_verify_of_one_step_reads_no_other(run: Path) -> None:
    cut_off(run)
    assert cli("verify", run, "--step", 6) == (0, "step 6: ok\n")
    assert cli("verify", run, "--step", 8)[0] == 1


@pytest.mark.parametrize("name", ["tensor", "node"])
def test_verify_where_parts_are_cut_or_files_shared(name: str, copy: Callable[[str], Path]) -> None:
    run = copy(name)
    if name == "tensor":
        edit_manifest(run, 8, lambda manifest: slices(manifest, "model.layers.0.mlp.up_proj.weight").pop())
        expected = "model.layers.0.mlp.up_proj.weight weight: no shard holds part 1 of 2"
    else:
        flip(step_of(run, 8) / "node-00000.safetensors")
        expected = "node-00000.safetensors: rank 1's part of it changed"
    code, said = cli("verify", run)
    assert (code, said.count(" wrong")) == (1, 1)
    assert expected in said


def test_shards_that_hold_other_tensors_than_the_manifest_says(run: Path) -> None:
    shutil.copy(shard_of(run, 8, 1), shard_of(run, 8, 0))
    rehash(run, 8, "rank-00000.safetensors")
    code, said = cli("verify", run, "--step", 8)
    assert code == 1
    assert "rank-00000.safetensors" in said


def test_nan_scan_counts_and_places(copy: Callable[[str], Path]) -> None:
    """Two NaN and an Inf, put into rank 1's half of a matrix by hand."""
    run = copy("zero3")
    manifest = layout.read_manifest(step_of(run, 8))
    assert manifest is not None
    shard, start, _ = next(piece for piece in slices(manifest) if piece[0] == 1)
    path = shard_of(run, 8, shard)
    for place, value in ((70, float("nan")), (71, float("inf")), (500, float("nan"))):
        overwrite(path, "lm_head.weight::weight", place, torch.tensor([value]))
    rehash(run, 8, path.name)
    assert cli("verify", run, "--step", 8) == (0, "step 8: ok\n")
    row, column = divmod(start + 70, 32)
    expected = f"step 8: 1 wrong\n  lm_head.weight weight: 2 NaN, 1 Inf, the first at [{row}, {column}]\n"
    assert cli("verify", run, "--step", 8, "--nan-scan") == (1, expected)


@pytest.mark.parametrize("case", DAMAGE)
def test_repair_moves_what_is_damaged_aside(case: str, run: Path) -> None:
    DAMAGE[case][0](run)
    damaged = {path.name: path.read_bytes() for path in step_of(run, 8).iterdir()}
    before = tiny.tree(run)
    code, said = cli("repair", run, "--dry-run")
    assert code == 0
    assert "would do: step 8 is damaged" in said
    assert tiny.tree(run) == before
    code, said = cli("repair", run)
    assert code == 0
    assert "step 8 is damaged" in said
    assert "latest names step 8" in said or "it now names step 6" in said
    assert ("can't be rebuilt" in said) == ("manifest" in case)
    aside = layout.checkpoints_directory(run) / "damaged" / "step-00000008"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    assert layout.pointer_path(run).read_text() == "step-00000006\n"
    assert cli("verify", run)[0] == 0
    assert cli("repair", run) == (0, "nothing to repair\n")


@pytest.mark.parametrize("case", HARMLESS)
def test_repair_of_what_harms_no_checkpoint(case: str, run: Path) -> None:
    HARMLESS[case][0](run)
    held = {path.name for path in step_of(run, 8).glob("rank-0000[01]*")}
    code, said = cli("repair", run)
    assert code == 0
    assert {path.name for path in step_of(run, 8).glob("rank-0000[01]*")} == held
    assert layout.pointer_path(run).read_text() == "step-00000008\n"
    assert cli("verify", run)[0] == (1 if case == "newer" else 0), said


def test_repair_removes_leftovers_and_closes_what_is_open(run: Path) -> None:
    checkpoints = layout.checkpoints_directory(run)
    shutil.copytree(step_of(run, 6), layout.temporary_directory(run, 10, "0002"))
    (checkpoints / ".latest.tmp-17").write_text("step-0000")
    checkpoints.chmod(0o755)
    shard_of(run, 6).chmod(0o644)
    _, said = cli("list", run)
    assert ".step-00000010.tmp-0002: left by an interrupted save" in said
    code, said = cli("repair", run)
    assert code == 0
    assert said.count("removed\n") == 2
    assert "others may look into checkpoints: made private" in said
    assert {path.name for path in checkpoints.iterdir()} == {"latest", *(layout.step_name(step) for step in STEPS)}
    assert (checkpoints.stat().st_mode & 0o777, shard_of(run, 6).stat().st_mode & 0o777) == (0o700, 0o600)
    assert cli("verify", run)[0] == 0


def test_repair_changes_nothing_where_nothing_good_would_be_left(run: Path) -> None:
    for step in STEPS:
        flip(shard_of(run, step))
    layout.temporary_directory(run, 10, "0002").mkdir()
    (run / ".lock").touch()
    before = tiny.tree(layout.checkpoints_directory(run))
    code, said = cli("repair", run)
    assert code == 1
    assert said.count("contents changed") == 3
    assert said.endswith("no good checkpoint would be left: nothing is changed\n")
    assert tiny.tree(layout.checkpoints_directory(run)) == before


@pytest.mark.parametrize("command", ["repair", "prune"])
def test_refused_while_a_job_trains_there(command: str, run: Path) -> None:
    lock = RunLock(run)
    try:
        before = tiny.tree(layout.checkpoints_directory(run))
        code, said = cli(command, run)
    finally:
        lock.release()
    assert code == 2
    assert "another job is training here" in said
    assert tiny.tree(layout.checkpoints_directory(run)) == before


def test_a_finished_run_where_a_job_trains_is_refused_too(
    world: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    arguments = Path("tiny.yaml"), [f"run.directory={run}"]
    assert start(*arguments) == 0
    assert "already finished" in capsys.readouterr().out
    lock = RunLock(run)
    try:
        with pytest.raises(RefusedError, match="another job is training here"):
            start(*arguments)
    finally:
        lock.release()


def test_diff_of_a_checkpoint_with_itself_and_with_another(world: Path, run: Path) -> None:
    same = "tensors, every element: same\nfields of the manifest: same\n"
    assert cli("diff", step_of(run, 8), f"{world / 'runs/tiny'}@8", "--tensors") == (0, same)
    code, said = cli("diff", f"{run}@4", run)
    assert code == 1
    assert "step: 4 -> 8\n" in said
    assert "state.train.step: 4 -> 8\n" in said
    assert "names, states, shapes and dtypes: same" in said
    code, said = cli("diff", f"{run}@4", run, "--tensors")
    assert code == 1
    assert "lm_head.weight exp_avg: " in said


def test_diff_names_a_lost_manifest(run: Path) -> None:
    layout.manifest_path(step_of(run, 8)).unlink()
    code, said = cli("diff", f"{run}@8", run)
    assert code == 2
    assert "A = 8: step-00000008 has no readable manifest.json → see trainer checkpoint verify" in said


def test_diff_across_layouts_tells_recipe_and_topology(world: Path) -> None:
    code, said = cli("diff", world / "runs/tiny", world / "runs/tensor")
    assert code == 1
    assert "recipe.parallel.tensor: 1 -> 2\n" in said
    assert "topology.tensor: 1 -> 2\n" in said


def test_differences_of_values_are_what_plain_safetensors_says(run: Path, world: Path) -> None:
    """One element of the optimizer state is raised by 0.5."""
    manifest = layout.read_manifest(step_of(run, 8))
    assert manifest is not None
    path = shard_of(run, 8, slices(manifest, "model.norm.weight", "exp_avg")[0][0])
    tensors = load_file(path)
    key = "model.norm.weight::exp_avg"
    changed = tensors[key].clone()
    changed[3] += 0.5
    gap = float((changed[3].double() - tensors[key][3].double()).abs())
    overwrite(path, key, 0, changed)
    rehash(run, 8, path.name)
    a, b = CheckpointReader(step_of(world / "runs/tiny", 8)), CheckpointReader(step_of(run, 8))
    (found,) = tensor_differences(a, b)
    assert (found.name, found.key, found.num_different) == ("model.norm.weight", "exp_avg", 1)
    assert found.max_difference == gap
    assert tensor_differences(a, b, values=False) == []
    code, said = cli("diff", a.directory, b.directory, "--tensors")
    assert code == 1
    assert "model.norm.weight exp_avg: 1 of 32 elements differ, by up to 0.5\n" in said


def test_prune_keeps_what_the_recipe_says(run: Path) -> None:
    code, said = cli("prune", run, "--keep-last", 1, "--keep-every", 8, "--dry-run")
    assert code == 0
    assert "step 4: would be deleted\nstep 6: would be deleted\n" in said
    assert [step for step, _ in layout.step_directories(run)] == STEPS
    assert cli("prune", run)[0] == 0
    assert [step for step, _ in layout.step_directories(run)] == STEPS
    code, said = cli("prune", run, "--keep-last", 1)
    assert (code, "step 6: deleted\n" in said) == (0, True)
    assert [step for step, _ in layout.step_directories(run)] == [4, 8]
    assert layout.temporary_directories(run) == []


def test_prune_does_not_count_damaged_ones(run: Path) -> None:
    flip(shard_of(run, 8))
    code, said = cli("prune", run, "--keep-last", 1, "--keep-every", 100)
    assert code == 0
    assert "step 8: damaged (rank-00000.safetensors: contents changed" in said
    assert [step for step, _ in layout.step_directories(run)] == [6, 8]
    assert cli("verify", run, "--step", 6)[0] == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_reshaped_checkpoints_are_the_same_bit_for_bit(name: str, ranks: int, world: Path, tmp_path: Path) -> None:
    output = reshaped(world, name, tmp_path / "out", "--ranks", ranks)
    code, said = cli("diff", world / "runs" / name, output, "--tensors")
    assert code == 0, said
    assert "tensors, every element: same\n" in said
    manifest = layout.read_manifest(step_of(output, 8))
    assert manifest is not None
    assert (manifest["world_size"], manifest["topology"]["world_size"], len(manifest["files"])) == (ranks,) * 3
    each = -(-512 * 32 // ranks)
    held = [load_file(step_of(output, 8) / shard) for shard in manifest["shards"]]
    assert [len(shard["lm_head.weight::weight"]) for shard in held[:-1]] == [each] * (ranks - 1)
    assert all(("rng::torch" in shard) == (ranks == 2) for shard in held)
    modes = {path.stat().st_mode & 0o077 for path in (step_of(output, 8), *step_of(output, 8).iterdir())}
    assert modes == {0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_alone(dtype: str, world: Path, tmp_path: Path) -> None:
    output = reshaped(world, "tensor", tmp_path / "out", "--ranks", 1, "--weights-only", "--dtype", dtype)
    original, alone = (CheckpointReader(step_of(run, 8)) for run in (world / "runs/tensor", output))
    for name in original.names():
        assert torch.equal(alone.whole(name), original.whole(name).to(getattr(torch, dtype)))
    held = load_file(shard_of(output, 8))
    assert set(held) == {f"{name}::weight" for name in original.names()}
    assert "optimizer" not in (layout.read_manifest(step_of(output, 8)) or {})


@pytest.mark.parametrize(("name", "ranks"), [("tiny", 2), ("tensor", 1), ("tensor", 2)])
def test_training_goes_on_from_a_reshaped_checkpoint(
    name: str, ranks: int, trainer: Trainer, world: Path, tmp_path: Path
) -> None:
    """Also where it says 2 ranks and holds no generators: rewritten for 1 rank, and that for 2."""
    output = reshaped(world, name, tmp_path / "out", "--ranks", ranks if name == "tiny" else 1)
    if (name, ranks) == ("tensor", 2):
        output = tmp_path / "again"
        assert cli("reshape", tmp_path / "out", "--output", output, "--ranks", 2)[0] == 0
    recipe = world / f"{name if name == 'tiny' else 'zero3'}.yaml"
    trainer.check(trainer.train(recipe, f"run.directory={output}", "run.steps=9", world=ranks), recipe)
    assert json.loads((output / "status.json").read_text())["resumed_step"] == 8
    said = recipe.with_suffix(".out").read_text()
    why = "step-00000008 holds no states of random generators: random generators start anew"
    assert (why in said) == ("start anew" in said) == (name == "tensor"), said


@pytest.fixture
def untouched(world: Path) -> Iterator[None]:
    before = tiny.tree(world)
    yield
    assert tiny.tree(world) == before


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "data"], "RUN_DIR = 'data': holds no checkpoint"),
        (["verify", "no/such/run"], "RUN_DIR = 'no/such/run': holds no checkpoint"),
        (["verify", "runs/tiny", "--step", "5"], "--step = 5: there is no such checkpoint (there are: 4, 6, 8)"),
        (["repair", "data"], "RUN_DIR = 'data': holds no checkpoint"),
        (["prune", "data"], "RUN_DIR = 'data': holds no checkpoint"),
        (["prune", "runs/tiny", "--keep-last", "0"], "--keep-last = 0: must be 1 or more"),
        (["diff", "runs/tiny", "runs/tiny@5"], "B = 5: there is no such checkpoint"),
        (["diff", "runs/tiny@x", "runs/tiny"], "A = 'runs/tiny@x': is not RUN_DIR@STEP"),
        (["diff", "data", "runs/tiny"], "RUN_DIR = 'data': holds no checkpoint"),
        (["reshape", "runs/tiny", "--output", "runs/zero3"], "--output = 'runs/zero3': is not empty"),
        (["reshape", "runs/tiny", "--output", "runs/tiny/new"], "lies in RUN_DIR"),
        (["reshape", "runs/tiny", "--output", "tiny.yaml"], "--output = 'tiny.yaml': is not empty"),
        (["reshape", "runs/tiny", "--output", "new", "--ranks", "0"], "--ranks = 0: must be 1 to"),
        (["reshape", "runs/tiny", "--output", "new", "--step", "5"], "--step = 5: there is no such checkpoint"),
        (["reshape", "runs/tiny", "--output", "new", "--dtype", "bfloat16"], "give --weights-only too"),
        (["reshape", "runs/tiny", "--output", "new", "--weights-only", "--dtype", "int8"], "must be one of float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments: list[str], expected: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    code, said = cli(*arguments)
    assert code == 2
    assert expected in said
    assert said.count("\n  - ") == 1


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("fault", ["checkpoint.before_manifest", "checkpoint.before_rename"])
def test_a_killed_reshape_leaves_nothing_that_counts_and_can_be_repeated(
    fault: str, world: Path, tmp_path: Path
) -> None:
    command = tiny.command("checkpoint", "reshape", "runs/tiny", "--output", tmp_path / "out")
    faults = {"TRAINER_ALLOW_FAULTS": "1", "TRAINER_FAULTS": f"{fault}:0:8:kill"}
    assert tiny.run(command, world, variables=faults).returncode == -9
    assert layout.step_directories(tmp_path / "out") == []
    done = tiny.run(command, world)
    assert done.returncode == 0, done.stderr
    assert cli("verify", tmp_path / "out") == (0, "step 8: ok\n")


def test_memory_does_not_grow_with_tensors(world: Path, tmp_path: Path) -> None:
    """One tensor of 400 MB: rewritten, compared and scanned in little more memory than the tiny model."""
    write_large(tmp_path / "big", world / "runs/tiny")
    assert peak(tmp_path / "big", tmp_path / "out") < peak(world / "runs/tiny", tmp_path / "small") + 150


@pytest.mark.usefixtures("untouched")
def test_a_damaged_checkpoint_is_not_rewritten(run: Path, tmp_path: Path) -> None:
    flip(shard_of(run, 8))
    code, said = cli("reshape", run, "--output", tmp_path / "out")
    assert code == 1
    assert "contents changed" in said
    assert not (tmp_path / "out").exists()


def test_a_damaged_newest_one_is_not_replaced_in_silence(run: Path, world: Path, tmp_path: Path) -> None:
    """Whoever names no step gets the newest, or is told which is."""
    shard_of(run, 8).unlink()
    output = ("--output", tmp_path / "out")
    for arguments, fix in (
        (("export", run, *output), "give --step 6"),
        (("checkpoint", "reshape", run, *output), "give --step 6"),
        (("checkpoint", "diff", run, f"{run}@4"), f"give {run}@6"),
        (("evaluate", run, "--data", world / "data/valid"), "so that step 6 is the newest"),
    ):
        code, said = command_line(*arguments)
        assert code == 2, said
        assert "step 8, the newest, is damaged: rank-00000.safetensors: No such file" in said
        assert fix in said
    assert not (tmp_path / "out").exists()
    code, said = command_line("export", run, "--step", 6, *output)
    assert (code, said.splitlines()[-1]) == (0, f"exported step 6 to {tmp_path / 'out'}")


@pytest.mark.usefixtures("untouched")
def test_changed_weights_are_neither_evaluated_nor_trained_on(run: Path, trainer: Trainer) -> None:
    flip(shard_of(run, 8))
    code, said = command_line("evaluate", run, "--data", trainer.directory / "data/valid")
    assert code == 1
    assert "rank-00000.safetensors: contents changed" in said
    elsewhere = tiny.write_recipe(
        run.parent, "on.yaml",
        run={"directory": str(run.parent / "on")}, model={"path": str(run), "config": None},
        data={"train": [{"path": str(trainer.directory / "data/train")}], "validation": []},
    )  # fmt: skip
    assert trainer.train(elsewhere, world=1) == [1]
    said = elsewhere.with_suffix(".out").read_text()
    assert f"model.path = '{run}': step-00000008, the newest, is damaged: rank-00000.safetensors" in said


@pytest.mark.usefixtures("untouched")
def test_outputs_that_no_rename_can_replace(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "here")
    for output, rule in ((".", "is or holds the current directory"), ("../link", "is a link")):
        code, said = command_line("export", world / "runs/tiny", "--output", output)
        assert code == 2
        assert f"--output = '{output}': {rule}" in said
    code, said = cli("reshape", world / "runs/tiny", "--output", "../dangling")
    assert code == 2
    assert "is a link to nothing" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dangling", "here", "link"]


@pytest.mark.usefixtures("untouched")
def test_all_that_is_wrong_with_an_export_is_said_at_once(world: Path, tmp_path: Path) -> None:
    options = ("--max-shard-size", "abc", "--dtype", "int8", "--output", tmp_path / "out")
    code, said = command_line("export", world / "runs/tiny", *options)
    assert code == 2
    assert "--max-shard-size = 'abc': must be a number of bytes" in said
    assert "--dtype = 'int8'" in said
    assert said.count("\n  - ") == 2


def test_a_checkpoint_that_is_deleted_during_its_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_of = export.prompts_of

    def delete_then_go_on(*arguments: object) -> object:
        shutil.rmtree(step_of(run, 8))
        return prompts_of(*arguments)

    monkeypatch.setattr(export, "prompts_of", delete_then_go_on)
    code, said = command_line("export", run, "--output", tmp_path / "out")
    assert code == 1
    assert "step-00000008 was deleted while it was read (a job trains there): try again, or give --step" in said
    assert not (tmp_path / "out").exists()
