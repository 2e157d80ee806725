"""Find out what a cluster wants of a job, by asking SLURM and by a short job, and write it down as a site profile."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.launch import SlurmConfig
from trainer.core.errors import RefusedError, TrainerError
from trainer.core.resources import resource_directory
from trainer.launch.probe_text import profile_text
from trainer.launch.profile import find_profile, user_directory
from trainer.launch.slurm import LaunchPlan, render
from trainer.launch.slurm_commands import (
    SlurmCommandError,
    SlurmRefusedError,
    accepts_options,
    accounts_of_user,
    cluster_config,
    mpi_types,
    node_kinds,
    run_on_node,
    srun_has_option,
    test_script,
)

_SECONDS = 600.0
"""How long to wait for a node."""
_GRES = re.compile(r"gpu(?::([A-Za-z0-9_.-]+))?:([0-9]+)")
_GRES_STYLES = ("gpus-per-node", "gres", "gpus-per-task")
_DIRECTORIES = ("HOME", "SCRATCH", "WORK", "PROJECT", "STORE")
_VIRTUAL = re.compile(r"lo|docker|virbr|veth|br-|cni|flannel|cali|tun|tap")


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    partition: str
    is_default: bool
    time_limit: str
    nodes: int
    cpus: int
    memory_megabytes: int
    gpus: int
    gpu_type: str | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a profile is made of."""

    config: Mapping[str, str]
    """``scontrol show config``."""
    kind: NodeKind
    accounts: Sequence[str]
    """That this user may charge; empty without accounting."""
    gres_style: str
    mpi: Sequence[str]
    has_pyxis: bool
    said: Mapping[str, Sequence[str]]
    """What slurm/probe.sh said on the node."""
    shared: Sequence[str]
    """Directories that the node sees."""
    not_shared: Sequence[str]
    given: Mapping[str, object] = field(default_factory=dict[str, object])
    """Of the profile that was named: kept."""


def probe_site(
    named: str | None, output: Path | None, environment: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Write a profile of this cluster and return the exit code: 0, or 1 where jobs would not find trainer.

    ``named`` is a profile whose partition, account, QOS and other values are used and kept. Raises RefusedError where
    the file exists already, SlurmCommandError where SLURM can't be asked or the job does not run.
    """
    profile = find_profile(named, environment)
    given = dict(profile.values) if profile is not None else {}
    config = cluster_config()
    path = output or user_directory(environment) / f"{_file_name(config.get('ClusterName', 'cluster'))}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise RefusedError(f"{path} is no name of a profile → let it end in .yaml")
    if path.exists():
        raise RefusedError(f"{path} exists → remove it, or give another name with --output")
    kind = _choose(_node_kinds(), given)
    site = _site_options(kind, given)
    style = _gres_style(kind, site, given)
    say(f"asking for a node of partition {kind.partition} (at most {_SECONDS / 60:.0f} minutes, Ctrl-C gives up)")
    with _tokens(environment) as tokens:
        said = _ask_node([*site, *_gpu_options(style, 1 if kind.gpus else 0)], list(tokens))
    seen = set(said.get("shared", ()))
    findings = Findings(
        config=config,
        kind=kind,
        accounts=accounts_of_user(),
        gres_style=style,
        mpi=mpi_types(),
        has_pyxis=srun_has_option("--container-image"),
        said=said,
        shared=[directory for token, directory in tokens.items() if token in seen],
        not_shared=[directory for token, directory in tokens.items() if token not in seen],
        given=given,
    )
    _write(path, profile_text(findings))
    refusal = _refusal_of(path, environment)
    say(f"wrote {path}" + (f", but sbatch refuses a job of it: {refusal}" if refusal else ": sbatch takes a job of it"))
    if "python" not in said:
        say(f"the node can't import trainer with {sys.executable}: install it in a directory that nodes share")
    say(f"look through it, then: trainer submit RECIPE --profile {path.stem if output is None else path}")
    return 1 if refusal or "python" not in said else 0


def _node_kinds() -> list[NodeKind]:
    kinds: list[NodeKind] = []
    for row in node_kinds():
        name, limit, nodes, cpus, memory, gres = row
        match = _GRES.search(gres)
        numbers = [int(re.sub(r"\D.*", "", text) or 0) for text in (nodes, cpus, memory)]  # "96+": at least
        kinds.append(
            NodeKind(
                partition=name.rstrip("*"),
                is_default=name.endswith("*"),
                time_limit=limit,
                nodes=numbers[0],
                cpus=numbers[1],
                memory_megabytes=numbers[2],
                gpus=int(match[2]) if match else 0,
                gpu_type=match[1] if match else None,
            )
        )
    return kinds


def _choose(kinds: Sequence[NodeKind], given: Mapping[str, object]) -> NodeKind:
    """Return the nodes to look at: of the profile's partition or the default one, those with GPUs first."""
    partition, gpu_type = given.get("partition"), given.get("gpu_type")
    if not kinds:
        raise TrainerError("sinfo shows no partition that you may use")
    if isinstance(partition, str):
        fitting = [kind for kind in kinds if kind.partition in partition.split(",")]
        if not fitting:
            known = ", ".join(sorted({kind.partition for kind in kinds}))
            raise RefusedError(f"partition {partition} is none of this cluster's → use one of {known}")
    else:
        fitting = [kind for kind in kinds if kind.is_default] or list(kinds)
    typed = [kind for kind in fitting if gpu_type is None or kind.gpu_type == gpu_type] or fitting
    return max(typed, key=lambda kind: (kind.gpus > 0, kind.nodes))


def _site_options(kind: NodeKind, given: Mapping[str, object]) -> list[str]:
    """Return what every job here needs, as options of srun. Values of a profile have been checked."""
    names = ("account", "qos", "constraint", "reservation")
    return [f"--partition={kind.partition}", *(f"--{name}={given[name]}" for name in names if given.get(name))]


def _gpu_options(style: str, gpus: int) -> list[str]:
    if gpus == 0:
        return []
    return [f"--gres=gpu:{gpus}" if style == "gres" else f"--{style}={gpus}"]


def _gres_style(kind: NodeKind, site: Sequence[str], given: Mapping[str, object]) -> str:
    """Return the first way of asking for GPUs that sbatch takes."""
    if isinstance(given.get("gres_style"), str) or kind.gpus == 0:
        return str(given.get("gres_style", _GRES_STYLES[0]))
    for style in _GRES_STYLES:
        if accepts_options([*site, "--ntasks-per-node=1", *_gpu_options(style, 1)]):
            return style
    return _GRES_STYLES[0]


@contextlib.contextmanager
def _tokens(environment: Mapping[str, str]) -> Generator[dict[str, str]]:
    """Put an empty file into each directory that jobs may use; yield their paths and directories."""
    tokens: dict[str, str] = {}
    candidates = [os.getcwd(), *(environment.get(name, "") for name in _DIRECTORIES)]
    try:
        for directory in dict.fromkeys(filter(os.path.isdir, candidates)):
            with contextlib.suppress(OSError):  # a directory we may not write is nothing for a run
                descriptor, path = tempfile.mkstemp(prefix=".trainer-probe-", dir=directory)
                os.close(descriptor)
                tokens[path] = directory
        yield tokens
    finally:
        for path in tokens:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _ask_node(options: Sequence[str], tokens: Sequence[str]) -> dict[str, list[str]]:
    """Run slurm/probe.sh on one node and return what it said, by name."""
    script = (resource_directory("slurm") / "probe.sh").read_text(encoding="utf-8")
    # By -c: the node may not see the file.
    answer = run_on_node([*options, "--time=5"], ["bash", "-c", script, "probe", sys.executable, *tokens], _SECONDS)
    said: dict[str, list[str]] = {}
    for line in answer.splitlines():
        name, equals, value = line.partition("=")
        if equals and value:
            said.setdefault(name, []).append(value)
    if "host" not in said:
        raise SlurmCommandError(f"the probe said nothing on its node: {answer.strip()[:500]!r}")
    return said


def chosen_interface(said: Mapping[str, Sequence[str]]) -> str | None:
    """Return the interface for the traffic of ranks: InfiniBand's, else the one that leads outside, else the only."""
    rows = [row.split() for row in said.get("interface", ()) if not _VIRTUAL.match(row)]
    infiniband = [row[0] for row in rows if row[1:2] == ["32"]]
    outside = [name for name in said.get("default_interface", ()) if any(row[0] == name for row in rows)]
    only = [rows[0][0]] if len(rows) == 1 else []
    return next(iter([*infiniband, *outside, *only]), None)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror} → choose another place with --output") from error


def _refusal_of(path: Path, environment: Mapping[str, str]) -> str | None:
    """Return why sbatch would not take a job of the profile at ``path``, None where it would. Nothing is submitted."""
    profile = find_profile(str(path.absolute()), environment)
    assert profile is not None
    slurm = SlurmConfig.model_validate(dict(profile.values))
    plan = LaunchPlan(
        job_name="probe",
        nodes=1,
        ranks_per_node=slurm.gpus_per_node or 1,
        gpus_per_node=slurm.gpus_per_node,
        gres_style=slurm.gres_style,
        gpu_type=slurm.gpu_type,
        time=slurm.time,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        cpus_per_task=slurm.cpus_per_task,
        memory_per_node=slurm.memory_per_node,
        command=("true",),
        python=sys.executable,
        working_directory=Path("/"),
        run_directory=Path("/tmp"),
    )
    try:
        test_script(render(plan))
    except SlurmRefusedError as error:
        return str(error)
    return None


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).strip(".-") or "cluster"
