"""Write a batch script into the run directory, hand it to sbatch, and remember the job."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

from trainer.core.durable import replace_text
from trainer.core.errors import RefusedError
from trainer.core.private import GroupAccess, directory_mode, file_mode, keep_private, make_run_directory
from trainer.launch.slurm_commands import SlurmRefusedError, is_job_id, submit_script

_JOBS_NAME = "jobs.json"


def slurm_directory(run_directory: Path) -> Path:
    """Return RUN/slurm: the scripts that were submitted and the jobs they became."""
    return run_directory / "slurm"


def write_script(run_directory: Path, text: str, group: GroupAccess = "none") -> Path:
    """Write RUN/slurm/submit-NNNN.sbatch, the next free number, and RUN/logs for SLURM's own output.

    ``group`` is run.group_access. Raises RefusedError, with nothing written, where there is no sbatch or the run
    directory can't be written.
    """
    if shutil.which("sbatch") is None:
        raise RefusedError("sbatch is not installed here → run `trainer submit` on a login node of the cluster")
    directory = slurm_directory(run_directory)
    try:
        keep_private(group)  # SLURM gives the job the umask of its submission
        make_run_directory(run_directory, group)
        # SLURM does not make the directory of --output: the job would fail without a word.
        (run_directory / "logs").mkdir(mode=directory_mode(), exist_ok=True)
        directory.mkdir(mode=directory_mode(), exist_ok=True)
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


def submit(script_path: Path) -> str:
    """Submit a script of `write_script`, record the job beside it in jobs.json, and return its id.

    Raises RefusedError when SLURM refuses the job (its script is removed again), SlurmCommandError when sbatch gave no
    clear answer (the script stays: the job may have been queued).
    """
    try:
        job_id = submit_script(script_path)
    except SlurmRefusedError as error:
        script_path.unlink(missing_ok=True)
        raise RefusedError(str(error)) from error
    _record_job(script_path.parent, {"id": job_id, "script": script_path.name, "submitted_unix": time.time()})
    return job_id


def recorded_jobs(run_directory: Path) -> list[str]:
    """Return the job ids of this run, oldest first; empty where none is recorded or the record can't be read."""
    return [str(job["id"]) for job in _read_jobs(slurm_directory(run_directory))]


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
    text = json.dumps({"jobs": [*_read_jobs(directory), job]}, indent=2) + "\n"
    replace_text(directory / _JOBS_NAME, text)
