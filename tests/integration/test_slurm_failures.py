"""Nodes, links and SLURM itself that fail under a job: one run meets them in turn, on a real cluster."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm_runs import SlurmRun, sections, undisturbed

from trainer.core.hostlist import expand_hostlist
from trainer.launch.slurm import LaunchPlan, render

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
STEPS = 28
STAND_IN = Path(__file__).resolve().parents[1] / "slurm_cluster" / "stand_in.py"


def test_run_survives_its_nodes(slurm_cluster, tmp_path):
    """A node dies in a step, the batch host dies in a save, a cable is pulled, two nodes lose each other."""
    data = tmp_path / "undisturbed"
    data.mkdir()
    expected = undisturbed(data, STEPS)
    recipe = sections(STEPS, end_seconds=5, controller_seconds=60) | {"resilience": {"watchdog": {"grace_seconds": 20}}}
    run = SlurmRun(slurm_cluster, data, tmp_path / "elsewhere" / "run", recipe)
    job = run.submit("train.step:*:*:pause0.3,checkpoint.before_shard:*:12:pause10")

    def nodes(restart: int) -> list[str]:
        """Wait for an attempt that has saved something new, and return its nodes."""
        before = run.checkpoint()
        slurm_cluster.wait_for_start(job, restart, timeout=240)
        run.wait_until(lambda: run.checkpoint() > before, f"checkpoint after {before}")
        return expand_hostlist(run.attempt(job, restart)["nodes"])

    def end(restart: int) -> dict[str, Any]:
        """Wait for the next attempt, and return what is said of this one."""
        slurm_cluster.wait_for_start(job, restart + 1, timeout=240)
        run.wait_until(lambda: run.attempt(job, restart)["decision"] != "running", "end of the attempt")
        return run.attempt(job, restart)

    _, other = nodes(0)
    run.wait_for_step(run.checkpoint() + 1)
    slurm_cluster.crash(other)
    entry = end(0)
    assert entry["decision"] == "retry"
    assert other in entry["reason"]
    slurm_cluster.boot(other)

    batch_host, _ = nodes(1)
    assert other != batch_host
    run.wait_until(lambda: list((run.directory / "checkpoints").glob(".step-00000012*")), "save of step 12")
    slurm_cluster.crash(batch_host)
    entry = end(1)
    assert entry["decision"] == "lost"
    assert batch_host in entry["reason"]
    assert run.checkpoint() == 8, "what was half written is none"
    slurm_cluster.boot(batch_host)

    _, other = nodes(2)
    slurm_cluster.cut(other)
    entry = end(2)
    slurm_cluster.heal(other)
    assert entry["decision"] == "retry"
    assert other in entry["reason"]

    pair = nodes(3)
    slurm_cluster.part(*pair)
    try:
        entry = end(3)
    finally:
        slurm_cluster.join(*pair)
    assert entry["decision"] == "retry"
    assert any(host in entry["reason"] for host in pair), "SLURM sees nothing: the ranks' supervisors do"

    assert slurm_cluster.wait(job, timeout=240) == "COMPLETED", run.log()
    assert run.exact_lines() == expected
    excluded = json.loads((run.directory / "slurm" / "excluded_nodes.json").read_text())["nodes"]
    assert {node["host"] for node in excluded} >= {batch_host}


def stand_in(run_directory: Path, mode: str, controller_seconds: int, nodes: int = 1) -> Path:
    """Return the batch script of a job that trains nothing."""
    plan = LaunchPlan(
        job_name="stand-in",
        nodes=nodes,
        ranks_per_node=1,
        time="5",
        command=(sys.executable, str(STAND_IN), str(run_directory), mode),
        python=sys.executable,
        controller_seconds=controller_seconds,
        working_directory=run_directory,
        run_directory=run_directory,
    )
    (run_directory / "logs").mkdir(parents=True)
    script = run_directory / "job.sbatch"
    script.write_text(render(plan))
    return script


def wrapper(directory: Path, name: str, lines: str) -> None:
    """Put a command before the real one on PATH; ``$count`` is how often it has been called before."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(
        f"#!/bin/bash\ncount=$(cat '{path}.count' 2>/dev/null || echo 0)\necho $((count + 1)) > '{path}.count'\n"
        f'{lines}\nexec /usr/bin/{name} "$@"\n'
    )
    path.chmod(0o755)


def test_dead_node_is_left_out(slurm_cluster, tmp_path):
    """Also once it is back, and although SLURM had requeued the job before anybody asked."""
    run = tmp_path / "run"
    done = slurm_cluster.run(["sbatch", "--parsable", str(stand_in(run, "wait", 60, nodes=2))], cwd=run)
    job = done.stdout.strip()
    slurm_cluster.wait_for(run / "attempt-0-rank-1.json")
    slurm_cluster.crash("node2")
    slurm_cluster.wait_for(run / "slurm" / "excluded_nodes.json", timeout=120)
    slurm_cluster.boot("node2")
    log = run / "logs" / f"slurm-{job}.out"
    assert slurm_cluster.wait(job, timeout=120) == "COMPLETED", log.read_text()
    assert slurm_cluster.fields(job)["ExcNodeList"] == "node2", log.read_text()
    entries = json.loads((run / "slurm" / "restarts.json").read_text())["attempts"]
    assert [entry["decision"] for entry in entries] == ["retry", "done"]
    assert "node failure: node2" in entries[0]["reason"]
    assert "node2" not in expand_hostlist(entries[1]["nodes"])


def test_commands_that_fail_hang_and_refuse(slurm_cluster, tmp_path):
    """srun that can't start, scontrol that refuses, hangs and answers in the end; and one that never does."""
    commands = tmp_path / "commands"
    wrapper(commands, "srun", "[ $count -gt 0 ] || { echo 'srun: error: Unable to create step' >&2; exit 1; }")
    # The second to fourth calls are those of the second attempt's end.
    wrapper(commands, "scontrol", "case $count in 2) echo 'Socket timed out' >&2; exit 1 ;; 3) sleep 60 ;; esac")
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}

    def submit(script: Path) -> str:
        done = slurm_cluster.run(["sbatch", "--parsable", str(script)], cwd=script.parent, env=environment)
        return done.stdout.strip()

    run = tmp_path / "run"
    script = stand_in(run, "stop-twice", 60)
    job = submit(script)
    assert slurm_cluster.wait(job, timeout=180) == "COMPLETED", (run / "logs" / f"slurm-{job}.out").read_text()
    assert slurm_cluster.fields(job)["Restarts"] == "2"
    log = (run / "logs" / f"slurm-{job}.out").read_text()
    assert log.count("trying again for up to 1m 00s") == 1, log
    attempts = json.loads((run / "slurm" / "restarts.json").read_text())["attempts"]
    assert [attempt["decision"] for attempt in attempts] == ["retry", "requeue", "done"]

    wrapper(commands, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    never = tmp_path / "never"
    job = submit(stand_in(never, "stop", 1))
    assert slurm_cluster.wait(job) == "FAILED"
    assert slurm_cluster.fields(job)["ExitCode"] == "75:0"
    assert f"by hand: scontrol requeue {job}" in (never / "logs" / f"slurm-{job}.out").read_text()
