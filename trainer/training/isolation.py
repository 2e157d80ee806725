"""Does the model keep attention inside documents? Asked of the model itself before a run that relies on it."""

from __future__ import annotations

import torch
from torch import distributed

from trainer.core.errors import Problem, RecipeError
from trainer.core.targets import IGNORE_INDEX
from trainer.data.batches import MicroBatch
from trainer.engine.base import TrainEngine

_DOCUMENT_TOKENS = 16
# Share of what the document before changes where positions don't restart. Where documents are kept apart it is 0 to the
# last bit (experts of a mixture may be batched otherwise, which costs the last bits of bfloat16); where position ids
# aren't heeded it is 1. Nats alone would not do: how much a fresh model attends differs a thousandfold among families.
_TOLERANCE = 0.25


def refuse_leak(engine: TrainEngine, family: str, vocabulary: int) -> None:
    """Raise RecipeError if the loss of a document depends on the document before it. All ranks call it together."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(vocabulary, (2, _DOCUMENT_TOKENS), generator=generator)
    after = torch.randint(vocabulary, (1, _DOCUMENT_TOKENS + 1), generator=generator)
    problem: Problem | None = None
    try:
        apart, joined = (
            abs(one - other)
            for one, other in (
                [engine.evaluate([_packed(first[None], after, restart)])[0] for first in before]
                for restart in (True, False)
            )
        )
    except TypeError as error:  # a forward pass without position_ids
        problem = _problem(family, f"takes no position_ids ({error})")
    else:
        differences = torch.tensor([apart, joined], device=engine.device, dtype=torch.float64)
        distributed.all_reduce(differences, op=distributed.ReduceOp.MAX)
        apart, joined = differences.tolist()
        if not apart <= _TOLERANCE * joined:
            seen = f"lets a document see the one before it (its loss moves by {apart:.3g} nats)"
            problem = _problem(family, seen)
    if problem is not None:
        raise RecipeError(problem, title="recipe refused")


def _packed(first: torch.Tensor, second: torch.Tensor, restart: bool) -> MicroBatch:
    """Return two documents in one row, of which only the second counts; without ``restart`` they are one."""
    inputs = torch.cat([first, second[:, :-1]], dim=1)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    targets[:, first.shape[1] :] = second[:, 1:]
    lengths = first.shape[1], second.shape[1] - 1
    positions = torch.cat([torch.arange(length) for length in (lengths if restart else (sum(lengths),))])[None]
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    return MicroBatch(inputs, targets, positions, documents)


def _problem(family: str, what: str) -> Problem:
    fix = "set it to false, or use packing: one_per_sequence or a model with position_ids and maskable attention"
    return Problem("data.mask_documents", True, f"{family} {what}", fix)
