"""How ranks are started."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field, field_validator

from trainer.config.section import Section, broken_rule
from trainer.config.slurm import ContainerConfig


class SlurmConfig(Section):
    """Resources asked of SLURM by ``trainer submit``. A site profile is a file of these keys."""

    profile: str | None = None
    """Site profile laid under these keys: a name (slurm.md) or a path; ``none``: not even your default."""
    nodes: int = Field(default=1, ge=1)
    """Nodes."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs, and so ranks, per node; 0: ``launch.processes`` ranks per node, on CPU."""
    time: str = "24:00:00"
    """Time limit as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS."""
    gres_style: Literal["gpus-per-node", "gres", "gpus-per-task"] = "gpus-per-node"
    """How this site wants GPUs to be asked for."""
    gpu_type: str | None = None
    """Type of GPU, as ``sinfo -o %G`` shows it."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPUs per rank."""
    memory_per_node: str | None = None
    """As sbatch --mem takes it, e.g. 64G."""
    exclude: str | None = None
    """Nodes to avoid."""
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    """Seconds before the time limit at which ranks are told to checkpoint."""
    preflight: bool | None = None
    """Whether the job checks its nodes first (``trainer check --on-node``); null: if there is more than one."""
    reservation: str | None = None
    """Reservation."""
    licenses: str | None = None
    """Licenses."""
    mail_type: str | None = None
    """Events that SLURM sends mail about, e.g. END,FAIL."""
    mail_user: str | None = None
    """Address of that mail."""
    sbatch_options: dict[str, str | int | bool] = Field(default_factory=dict[str, str | int | bool])
    """More options of sbatch, from a list of allowed ones; ``true`` for an option without a value, ``false`` to undo
    that of a profile."""
    modules: tuple[str, ...] = ()
    """Environment modules to load, in this order."""
    end_seconds: int = Field(default=120, ge=1)
    """That the ranks may take to end after one has failed, before what starts them is killed: srun waits for those on
    a node that it can't reach."""
    max_restarts: int = Field(default=100, ge=0)
    """Failures after which a job starts again by itself; stops to checkpoint and restarts by SLURM don't count."""
    max_excluded_nodes: int = Field(default=2, ge=0)
    """Nodes that are left out at most because a run failed on them."""
    controller_seconds: int = Field(default=600, ge=0)
    """How long a job tries to reach a controller that does not answer."""
    setup: tuple[str, ...] = ()
    """Shell lines run before the ranks start (source venv/bin/activate), written as they are."""
    starter: Literal["srun", "torchrun", "mpirun", "mpiexec"] = "srun"
    """What starts the ranks in the job: srun, one task a rank; torchrun, one agent a node; Open MPI's mpirun; mpiexec
    of MPICH or Intel MPI."""
    mpi: Literal["none", "pmix", "pmi2"] = "none"
    """``srun --mpi``: only for code of yours that uses MPI, training does not need it."""
    online: bool = False
    """Whether the nodes may ask the Hugging Face Hub; else what the recipe names there must lie in the cache
    (``trainer fetch``)."""
    stage: str | None = None
    """Archive (tar) of an environment with bin/python, e.g. from launch/stage.sh: each node unpacks it once, and ranks
    start from there. For jobs of many ranks, whose imports a shared file system would feel."""
    stage_directory: str = "/tmp"
    """Where nodes unpack ``stage``: a directory of their own, on disk or in memory (/dev/shm)."""
    environment: dict[str, str | int] = Field(default_factory=dict[str, str | int])
    """Environment variables of the ranks, taken word for word. No secrets: read those from a file in ``setup``."""
    network_interface: str | None = None
    """Interface for the traffic of ranks (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    container: ContainerConfig | None = None
    """Container that the ranks run in."""

    @field_validator("environment", mode="before")
    @classmethod
    def _refuse_switches(cls, value: object) -> object:
        """``DEBUG: true`` would become True, which no program reads as one."""
        for name, given in cast("dict[object, object]", value).items() if isinstance(value, dict) else ():
            if isinstance(given, bool | float):
                raise broken_rule("must be text or a whole number", f'put it in quotes: "{given}"'.lower(), str(name))
        return cast("object", value)


class PreflightConfig(Section):
    """The check of the nodes before training, ``trainer check --on-node``."""

    seconds: int = Field(default=60, ge=10)
    """Time limit of the check, from when a rank has loaded torch; half of it for the ranks to arrive."""
    slow_fraction: float = Field(default=0.5, ge=0, lt=1)
    """A node slower than this share of the median is at fault."""


class LaunchConfig(Section):
    """Where ranks come from when no launcher has started them already."""

    processes: int = Field(default=1, ge=1)
    """Ranks that ``trainer train`` starts on this machine."""
    launcher: Literal["local", "slurm", "ssh"] = "local"
    """Who starts them; ssh: ``hostfile`` says where."""
    hostfile: str | None = None
    """Hosts of ``launcher: ssh``, a line each, as DeepSpeed takes it: ``worker-1 slots=8``."""
    include: str | None = None
    """Of the hostfile, only these hosts or slots: ``worker-1@worker-2:0,2``."""
    exclude: str | None = None
    """Of the hostfile, not these hosts or slots."""
    bind: Literal["auto", "none"] = "auto"
    """auto: give each rank CPUs of its own, near its GPU, unless the launcher has done so."""
    rendezvous_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long ranks wait for each other at the start."""
    preflight: PreflightConfig = PreflightConfig()
    """How nodes are checked before training."""
    slurm: SlurmConfig = SlurmConfig()
    """What is asked of SLURM; only read by ``trainer submit`` and where ``launcher`` is slurm."""
