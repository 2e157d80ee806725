"""End the jobs of a run: those that wait at once, those that run after a save, or now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.core.control_file import new_command, write_command
from trainer.core.errors import RefusedError, TrainerError
from trainer.launch.queue import ask_queue
from trainer.launch.slurm_commands import cancel_jobs, user_name
from trainer.launch.submit import recorded_jobs
from trainer.launch.sweep_file import read_sweep, task_of_sweep


@dataclass(frozen=True)
class Cancelled:
    """What was done."""

    ended: list[str]
    """Jobs handed to scancel."""
    asked: list[str]
    """Jobs whose runs were asked to save and stop."""
    foreign: list[str]
    """Jobs of another user, left alone."""


def cancel(run_directory: Path, *, now: bool, whole_sweep: bool, say: Callable[[str], None]) -> Cancelled:
    """End every job that was submitted for a run and is not over, and say what happens to each.

    Jobs that wait are taken out of the queue first, so that none of a chain follows. The run of a job that runs is
    asked to save and stop, and not to go back into the queue; ``now`` leaves it SLURM's KillWait to save. Raises
    RefusedError for a sweep without ``whole_sweep`` and for what is no run, TrainerError where SLURM can't be asked.
    """
    run_directory = run_directory.absolute()
    directories = _directories(run_directory, whole_sweep=whole_sweep)
    ids = recorded_jobs(run_directory)
    if not ids:
        rule = f"no job is recorded for {run_directory}"
        raise RefusedError(f"{rule} → use scancel for jobs that `trainer submit` did not submit")
    queue = ask_queue(ids)
    if queue.note is not None:
        raise TrainerError(f"nothing was cancelled: {queue.note}")
    jobs = [job for job in queue.of(ids) if not job.ended]
    ours = [job for job in jobs if job.user in (None, user_name())]
    ending = [job for job in ours if now or job.waits]
    asked = [job for job in ours if job not in ending]
    foreign = [job for job in jobs if job not in ours]
    if ending:
        cancel_jobs([job.id for job in ending])
    for job in ending:
        say(f"{job.id}: {'out of the queue' if job.waits else 'ends, saves as far as KillWait lets it'}")
    for job in asked:
        _ask_to_stop(directories.get(job.id.partition("_")[2], run_directory))
        say(f"{job.id}: asked to save and stop, which takes up to two steps and a save; --now ends it at once")
    for job in foreign:
        say(f"{job.id}: belongs to {job.user}, left alone")
    if not jobs:
        say(f"nothing to cancel: all jobs of {run_directory} are over")
    return Cancelled([job.id for job in ending], [job.id for job in asked], [job.id for job in foreign])


def _directories(run_directory: Path, *, whole_sweep: bool) -> dict[str, Path]:
    """Return the run directories of a sweep by the number of the task; none where it is one run."""
    if not run_directory.is_dir() and task_of_sweep(run_directory) is None:
        raise RefusedError(f"{run_directory} is not a directory → give the run.directory of a recipe")
    sweep = read_sweep(run_directory)
    if sweep is None and whole_sweep:
        raise RefusedError("--all is for sweeps: all jobs of a run are cancelled in any case → remove it")
    if sweep is not None and not whole_sweep:
        fix = f"add --all to end all of its runs, or name one, e.g. {run_directory / sweep.tasks[0].name}"
        raise RefusedError(f"{run_directory} is a sweep of {len(sweep.tasks)} runs → {fix}")
    return {str(task.number): run_directory / task.name for task in sweep.tasks} if sweep is not None else {}


def _ask_to_stop(run_directory: Path) -> None:
    try:
        write_command(run_directory, new_command("stop"))
    except OSError as error:
        raise TrainerError(f"{run_directory} can't be asked to stop: {error.strerror} → use --now") from error
