"""One rank's life: log, claim, join, build, train, status, leave."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from pathlib import Path
from typing import Any

from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment
from trainer.core.errors import EXIT_FAILURE, EXIT_OK, EXIT_REQUEUE, RefusedError, TrainerError
from trainer.core.logs import RankLog, open_rank_log
from trainer.core.private import keep_private, make_run_directory
from trainer.resilience.signals import StopFlag
from trainer.training.run_directory import RunDirectory


def run_rank(recipe: Recipe, derived: Derived, deepspeed_json: dict[str, Any], environment: RankEnvironment) -> int:
    """Train as one rank and return its exit code. The environment has been exported to os.environ."""
    keep_private(recipe.run.group_access)  # a run directory holds paths, host names and data
    make_run_directory(Path(recipe.run.directory), recipe.run.group_access)
    directory: RunDirectory | None = None
    with StopFlag() as stop, open_rank_log(Path(recipe.run.directory), environment.rank) as log:

        def say(text: str) -> None:
            print(text, file=log.console_stream, flush=True)

        try:
            if environment.rank == 0:
                directory = RunDirectory(recipe, deepspeed_json, environment.world_size, say)
            code = _train(recipe, derived, deepspeed_json, environment, directory, log, stop)
        except BaseException as error:  # noqa: BLE001 - status.json must say how every run ended
            code = _report(error, environment, directory, log)
        finally:
            if directory is not None:
                directory.release()
    return code


def _train(
    recipe: Recipe, derived: Derived, deepspeed_json: dict[str, Any], environment: RankEnvironment,
    directory: RunDirectory | None, log: RankLog, stop: StopFlag,
) -> int:  # fmt: skip
    # Imported here: the log must be open before torch and DeepSpeed give their loggers a stream.
    from trainer.engine.build import join_group, leave_group
    from trainer.telemetry.build import build_sinks
    from trainer.telemetry.sinks.base import Fanout
    from trainer.training.attempt_clock import GoodputSink
    from trainer.training.binding import bind
    from trainer.training.build import build_parts
    from trainer.training.evaluating import early_end
    from trainer.training.loop import train
    from trainer.training.status_sink import StatusSink

    sinks = Fanout([])

    def open_sinks(resume_step: int, restore_seconds: float) -> Fanout:
        nonlocal sinks
        sinks.close()
        if directory is not None:
            if not directory.started:  # a rewind is no other start
                directory.clock.begin(
                    resume_step, restore_seconds, -(-environment.world_size // environment.local_world_size)
                )
            made = build_sinks(recipe, directory.path, resume_step, derived.total_steps, log.console_stream)
            goodput = GoodputSink(directory.clock, lambda record: sinks.goodput(record))
            sinks = Fanout([*made, goodput, StatusSink(directory, resume_step, derived.total_steps)])
        return sinks

    def say(text: str) -> None:
        print(text, file=log.console_stream, flush=True)

    try:
        join_group(environment, rendezvous_timeout_seconds=recipe.launch.rendezvous_timeout_seconds)
        if (bound := bind(recipe.launch.bind, environment)) is not None:
            print(bound, flush=True)  # into the log
            say(bound)
        parts = build_parts(
            recipe, derived, deepspeed_json, environment,
            attempt=directory.attempt if directory else 0,
            open_sinks=open_sinks, say=say,
            stop_requested=lambda: stop.received is not None or (directory is not None and directory.lost),
            may_commit=directory.refuse_if_taken_over if directory else lambda: None,
        )  # fmt: skip
        if directory is not None and parts.state.best.loss is not None:
            directory.status(best_validation_loss=parts.state.best.loss, best_step=parts.state.best.step)
        try:
            outcome = train(parts)
        except BaseException:
            parts.saver.rescue()
            raise
        early = early_end(parts)
        code = EXIT_OK if outcome == "finished" else EXIT_REQUEUE
        if directory is not None:
            # Before teardown: an abort there must not look like a failed run.
            reason = early if outcome == "finished" else f"asked to stop ({stop.received or 'another rank'})"
            directory.status(state=outcome, step=parts.state.step, exit_code=code, reason=reason)
        sinks.message(_farewell(outcome, parts.state.step, derived, recipe, early))
        if directory is not None and outcome == "finished":
            directory.report(sinks.message)
        parts.saver.close(wait=outcome == "finished")
        sinks.close()
        parts.loader.close()
        parts.engine.close()
    finally:
        sinks.close()
        leave_group()
    return code


def _farewell(outcome: str, step: int, derived: Derived, recipe: Recipe, early: str | None) -> str:
    if outcome == "finished" and early is not None:
        return f"finished {step} of {derived.total_steps} steps in {recipe.run.directory}: {early}"
    if outcome == "finished":
        return f"finished {step} steps in {recipe.run.directory}"
    return f"stopped at step {step} of {derived.total_steps}, checkpoint committed: the same command continues"


def _report(error: BaseException, environment: RankEnvironment, directory: RunDirectory | None, log: RankLog) -> int:
    """Tell user, log and status.json what ended this rank; return its exit code."""
    traceback.print_exception(error)
    code = error.exit_code if isinstance(error, TrainerError) else EXIT_FAILURE
    text = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
    # A start that is refused leaves the status of the run it would have continued.
    if directory is not None and (directory.started or not isinstance(error, RefusedError)):
        directory.status(state="failed", exit_code=code, reason=text)
    rank = f"rank {environment.rank}: " if environment.world_size > 1 and not isinstance(error, TrainerError) else ""
    # A lost connection is the echo of another rank's end.
    if not _is_echo(text) and not (environment.rank > 0 and _told_by_first_rank(log, text)):
        where = "" if isinstance(error, TrainerError) else f" (see {log.path})"
        with contextlib.suppress(OSError):
            print(f"trainer: {rank}{text}{where}", file=log.error_stream, flush=True)
    return code


def _told_by_first_rank(log: RankLog, text: str) -> bool:
    """Return whether rank 0 failed with the same words: most refusals are raised by all ranks alike."""
    time.sleep(1.0)  # ranks fail within moments of each other
    path = log.path.with_name(f"rank-{0:05d}.log")
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return text.splitlines()[0] in file.read().decode(errors="replace")
    return False


def _is_echo(text: str) -> bool:
    return any(part in text for part in ("Connection closed by peer", "Connection reset by peer", "Connection refused"))


def end_process(code: int) -> None:
    """Leave at once: daemon threads of torch and DeepSpeed may abort during interpreter shutdown."""
    os._exit(code)
