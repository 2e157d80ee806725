"""Render the batch script of a run. Pure: strings in, one string out."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from trainer.config.deepspeed_json import BUILD_SECONDS
from trainer.config.run import Recipe
from trainer.config.slurm import ContainerConfig, has_control_characters, slurm_problems
from trainer.core.errors import Problem, RefusedError
from trainer.core.redact import redacted_text
from trainer.core.resources import resource_directory
from trainer.launch.container import in_container, srun_container_options
from trainer.launch.site import environment_lines, export_lines, gpu_lines, module_lines
from trainer.launch.starters import Starter, signal_target, stage_lines, start_line
from trainer.launch.sweep_file import task_stem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PATH = re.compile(r"/[\w./+=@:,~% -]*")
_ARRAY = re.compile(r"1-[0-9]{1,7}%[0-9]{1,7}")
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_LOADING_SECONDS = 150
"""For Python and torch to be loaded, from a network file system perhaps, and for srun to start and end the ranks."""
_NODE_CHECK = """
# Are these nodes fit for the run? 1: a node is at fault, RUN/failure.json names it; 2: the recipe or environment is.
# srun waits for ever for a node that it can't reach, hence timeout, which passes TERM on and would die of USR1. Signals
# end the check, since nothing is to be saved yet; one that only the step got has killed its processes (128 + 10, 12).
ask_by=TERM
{start} &
step=$!
[ -z "$asked" ] || ask_to_stop
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?
step= ask_by=USR1
case $code in 138 | 140) asked=1 ;; esac
[ -z "$asked" ] || not_started
[ "$code" -eq 0 ] || settle "$code"
"""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """All that the batch script depends on."""

    job_name: str
    nodes: int
    ranks_per_node: int
    """One srun task per rank."""
    gpus_per_node: int = 0
    """0: no GPUs are asked for."""
    time: str
    gres_style: str = "gpus-per-node"
    gpu_type: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    memory_per_node: str | None = None
    exclude: str | None = None
    avoid: tuple[str, ...] = ()
    """Nodes that the run failed on lately, beside those that the user excludes."""
    signal_seconds: int = 120
    """Seconds before the time limit at which SLURM sends USR1 to the ranks."""
    reservation: str | None = None
    licenses: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    sbatch_options: Mapping[str, str | int | bool] = field(default_factory=dict[str, str | int | bool])
    modules: tuple[str, ...] = ()
    end_seconds: int = 120
    """That the ranks may take to end after one has failed."""
    max_restarts: int = 100
    """Failures after which the job starts again by itself."""
    max_excluded_nodes: int = 2
    """Nodes that are left out at most because the run failed on them."""
    controller_seconds: int = 600
    """How long the job tries to reach a controller that does not answer."""
    setup: tuple[str, ...] = ()
    """Shell lines of the recipe, written as they are."""
    environment: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    network_interface: str | None = None
    container: ContainerConfig | None = None
    array: str | None = None
    """Tasks of a job array, e.g. 1-5%1; None: one job."""
    sweep: bool = False
    """Each task of the array has a run directory of its own: ``run_directory``/`task_stem`-0001..."""
    starter: Starter = "srun"
    """What starts the ranks in the job."""
    mpi: Literal["none", "pmix", "pmi2"] = "none"
    """``srun --mpi``."""
    online: bool = False
    """False: the Hugging Face libraries of the ranks ask no Hub."""
    stage: str | None = None
    """Archive of the ranks' environment, unpacked on every node."""
    stage_directory: str = "/tmp"
    command: tuple[str, ...]
    """What each rank runs."""
    node_check: tuple[str, ...] = ()
    """What each rank runs before, to check its node; empty: nothing."""
    node_check_seconds: int = 210
    """After which the check is killed."""
    python: str
    """Interpreter that has `trainer`; it decides about the requeue."""
    working_directory: Path
    """Absolute; where the job runs, and relative paths of the recipe start."""
    run_directory: Path
    """Absolute; SLURM's own output goes to its logs/."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


def plan(
    recipe: Recipe, *, command: tuple[str, ...], python: str, working_directory: Path, run_directory: Path,
    node_check: tuple[str, ...] = (), builds: bool = False, array: str | None = None, sweep: bool = False,
) -> LaunchPlan:  # fmt: skip
    """Return what ``launch.slurm`` of the recipe asks for, running ``command`` once per rank.

    ``node_check`` is run before it where ``launch.slurm.preflight`` asks for it; ``builds``: it may have to compile.
    """
    slurm = recipe.launch.slurm
    checks = slurm.preflight if slurm.preflight is not None else slurm.nodes > 1
    shared = {
        each.name: getattr(slurm, each.name) for each in fields(LaunchPlan) if each.name in type(slurm).model_fields
    }
    return LaunchPlan(
        job_name=recipe.run.name,
        ranks_per_node=ranks_per_node(recipe),
        command=command,
        node_check=node_check if checks else (),
        node_check_seconds=recipe.launch.preflight.seconds + _LOADING_SECONDS + (BUILD_SECONDS if builds else 0),
        python=python,
        working_directory=working_directory,
        run_directory=run_directory,
        array=array,
        sweep=sweep,
        **shared,
    )


def ranks_per_node(recipe: Recipe) -> int:
    """Return one rank per GPU, or ``launch.processes`` ranks where no GPUs are asked for."""
    return recipe.launch.slurm.gpus_per_node or recipe.launch.processes


def render(plan: LaunchPlan) -> str:
    """Return slurm/train.sbatch filled in. Raises RefusedError naming every value that can't be used.

    Values reach the script as ``#SBATCH`` options that match a strict pattern, or as shell words quoted by shlex; only
    ``launch.slurm.setup`` is shell by intent.
    """
    problems = _problems(plan)
    if problems:
        raise RefusedError(problems, title="the SLURM job can't be written")
    filled = {
        "DIRECTIVES": "\n".join(f"#SBATCH --{option}" for option in _directives(plan)),
        "SITE": "\n".join(_site_lines(plan)),
        "SETUP": "\n".join(plan.setup),
        "PREFLIGHT": _node_check(plan),
        "STAGE": "".join(f"\n{line}" for line in stage_lines(plan)) + ("\n" if plan.stage else ""),
        "START": _start(plan),
        "PYTHON": shlex.quote(plan.python),
        "RUN_DIRECTORY": '"$run"',
        "FIND_RUN_DIRECTORY": f"run={_run_directory(plan)}",
        "END_SECONDS": str(plan.end_seconds),
        "LIMITS": " ".join(_limits(plan)),
    }
    template = (resource_directory("slurm") / "train.sbatch").read_text(encoding="utf-8")
    # One pass, so that a value that looks like a placeholder stays what it is.
    return _PLACEHOLDER.sub(lambda match: filled[match[1]], template)


def _site_lines(plan: LaunchPlan) -> list[str]:
    lines = [*export_lines(), *gpu_lines(plan.gres_style), *module_lines(plan.modules)]
    return lines + environment_lines(plan.environment, plan.network_interface)


def _run_directory(plan: LaunchPlan) -> str:
    """Return the shell word of the run directory; a task of a sweep has its own."""
    whole = shlex.quote(str(plan.run_directory))
    if not plan.sweep:
        return whole
    return f'{whole}/{task_stem(plan.job_name)}-"$(printf %04d "$SLURM_ARRAY_TASK_ID")"'


def _start(plan: LaunchPlan) -> str:
    """Return the line that starts the ranks, in their container."""
    directories = (plan.working_directory, plan.run_directory)

    def contained(command: tuple[str, ...]) -> tuple[str, ...]:
        return in_container(command, plan.container, directories, has_gpus=plan.gpus_per_node > 0)

    inside = plan if plan.container is None else replace(plan, python=plan.container.python)
    return start_line(inside, srun_container_options(plan.container, directories, plan.environment), contained)


def _node_check(plan: LaunchPlan) -> str:
    if not plan.node_check:
        return ""
    # By srun, whatever starts the ranks: the command line of the check needs no MPI, and no agent.
    start = _start(dataclasses.replace(plan, starter="srun", mpi="none", command=plan.node_check))
    limit = f"timeout --kill-after=10 {plan.node_check_seconds}"
    return _NODE_CHECK.format(start=start.replace("srun ", f"{limit} srun ", 1))


def _directives(plan: LaunchPlan) -> list[str]:
    # SLURM expands %j, %A and %a here; a percent sign of the path itself is doubled.
    job = "%A_%a" if plan.array else "%j"
    output = str(plan.run_directory / "logs").replace("%", "%%") + f"/slurm-{job}.out"
    options: list[tuple[str, str | int | None]] = [
        ("job-name", plan.job_name),
        ("array", plan.array),
        ("nodes", plan.nodes),
        ("ntasks-per-node", plan.ranks_per_node),
        _gpus(plan),
        ("cpus-per-task", plan.cpus_per_task),
        ("mem", plan.memory_per_node),
        ("time", plan.time),
        ("partition", plan.partition),
        ("account", plan.account),
        ("qos", plan.qos),
        ("constraint", plan.constraint),
        ("exclude", ",".join(filter(None, [plan.exclude, *plan.avoid])) or None),
        ("reservation", plan.reservation),
        ("licenses", plan.licenses),
        ("mail-type", plan.mail_type),
        ("mail-user", plan.mail_user),
        ("chdir", _quoted(str(plan.working_directory))),
        ("output", _quoted(output)),
        ("signal", f"{signal_target(plan)}USR1@{plan.signal_seconds}"),
    ]
    lines = [f"{name}={value}" for name, value in options if value is not None]
    given = {name: value for name, value in plan.sbatch_options.items() if value is not False}
    lines += [name if value is True else f"{name}={value}" for name, value in given.items()]
    # Without append SLURM empties the output file at every requeue.
    return [*lines, "requeue", "open-mode=append"]


def _gpus(plan: LaunchPlan) -> tuple[str, str | int | None]:
    if plan.gpus_per_node == 0:
        return "gpus-per-node", None
    kind = f"{plan.gpu_type}:" if plan.gpu_type else ""
    if plan.gres_style == "gres":
        return "gres", f"gpu:{kind}{plan.gpus_per_node}"
    return plan.gres_style, f"{kind}{1 if plan.gres_style == 'gpus-per-task' else plan.gpus_per_node}"


def _quoted(path: str) -> str:
    """Quote for sbatch's own parser (a path has no quotes or backslashes: `_PATH`)."""
    return f'"{path}"' if " " in path else path


def _limits(plan: LaunchPlan) -> list[str]:
    """Return the options by which the script's last line is told when to give up."""
    names = ("max_restarts", "max_excluded_nodes", "controller_seconds")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(plan, name)))]
    return words + (["--exclude", shlex.quote(plan.exclude)] if plan.exclude else [])


def _problems(plan: LaunchPlan) -> list[Problem]:
    problems: list[Problem] = []
    if _NAME.fullmatch(plan.job_name) is None:
        problems.append(Problem("run.name", plan.job_name, "sbatch takes letters, digits, '.', '_' and '-' here"))
    problems += slurm_problems(plan)
    for key, number, least in (
        ("launch.slurm.nodes", plan.nodes, 1),
        ("launch.processes", plan.ranks_per_node, 1),
        ("launch.slurm.gpus_per_node", plan.gpus_per_node, 0),
        ("launch.slurm.cpus_per_task", plan.cpus_per_task, 1),
        ("launch.slurm.signal_seconds", plan.signal_seconds, 1),
        ("launch.slurm.end_seconds", plan.end_seconds, 1),
        ("launch.slurm.max_restarts", plan.max_restarts, 0),
        ("launch.slurm.max_excluded_nodes", plan.max_excluded_nodes, 0),
        ("launch.slurm.controller_seconds", plan.controller_seconds, 0),
    ):
        if number is not None and (type(number) is not int or number < least):
            problems.append(Problem(key, number, f"must be an integer of at least {least}"))
    if plan.gres_style not in ("gpus-per-node", "gres", "gpus-per-task"):
        rule = "must be gpus-per-node, gres or gpus-per-task"
        problems.append(Problem("launch.slurm.gres_style", plan.gres_style, rule))
    if plan.array is not None and _ARRAY.fullmatch(plan.array) is None:
        problems.append(Problem("array", plan.array, "must be 1-TASKS%RUNNING"))
    for key, path in (("run.directory", plan.run_directory), ("working directory", plan.working_directory)):
        if _PATH.fullmatch(str(path)) is None:
            rule = "SLURM scripts take absolute paths of letters, digits, spaces and ./_-+=@:,~% only"
            problems.append(Problem(key, str(path), rule, "choose another directory"))
        elif plan.container is not None and re.search(r"[:, ]", str(path)):
            rule = "can't be mounted into a container: it has a space, comma or colon"
            problems.append(Problem(key, str(path), rule, "choose another directory"))
    for text in (*plan.command, *plan.node_check, plan.python):
        if has_control_characters(text):
            problems.append(Problem("command", text, "must be one line without control characters"))
        elif redacted_text(text) != text:
            rule = "looks like a secret, and batch scripts are kept and shown"
            problems.append(
                Problem("command line", redacted_text(text), rule, "read it from a file, by launch.slurm.setup")
            )
    for key, text in (("stage", plan.stage), ("stage_directory", plan.stage_directory)):
        if text is not None and _PATH.fullmatch(text) is None:
            rule = "must be an absolute path of letters, digits, spaces and ./_-+=@:,~%"
            problems.append(Problem(f"launch.slurm.{key}", text, rule))
    if plan.stage is not None and plan.container is not None:
        rule = "has no effect in a container, which brings its own environment"
        problems.append(Problem("launch.slurm.stage", plan.stage, rule, "remove one of them"))
    if not plan.command:
        problems.append(Problem("command", None, "is empty"))
    return problems
