"""Ranks that take cases through the trainer's engine: one process imports, every case forks its ranks.

Reads a JSON object a line: what ``trainer.verification.case.run_case`` takes (or, with "kind": "documents",
``second_document_losses``), "world_size", "log" (a path) and "damage" (how to break the trainer, or null). Answers with
the exit codes of the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports print there

import deepspeed  # noqa: F401 - imported for the children
import torch
import transformers  # noqa: F401

from trainer.core import environ
from trainer.core.environ import RankEnvironment
from trainer.engine.build import join_group, leave_group
from trainer.launch.ports import free_port
from trainer.verification.case import run_case, second_document_losses

TIMEOUT_SECONDS = 180

torch.set_num_threads(1)


def main() -> None:
    """Serve cases until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


def run(job: dict[str, Any]) -> list[int]:
    """Fork the ranks of one case, wait for them, kill all when one fails; return their exit codes."""
    port = free_port("127.0.0.1")
    pids: list[int] = []
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            _child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    failed_at: float | None = None
    while len(codes) < len(pids):
        for pid in [p for p in pids if p not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        if time.monotonic() > deadline or (failed_at is not None and time.monotonic() > failed_at + 2):
            for pid in [p for p in pids if p not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _child(job: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    world_size = job["world_size"]
    place = RankEnvironment(rank, world_size, rank, world_size, 0, "127.0.0.1", port, "environment")
    environ.export(place, os.environ)
    code = 1
    try:
        _case(job, place)
        code = 0
    except BaseException as error:  # noqa: BLE001 - told by exit code and log
        import traceback

        traceback.print_exc()
        Path(job["output"], f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _case(job: dict[str, Any], place: RankEnvironment) -> None:
    join_group(place)
    if job.get("damage"):
        _damage(job["damage"])
    if job.get("kind") == "documents":
        second_document_losses(job, place)
    else:
        run_case(job, place)
    leave_group()


def _damage(kind: str) -> None:
    """Break the trainer on purpose: a cell that stays green then would prove nothing."""
    from trainer.models import stages

    if kind == "swapped blocks":
        intact = stages.Stage.__init__

        def swapped(self: Any, network: Any, part: Any) -> None:
            intact(self, network, part)
            blocks = network.get_submodule(part.anatomy.blocks)
            if part.last - part.first > 1:
                one, other = blocks[part.first], blocks[part.first + 1]
                for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
                    a.data, b.data = b.data, a.data

        stages.Stage.__init__ = swapped
    elif kind == "untied head":
        from trainer.engine.pipeline_module import StageModule

        StageModule.get_tied_weights_and_groups = lambda self: []
    elif kind == "dropped rotary":
        run_forward = stages.Stage._run

        def shifted(self: Any, arguments: dict[str, Any]) -> torch.Tensor:
            if self._route.received is not None:
                arguments = {**arguments, "position_ids": torch.zeros_like(arguments["input_ids"])}
            return run_forward(self, arguments)

        stages.Stage._run = shifted
    elif kind == "router loss without a way back":
        from trainer.models.router_logits import RouterLogits

        split = RouterLogits.split

        def cut(self: Any, received: torch.Tensor) -> torch.Tensor:
            states = split(self, received)
            self.arrived = tuple(logits.detach() for logits in self.arrived)
            return states

        RouterLogits.split = cut
    elif kind == "router loss of the last stage":
        from trainer.models.router_logits import RouterLogits

        RouterLogits.enter = lambda self: None
    elif kind == "no router loss":
        from trainer.engine.pipeline import StagedEngine

        construct = StagedEngine.__init__

        def unbalanced(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            self._auxiliary_coefficient = 0.0

        StagedEngine.__init__ = unbalanced
    elif kind == "forgotten documents":
        from trainer.models.shard_sequence import SequenceAttention

        enter = SequenceAttention.enter
        SequenceAttention.enter = lambda self, documents: enter(self, None)
    else:
        raise ValueError(kind)


if __name__ == "__main__":
    main()
