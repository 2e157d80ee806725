"""Put a foreign checkpoint under the names of a model, or say everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from trainer.checkpoint.import_source import ForeignTensor, Source
from trainer.core.errors import Problem, RefusedError
from trainer.engine.state_replicated import persistent_buffers

_SHOWN = 20
_FIX = "give the model that was trained: --model, a directory with its config.json or a Hugging Face id"


def fitted(source: Source, network: PreTrainedModel) -> Source:
    """Return ``source`` under the names of ``network``, tied weights once.

    Raises RefusedError with everything that is missing, left over, of another shape, or tied here and not there.
    """
    names = _first_names(network)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    buffers = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(network)}
    problems: list[Problem] = []
    weights: dict[str, ForeignTensor] = {}
    for name, tensor in source.weights.items():
        first = names.get(name)
        if first is None:
            problems.append(Problem(name, None, "is left over: the model has no such parameter", _FIX))
        elif first not in weights:
            weights[first] = tensor
        elif name in source.moments or not torch.equal(weights[first].read(), tensor.read()):
            rule = f"is one tensor with {first} by the config, and another one in the checkpoint"
            problems.append(Problem(name, None, rule, "give a config.json with tie_word_embeddings: false"))
    for name in sorted(shapes.keys() - weights.keys()):
        if name in source.shared:
            rule = f"is one tensor with {source.shared[name]} in the checkpoint, and of its own by the config"
            problems.append(Problem(name, None, rule, "give a config.json with tie_word_embeddings: true"))
        else:
            problems.append(Problem(name, None, "is missing in the checkpoint", _FIX))
    problems += _other_shapes(weights, shapes) + _other_shapes(source.buffers, buffers)
    for name in sorted(source.buffers.keys() - buffers.keys()):
        problems.append(Problem(name, None, "is left over: the model has no such buffer", _FIX))
    for name in sorted(buffers.keys() - source.buffers.keys()):
        problems.append(Problem(name, None, "is missing in the checkpoint", _FIX))
    frozen = {names[name] for name in source.frozen if name in names}
    moments = {names[name]: held for name, held in source.moments.items() if name in names}
    problems += _bad_moments(weights, moments, frozen)
    if problems:
        raise RefusedError([*_shortened(problems)], title="import refused, nothing was written")
    return Source(
        source.path, source.kind, weights, source.buffers, moments, frozen, {},
        {names[name]: tensor for name, tensor in source.rounded.items()},
        source.step, source.optimizer_steps, source.dtype, source.notes, source.directory,
    )  # fmt: skip


def _first_names(network: PreTrainedModel) -> dict[str, str]:
    """Return the name under which a parameter is kept, by each of its names."""
    first: dict[int, str] = {}
    named = network.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _other_shapes(held: dict[str, ForeignTensor], shapes: dict[str, tuple[int, ...]]) -> list[Problem]:
    return [
        Problem(name, list(tensor.shape), f"the model's is {list(shapes[name])}", _FIX)
        for name, tensor in held.items()
        if name in shapes and tensor.shape != shapes[name]
    ]


def _bad_moments(
    weights: dict[str, ForeignTensor], moments: dict[str, dict[str, ForeignTensor]], frozen: set[str]
) -> list[Problem]:
    if not moments:
        return []
    fix = "import the weights alone: --weights-only"
    problems = [
        Problem(name, None, "was trained, but its optimizer state is missing", fix)
        for name in sorted(weights.keys() - frozen - moments.keys())
    ]
    return problems + [
        Problem(name, list(tensor.shape), f"{key} of a weight of shape {list(weights[name].shape)}", fix)
        for name, held in moments.items()
        for key, tensor in held.items()
        if name in weights and tensor.shape != weights[name].shape
    ]


def _shortened(problems: list[Problem]) -> Iterator[Problem]:
    """Yield so many problems of each kind that a person reads them, and how many more there are."""
    counted: dict[str, int] = {}
    for problem in problems:
        kind = problem.rule.split(" ")[0] + problem.rule.split(" ")[1]
        counted[kind] = counted.get(kind, 0) + 1
        if counted[kind] <= _SHOWN:
            yield problem
    more = sum(max(0, count - _SHOWN) for count in counted.values())
    if more:
        yield Problem("parameters", None, f"{more} more do not fit in the same ways", _FIX)
