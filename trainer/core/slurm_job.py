"""By which id SLURM's commands mean this job, and no other one."""

from __future__ import annotations

from collections.abc import Mapping


def controller_id(environment: Mapping[str, str]) -> str:
    """Return the id of the job around us for scontrol and scancel: ARRAY_TASK for the task of an array.

    SLURM_JOB_ID will not do there: that of the last task is the id of the array, and would mean all of its tasks.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")
