"""The batch script: its text is golden, hostile values are refused, and bash agrees that nothing can be smuggled in."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import recipe

from trainer.config.deepspeed_json import builds_operations
from trainer.config.run import Recipe
from trainer.config.slurm import ContainerConfig
from trainer.core.errors import RefusedError
from trainer.core.resources import resource_directory
from trainer.launch.slurm import LaunchPlan, plan, render

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
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
TEXT_FIELDS = [
    "job_name", "time", "partition", "account", "qos", "constraint", "memory_per_node", "exclude", "gpu_type",
    "reservation", "licenses", "mail_type", "mail_user", "network_interface", "gres_style", "array",
]  # fmt: skip
CONTAINER = ContainerConfig(
    runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.06-py3", mounts=("/data:/data:ro", "/scratch")
)
VARIANTS = {
    "train": PLAN,
    "cpu": LaunchPlan(
        job_name="cpu",
        nodes=1,
        ranks_per_node=2,
        time="30",
        command=("python3", "-m", "trainer", "train", "recipe.yaml"),
        python="/usr/bin/python3",
        working_directory=Path("/w"),
        run_directory=Path("/w/r"),
    ),
    "gres": dataclasses.replace(
        PLAN,
        gres_style="gres",
        gpu_type="a100",
        reservation="course",
        licenses="scratch:1",
        mail_type="END,FAIL",
        mail_user="me@example.org",
        sbatch_options={"exclusive": True, "switches": "1@2:00:00", "nice": 100},
        modules=("cuda/12.4", "nccl"),
        environment={"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": 8, "GREETING": 'it\'s "a b"; id'},
        network_interface="ib0",
    ),
    "pyxis": dataclasses.replace(
        PLAN, container=CONTAINER, environment={"NCCL_DEBUG": "WARN"}, run_directory=Path("/home/me/runs/pretrain")
    ),
    "apptainer": dataclasses.replace(
        PLAN,
        gres_style="gpus-per-task",
        container=ContainerConfig(runtime="apptainer", image="/images/train.sif", mounts=("/data:/in:ro",)),
        run_directory=Path("/home/me/runs/pretrain"),
    ),
    "array": dataclasses.replace(PLAN, array="1-5%1"),
    "preflight": dataclasses.replace(
        PLAN,
        starter="torchrun",
        node_check=("/usr/bin/python3", "-m", "trainer", "check", "/home/me/my recipe.yaml", "--on-node"),
    ),
    "sweep": dataclasses.replace(
        PLAN,
        array="1-12%4",
        sweep=True,
        command=("/usr/bin/python3", "-m", "trainer.launch.sweep_task", "/home/me/runs/pretrain 100%"),
    ),
}


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_script(name, tmp_path):
    script = render(VARIANTS[name])
    assert script == (GOLDEN / f"{name}.sbatch.txt").read_text(encoding="utf-8")
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_cpu_job_asks_for_no_gpu_and_nothing_unset():
    script = render(VARIANTS["cpu"])
    assert VARIANTS["cpu"].world_size == 2
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


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_hostile_option_is_refused(field, value):
    with pytest.raises(RefusedError) as error:
        render(dataclasses.replace(PLAN, **{field: value}))
    assert len(error.value.problems) == 1
    assert error.value.problems[0].value == value


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("make", [
    lambda value: {"modules": (value,)},
    lambda value: {"sbatch_options": {"comment": value}},
    lambda value: {"sbatch_options": {value: "x"}},
    lambda value: {"environment": {value: "x"}},
    lambda value: {"container": CONTAINER.model_copy(update={"image": value.replace("#", "'")})},  # registry#image is
    lambda value: {"container": CONTAINER.model_copy(update={"python": value})},
    lambda value: {"container": CONTAINER.model_copy(update={"mounts": (value,)})},
    lambda value: {"container": CONTAINER.model_copy(update={"mounts": (f"/data:{value}",)})},
], ids=["module", "option value", "option", "variable", "image", "python", "mount", "mount target"])  # fmt: skip
def test_hostile_value_of_the_site_is_refused(make, value):
    plan = dataclasses.replace(PLAN, run_directory=Path("/r"), **make(value))
    with pytest.raises(RefusedError) as error:
        render(plan)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("option", ["wrap", "uid", "output", "export", "chdir", "job-name", "bb", "mem"])
def test_dangerous_option_is_not_on_the_list(option):
    with pytest.raises(RefusedError, match="not among the sbatch options"):
        render(dataclasses.replace(PLAN, sbatch_options={option: "x"}))


@pytest.mark.parametrize("changes", [
    {"environment": {"HF_TOKEN": "hf_abc"}},
    {"environment": {"WANDB_API_KEY": "0123456789abcdef"}},
    {"environment": {"HARMLESS": "hf_" + "a" * 30}},
    {"environment": {"PROXY": "http://me:pass@proxy:3128"}},
    {"setup": ("export HF_TOKEN=hf_abc",)},
    {"setup": ("curl -H 'Authorization: Bearer abcdefghijkl' x",)},
])  # fmt: skip
def test_secret_is_refused_without_repeating_it(changes):
    with pytest.raises(RefusedError, match="mode 0600") as error:
        render(dataclasses.replace(PLAN, **changes))
    for secret in ("hf_abc", "0123456789abcdef", "aaaaaaaa", "pass@", "abcdefghijkl"):
        assert secret not in str(error.value)


def test_secret_on_the_command_line_is_refused():
    command = ("python3", "-m", "trainer", "train", "recipe.yaml", "telemetry.api_key=0123456789abcdef")
    with pytest.raises(RefusedError, match=r"telemetry\.api_key=<redacted>") as error:
        render(dataclasses.replace(PLAN, command=command))
    assert "0123456789abcdef" not in str(error.value)


@pytest.mark.parametrize("line", ['export HF_TOKEN="$(cat ~/.token)"', "export HF_TOKEN=$TOKEN", "source ~/.secrets"])
def test_secret_read_from_elsewhere_is_taken(line):
    assert line in render(dataclasses.replace(PLAN, setup=(line,)))


def test_agent_in_a_container_is_the_images_own():
    script = render(dataclasses.replace(VARIANTS["apptainer"], starter="torchrun"))
    assert "/images/train.sif python3 -m trainer.launch.torchrun 8 -- " in script


def test_pyxis_without_srun_is_refused():
    with pytest.raises(RefusedError, match="is a plugin of srun"):
        render(dataclasses.replace(VARIANTS["pyxis"], starter="mpirun"))


@pytest.mark.parametrize(
    "name", ["RANK", "MASTER_ADDR", "SLURM_JOB_ID", "SBATCH_ACCOUNT", "BASH_ENV", "TRAINER_LAUNCHER"]
)
def test_variable_of_the_launch_is_refused(name):
    with pytest.raises(RefusedError, match="is set by SLURM"):
        render(dataclasses.replace(PLAN, environment={name: "x"}))


@pytest.mark.parametrize("value", ["$HOME/x", "~/x", "${PATH}:/x", "`id`", "$(id)"])
def test_value_that_hopes_for_a_shell_is_refused(value):
    with pytest.raises(RefusedError, match="word for word"):
        render(dataclasses.replace(PLAN, environment={"WHERE": value}))


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.sampled_from(["A", "GREETING", "LONG_NAME_2"]), st.text(max_size=30), min_size=1))
def test_environment_reaches_the_ranks_word_for_word(environment):
    """Either refused, or bash exports exactly this."""
    try:
        script = render(dataclasses.replace(PLAN, environment=environment))
    except RefusedError:
        return
    lines = "\n".join(line for line in script.splitlines() if line.startswith("export "))
    done = subprocess.run(
        ["bash", "-c", f"{lines}\nenv -0"], capture_output=True, env={"PATH": "/usr/bin:/bin"}, check=True
    )
    found = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if "=" in entry)
    assert {name: found.get(name) for name in environment} == environment


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
    line = script[script.index("\n  srun --nodes") :]
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


if __name__ == "__main__":  # write the golden files: python tests/unit/test_launch_slurm.py
    for name, variant in VARIANTS.items():
        (GOLDEN / f"{name}.sbatch.txt").write_text(render(variant), encoding="utf-8")


@pytest.mark.parametrize(("base", "seconds"), [("zero1", 210), ("zero3_offload_nvme", 1410)])
def test_check_of_the_nodes_has_time_to_compile(base, seconds):
    made = Recipe.model_validate(recipe(launch={"launcher": "slurm", "slurm": {"nodes": 2, "time": "30"}}))
    values = json.loads((resource_directory("ds_configs") / f"{base}.json").read_text())
    script = render(
        plan(
            made, command=("train",), python="/usr/bin/python3", working_directory=Path("/w"),
            run_directory=Path("/w/r"), node_check=("check",), builds=builds_operations(values),
        )
    )  # fmt: skip
    assert f"timeout --kill-after=10 {seconds} srun " in script
