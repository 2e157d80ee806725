"""Bad data and broken memory for forked runs: ``install`` is called in each rank (forked_runs.Trainer.train, before).

TRAINER_FAULTS=POINT:RANK:WHERE:KIND[,...] with the points ``poison.samples`` (WHERE is A-B: the rows of those samples,
whenever they are read), ``poison.step`` (the rows of a step: WHERE, in every start) and ``poison.weight`` (after the
update of step WHERE; KIND names a parameter, of which the lowest bit of an element is turned over).
``poison.rewound`` with the kind ``kill`` kills the rank when step WHERE begins after a rewind.
Kinds of rows: ``nan``, ``inf``, ``spike`` (loss and gradient times 100), ``gradient`` (the gradient alone).
"""

from __future__ import annotations

import os
import signal
from typing import Any, ClassVar

import torch
from torch import distributed

from trainer.data.loader import TrainLoader
from trainer.engine.pipeline import StagedEngine
from trainer.engine.zero import ZeroEngine
from trainer.models.loss import LossSpec
from trainer.training import build

_FACTORS = {"nan": float("nan"), "inf": float("inf"), "spike": 100.0}


class Now:
    """What the step under way reads."""

    step = 0
    rows: ClassVar[list[list[int]]] = []
    """Sample numbers of each micro-batch."""
    micro_batch = 0
    rewound = False


def install() -> None:
    own_next, own_seek, own_spec = TrainLoader.next_step, TrainLoader.seek, build.loss_spec

    def next_step(loader: TrainLoader) -> list[Any]:
        Now.rows, Now.micro_batch = loader.sample_numbers().tolist(), 0
        batches = own_next(loader)
        Now.step = loader._steps_done
        if Now.rewound and any(int(where) == Now.step for where, _ in _faults("poison.rewound")):
            os.kill(os.getpid(), signal.SIGKILL)
        return batches

    def seek(loader: TrainLoader, *position: int) -> None:
        own_seek(loader, *position)
        Now.rewound = True

    def loss_spec(unpadded: int | None) -> LossSpec:
        spec = own_spec(unpadded)

        def function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            losses = spec.function(logits, targets)
            if not torch.is_grad_enabled():
                return losses
            numbers = Now.rows[Now.micro_batch]
            Now.micro_batch += 1
            return torch.stack([_poisoned(loss, number) for loss, number in zip(losses, numbers, strict=True)])

        return LossSpec(spec.name, function)

    TrainLoader.next_step, TrainLoader.seek, build.loss_spec = next_step, seek, loss_spec
    for kind in (ZeroEngine, StagedEngine):
        _turn_bits(kind)


def _faults(point: str) -> list[tuple[str, str]]:
    """Return (where, kind) of this rank's faults at a point."""
    entries = [fault.split(":") for fault in filter(None, os.environ.get("TRAINER_FAULTS", "").split(","))]
    mine = ("*", str(distributed.get_rank()))
    return [(where, kind) for name, rank, where, kind in entries if name == point and rank in mine]


def _poisoned(loss: torch.Tensor, number: int) -> torch.Tensor:
    kinds = [kind for where, kind in _faults("poison.step") if int(where) == Now.step]
    for where, kind in _faults("poison.samples"):
        first, last = map(int, where.split("-"))
        kinds += [kind] if first <= number <= last else []
    for kind in kinds:
        loss = loss + 10_000 * (loss - loss.detach()) if kind == "gradient" else loss * _FACTORS[kind]
    return loss


def _turn_bits(kind: Any) -> None:
    own = kind.train_batch

    def train_batch(engine: Any, *args: Any) -> Any:
        result = own(engine, *args)
        for where, name in _faults("poison.weight"):
            if int(where) == Now.step:
                weight = dict(engine._network.named_parameters())[name]
                weight.data.view(-1)[3:4].view(torch.uint8)[0] ^= 1
        return result

    kind.train_batch = train_batch
