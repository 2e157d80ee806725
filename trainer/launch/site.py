"""Lines of the batch script that make a site's environment: modules and variables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

# A batch shell is no login shell: where the submitting shell did not export `module`, the site's own files define it.
_MODULE_FILES = (
    "/etc/profile.d/lmod.sh",
    "/etc/profile.d/z00_lmod.sh",
    "/etc/profile.d/modules.sh",
    "/usr/share/lmod/lmod/init/bash",
    "/usr/share/modules/init/bash",
)


def module_lines(modules: Sequence[str]) -> list[str]:
    """Return the lines that load environment modules."""
    if not modules:
        return []
    return [
        "for file in " + " ".join(_MODULE_FILES) + "; do",
        '  if ! type module >/dev/null 2>&1 && [ -r "$file" ]; then . "$file" || true; fi',
        "done",
        *(f"module load {shlex.quote(module)}" for module in modules),
    ]


def environment_lines(environment: Mapping[str, str | int], network_interface: str | None) -> list[str]:
    """Return the lines that export variables.

    In the script, not by ``--export=NAME=value``: command lines are seen by every user of a node.
    """
    variables = {name: str(value) for name, value in environment.items()}
    if network_interface is not None:
        variables.setdefault("NCCL_SOCKET_IFNAME", f"={network_interface}")  # "=": this one, not all that begin so
        variables.setdefault("GLOO_SOCKET_IFNAME", network_interface)
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def export_lines() -> list[str]:
    """Return the lines that hand the job's variables on to the ranks, also where it was submitted with --export=NONE.

    SLURM tells the job so by these, and srun would then start the ranks without any of what this script sets.
    """
    return ["unset SLURM_EXPORT_ENV SRUN_EXPORT_ENV"]


def gpu_lines(gres_style: str) -> list[str]:
    """Return the lines that let every rank see all GPUs of its node, whatever they were asked for by.

    DeepSpeed takes the GPU of the local rank's number, but steps of srun inherit --gpus-per-task and show a task one.
    """
    return ["unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND"] if gres_style == "gpus-per-task" else []
