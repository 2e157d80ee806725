"""The batch script under bash, with commands that only write down how they are called."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_launch_slurm import PLAN, VARIANTS

from trainer.launch.slurm import render

pytestmark = pytest.mark.fast
BEFORE_START = "--code 75 --before-start"


def run_script(folder: Path, commands: dict[str, str], **changes: Any) -> tuple[int, list[str], str]:
    """Return exit code, calls (of our own Python what it is told to do) and errors of a rendered script."""
    calls = folder / "calls"
    calls.touch()
    programs = {"python": "case $3 in end) exit 9 ;; esac", "srun": "", "sbcast": "", **commands}
    for name, lines in programs.items():
        path = folder / name
        words = '"${@:3:1} ${@:5}"' if name == "python" else f'"{name}"'
        path.write_text(f"#!/bin/bash\necho {words} >> '{calls}'\n{lines}\n")
        path.chmod(0o755)
    (folder / "run" / "slurm").mkdir(parents=True)
    values = {"setup": (), "python": str(folder / "python"), "run_directory": folder / "run", **changes}
    script = folder / "job.sh"
    script.write_text(render(dataclasses.replace(PLAN, **values)))
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, env=environment, check=False, timeout=30
    )
    return done.returncode, calls.read_text().splitlines(), done.stderr


@pytest.mark.parametrize(("line", "code"), [("false", 1), ("exit 2", 2), ("source /nowhere", 1)])
def test_setup_that_fails_is_told_and_settled(tmp_path: Path, line: str, code: int) -> None:
    ended, calls, errors = run_script(tmp_path, {}, setup=(line, "touch $HOME/not-reached"))
    assert ended == 9, "what `requeue end` says"
    assert f"trainer: setup line failed (exit {code})" in errors
    assert len(calls) == 1
    assert calls[0].startswith(f"end --code 1 --before-start --cause setup line failed (exit {code}) --max-restarts")


def test_setup_line_may_end_the_job(tmp_path: Path) -> None:
    assert run_script(tmp_path, {}, setup=("exit 0",))[:2] == (0, [])


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_signal_before_the_ranks_keeps_them_from_starting(tmp_path: Path, name: str) -> None:
    ended, calls, _ = run_script(tmp_path, {}, setup=(f"kill -s {name} $$",))
    assert ended == 9
    assert "srun" not in calls
    assert calls[-1].startswith(f"end {BEFORE_START} --max-restarts")
    assert sum(call.startswith("begin") for call in calls) == 1


@pytest.mark.parametrize(
    "check",
    ["kill -s USR1 $(ps -o ppid= $PPID); exec sleep 20", "exit 138"],  # to the shell; to the step's processes alone
    ids=["shell", "step"],
)
def test_signal_in_the_check_is_no_failure_of_it(tmp_path: Path, check: str) -> None:
    ended, calls, _ = run_script(tmp_path, {"srun": check}, node_check=VARIANTS["preflight"].node_check)
    assert ended == 9
    assert calls.count("srun") == 1, "no ranks"
    assert calls[-1].startswith(f"end {BEFORE_START} --max-restarts")


@pytest.mark.parametrize(("command", "words"), [("sbcast", "sbcast failed"), ("srun", "could not be unpacked")])
def test_stage_that_fails_is_settled(tmp_path: Path, command: str, words: str) -> None:
    ended, calls, errors = run_script(tmp_path, {command: "exit 3"}, stage="/images/environment.tar")
    assert ended == 9
    assert f"{words} (exit 3)" in errors
    ends = [call for call in calls if call.startswith("end")]
    assert len(ends) == 1
    assert ends[0].startswith("end --code 1 --before-start --cause ")


@pytest.mark.parametrize(
    ("launch", "age", "found"),
    [
        ("slurm-17-0-1", 0, True),
        ("17-node1-20061-0", 0, True),  # torchrun
        ("17-10.0.0.1-20061", 0, True),  # mpirun, mpiexec
        ("17-node1-20061-0", 100, False),  # of an earlier start
        ("slurm-17-1-1", 0, False),
        ("slurm-217-0-1", 0, False),
        ("217-node1-20061-0", 0, False),
    ],
)
def test_failures_of_every_starter_are_seen(tmp_path: Path, launch: str, age: int, found: bool) -> None:
    run = tmp_path / "17-x" / "run"
    report = run / "failures" / launch / "rank-00003.json"
    report.parent.mkdir(parents=True)
    started = tmp_path / "started"
    started.touch()
    os.utime(started, (1000, 1000))
    report.touch()
    os.utime(report, (1050 - age, 1050 - age))
    function = re.search(r"^failed\(\) \{.*?^\}$", render(PLAN), re.MULTILINE | re.DOTALL)
    assert function is not None
    variables = {"SLURM_JOB_ID": "17", "run": str(run), "started": str(started), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{function[0]}\nfailed"], capture_output=True, text=True, env=variables, check=True
    )
    assert bool(done.stdout) == found
