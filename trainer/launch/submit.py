"""Write a batch script into the run directory, hand it to sbatch, and remember the job."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, cast

from trainer.core.control_file import stop_file_problem, stop_path
from trainer.core.durable import replace_text
from trainer.core.errors import Problem, RefusedError, TrainerError
from trainer.core.private import GroupAccess, directory_mode, file_mode, keep_private, make_run_directory
from trainer.launch.slurm_commands import SlurmRefusedError, is_job_id, submit_script
from trainer.launch.sweep_file import task_of_sweep

_JOBS_NAME, _LOCK_NAME = "jobs.json", ".jobs.lock"
_LOCK_SECONDS = 5.0
_KINDS = ("afterany", "afternotok", "afterok", "after")


def slurm_directory(run_directory: Path) -> Path:
    """Return RUN/slurm: the scripts that were submitted and the jobs they became."""
    return run_directory / "slurm"


def refuse_stopped(run_directories: Iterable[Path]) -> None:
    """Raise RefusedError where RUN/stop keeps a run from training: its job would wait for nodes and end at once."""
    for directory in run_directories:
        path = stop_path(directory)
        if stop_file_problem(directory) == "":
            raise RefusedError(f"{path} exists: no start would train → remove it: rm {shlex.quote(str(path))}")


def made_slurm_directory(run_directory: Path) -> Path:
    """Return RUN/slurm, made if need be; RUN too, which a task of a sweep may not have yet. Raises OSError."""
    run_directory.mkdir(mode=directory_mode(), parents=True, exist_ok=True)
    directory = slurm_directory(run_directory)
    directory.mkdir(mode=directory_mode(), exist_ok=True)
    return directory


def make_submittable(run_directory: Path, group: GroupAccess = "none") -> None:
    """Make the run directory with what a job needs in it. Raises RefusedError as `write_script`."""
    if shutil.which("sbatch") is None:
        raise RefusedError("sbatch is not installed here → run `trainer submit` on a login node of the cluster")
    try:
        keep_private(group)  # SLURM gives the job the umask of its submission
        make_run_directory(run_directory, group)
        # SLURM does not make the directory of --output: the job would fail without a word.
        (run_directory / "logs").mkdir(mode=directory_mode(), exist_ok=True)
        slurm_directory(run_directory).mkdir(mode=directory_mode(), exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{error.filename}: {error.strerror} → choose a run.directory you can write") from error


def write_script(run_directory: Path, text: str, group: GroupAccess = "none") -> Path:
    """Write RUN/slurm/submit-NNNN.sbatch, the next free number, and RUN/logs for SLURM's own output.

    ``group`` is run.group_access. Raises RefusedError, with nothing written, where there is no sbatch or the run
    directory can't be written.
    """
    make_submittable(run_directory, group)
    directory = slurm_directory(run_directory)
    try:
        for number in range(1, 100_000):
            path = directory / f"submit-{number:04d}.sbatch"
            try:
                # O_EXCL: of two submissions at once, each gets its own number.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode())
            except FileExistsError:
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            return path
    except OSError as error:
        raise RefusedError(f"{error.filename}: {error.strerror} → choose a run.directory you can write") from error
    raise RefusedError(f"{directory} holds too many scripts → remove old ones")


def submit(
    script_path: Path, say: Callable[[str], None], *, dependency: str | None = None, array: str | None = None
) -> str:
    """Submit a script of `write_script`, record the job beside it in jobs.json, and return its id.

    ``dependency`` is what sbatch --dependency takes; ``array`` is recorded. Raises RefusedError when SLURM refuses the
    job (its script is removed again, unless another job has it), SlurmCommandError when sbatch gave no clear answer
    (the script stays: the job may have been queued). ``say`` is told of a job that is queued and can't be recorded.
    """
    directory = script_path.parent
    try:
        job_id = submit_script(script_path, dependency)
    except SlurmRefusedError as error:
        if all(job["script"] != script_path.name for job in _read_jobs(directory)):
            script_path.unlink(missing_ok=True)
        raise RefusedError(str(error)) from error
    job = {"id": job_id, "script": script_path.name, "submitted_unix": time.time()}
    job |= {name: text for name, text in (("dependency", dependency), ("array", array)) if text is not None}
    try:
        _record_job(directory, job)
    except OSError as error:  # the job is queued all the same
        unknown = "trainer status and cancel will not know it"
        say(f"{directory / _JOBS_NAME}: {error.strerror}: job {job_id} is queued, but {unknown} → scancel {job_id}")
    return job_id


def dependency(after: str | None, *, singleton: bool = False) -> str | None:
    """Return what sbatch --dependency takes for ``--after JOBID[:type]`` and ``--singleton``. Raises RefusedError."""
    parts: list[str] = []
    if after is not None:
        job_id, _, kind = after.partition(":")
        kind = kind or "afterany"
        if not is_job_id(job_id) or kind not in _KINDS:
            rule = "must be a job id, or a job id and when: 123, 123:afternotok"
            raise RefusedError(Problem("--after", after, rule, f"use one of {', '.join(_KINDS)}"))
        parts.append(f"{kind}:{job_id}")
    return ",".join([*parts, *(["singleton"] if singleton else [])]) or None


def submit_chain(script_path: Path, jobs: int, say: Callable[[str], None], *, first: str | None = None) -> list[str]:
    """Submit a script ``jobs`` times, each job after the end of the one before, and return their ids.

    ``first`` is what the first one waits for. Raises as `submit`; jobs that are in the queue by then stay there, and
    the message names them.
    """
    ids: list[str] = []
    waits_for = first
    for _ in range(jobs):
        try:
            ids.append(submit(script_path, say, dependency=waits_for))
        except TrainerError as error:
            if not ids:
                raise
            raise TrainerError(f"{len(ids)} of {jobs} jobs are in the queue ({' '.join(ids)}); {error}") from error
        # Not afterok: that never runs once the job before has failed, also where it was requeued and finished.
        waits_for = f"afterany:{ids[-1]}"
    return ids


def recorded_jobs(run_directory: Path) -> list[str]:
    """Return the job ids of this run, oldest first; empty where none is recorded or the record can't be read.

    A run of a sweep has the task of each array that was submitted for it.
    """
    task = task_of_sweep(run_directory)
    if task is not None:
        return [f"{job['id']}_{task}" for job in _read_jobs(slurm_directory(run_directory.parent))]
    return [str(job["id"]) for job in _read_jobs(slurm_directory(run_directory))]


def script_of_job(run_directory: Path, job_id: str) -> Path | None:
    """Return the script that a job of this run (or of the sweep it is in) was submitted with, None if not recorded."""
    directory = slurm_directory(run_directory if task_of_sweep(run_directory) is None else run_directory.parent)
    found = [job for job in _read_jobs(directory) if str(job["id"]) == job_id and isinstance(job.get("script"), str)]
    return directory / Path(str(found[-1]["script"])).name if found else None


def _read_jobs(directory: Path) -> list[dict[str, Any]]:
    try:
        content: object = json.loads((directory / _JOBS_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    jobs = cast("dict[str, object]", content).get("jobs") if isinstance(content, dict) else None
    if not isinstance(jobs, list):
        return []
    entries = [cast("dict[str, Any]", job) for job in cast("list[object]", jobs) if isinstance(job, dict)]
    return [job for job in entries if is_job_id(str(job.get("id")))]


def _record_job(directory: Path, job: dict[str, Any]) -> None:
    with _recording_alone(directory):
        text = json.dumps({"jobs": [*_read_jobs(directory), job]}, indent=2) + "\n"
        replace_text(directory / _JOBS_NAME, text)


@contextlib.contextmanager
def _recording_alone(directory: Path) -> Generator[None]:
    """Keep a submission that goes on at the same moment from writing over what this one records.

    Where the file system has no locks, or somebody holds one for seconds, we go on without: the job is submitted.
    """
    try:
        descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, file_mode())
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
