"""One rank's life: log, claim, join, build, train, status, leave."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core import faults, phases
from trainer.core.done_file import read_done, remove_done, write_done
from trainer.core.environ import RankEnvironment
from trainer.core.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, CorruptionError, RefusedError, TrainerError
from trainer.core.failure_file import launch_name
from trainer.core.logs import RankLog, open_rank_log
from trainer.core.private import keep_private, make_run_directory
from trainer.resilience.deadline import Durations
from trainer.resilience.job_end import Ask
from trainer.resilience.signals import StopFlag
from trainer.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.telemetry.sinks.base import Fanout
    from trainer.training.loop import Outcome, Parts

_CODES: dict[Outcome, int] = {"finished": EXIT_OK, "stopped": EXIT_REQUEUE}


def run_rank(
    recipe: Recipe, derived: Derived, deepspeed_json: dict[str, Any], environment: RankEnvironment,
    stop: StopFlag | None = None, job_end: Ask | None = None,
) -> int:  # fmt: skip
    """Train as one rank and return its exit code. The environment has been exported to os.environ.

    ``stop`` has its handlers installed already; ``job_end`` asks the scheduler when a job ends. What happens before
    there is a log is raised.
    """
    try:
        return _run(recipe, derived, deepspeed_json, environment, stop, job_end)
    except BaseException as error:
        note_exception(error)
        raise


def _run(
    recipe: Recipe, derived: Derived, deepspeed_json: dict[str, Any], environment: RankEnvironment,
    stop: StopFlag | None, job_end: Ask | None,
) -> int:  # fmt: skip
    keep_private(recipe.run.group_access)  # a run directory holds paths, host names and data
    make_run_directory(Path(recipe.run.directory), recipe.run.group_access)
    phases.mark("start", detail="opening the run directory")
    directory: RunDirectory | None = None
    with (
        stop or StopFlag() as stop,
        open_rank_log(Path(recipe.run.directory), environment.rank, recipe.telemetry.log_cap_bytes) as log,
    ):

        def say(text: str) -> None:
            print(text, file=log.console_stream, flush=True)

        try:
            faults.reach("train.start", rank=environment.rank, step=0)
            if environment.rank == 0:
                launch = launch_name(environment, os.environ)
                directory = RunDirectory(recipe, deepspeed_json, environment.world_size, launch, say)
            code = _train(recipe, derived, deepspeed_json, environment, directory, log, stop, job_end)
        except BaseException as error:  # noqa: BLE001 - status.json must say how every run ended
            code = _report(error, environment, directory, log)
        finally:
            if directory is not None:
                directory.release()
    return code


def _train(
    recipe: Recipe, derived: Derived, deepspeed_json: dict[str, Any], environment: RankEnvironment,
    directory: RunDirectory | None, log: RankLog, stop: StopFlag, job_end: Ask | None,
) -> int:  # fmt: skip
    phases.mark("start", detail="importing torch and DeepSpeed")
    # Imported here: the log must be open before torch and DeepSpeed give their loggers a stream.
    from trainer.engine.build import leave_group
    from trainer.telemetry.build import build_sinks
    from trainer.telemetry.sinks.base import Fanout
    from trainer.training.asking import DurationsSink, request_sources
    from trainer.training.attempt_clock import GoodputSink
    from trainer.training.build import build_parts
    from trainer.training.loop import train
    from trainer.training.status_sink import StatusSink

    sinks, durations = Fanout([]), Durations()
    parts: Parts | None = None

    def open_sinks(resume_step: int, restore_seconds: float) -> Fanout:
        nonlocal sinks
        sinks.close()
        if directory is not None:
            nodes = -(-environment.world_size // environment.local_world_size)
            directory.clock.begin(resume_step, restore_seconds, nodes)
            phases.board.note_started()
            made = build_sinks(recipe, directory.path, resume_step, derived.total_steps, log.console_stream)
            goodput = GoodputSink(directory.clock, lambda record: sinks.goodput(record))
            best = parts.state.best if parts is not None else None
            status = StatusSink(directory, resume_step, derived.total_steps, best)
            sinks = Fanout([*made, goodput, status, DurationsSink(durations)])
        return sinks

    def say(text: str) -> None:
        print(text, file=log.console_stream, flush=True)

    try:
        requests = request_sources(
            recipe, derived.total_steps, stop, directory, job_end, durations, lambda text: sinks.message(text)
        )
        _meet(recipe, environment, say)
        parts = build_parts(
            recipe, derived, deepspeed_json, environment,
            attempt=directory.attempt if directory else 0,
            open_sinks=open_sinks, say=say, requests=requests,
            may_commit=directory.refuse_if_taken_over if directory else lambda: None,
        )  # fmt: skip
        if directory is not None:
            _take_up(directory, parts)
        try:
            outcome = train(parts)
        except BaseException as error:
            note_exception(error)
            parts.saver.rescue()
            raise
        _end(parts, outcome, recipe, derived, directory, sinks)
    except BaseException as error:
        note_exception(error)
        _note_status(error, directory)  # before teardown, which may hang: the scheduler must know whether to restart
        raise
    finally:
        sinks.close()
        leave_group()
    return _CODES[outcome]


def _meet(recipe: Recipe, environment: RankEnvironment, say: Callable[[str], None]) -> None:
    from trainer.engine.build import join_group
    from trainer.training.binding import bind

    detail = f"meeting the other ranks at {environment.master_address}:{environment.master_port}"
    phases.board.mark("start", detail=detail, allowed_seconds=meeting_seconds(recipe))
    join_group(environment, rendezvous_timeout_seconds=recipe.launch.rendezvous_timeout_seconds)
    if (bound := bind(recipe.launch.bind, environment)) is not None:
        print(bound, flush=True)  # into the log
        say(bound)


def _end(
    parts: Parts, outcome: Outcome, recipe: Recipe, derived: Derived, directory: RunDirectory | None, sinks: Fanout
) -> None:
    """Say how the run ended and close its parts: before teardown, an abort there must not look like a failure."""
    from trainer.training.evaluating import early_end

    early = early_end(parts)
    if directory is not None:
        _say_ended(directory, parts, outcome, early)
    sinks.message(_farewell(outcome, parts.state.step, derived, recipe, early))
    if directory is not None and outcome == "finished":
        directory.report(sinks.message)
    phases.board.mark("stop", allowed_seconds=leaving_seconds(recipe))
    parts.saver.close(wait=outcome == "finished")
    sinks.close()
    parts.loader.close()
    parts.engine.close()


def meeting_seconds(recipe: Recipe) -> float:
    """Return what meeting the other ranks may take: its own time limit names who is missing."""
    return max(recipe.resilience.watchdog.start_seconds, recipe.launch.rendezvous_timeout_seconds + 60.0)


def leaving_seconds(recipe: Recipe) -> float:
    """Return what leaving may take: the hook that runs and the one that is next have their time limits."""
    hooks = 2 * recipe.checkpoint.hook_timeout_seconds if recipe.checkpoint.hook else 0.0
    return hooks + recipe.resilience.watchdog.slow_seconds


def _take_up(directory: RunDirectory, parts: Parts) -> None:
    """Note the best step so far, and remove RUN/DONE: a finished run was asked for more, or lost its checkpoint."""
    if parts.state.best.loss is not None:
        directory.status(best_validation_loss=parts.state.best.loss, best_step=parts.state.best.step)
    done = read_done(directory.path)
    if done is not None and done.step > parts.state.step:
        parts.sinks.message(f"DONE says step {done.step}, but the newest checkpoint is of step {parts.state.step}")
    remove_done(directory.path)


def _say_ended(directory: RunDirectory, parts: Parts, outcome: Outcome, early: str | None) -> None:
    """Write into status.json, and RUN/DONE where nothing is left to do, how the loop ended."""
    parts.requests.finish()
    ended: dict[str, Any] = {"state": outcome, "step": parts.state.step, "exit_code": _CODES[outcome]}
    if outcome == "finished":
        write_done(directory.path, step=parts.state.step, attempt=directory.attempt, reason=early)
        directory.status(**ended, reason=early, requeue=False)
    else:
        ending = parts.requests.ending
        directory.status(**ended, reason=ending.reason, requeue=not ending.by_person)


def _farewell(outcome: str, step: int, derived: Derived, recipe: Recipe, early: str | None) -> str:
    if outcome == "finished" and early is not None:
        return f"finished {step} of {derived.total_steps} steps in {recipe.run.directory}: {early}"
    if outcome == "finished":
        return f"finished {step} steps in {recipe.run.directory}"
    return f"stopped at step {step} of {derived.total_steps}, checkpoint committed: the same command continues"


def _report(error: BaseException, environment: RankEnvironment, directory: RunDirectory | None, log: RankLog) -> int:
    """Tell user, log and status.json what ended this rank; return its exit code."""
    note_exception(error)
    traceback.print_exception(error)
    code, text = _code_and_words(error)
    _note_status(error, directory)
    rank = f"rank {environment.rank}: " if environment.world_size > 1 and not isinstance(error, TrainerError) else ""
    # A lost connection is the echo of another rank's end.
    if not _is_echo(text) and not (environment.rank > 0 and _told_by_first_rank(log, text)):
        where = "" if isinstance(error, TrainerError) else f" (see {log.path})"
        with contextlib.suppress(OSError):
            print(f"trainer: {rank}{text}{where}", file=log.error_stream, flush=True)
    return code


def _code_and_words(error: BaseException) -> tuple[int, str]:
    if isinstance(error, TrainerError):
        return error.exit_code, str(error)
    return EXIT_FAILURE, f"{type(error).__name__}: {error}"


def _note_status(error: BaseException, directory: RunDirectory | None) -> None:
    """Say in status.json what ends the run; a start that is refused leaves that of the run it would have continued."""
    if directory is not None and (directory.started or not isinstance(error, RefusedError)):
        code, text = _code_and_words(error)
        directory.status(state="failed", exit_code=code, reason=text)


def note_exception(error: BaseException) -> None:
    """Let the supervisor know what ends this rank, before anything else is done about it."""
    if isinstance(error, RefusedError):  # nothing failed, and nothing may be written
        return
    blamed = (error.ranks, error.hosts) if isinstance(error, CorruptionError) else ((), ())
    phases.board.note_exception(
        error,
        "".join(traceback.format_exception(error)),
        told=isinstance(error, TrainerError),
        blamed_ranks=blamed[0],
        blamed_hosts=blamed[1],
        exit_code=_code_and_words(error)[0],
    )


def _told_by_first_rank(log: RankLog, text: str) -> bool:
    """Return whether rank 0 failed with the same words: most refusals are raised by all ranks alike."""
    time.sleep(1.0)  # ranks fail within moments of each other
    path = log.first_path
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return text.splitlines()[0] in file.read().decode(errors="replace")
    return False


def _is_echo(text: str) -> bool:
    return any(part in text for part in ("Connection closed by peer", "Connection reset by peer", "Connection refused"))


def end_process(code: int) -> None:
    """Leave at once: daemon threads of torch and DeepSpeed may abort during interpreter shutdown."""
    os._exit(code)
