"""Sweeps: the combinations, what is refused, and what a task of the array runs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_recipe, write_world
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.config.load import read_mapping
from trainer.core.control_file import new_command
from trainer.core.errors import Problem, RecipeError, RefusedError
from trainer.launch.control import ask_run
from trainer.launch.finished import finished_since_submission
from trainer.launch.slurm import LaunchPlan, render
from trainer.launch.submit import dependency, recorded_jobs
from trainer.launch.sweep import MAXIMUM_TASKS, plan_sweep, read_axes
from trainer.launch.sweep_file import Sweep, Task, read_sweep, write_sweep
from trainer.launch.sweep_task import train_command

pytestmark = pytest.mark.fast


def nothing(_overrides):
    return None


def test_every_combination_is_a_run_of_its_own(tmp_path):
    axes = read_axes(["optimizer.learning_rate=1e-4,3e-4", "optimizer.betas=[0.9, 0.95],[0.9, 0.99]", "run.seed=7"])
    sweep = plan_sweep("name", tmp_path / "recipe.yaml", ["a.b=1"], axes, tmp_path, nothing)
    assert [task.name for task in sweep.tasks] == ["name-0001", "name-0002", "name-0003", "name-0004"]
    assert sweep.tasks[1].values == {"optimizer.learning_rate": 1e-4, "optimizer.betas": [0.9, 0.99], "run.seed": 7}
    write_sweep(tmp_path, sweep)
    assert read_sweep(tmp_path) == sweep
    command = train_command(tmp_path, {"SLURM_ARRAY_TASK_ID": "2"})
    assert command[:5] == ["-m", "trainer", "train", str(tmp_path / "recipe.yaml"), "a.b=1"]
    (tmp_path / "recipe.yaml").write_text("run: {}")
    mapping, problems = read_mapping(tmp_path / "recipe.yaml", command[4:])
    assert problems == []
    assert mapping["run"] == {"seed": 7, "name": "name-0002", "directory": str(tmp_path / "name-0002")}
    assert mapping["optimizer"] == {"learning_rate": 1e-4, "betas": [0.9, 0.99]}


@settings(deadline=None, max_examples=80)
@given(st.lists(st.one_of(st.text(max_size=12), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
                          st.booleans(), st.none()), min_size=1, max_size=3))  # fmt: skip
def test_values_reach_the_task_unchanged(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("sweep")
    write_sweep(directory, Sweep("recipe.yaml", [], [Task(1, "n", {"a.b": values})]))
    (directory / "recipe.yaml").write_text("a: {}")
    mapping, problems = read_mapping(directory / "recipe.yaml", read_sweep(directory).tasks[0].overrides(directory))
    assert problems == []
    assert mapping["a"]["b"] == values


def test_task_and_script_agree_on_a_name_of_the_greatest_length(tmp_path):
    name = "n" * 100
    sweep = plan_sweep(name, tmp_path / "r.yaml", [], {"a.b": [1, 2]}, tmp_path, nothing)
    assert len(sweep.tasks[1].name) == 100
    plan = LaunchPlan(
        job_name=name, nodes=1, ranks_per_node=1, time="30", array="1-2%2", sweep=True, command=("python3",),
        python="python3", working_directory=tmp_path, run_directory=tmp_path,
    )  # fmt: skip
    line = next(line for line in render(plan).splitlines() if line.startswith("find_run() "))
    said = subprocess.run(
        ["bash", "-c", f'{line}; find_run; echo "$run"'], env={"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == str(tmp_path / sweep.tasks[1].name)


@pytest.mark.parametrize("options", [
    ["optimizer.learning_rate"],
    ["learning_rate=1"],
    ["=1,2"],
    ["a.b="],
    ["a.b=1,,2"],
    ["a.b=1,1"],
    ["a.b=1], [2"],
    ["a.b=!!python/object:os.system"],
    ["a.b=1", "a.b=2"],
    ["run.name=a,b"],
    ["run.directory=/a,/b"],
    ["launch.slurm.nodes=1,2"],
    ["a.$(id)=1"],
    [f"a.b={','.join(map(str, range(MAXIMUM_TASKS + 1)))}"],
])  # fmt: skip
def test_bad_axis_is_refused(options):
    with pytest.raises(RefusedError, match="--sweep"):
        read_axes(options)


def test_problems_of_all_tasks_are_gathered_and_bounded(tmp_path):
    def refuse(overrides):
        number = int(overrides[0].partition("=")[2])
        if number >= 10:
            raise RecipeError([Problem("a.b", number, "is large", "less"), Problem("c.d", 1, "is bad", "mend it")])

    with pytest.raises(RecipeError) as error:
        plan_sweep("n", tmp_path / "r.yaml", [], {"a.b": list(range(60))}, tmp_path, refuse)
    assert len(error.value.problems) == 21
    assert "c.d = 1: is bad (50 of 60 tasks, the first 11)" in str(error.value)
    assert "31 more problems" in str(error.value)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": "trainer-sweep", "version": 2}', "[" * 100_000,
    '{"format": "trainer-sweep", "version": 1, "recipe": "r", "overrides": [], "tasks": [{"number": "x"}]}',
])  # fmt: skip
def test_damaged_sweep_file_is_no_sweep(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    assert read_sweep(tmp_path) is None
    with pytest.raises(RefusedError):
        train_command(tmp_path, {"SLURM_ARRAY_TASK_ID": "1"})


@pytest.mark.parametrize("number", ["", "0", "3", "1; id", "01"])
def test_a_task_that_is_not_in_the_sweep_is_refused(tmp_path, number):
    write_sweep(tmp_path, Sweep("r", [], [Task(1, "n-0001", {}), Task(2, "n-0002", {})]))
    with pytest.raises(RefusedError):
        train_command(tmp_path, {"SLURM_ARRAY_TASK_ID": number})


def test_a_run_of_a_sweep_has_a_task_of_each_array(tmp_path):
    write_sweep(tmp_path, Sweep("r", [], [Task(1, "n-0001", {}), Task(2, "n-0002", {})]))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text(json.dumps({"jobs": [{"id": "7"}, {"id": "9"}]}))
    assert recorded_jobs(tmp_path) == ["7", "9"]
    assert recorded_jobs(tmp_path / "n-0002") == ["7_2", "9_2"]
    assert recorded_jobs(tmp_path / "other") == []


@pytest.mark.parametrize("action", ["stop", "save"])
def test_a_sweep_is_asked_run_by_run(tmp_path, action):
    write_sweep(tmp_path, Sweep("r", [], [Task(1, "n-0001", {}), Task(2, "n-0002", {})]))
    with pytest.raises(RefusedError, match=r"is a sweep of 2 runs → name one, e\.g\. .*/n-0001, or .*cancel --all"):
        ask_run(tmp_path, new_command(action), wait_seconds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_done_counts_for_jobs_that_were_submitted_before(tmp_path):
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    jobs = [{"id": "1", "script": "submit-0001.sbatch"}, {"id": "2", "script": "submit-0002.sbatch"}, {"id": "3"}]
    (slurm / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    (slurm / "submit-0001.sbatch").write_text("")
    assert not finished_since_submission(tmp_path, {"SLURM_JOB_ID": "1"})
    (tmp_path / "DONE").write_text("{}")
    (slurm / "submit-0002.sbatch").write_text("")
    for path, at in (
        (slurm / "submit-0001.sbatch", 100),
        (tmp_path / "DONE", 200),
        (slurm / "submit-0002.sbatch", 300),
    ):
        os.utime(path, (at, at))
    assert finished_since_submission(tmp_path, {"SLURM_JOB_ID": "1"})
    assert finished_since_submission(tmp_path, {"SLURM_JOB_ID": "44", "SLURM_ARRAY_JOB_ID": "1"})
    assert not finished_since_submission(tmp_path, {"SLURM_JOB_ID": "2"}), "it was asked for more"
    for unknown in ("3", "4", ""):
        assert not finished_since_submission(tmp_path, {"SLURM_JOB_ID": unknown})


@pytest.mark.parametrize(("after", "singleton", "expected"), [
    (None, False, None),
    (None, True, "singleton"),
    ("12", False, "afterany:12"),
    ("12_3:afternotok", True, "afternotok:12_3,singleton"),
])  # fmt: skip
def test_dependency(after, singleton, expected):
    assert dependency(after, singleton=singleton) == expected


@pytest.mark.parametrize("after", ["", "x", "12:never", "12,13", "12 --wrap=id", "12:afterok:13", "12\n"])
def test_bad_dependency_is_refused(after):
    with pytest.raises(RefusedError, match="--after"):
        dependency(after)


@pytest.mark.parametrize("arguments", [[], ["--sweep", "run.seed=1,2"]])
def test_a_stopped_run_is_not_submitted(tmp_path, monkeypatch, arguments):
    """Its job would wait for its nodes, and end at once."""
    write_world(tmp_path)
    slurm = {"time": "30", "gpus_per_node": 0}
    path = write_recipe(tmp_path, run={"directory": str(tmp_path / "run")}, launch={"processes": 2, "slurm": slurm})
    stopped = tmp_path / "run" / "tiny-0002" if arguments else tmp_path / "run"
    stopped.mkdir(parents=True)
    (stopped / "stop").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    submitted = CliRunner().invoke(app, ["submit", str(path), *arguments])
    assert isinstance(submitted.exception, RefusedError)
    assert submitted.exception.exit_code == 2
    assert f"{stopped / 'stop'} exists" in str(submitted.exception)
    assert "remove it" in str(submitted.exception)
    assert sorted(tmp_path.rglob("*")) == before
