"""When the scheduler ends this job: asked in the background, because a controller may be slow or away."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from trainer.core.slurm_job import controller_id

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 300.0
"""Limits change (scontrol update TimeLimit); one question of one rank in five minutes is nothing to a controller."""
Ask = Callable[[str], float | None]


class JobEnd:
    """Knows when the job ends, as well as it can be known."""

    def __init__(
        self, environment: Mapping[str, str], ask: Ask | None, interval_seconds: float = _INTERVAL_SECONDS
    ) -> None:
        """Begin with SLURM_JOB_END_TIME, then call ``ask`` with the job's id in a thread, now and every so often.

        ``ask`` returns seconds since 1970, None where there is no limit; it may fail or take its time.
        """
        self._unix = _of_environment(environment)
        self._interval_seconds = interval_seconds
        job_id = controller_id(environment)
        if ask is not None and job_id:
            threading.Thread(target=self._watch, args=(ask, job_id), name="job end", daemon=True).start()

    def unix(self) -> float | None:
        """Return when the job ends, in seconds since 1970, None where that is not known. Does not block."""
        return self._unix

    def _watch(self, ask: Ask, job_id: str) -> None:
        told = False
        while True:
            try:
                self._unix, told = ask(job_id), False
            except Exception as error:  # noqa: BLE001 - a controller that is away or talks nonsense must not end a run
                if not told:
                    logger.warning("the time limit of job %s is not known anew: %s", job_id, error)
                told = True
            time.sleep(self._interval_seconds)


def _of_environment(environment: Mapping[str, str]) -> float | None:
    """Return SLURM_JOB_END_TIME, None where it is missing, no time, or over: then it is another job's."""
    try:
        end = float(environment.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None
    return end if math.isfinite(end) and end > time.time() else None
