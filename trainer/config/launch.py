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
    """Shell lines run before the ranks start (module load ..., source venv/bin/activate), written as they are."""


class LaunchConfig(Section):
    """Where ranks come from when no launcher has started them already."""

    processes: int = Field(default=1, ge=1)
    """Ranks that ``trainer train`` starts on this machine."""
    launcher: Literal["local", "slurm"] = "local"
    """Who starts them."""
    slurm: SlurmConfig = SlurmConfig()
    """What is asked of SLURM; only read by ``trainer submit`` and where ``launcher`` is slurm."""
