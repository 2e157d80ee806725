"""The batch script: its text is golden, hostile values are refused, and bash agrees that nothing can be smuggled in."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.core.errors import RefusedError
from trainer.launch.slurm import LaunchPlan, render

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "train.sbatch.txt"
PLAN = LaunchPlan(
    job_name="pretrain-7b",
    nodes=4,
    ranks_per_node=8,
    gpus_per_node=8,
    time="1-12:00:00",
    partition="gpu",
    account="proj_12",
    qos="high",
    constraint="a100&ib",
    cpus_per_task=12,
    memory_per_node="900G",
    exclude="node[1-3,7]",
    signal_seconds=300,
    setup=("module load cuda/12", "source /opt/venv/bin/activate"),
    command=("/usr/bin/python3", "-m", "trainer", "train", "/home/me/my recipe.yaml", "launch.slurm.time='1-12:00:00'"),
    python="/usr/bin/python3",
    working_directory=Path("/home/me"),
    run_directory=Path("/home/me/runs/pretrain 100%"),
)
HOSTILE = [
    "x; touch /tmp/pwned",
    "$(touch /tmp/pwned)",
    "`touch /tmp/pwned`",
    "x\n#SBATCH --uid=0",
    "x\r#SBATCH --wrap=x",
    "x --wrap=id",
    "x\\",
    'x"y',
    "x'y",
    "x#y",
    "x\x00y",
    "ä",
    "",
    " ",
    "x\u2028y",
]
TEXT_FIELDS = ["job_name", "time", "partition", "account", "qos", "constraint", "memory_per_node", "exclude"]


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def test_golden_script():
    assert render(PLAN) == GOLDEN.read_text(encoding="utf-8")


def test_cpu_job_asks_for_no_gpu_and_nothing_unset():
    plan = LaunchPlan(
        job_name="cpu",
        nodes=1,
        ranks_per_node=2,
        time="30",
        command=("true",),
        python="/usr/bin/python3",
        working_directory=Path("/w"),
        run_directory=Path("/w/r"),
    )
    script = render(plan)
    assert plan.world_size == 2
    assert directives(script) == [
        "#SBATCH --job-name=cpu",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=30",
        "#SBATCH --chdir=/w",
        "#SBATCH --output=/w/r/logs/slurm-%j.out",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    ]
    assert "None" not in script


def test_script_is_valid_bash(tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(render(PLAN))
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_hostile_option_is_refused(field, value):
    with pytest.raises(RefusedError) as error:
        render(dataclasses.replace(PLAN, **{field: value}))
    assert len(error.value.problems) == 1
    assert error.value.problems[0].value == value


@pytest.mark.parametrize("value", ['/x"y', "/x'y", "/x\\y", "/x\ny", "/x$(id)", "/x;y", "/x`id`", "relative", "/x#y"])
@pytest.mark.parametrize("field", ["run_directory", "working_directory"])
def test_hostile_directory_is_refused(field, value):
    with pytest.raises(RefusedError, match="absolute paths"):
        render(dataclasses.replace(PLAN, **{field: Path(value)}))


@pytest.mark.parametrize("changes", [
    {"command": ("python", "a=1\n#SBATCH --uid=0")},
    {"command": ()},
    {"python": "/usr/bin/py\nthon"},
    {"setup": ("ok", "two\nlines")},
    {"nodes": 0},
    {"nodes": "2 --wrap=x"},
    {"cpus_per_task": 0},
    {"signal_seconds": 0},
])  # fmt: skip
def test_unusable_value_is_refused(changes):
    with pytest.raises(RefusedError):
        render(dataclasses.replace(PLAN, **changes))


def test_every_problem_is_named_at_once():
    with pytest.raises(RefusedError) as error:
        render(dataclasses.replace(PLAN, partition="a b", qos="c;d", time="soon"))
    assert [problem.key for problem in error.value.problems] == [
        "launch.slurm.time",
        "launch.slurm.partition",
        "launch.slurm.qos",
    ]


@pytest.mark.parametrize("time", ["30", "30:00", "24:00:00", "1-12", "1-12:30", "1-12:30:15"])
def test_every_form_of_time_is_taken(time):
    assert f"#SBATCH --time={time}" in directives(render(dataclasses.replace(PLAN, time=time)))


SMUGGLED = [
    "$(id)",
    "`id`",
    "; id",
    "' ; id '",
    '"',
    "\\",
    "#SBATCH --uid=0",
    "@SETUP@",
    "@COMMAND@",
    "*",
    "~",
    "!x",
    "&",
]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(SMUGGLED), st.text(st.characters(codec="utf-8"), max_size=20)), min_size=1))
def test_command_reaches_the_rank_word_for_word(words):
    """Either refused, or bash sees exactly these words; the options of the job never change."""
    try:
        script = render(dataclasses.replace(PLAN, command=tuple(words)))
    except RefusedError:
        assert any(re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", word) for word in words)
        return
    assert directives(script) == directives(render(PLAN))
    line = script[script.index("srun --nodes") :]
    line = line[line.index("\\\n") + 2 : line.index("step=$!")].strip()
    assert shlex.split(line.removesuffix("&")) == words


def test_bash_hands_hostile_words_to_the_rank(tmp_path):
    """The rendered script, run by bash, with an `srun` that drops its options and runs the command."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    srun = bin_directory / "srun"
    srun.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    words = [*SMUGGLED, "a b", "ünï", "$HOME", "x=y"]
    plan = dataclasses.replace(
        PLAN,
        command=("printf", "%s\\n", *words),
        setup=("true",),
        python=sys.executable,
        run_directory=tmp_path / "run",
    )
    script = tmp_path / "job.sh"
    script.write_text(render(plan))
    environment = {"PATH": f"{bin_directory}:/usr/bin:/bin", "RANK": "7", "SLURM_JOB_ID": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == words
