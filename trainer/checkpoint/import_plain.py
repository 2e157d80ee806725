"""Read a DeepSpeed checkpoint without ZeRO: whole tensors, and an optimizer whose entries have numbers for names.

Which number is which parameter is not in the file. Float32 masters beside bfloat16 or float16 weights give it away:
rounded, they equal the weights. Otherwise the shapes must leave one possibility only, when every parameter group lists
its parameters in the model's order (``model.parameters()`` does, whatever it is filtered by).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.checkpoint.import_optimizer import WEIGHTS_ONLY, common_step, moments_of, settings_of, step_of
from trainer.checkpoint.import_pickle import Node
from trainer.checkpoint.import_source import ForeignTensor, Source
from trainer.core.errors import Problem, RefusedError

_STATES = 1_000_000
"""Partial assignments that are looked at before the search is given up."""


def read_plain(model: Node, *, weights_only: bool) -> Source:
    """Return the contents of ``mp_rank_00_model_states.pt``. Raises RefusedError."""
    found = Source("", "DeepSpeed without ZeRO", {})
    buffers = {node.text() for node in model["buffer_names"].elements()}
    tensors: dict[tuple[int, tuple[int, ...]], str] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, node in model["module"].named():
        tensor = node.tensor()
        first = tensors.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) if tensor.numel() else name
        if name in buffers:
            found.buffers[name] = ForeignTensor.of(tensor)
        elif first != name:
            found.shared[name] = first
        else:
            weights[name] = tensor
    found.weights = {name: ForeignTensor.of(tensor) for name, tensor in weights.items()}
    optimizer = model.get("optimizer")
    if optimizer is None or (weights_only and optimizer.get("fp32_groups") is None):
        if optimizer is not None and optimizer.get("fp32_groups_flat") is not None:
            found.notes.append("its float32 masters lie flat, without names: the rounded weights were taken")
        return found
    _add_optimizer(found, optimizer, weights, weights_only)
    return found


def _add_optimizer(found: Source, optimizer: Node, weights: dict[str, torch.Tensor], weights_only: bool) -> None:
    inner = optimizer.get("optimizer_state_dict") or optimizer
    groups = inner["param_groups"].elements()
    numbers = [[index.integer() for index in group["params"].elements()] for group in groups]
    state = dict(inner["state"].items())
    masters = optimizer.get("fp32_groups")
    if masters is not None:
        held = [[node.tensor() for node in group.elements()] for group in masters.elements()]
        if [len(group) for group in held] != [len(group) for group in numbers]:
            raise masters.unlike("has other parameters than the optimizer")
        names = _by_value([tensor for group in held for tensor in group], weights, masters)
        for name, tensor in zip(names, [tensor for group in held for tensor in group], strict=True):
            found.rounded[name], found.weights[name] = found.weights[name], ForeignTensor.of(tensor.float())
    elif any(tensor.dtype != torch.float32 for tensor in weights.values()):
        rule = "holds neither master weights nor float32 weights that its optimizer would step on"
        raise RefusedError(Problem(optimizer.path.name, None, rule, WEIGHTS_ONLY), title="import refused")
    else:
        shapes = [[_shape(state.get(number)) for number in group] for group in numbers]
        names = _by_shape(groups, shapes, {name: tuple(t.shape) for name, t in weights.items()}, optimizer)
    flat = [(number, group) for group, own in zip(groups, numbers, strict=True) for number in own]
    steps: list[int] = []
    for name, (number, group) in zip(names, flat, strict=True):
        if number in state and not weights_only:
            moments = moments_of(state[number])
            found.moments[name] = {key: ForeignTensor.of(node.tensor()) for key, node in moments.items()}
            steps.append(step_of(state[number], group))
    trained = set(found.moments) if found.moments else set(names)
    found.frozen = weights.keys() - trained
    if steps:
        found.optimizer_steps = common_step(steps, optimizer)
        if said := settings_of(groups):
            found.notes.append(f"its optimizer: {said}")


def _shape(entry: Node | None) -> tuple[int, ...] | None:
    return tuple(moments_of(entry)["exp_avg"].tensor().shape) if entry is not None else None


def _by_value(masters: Sequence[torch.Tensor], weights: dict[str, torch.Tensor], where: Node) -> list[str]:
    """Return the name of each master: the weight that it is when rounded. Raises RefusedError for none or several."""
    left = dict(weights)
    names: list[str] = []
    for number, master in enumerate(masters):
        fitting = [name for name, w in left.items() if w.shape == master.shape and torch.equal(master.to(w.dtype), w)]
        if len(fitting) != 1:
            rule = f"master weight {number} equals {' and '.join(fitting) or 'none of the weights'}, rounded"
            raise RefusedError(Problem(f"{where.path.name}: {where.place}", None, rule, WEIGHTS_ONLY), "import refused")
        names += fitting
        del left[fitting[0]]
    return names


def _by_shape(
    groups: Sequence[Node],
    shapes: Sequence[Sequence[tuple[int, ...] | None]],
    weights: dict[str, tuple[int, ...]],
    where: Node,
) -> list[str]:
    """Return the name of each entry, group by group. Raises RefusedError unless the shapes leave one possibility."""
    said = [group.get("param_names") for group in groups]
    if all(said):  # the optimizer was given names
        names = [node.text() for group in said if group for node in group.elements()]
        fitting = [weights.get(name) for name in names]
        wanted = [shape for group in shapes for shape in group]
        if len(names) == len(wanted) and all(w is None or w == f for w, f in zip(wanted, fitting, strict=True)):
            return names
    found = _only_assignment([tuple(group) for group in shapes], list(weights.values()))
    if found is None:
        rule = "numbers its parameters, and their shapes leave several possibilities, or none, which is which"
        raise RefusedError(Problem(f"{where.path.name}: {where.place}", None, rule, WEIGHTS_ONLY), "import refused")
    order = list(weights)
    chosen: list[list[str]] = [[] for _ in shapes]
    for name, group in zip(order, found, strict=True):
        if group is not None:
            chosen[group].append(name)
    return [name for group in chosen for name in group]


def _only_assignment(
    groups: Sequence[tuple[tuple[int, ...] | None, ...]], shapes: Sequence[tuple[int, ...]]
) -> list[int | None] | None:
    """Return the group of each parameter of ``shapes`` (None: it is in none), if there is exactly one possibility.

    Groups are consumed in order; an entry None fits any shape.
    """
    spare = len(shapes) - sum(map(len, groups))
    if spare < 0:
        return None
    start = tuple(0 for _ in groups)
    # By how much of each group is used up: the number of ways to get there, and the last move of one of them.
    reached: list[dict[tuple[int, ...], tuple[int, int | None]]] = [{start: (1, None)}]
    for index, shape in enumerate(shapes):
        following: dict[tuple[int, ...], tuple[int, int | None]] = {}
        for used, (ways, _) in reached[-1].items():
            moves: list[int | None] = [None] if index - sum(used) < spare else []
            moves += [n for n, group in enumerate(groups) if group[used[n] :][:1] in ((None,), (shape,))]
            for move in moves:
                after = _after(used, move)
                following[after] = ways + following.get(after, (0, None))[0], move
        reached.append(following)
        if sum(map(len, reached)) > _STATES:
            return None
    used = tuple(map(len, groups))
    if reached[-1].get(used, (0, None))[0] != 1:
        return None
    found: list[int | None] = []
    for step in reversed(reached[1:]):
        _, move = step[used]
        found.append(move)
        used = _after(used, move, -1)
    return found[::-1]


def _after(used: tuple[int, ...], move: int | None, by: int = 1) -> tuple[int, ...]:
    return tuple(count + by * (number == move) for number, count in enumerate(used))
