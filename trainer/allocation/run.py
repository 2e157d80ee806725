"""One rank's part in the check of an allocation: say, write, build, connect, measure; rank 0 judges and reports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.allocation import shared_directory
from trainer.allocation.board import Board, Concluded, MissingRanks
from trainer.allocation.collectives import Group, torch_facts
from trainer.allocation.facts import rank_facts
from trainer.allocation.findings import Check, Finding, exit_code
from trainer.allocation.judge import Judge, Stop
from trainer.allocation.pairs import rounds
from trainer.allocation.reach import Door, unreachable
from trainer.allocation.report import failure_fields, report
from trainer.config.deepspeed_json import BUILD_SECONDS, builds_operations
from trainer.config.launch import PreflightConfig
from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment, host_of_rank
from trainer.core.errors import EXIT_FAILURE, TrainerError
from trainer.core.failure_file import launch_name, write_failure
from trainer.core.private import make_run_directory

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Candidate:
    """The run that is to start, as this rank has resolved it."""

    recipe: Recipe | None
    deepspeed: Mapping[str, Any]
    refused: str = ""
    """Why there is none."""


class _Rank:
    def __init__(self, place: RankEnvironment, candidate: Candidate, environment: Mapping[str, str]) -> None:
        self.place, self.candidate = place, candidate
        # As SLURM's commands take it, which the host's own name need not be.
        self.host = host_of_rank(environment, place.rank) or socket.gethostname()
        self.settings = candidate.recipe.launch.preflight if candidate.recipe is not None else PreflightConfig()
        self.judge = Judge(candidate.recipe, place.local_world_size, lambda rank: host_of_rank(environment, rank))
        self.began = time.monotonic()
        self.environment = environment
        self._reported = threading.Lock()

    def run(self, say: Callable[[str], None]) -> int:
        """Take part and return the exit code, the same on all ranks that can be reached."""
        seconds = self.settings.seconds + (BUILD_SECONDS if builds_operations(self.candidate.deepspeed) else 0)
        try:
            board = Board(self.place, self.settings.seconds / 2, seconds)
        except (OSError, RuntimeError) as error:
            return self._unconnected(error, say)
        with self._ended_at(seconds, say):
            try:
                self._phases(board)
            except Concluded as concluded:
                _end_by_oneself()
                return concluded.code
            except MissingRanks as error:
                self.judge.missing(error.phase, error.ranks, error.values)
            except Stop:
                pass
            except (OSError, RuntimeError) as error:
                if self.place.rank != 0:  # rank 0's host is gone, or its process
                    return EXIT_FAILURE
                self._note("check", f"rank 0 ({self.host}): {_first_line(error)}")
            finally:
                self.judge.clean()
            _end_by_oneself()
            code = self.conclude(say)
            board.conclude(code, board.present())
        return code

    def _phases(self, board: Board) -> None:
        judge, place = self.judge, self.place
        candidate = self.candidate
        facts = rank_facts(
            place, self.host, candidate.recipe, candidate.deepspeed, candidate.refused, torch_facts(place.local_rank)
        )
        plan = board.exchange("facts", facts.to_json(), judge.facts)
        leaders, directory = plan["leaders"], Path(plan["directory"])
        node = leaders.index(place.rank) if place.rank in leaders else None

        wrote = shared_directory.write(directory, node) if node is not None else None
        board.exchange("run directory", wrote, judge.written)
        door = Door((place.master_address, place.master_port)) if node is not None else None
        saw = None
        if node is not None and door is not None:
            saw = {**shared_directory.read(directory, node, len(leaders)), "door": door.address}
        doors = board.exchange("run directory", saw, judge.seen)
        built = _attempt(self._build) if node is not None else None
        board.exchange("operations", built, judge.built)
        failed = {"failed": unreachable(node, doors, _CONNECT_SECONDS)} if node is not None else None
        ranks_of = board.exchange("connections", failed, judge.reached)
        if door is not None:
            door.close()
        board.exchange("collectives", _attempt(lambda: self._measure(board, ranks_of)), judge.measured)

    def _build(self) -> dict[str, Any]:
        if not builds_operations(self.candidate.deepspeed):
            return {"names": []}
        from trainer.engine.operations import build_operations  # loads DeepSpeed: seconds

        return {"names": build_operations(self.candidate.deepspeed)}

    def _measure(self, board: Board, ranks_of: list[list[int]]) -> dict[str, Any]:
        # Time for the verdict must be left when a collective has run into its limit.
        group = Group(self.place, board.connect_again(), max(1.0, min(30.0, board.seconds_left / 2)))
        try:
            found: dict[str, Any] = {"wrong": group.wrong(), "all_reduce": group.all_reduce_speed()}
            links = group.link_speeds(rounds(len(ranks_of)), ranks_of) if len(ranks_of) > 1 else {}
            found["links"] = [[*link, speed] for link, speed in links.items()]
            found |= {"compute": group.compute_speed(), "memory": group.copy_speed()}
        finally:
            group.close()
        return found

    def conclude(self, say: Callable[[str], None]) -> int:
        """Print the report, write RUN/failure.json where a node is at fault, and return the exit code."""
        checks = self.judge.checks
        code = exit_code(checks)
        if not self._reported.acquire(blocking=False):
            return code
        say(report(f"allocation of {self.place.world_size} ranks", checks, time.monotonic() - self.began))
        recipe = self.candidate.recipe
        if code == EXIT_FAILURE and recipe is not None:
            launch = launch_name(self.place, self.environment)
            with contextlib.suppress(OSError):  # it has been said
                make_run_directory(Path(recipe.run.directory), recipe.run.group_access)
            write_failure(Path(recipe.run.directory), failure_fields(checks, launch, self.host, time.time()))
        return code

    def _unconnected(self, error: Exception, say: Callable[[str], None]) -> int:
        place = self.place
        where = f"{place.master_address}:{place.master_port}"
        if place.rank == 0:
            self._note("ranks", f"rank 0 can't listen on {where}: {_first_line(error)}")
            return self.conclude(say)
        say(f"trainer: rank {place.rank} on {self.host} can't reach rank 0 at {where}: {_first_line(error)}")
        return EXIT_FAILURE

    def _note(self, name: str, text: str) -> None:
        self.judge.checks.append(Check(name, "", (Finding("node", text, hosts=(self.host,), failure="rendezvous"),)))

    @contextlib.contextmanager
    def _ended_at(self, seconds: float, say: Callable[[str], None]) -> Generator[None]:
        """End the process after ``seconds``: a library may wait for a lost node longer than anybody wants to."""

        def end() -> None:
            if self.place.rank == 0:
                self._note("check", f"was not over within launch.preflight.seconds = {self.settings.seconds}")
                self.conclude(say)
            os._exit(EXIT_FAILURE)

        timer = threading.Timer(seconds + 5.0, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def check_allocation(
    place: RankEnvironment, candidate: Candidate, environment: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Check the nodes of this job as one of its ranks; ``environment`` has been exported to the process.

    Rank 0 gives ``say`` the report. Returns 0 where training may start, 2 where the recipe or what is installed is at
    fault, 1 where a node is (RUN/failure.json names it).
    """
    return _Rank(place, candidate, environment).run(say)


def _end_by_oneself() -> None:
    """Ignore SIGTERM: the first rank that ends with another code than 0 makes srun send it to the others.

    The step would then end with SIGTERM's code instead of what was found.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``action`` does, or ``failed_with``: rank 0 must hear of it, whatever it was."""
    try:
        return action()
    except TrainerError as error:
        return {"failed_with": str(error), "refused": error.exit_code != EXIT_FAILURE}
    except Exception as error:  # noqa: BLE001 - any error of torch, NCCL or a compiler
        return {"failed_with": f"{type(error).__name__}: {_first_line(error)}", "refused": False}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
