"""What `trainer submit` hands to sbatch and leaves behind; SLURM's commands are small programs on PATH."""

from __future__ import annotations

import json
import multiprocessing
import os
import pwd
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml

from trainer.cli.submit import submit
from trainer.config.load import load_recipe
from trainer.core.control_file import control_path, new_command, write_command
from trainer.core.errors import RefusedError, TrainerError
from trainer.core.status_file import write_status
from trainer.launch import submit as submitting
from trainer.launch.hub_files import cache_of_jobs, not_cached
from trainer.launch.slurm_commands import accounts_of_user, cluster_config, submit_script, user_name
from trainer.launch.stale_stop import is_started_again, withdraw_stale_stop
from trainer.launch.sweep_file import read_sweep

pytestmark = pytest.mark.fast
RATES = ["optimizer.learning_rate=1e-4,3e-4"]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write commands that run a line of shell."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def write(name: str, line: str) -> None:
        (directory / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / name).chmod(0o755)

    for name in ("squeue", "scontrol", "sacct"):
        write(name, "echo Invalid job id specified >&2; exit 1")
    write("sbatch", "echo 7")
    return write


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    folder = tiny.write_world(tmp_path / "world")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    slurm = {"gpus_per_node": 0, "time": "00:10:00"}
    return tiny.write_recipe(folder, launch={"slurm": slurm})


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_another_sweep_in_the_same_directory_is_refused(program, recipe, capsys):
    submit(recipe, [], sweep=RATES)
    directory = recipe.parent / "runs" / "tiny"
    before = tree(directory)
    for overrides, axes, what in (
        ([], ["optimizer.learning_rate=3e-4,1e-4"], "other tasks"),
        (["run.steps=4"], RATES, "other overrides"),
    ):
        for dry_run in (False, True):
            with pytest.raises(RefusedError, match=rf"{what}, whose tasks .* choose another run\.directory") as error:
                submit(recipe, overrides, sweep=axes, dry_run=dry_run)
            assert error.value.exit_code == 2
    assert tree(directory) == before
    program("sbatch", "echo 8")
    submit(recipe, [], sweep=RATES)
    assert capsys.readouterr().out.split() == ["7", "8"], "the same one may be submitted again"
    program("sbatch", "echo no partition >&2; exit 1")
    with pytest.raises(RefusedError, match="no partition"):
        submit(recipe, [], sweep=RATES)
    assert read_sweep(directory) is not None, "jobs that are in the queue need it"
    (directory / "sweep.json").write_text("{")
    with pytest.raises(RefusedError, match="can't be read"):
        submit(recipe, [], sweep=RATES)


def test_sweep_that_sbatch_refuses_is_not_left_behind(program, recipe):
    program("sbatch", "echo no partition >&2; exit 1")
    with pytest.raises(RefusedError, match="no partition"):
        submit(recipe, [], sweep=RATES)
    assert not (recipe.parent / "runs" / "tiny" / "sweep.json").exists()


@pytest.mark.parametrize(("overrides", "axes"), [
    (["checkpoint.hook=[curl, 'https://me:hunter2@example.org']"], RATES),
    ([], ["data.train=[{path: 'https://me:hunter2@example.org/x'}],[{path: data/train}]"]),
    ([], ["model.config.api_key=hunter2,other"]),
    (["model.config={api_key: hunter2}"], RATES),
])  # fmt: skip
def test_secret_of_a_sweep_is_refused_before_anything_is_written(program, recipe, monkeypatch, overrides, axes):
    monkeypatch.setattr("trainer.cli.submit._plan", plan_without_checks)
    with pytest.raises(RefusedError, match="looks like a secret") as error:
        submit(recipe, overrides, sweep=axes)
    assert "hunter2" not in str(error.value)
    assert not (recipe.parent / "runs").exists()


def plan_without_checks(recipe, settings, site, tasks):
    """Return the plan of the recipe alone: whatever an override says, the rule for secrets is what is tested."""
    from trainer.launch.slurm import plan

    checked = load_recipe(recipe)
    words = ("python3", "-m", "trainer", "train", str(recipe), *settings)
    directory = recipe.parent / checked.run.directory
    return checked, plan(
        checked, command=words, python="python3", working_directory=Path.cwd(), run_directory=directory
    )


def test_variables_of_the_shell_do_not_beat_the_script(program, recipe, monkeypatch, tmp_path):
    program("sbatch", f"env | grep -o '^SBATCH_[A-Z_]*' | sort > {tmp_path}/seen; echo 7")
    for name in os.environ:
        if name.startswith("SBATCH_"):
            monkeypatch.delenv(name)
    for name in (
        "TIMELIMIT", "NO_REQUEUE", "REQUEUE", "EXPORT", "OPEN_MODE", "SIGNAL", "JOB_NAME", "ARRAY_INX", "OUTPUT",
        "ERROR", "WAIT", "GPUS", "PARTITION", "ACCOUNT", "QOS", "MEM_PER_CPU", "CONSTRAINT",
    ):  # fmt: skip
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    submit(recipe, ["launch.slurm.partition=main", "launch.slurm.memory_per_node=8G"])
    assert (tmp_path / "seen").read_text().split() == ["SBATCH_ACCOUNT", "SBATCH_CONSTRAINT", "SBATCH_QOS"]


def test_ranks_get_the_variables_of_the_job_whatever_it_was_submitted_with(program, recipe, capsys):
    submit(recipe, [], dry_run=True)
    script = capsys.readouterr().out
    site = script[script.index("# Modules, environment") : script.index("set -u")]
    done = subprocess.run(
        ["bash", "-c", f"{site}\nenv"], env={"SLURM_EXPORT_ENV": "NONE"}, capture_output=True, text=True, check=True
    )
    assert "EXPORT_ENV" not in done.stdout


def test_user_is_the_systems_whatever_the_shell_says(program, monkeypatch):
    program("sacctmgr", 'for word; do case "$word" in user=*) echo "${word#user=}";; esac; done')
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert (user_name(), accounts_of_user()) == (me, [me])


def test_empty_value_of_the_configuration_ends_with_its_line(program):
    program("scontrol", "printf 'AcctGatherNodeFreq      = \\nKillWait = 30 sec \\nMpiDefault=none\\n'")
    assert cluster_config() == {"AcctGatherNodeFreq": "", "KillWait": "30 sec", "MpiDefault": "none"}


def queued(program, state: str, task: int | None = None) -> None:
    job = {"job_id": 7, "job_state": state, "array_job_id": 7 if task else 0, "array_task_id": task}
    program("squeue", f"echo '{json.dumps({'jobs': [job]})}'")


def test_stop_that_nobody_saw_does_not_end_what_is_submitted_later(program, recipe, capsys):
    submit(recipe, [])
    directory = recipe.parent / "runs" / "tiny"
    write_command(directory, new_command("stop", who="ada@login"))
    for state in ("RUNNING", "REQUEUED", "PENDING", "REQUEUE_HOLD"):
        queued(program, state)
        submit(recipe, [])
        assert control_path(directory).exists(), f"it is meant for the job that is {state}"
    queued(program, "COMPLETED")
    submit(recipe, [], dry_run=True)
    assert control_path(directory).exists()
    submit(recipe, [])
    assert not control_path(directory).exists()
    assert "ada@login" in capsys.readouterr().err


def test_stop_of_a_task_is_withdrawn_with_the_next_sweep(program, recipe):
    submit(recipe, [], sweep=RATES)
    task = recipe.parent / "runs" / "tiny" / "tiny-0002"
    task.mkdir()
    write_command(task, new_command("stop"))
    queued(program, "RUNNING", 2)
    submit(recipe, [], sweep=RATES)
    assert control_path(task).exists()
    queued(program, "RUNNING", 1)
    submit(recipe, [], sweep=RATES)
    assert not control_path(task).exists()


def test_only_a_stop_that_was_not_seen_is_withdrawn(tmp_path):
    said: list[str] = []
    for action, value in (("save", None), ("stop-after", 5)):
        write_command(tmp_path, new_command(action, value))
        withdraw_stale_stop(tmp_path, said.append)
    command = new_command("stop")
    write_command(tmp_path, command)
    write_status(tmp_path, {"control": {"id": command.id}})
    withdraw_stale_stop(tmp_path, said.append)
    assert (control_path(tmp_path).exists(), said) == (True, [])
    write_status(tmp_path, {"control": {"id": "0" * 16}})
    withdraw_stale_stop(tmp_path, said.append)
    assert (control_path(tmp_path).exists(), len(said)) == (False, 1)


def test_requeued_job_is_told_from_a_start_by_a_person():
    assert [is_started_again(each) for each in ({}, {"SLURM_RESTART_COUNT": "0"}, {"SLURM_RESTART_COUNT": "1"})] == [
        False, False, True,
    ]  # fmt: skip


def test_local_train_withdraws_the_stop_before_its_ranks_start(recipe, monkeypatch):
    from trainer.cli.train import _launch

    directory = recipe.parent / "runs" / "tiny"
    directory.mkdir(parents=True)
    seen: list[bool] = []
    monkeypatch.setattr("trainer.launch.local.run_local", lambda *_: seen.append(control_path(directory).exists()) or 0)
    for restarts in ("1", "0"):
        write_command(directory, new_command("stop"))
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert _launch(recipe, []) == 0
    assert seen == [True, False]


def record(directory: Path, number: int) -> None:
    submitting._record_job(directory, {"id": str(number)})


def test_submissions_at_once_are_all_recorded(tmp_path):
    (tmp_path / "slurm").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record, args=(tmp_path / "slurm", number)) for number in range(1, 13)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(map(int, submitting.recorded_jobs(tmp_path))) == list(range(1, 13))


@pytest.mark.parametrize(("environment", "shell", "expected"), [
    ({}, {"HF_HOME": "/shell"}, None),
    ({"NCCL_DEBUG": "WARN"}, {"HF_HUB_CACHE": "/shell"}, None),
    ({"HF_HOME": "/job"}, {"HF_HOME": "/shell"}, "/job/hub"),
    ({"HF_HUB_CACHE": "/job"}, {"HF_HOME": "/shell"}, "/job"),
    ({"HF_HOME": "/job"}, {"HF_HUB_CACHE": "/shell"}, "/shell"),
    ({"HF_HOME": ""}, {}, None),
])  # fmt: skip
def test_cache_is_the_one_that_jobs_read(recipe, environment, shell, expected):
    loaded = load_recipe(recipe, [f"launch.slurm.environment={json.dumps(environment)}"])
    found = cache_of_jobs(loaded, shell)
    assert (str(found) if found else None) == expected


def test_cache_in_a_container_is_looked_for_where_it_is_mounted_from(recipe):
    container = "launch.slurm.container={runtime: apptainer, image: x.sif, mounts: ['/data/hf:/hf:ro', /other]}"
    loaded = load_recipe(recipe, [container, "launch.slurm.environment={HF_HOME: /hf/x}"])
    assert cache_of_jobs(loaded, {}) == Path("/data/hf/x/hub")


def write_cached(hub: Path, repository: str, files: dict[str, str]) -> None:
    commit, folder = "a" * 40, hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name, text in files.items():
        (folder / "snapshots" / commit / name).write_text(text)


def test_files_in_the_submitters_cache_do_not_count_for_jobs_that_read_another(recipe, tmp_path):
    write_cached(tmp_path / "job" / "hub", "org/small", {"config.json": "{}", "model.safetensors": "{}"})
    wanted = ["model={path: org/small}"]
    (problem,) = not_cached(load_recipe(recipe, [*wanted, f"launch.slurm.environment.HF_HOME={tmp_path / 'empty'}"]))
    assert f"({tmp_path}/empty/hub, by launch.slurm.environment)" in problem.rule
    assert not_cached(load_recipe(recipe, [*wanted, f"launch.slurm.environment.HF_HOME={tmp_path / 'job'}"])) == []


def test_script_alone_says_what_a_job_is(program, tmp_path, monkeypatch):
    """Also a script that asks for little."""
    program("sbatch", f'echo "$SBATCH_GRES $SBATCH_EXPORT" > {tmp_path}/seen; echo 7')
    monkeypatch.setenv("SBATCH_GRES", "nvme:1")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    script = tmp_path / "x.sbatch"
    for options, seen in (("#SBATCH --nodes=1", "nvme:1"), ("#SBATCH --gpus-per-node=1", "")):
        script.write_text(f"#!/bin/bash\n{options}\n")
        assert submit_script(script) == "7"
        assert (tmp_path / "seen").read_text().strip() == seen


def test_weights_of_every_task_of_a_sweep_must_be_in_the_cache(program, recipe, tmp_path):
    hub = tmp_path / "job" / "hub"
    config = json.dumps(yaml.safe_load(recipe.read_text())["model"]["config"])
    write_cached(hub, "org/one", {"config.json": config, "model.safetensors": "{}"})
    write_cached(hub, "org/two", {"config.json": config})
    settings = ["model.config=null", f"launch.slurm.environment.HF_HOME={tmp_path / 'job'}"]
    axes = ["model.path=org/one,org/two", "run.seed=1,2"]
    with pytest.raises(RefusedError, match=r"'org/two': is in the cache without model\.safetensors.*2 of 4 tasks"):
        submit(recipe, settings, sweep=axes)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(("options", "named"), [
    ({"dry_run": True}, "--dry-run"), ({"nodes": 2, "time": "1:00"}, "--nodes, --time"), ({"chain": 3}, "--chain"),
    ({"sweep": RATES}, "--sweep"), ({"singleton": True}, "--singleton"), ({"max_running": 1}, "--max-running"),
])  # fmt: skip
def test_probe_refuses_the_options_of_a_run(program, tmp_path, options, named):
    program("srun", f"touch {tmp_path}/ran")
    with pytest.raises(RefusedError, match=f"of its own, without {named} →"):
        submit(probe=True, output=tmp_path / "site.yaml", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_output_without_probe_is_refused(program, recipe):
    with pytest.raises(RefusedError, match="--output says where --probe writes"):
        submit(recipe, [], output=Path("site.yaml"))


@pytest.mark.parametrize("chain", [None, 2])
def test_id_of_a_job_that_can_not_be_recorded_is_printed(program, recipe, capsys, chain):
    (recipe.parent / "runs" / "tiny" / "slurm" / "jobs.json").mkdir(parents=True)
    submit(recipe, [], chain=chain)
    said = capsys.readouterr()
    assert said.out.split() == ["7"] * (chain or 1)
    assert "jobs.json: Is a directory: job 7 is queued" in said.err


def test_silent_sbatch_may_have_queued_the_job(program, recipe, monkeypatch):
    program("sbatch", "exec sleep 30")
    monkeypatch.setattr("trainer.launch.slurm_commands._SUBMIT_SECONDS", 0.2)
    with pytest.raises(TrainerError, match="the job may be queued: look with squeue --me"):
        submit(recipe, [])
    assert list((recipe.parent / "runs" / "tiny" / "slurm").glob("*.sbatch"))


def test_options_of_a_profile_can_be_undone(program, recipe, tmp_path, capsys):
    site = tmp_path / "site.yaml"
    site.write_text("sbatch_options: {exclusive: true, nice: 100}\n")
    undone = ["launch.slurm.sbatch_options.exclusive=false"]
    for overrides, there in (([], ["#SBATCH --exclusive"]), (undone, [])):
        submit(recipe, overrides, profile=str(site), dry_run=True)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("#SBATCH --exclusive")] == there
        assert "#SBATCH --nice=100" in lines
