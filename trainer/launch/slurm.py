"""Render the batch script of a run. Pure: strings in, one string out."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from trainer.config.run import Recipe
from trainer.core.errors import Problem, RefusedError
from trainer.core.resources import resource_directory

_TIME = re.compile(r"(?:[0-9]{1,5}-)?[0-9]{1,9}(?::[0-9]{1,2}){0,2}")
_PATH = re.compile(r"/[\w./+=@:,~% -]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_PATTERNS = {
    "run.name": (re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"), "letters, digits, '.', '_' and '-'"),
    "launch.slurm.time": (_TIME, "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
    "launch.slurm.partition": (re.compile(r"[A-Za-z0-9_.,-]{1,200}"), "names, separated by commas"),
    "launch.slurm.account": (re.compile(r"[A-Za-z0-9_.@-]{1,200}"), "one name"),
    "launch.slurm.qos": (re.compile(r"[A-Za-z0-9_.-]{1,200}"), "one name"),
    "launch.slurm.constraint": (re.compile(r"[A-Za-z0-9_.,:&|*()\[\]+-]{1,500}"), "features, e.g. a100&ib"),
    "launch.slurm.memory_per_node": (re.compile(r"[0-9]{1,12}[KMGTkmgt]?"), "a number with K, M, G or T"),
    "launch.slurm.exclude": (re.compile(r"[A-Za-z0-9_.,\[\]-]{1,5000}"), "a host list, e.g. node[1-3,7]"),
}


_LOADING_SECONDS = 150
"""For Python and torch to be loaded, from a network file system perhaps, and for srun to start and end the ranks."""
_PREFLIGHT = """
# Are these nodes fit for the run? 1: a node is at fault, RUN/failure.json names it; 2: the recipe or environment is.
# srun waits for ever for a node that it can't reach, hence timeout.
timeout --kill-after=10 {seconds} srun {options} \\
  {command} &
preflight=$!
while kill -0 "$preflight" 2>/dev/null; do wait "$preflight" || true; done
code=0
wait "$preflight" || code=$?
if [ "$code" -ne 0 ]; then
  {python} -m trainer.launch.requeue {run} --since "$started" || true
  exit "$code"
fi
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
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    memory_per_node: str | None = None
    exclude: str | None = None
    signal_seconds: int = 120
    """Seconds before the time limit at which SLURM sends USR1 to the ranks."""
    setup: tuple[str, ...] = ()
    """Shell lines of the recipe, written as they are."""
    preflight: tuple[str, ...] = ()
    """What each rank runs to check its node before the ranks train; empty: nothing."""
    preflight_seconds: int = 210
    """After which the check is killed."""
    command: tuple[str, ...]
    """What each rank runs."""
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
    recipe: Recipe,
    *,
    command: tuple[str, ...],
    preflight: tuple[str, ...] = (),
    python: str,
    working_directory: Path,
    run_directory: Path,
) -> LaunchPlan:
    """Return what ``launch.slurm`` of the recipe asks for, running ``command`` once per rank.

    ``preflight``, what checks a node, is run before it where ``launch.slurm.preflight`` asks for it.
    """
    slurm = recipe.launch.slurm
    checks = slurm.preflight if slurm.preflight is not None else slurm.nodes > 1
    return LaunchPlan(
        job_name=recipe.run.name,
        nodes=slurm.nodes,
        ranks_per_node=ranks_per_node(recipe),
        gpus_per_node=slurm.gpus_per_node,
        time=slurm.time,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        cpus_per_task=slurm.cpus_per_task,
        memory_per_node=slurm.memory_per_node,
        exclude=slurm.exclude,
        signal_seconds=slurm.signal_seconds,
        setup=slurm.setup,
        preflight=preflight if checks else (),
        preflight_seconds=recipe.launch.preflight.seconds + _LOADING_SECONDS,
        command=command,
        python=python,
        working_directory=working_directory,
        run_directory=run_directory,
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
        "SETUP": "\n".join(plan.setup),
        "PREFLIGHT": _preflight(plan),
        "START": f"srun {' '.join(_srun_options(plan))} \\\n  {shlex.join(plan.command)}",
        "PYTHON": shlex.quote(plan.python),
        "RUN_DIRECTORY": shlex.quote(str(plan.run_directory)),
    }
    template = (resource_directory("slurm") / "train.sbatch").read_text(encoding="utf-8")
    # One pass, so that a value that looks like a placeholder stays what it is.
    return _PLACEHOLDER.sub(lambda match: filled[match[1]], template)


def _directives(plan: LaunchPlan) -> list[str]:
    # SLURM expands %j here; a percent sign of the path itself is doubled.
    output = str(plan.run_directory / "logs").replace("%", "%%") + "/slurm-%j.out"
    options: list[tuple[str, str | int | None]] = [
        ("job-name", plan.job_name),
        ("nodes", plan.nodes),
        ("ntasks-per-node", plan.ranks_per_node),
        ("gpus-per-node", plan.gpus_per_node or None),
        ("cpus-per-task", plan.cpus_per_task),
        ("mem", plan.memory_per_node),
        ("time", plan.time),
        ("partition", plan.partition),
        ("account", plan.account),
        ("qos", plan.qos),
        ("constraint", plan.constraint),
        ("exclude", plan.exclude),
        ("chdir", _quoted(str(plan.working_directory))),
        ("output", _quoted(output)),
        ("signal", f"USR1@{plan.signal_seconds}"),  # without B: the ranks get it, on every node
    ]
    # Without append SLURM empties the output file at every requeue.
    return [f"{name}={value}" for name, value in options if value is not None] + ["requeue", "open-mode=append"]


def _quoted(path: str) -> str:
    """Quote for sbatch's own parser (a path has no quotes or backslashes: `_PATH`)."""
    return f'"{path}"' if " " in path else path


def _srun_options(plan: LaunchPlan) -> list[str]:
    # KillOnBadExit is 0 by default: without it a job with a dead rank hangs until its time limit.
    options = [
        f"--nodes={plan.nodes}",
        f"--ntasks={plan.world_size}",
        f"--ntasks-per-node={plan.ranks_per_node}",
        "--kill-on-bad-exit=1",
        "--wait=60",
    ]
    # Since Slurm 22.05 srun does not inherit it from sbatch.
    return options + ([f"--cpus-per-task={plan.cpus_per_task}"] if plan.cpus_per_task else [])


def _preflight(plan: LaunchPlan) -> str:
    if not plan.preflight:
        return ""
    return _PREFLIGHT.format(
        seconds=plan.preflight_seconds,
        options=" ".join(_srun_options(plan)),
        command=shlex.join(plan.preflight),
        python=shlex.quote(plan.python),
        run=shlex.quote(str(plan.run_directory)),
    )


def _problems(plan: LaunchPlan) -> list[Problem]:
    problems: list[Problem] = []
    values: dict[str, str | None] = {
        "run.name": plan.job_name,
        "launch.slurm.time": plan.time,
        "launch.slurm.partition": plan.partition,
        "launch.slurm.account": plan.account,
        "launch.slurm.qos": plan.qos,
        "launch.slurm.constraint": plan.constraint,
        "launch.slurm.memory_per_node": plan.memory_per_node,
        "launch.slurm.exclude": plan.exclude,
    }
    for key, value in values.items():
        pattern, meaning = _PATTERNS[key]
        if value is not None and (not value.isascii() or pattern.fullmatch(value) is None):
            problems.append(Problem(key, value, f"sbatch takes {meaning} here"))
    for key, number, least in (
        ("launch.slurm.nodes", plan.nodes, 1),
        ("launch.processes", plan.ranks_per_node, 1),
        ("launch.slurm.gpus_per_node", plan.gpus_per_node, 0),
        ("launch.slurm.cpus_per_task", plan.cpus_per_task, 1),
        ("launch.slurm.signal_seconds", plan.signal_seconds, 1),
    ):
        if number is not None and (type(number) is not int or number < least):
            problems.append(Problem(key, number, f"must be an integer of at least {least}"))
    for key, path in (("run.directory", plan.run_directory), ("working directory", plan.working_directory)):
        if _PATH.fullmatch(str(path)) is None:
            rule = "SLURM scripts take absolute paths of letters, digits, spaces and ./_-+=@:,~% only"
            problems.append(Problem(key, str(path), rule, "choose another directory"))
    words = [("command", word) for word in (*plan.command, *plan.preflight, plan.python)]
    for key, text in [*words, *(("launch.slurm.setup", line) for line in plan.setup)]:
        if _CONTROL.search(text.replace("\t", " ")):
            problems.append(Problem(key, text, "must be one line without control characters"))
    if not plan.command:
        problems.append(Problem("command", None, "is empty"))
    return problems
