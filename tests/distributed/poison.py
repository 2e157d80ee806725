"""Bad data and broken memory for forked runs: ``install`` is called in each rank (forked_runs.Trainer.train, before).

TRAINER_FAULTS=POINT:RANK:WHERE:KIND[,...] with the points ``poison.samples`` (WHERE is A-B, the rows of those samples
are bad whenever they are read: ``nan``, ``inf``, ``spike``, ``gradient``) and ``poison.step`` (WHERE is the step, in
this start alone: also ``flip``, one bit of a weight after the update, ``buffer`` is not used).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed

from trainer.data.loader import TrainLoader
from trainer.models.loss import LossSpec

_now: dict[str, Any] = {"step": 0, "rows": []}


def _faults() -> list[list[str]]:
    entries = [fault.split(":") for fault in filter(None, os.environ.get("TRAINER_FAULTS", "").split(","))]
    return [entry for entry in entries if entry[0].startswith("poison.")]


def _kinds(index: int) -> list[tuple[list[int], str]]:
    """Return (rows of micro-batch ``index``, kind) of what is to happen there now."""
    rows = _now["rows"][index] if index < len(_now["rows"]) else []
    found: list[tuple[list[int], str]] = []
    for point, rank, where, kind in _faults():
        if rank not in ("*", str(distributed.get_rank())):
            continue
        if point == "poison.samples":
            first, last = map(int, where.split("-"))
            found.append(([i for i, number in enumerate(rows) if first <= number <= last], kind))
        elif int(where) == _now["step"]:
            found.append((list(range(len(rows))), kind))
    return found


def install() -> None:
    import trainer.training.build as build

    own_next, own_spec = TrainLoader.next_step, build.loss_spec

    def next_step(loader: TrainLoader) -> list[Any]:
        _now["rows"] = loader.sample_numbers().tolist()
        batches = own_next(loader)
        _now["step"], _now["index"] = loader._steps_done, 0
        return batches

    def loss_spec(unpadded: int | None) -> LossSpec:
        spec = own_spec(unpadded)

        def function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            losses = spec.function(logits, targets)
            if not torch.is_grad_enabled():
                return losses
            for rows, kind in _kinds(_now["index"]):
                losses = torch.stack([_bad(loss, kind) if i in rows else loss for i, loss in enumerate(losses)])
            _now["index"] += 1
            return losses

        return LossSpec(spec.name, function)

    TrainLoader.next_step = next_step
    build.loss_spec = loss_spec
    _flip_after_steps()


def _bad(loss: torch.Tensor, kind: str) -> torch.Tensor:
    factors = {"nan": float("nan"), "inf": float("inf"), "spike": 100.0}
    if kind == "gradient":
        return loss + 10_000.0 * (loss - loss.detach())
    return loss * factors.get(kind, 1.0)


def _flip_after_steps() -> None:
    from trainer.engine.pipeline import StagedEngine
    from trainer.engine.zero import ZeroEngine

    def wrap(kind: type) -> None:
        own = kind.train_batch

        def train_batch(engine: Any, *args: Any) -> Any:
            result = own(engine, *args)
            for _, _, _, what in [f for f in _faults() if f[0] == "poison.step" and int(f[2]) == _now["step"]]:
                if what.startswith("flip") and str(distributed.get_rank()) in [f[1] for f in _faults()]:
                    name = what.partition("=")[2]
                    weight = dict(engine._network.named_parameters())[name]
                    weight.data.view(-1)[3:4].view(torch.uint8)[0] ^= 1  # the lowest bit of one element
            return result

        kind.train_batch = train_batch

    wrap(ZeroEngine)
    wrap(StagedEngine)
