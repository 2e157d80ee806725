"""Run the ranks inside an image: options for srun's pyxis plugin, or a command in front of the ranks' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainer.config.slurm import MOUNT, ContainerConfig


def srun_container_options(
    container: ContainerConfig | None, directories: Sequence[Path], environment: Mapping[str, str | int]
) -> list[str]:
    """Return srun's options for ``container``; none where pyxis has no part in it.

    The first of ``directories`` is the one to run in. Not options of sbatch: the batch script could not call srun.
    """
    if container is None or container.runtime != "pyxis":
        return []
    options = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(container, directories))}",
        f"--container-workdir={directories[0]}",
    ]
    # An image's own variables win over the job's, but for those named here.
    return options + ([f"--container-env={','.join(environment)}"] if environment else [])


def in_container(
    command: Sequence[str], container: ContainerConfig | None, directories: Sequence[Path], *, has_gpus: bool
) -> tuple[str, ...]:
    """Return the words that run ``command`` inside ``container``; ``command`` itself where srun does it."""
    if container is None or container.runtime != "apptainer":
        return tuple(command)
    binds = (word for mount in _mounts(container, directories) for word in ("--bind", mount))
    gpus = ("--nv",) if has_gpus else ()
    return ("apptainer", "exec", *gpus, *binds, "--pwd", str(directories[0]), container.image, *command)


def _mounts(container: ContainerConfig, directories: Iterable[Path]) -> list[str]:
    """Return SOURCE:TARGET[:ro] of every mount, the job's own directories first."""
    mounts = [f"{directory}:{directory}" for directory in directories]
    for text in container.mounts:
        match = MOUNT.fullmatch(text)
        if match is not None:  # what does not fit is refused before
            source, target, mode = match.groups()
            mounts.append(f"{source}:{target or source}" + (f":{mode}" if mode else ""))
    return list(dict.fromkeys(mounts))
