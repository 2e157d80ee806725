"""How ranks are started."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.config.section import Section


class SlurmConfig(Section):
    """Resources asked of SLURM by ``trainer submit``."""

    nodes: int = Field(default=1, ge=1)
    """Nodes."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs, and so ranks, per node; 0: ``launch.processes`` ranks per node, on CPU."""
    time: str = "24:00:00"
    """Time limit as sbatch takes it: minutes, HH:MM:SS or D-HH:MM:SS."""
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
    setup: tuple[str, ...] = ()
    """Shell lines run before the ranks start (module load ..., source venv/bin/activate), written as they are."""


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
    launcher: Literal["local", "slurm"] = "local"
    """Who starts them."""
    preflight: PreflightConfig = PreflightConfig()
    """How nodes are checked before training."""
    slurm: SlurmConfig = SlurmConfig()
    """What is asked of SLURM; only read by ``trainer submit`` and where ``launcher`` is slurm."""
