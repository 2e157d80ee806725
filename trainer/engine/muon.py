"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) on weights that ranks hold pieces of.

The step of a matrix is its momentum made nearly orthogonal, scaled so that its size is AdamW's and one learning rate
serves both (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2). Embeddings, head, norms and biases follow
AdamW. torch's Muon takes whole matrices; DeepSpeed's makes gradients orthogonal before their norm is known, so that
neither clipping nor the veto of a step could work (0.19.8).

Momentum is kept in pieces, like all state. In a step the pieces of a matrix travel to the rank that holds most of it,
and its update back: with ZeRO 1 and 2 those at the edges of partitions do, with ZeRO 3 all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import distributed
from torch.optim.adamw import adamw

from trainer.engine.base import StateSlice

Group = distributed.ProcessGroup
# Of the quintic iteration in the post above.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


@dataclass(frozen=True)
class Piece:
    """Elements of one matrix that lie on this rank."""

    name: str
    shape: tuple[int, ...]
    """Of the whole matrix; where it has more dims, the last two are matrices (stacked experts)."""
    start: int
    """First element, in the flattened matrix."""
    count: int
    master: int
    """Number of the master it lies in."""
    offset: int
    """First element, in that master."""


@dataclass(frozen=True)
class _Matrix:
    shape: tuple[int, ...]
    places: tuple[tuple[int, int, int], ...]
    """(rank, start, count) of every piece, by start."""
    owner: int
    """The rank that computes the update."""


class MasterAccess(Protocol):
    """What the engines' state offers."""

    def masters(self) -> Iterable[tuple[torch.Tensor, int]]:
        """Return what is stepped on, each with its parameter group."""
        ...

    def slices(self) -> Iterator[StateSlice]:
        """Yield views into it."""
        ...


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``orthogonal: True``, AdamW for the others. ``attach`` must be called before a step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "orthogonal": False})
        self._masters: dict[int, int] = {}
        self._pieces: dict[int, list[Piece]] = {}
        self._matrices: dict[int, dict[str, _Matrix]] = {}
        self._group: Group | None = None

    def attach(self, state: MasterAccess, group: Group | None) -> None:
        """Learn which matrices lie where; ``group`` shares them, None: this rank has all of each.

        Every rank of the group has as many masters, and steps on those of one number together. Collective.
        """
        self._group = group
        masters = [(master, self.param_groups[number]["orthogonal"]) for master, number in state.masters()]
        self._masters = {id(master): number for number, (master, orthogonal) in enumerate(masters) if orthogonal}
        self._pieces = {number: [] for number in self._masters.values()}
        by_storage = {master.untyped_storage().data_ptr(): master for master, _ in masters}
        for found in sorted(state.slices(), key=lambda found: found.name):
            master = by_storage.get(found.tensor.untyped_storage().data_ptr())
            if found.key == "weight" and master is not None and id(master) in self._masters:
                number, offset = self._masters[id(master)], int(found.tensor.storage_offset() - master.storage_offset())
                piece = Piece(found.name, found.shape, found.start, found.tensor.numel(), number, offset)
                self._pieces[number].append(piece)
        everywhere: list[Any] = [self._pieces]
        if group is not None:
            everywhere = [None] * group.size()
            distributed.all_gather_object(everywhere, self._pieces, group=group)
        load = [0] * len(everywhere)
        for number in self._pieces:
            self._matrices[number] = _placed([held[number] for held in everywhere], load)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the ranks of the group step together."""
        del closure
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                for master in stepped:
                    self._step_matrices(group, master)
            elif stepped:
                self._step_others(group, stepped)

    def _step_others(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [cast("torch.Tensor", parameter.grad) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, group: dict[str, Any], master: torch.Tensor) -> None:
        number = self._masters.get(id(master))
        if number is None:  # a stage's stand-in for a group that it has no parameters of
            return
        gradient, momentum = cast("torch.Tensor", master.grad), self.state[master]["momentum_buffer"]
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        nesterov = gradient.lerp(momentum, group["momentum"]).view(-1)
        pieces = self._pieces[number]
        held = {piece.name: nesterov.narrow(0, piece.offset, piece.count) for piece in pieces}
        updates = self._orthogonal(self._matrices[number], held, master)
        master.mul_(1.0 - group["lr"] * group["weight_decay"])
        for piece in pieces:
            size = 0.2 * math.sqrt(max(piece.shape[-2:]))
            weight = master.view(-1).narrow(0, piece.offset, piece.count)
            weight.add_(updates[piece.name], alpha=-group["lr"] * size)

    def _orthogonal(
        self, matrices: dict[str, _Matrix], held: dict[str, torch.Tensor], like: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the update of each piece held, flat; a matrix is put together on its owner."""
        if self._group is None or all(len(matrix.places) == 1 for matrix in matrices.values()):
            return {name: orthogonal(held[name].view(matrices[name].shape)).reshape(-1) for name in held}
        rank = self._group.rank()
        owned = {name: matrix for name, matrix in matrices.items() if matrix.owner == rank}
        arrived = self._exchange(
            [(matrices[name].owner, name, values) for name, values in held.items()],
            [(source, name, count) for name, matrix in owned.items() for source, _, count in matrix.places],
            like,
        )
        updates: list[tuple[int, str, torch.Tensor]] = []
        for name, matrix in owned.items():
            whole = torch.cat([arrived.pop((source, name)) for source, _, _ in matrix.places]).view(matrix.shape)
            flat = orthogonal(whole).reshape(-1)
            updates += [(target, name, flat.narrow(0, start, count)) for target, start, count in matrix.places]
        due = [(matrices[name].owner, name, values.numel()) for name, values in held.items()]
        return {name: values for (_, name), values in self._exchange(updates, due, like).items()}

    def _exchange(
        self, sent: list[tuple[int, str, torch.Tensor]], due: list[tuple[int, str, int]], like: torch.Tensor
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Send (target, name, values); return what is due from (source, name), of so many elements."""
        assert self._group is not None
        rank, ranks = self._group.rank(), range(self._group.size())
        received, given = Counter[int](), Counter[int]()
        found = {(rank, name): values for target, name, values in sent if target == rank}
        # Both sides know the pieces, so order alone tells what is what.
        away = sorted((item for item in sent if item[0] != rank), key=lambda item: item[:2])
        due = sorted(item for item in due if item[0] != rank)
        outgoing = torch.cat([like.new_empty(0), *(values for _, _, values in away)])
        incoming = like.new_empty(sum(count for _, _, count in due))
        for source, _, count in due:
            received[source] += count
        for target, _, values in away:
            given[target] += values.numel()
        sizes = [received[r] for r in ranks], [given[r] for r in ranks]
        distributed.all_to_all_single(incoming, outgoing, *sizes, group=self._group)
        chunks = incoming.split([count for _, _, count in due])
        return found | {(source, name): chunk for (source, name, _), chunk in zip(due, chunks, strict=True)}


def _placed(held: list[list[Piece]], load: list[int]) -> dict[str, _Matrix]:
    """Return the matrices of one master and who computes them: who holds most, of those who has least to do so far."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            shapes[piece.name] = piece.shape
            places.setdefault(piece.name, []).append((rank, piece.start, piece.count))
    matrices: dict[str, _Matrix] = {}
    for name, shape in shapes.items():
        found = sorted(places[name], key=lambda place: place[1])
        most = max(count for _, _, count in found)
        owner = min((rank for rank, _, count in found if count == most), key=lambda rank: (load[rank], rank))
        load[owner] += math.prod(shape) * min(shape[-2:])
        matrices[name] = _Matrix(shape, tuple(found), owner)
    return matrices


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest orthogonal matrix, nearly: every singular value becomes one of about 0.7 to 1.2.

    ``matrix`` is [..., rows, columns]. Computed in bfloat16 on a GPU, where that is many times faster and good enough
    (the post above); in float32 on a CPU.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)
