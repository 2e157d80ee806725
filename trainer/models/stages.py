"""Pipeline stages out of any Hugging Face causal LM, by leaving modules out and running the model's own forward pass.

A stage is the whole model with the parameters of the other stages removed. Its forward pass is the model's own: it
derives masks, rotary tables and whatever else from the micro-batch, as the whole model would. Only the row of blocks is
different: blocks before the stage do nothing, the first block of the stage is given the hidden states that arrived,
and the first block behind the stage ends the pass. So sliding windows, layer types, ALiBi, several rotary tables or
soft-capped logits need no code here, and every parameter keeps its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.core.errors import Problem, RecipeError
from trainer.models.router_logits import RouterLogits, router_logits_of
from trainer.parallel.cut import whole_shape_of

# Modules that run on the other side of the blocks than they are defined on; by model type.
_BEHIND_THE_BLOCKS: dict[str, tuple[str, ...]] = {
    "opt": ("model.decoder.project_out", "model.decoder.final_layer_norm")
}
_IN_FRONT_OF_THE_BLOCKS: dict[str, tuple[str, ...]] = {"phi4_multimodal": ("model.embed_tokens_extend",)}

# What code raises that finds something else than it expects.
_UNFIT = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are: dotted paths of modules."""

    blocks: str
    """The ModuleList of transformer blocks."""
    num_blocks: int
    front: tuple[str, ...]
    """Modules with parameters that run before the blocks."""
    back: tuple[str, ...]
    """Modules with parameters that run behind them, the head included."""
    tied: Mapping[str, str]
    """Parameters of the back that are parameters of the front: {name at the back: name at the front}."""
    model_class: type[PreTrainedModel]


def anatomy_of(network: PreTrainedModel) -> Anatomy:
    """Find the parts of a model; parameters may be on the meta device. Raises RecipeError if it can't be split."""
    config = network.config.get_text_config()
    kind = str(config.model_type)
    if getattr(network.config, "is_encoder_decoder", False):
        raise _refused(kind, "has an encoder beside its decoder")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refused(kind, "shares keys and values between layers, which no stage boundary may cut")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise _refused(kind, "has an embedding for every layer (hidden_size_per_layer_input)")
    path = find_blocks(network)
    if path is None:
        raise _refused(kind, f"has no list of its {getattr(config, 'num_hidden_layers', None)} blocks")
    blocks = cast("nn.ModuleList", network.get_submodule(path))
    front, back = _around(network, path)
    late = [name for name in _BEHIND_THE_BLOCKS.get(kind, ()) if name in front]
    early = [name for name in _IN_FRONT_OF_THE_BLOCKS.get(kind, ()) if name in back]
    front = [name for name in front if name not in late] + early
    back = late + [name for name in back if name not in early]
    ties = _ties(network, kind, path, front, back)
    return Anatomy(path, len(blocks), tuple(front), tuple(back), ties, type(network))


@dataclass(frozen=True)
class StagePart:
    """Blocks ``first`` .. ``last`` - 1 of a model, with what is in front of the first and behind the last block."""

    anatomy: Anatomy
    first: int
    last: int

    @property
    def is_first(self) -> bool:
        """Whether the embeddings are here."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.last == self.anatomy.num_blocks

    def foreign_modules(self) -> list[str]:
        """Return the modules that belong to other stages."""
        anatomy = self.anatomy
        numbers = [*range(self.first), *range(self.last, anatomy.num_blocks)]
        names = [f"{anatomy.blocks}.{number}" for number in numbers]
        return names + list(() if self.is_first else anatomy.front) + list(() if self.is_last else anatomy.back)

    def owns(self, name: str) -> bool:
        """Return whether this stage is the one that writes a parameter or buffer, given its name in the whole model.

        A tied parameter is the first stage's, and so is what belongs to no block, front or back.
        """
        if self.is_first:
            return True
        anatomy = self.anatomy
        mine = [f"{anatomy.blocks}.{number}." for number in range(self.first, self.last)]
        return name.startswith((*mine, *(f"{module}." for module in (anatomy.back if self.is_last else ()))))

    def parameters(self, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of a pruned model under their names in the whole one: tied ones as at the front."""
        tied = self.anatomy.tied
        named = {tied.get(name, name): parameter for name, parameter in network.named_parameters()}
        return list(named.items())

    def tied_copies(self, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that another stage has too, in the same order on both."""
        shared = set(self.anatomy.tied.values()) if self.is_first != self.is_last else set[str]()
        return sorted(((n, p) for n, p in self.parameters(network) if n in shared), key=lambda item: item[0])


class Stage(nn.Module):
    """A part of a model that takes hidden states from the stage before and returns them for the next.

    ``network`` is pruned in place, if that has not been done already: parameters of other stages are gone, names and
    everything else are as before.
    """

    def __init__(self, network: PreTrainedModel, part: StagePart) -> None:
        super().__init__()
        prune(network, part)
        self.network = network
        self._unproven = True
        self._route = _Route(router_logits_of(network))
        self.auxiliary: torch.Tensor | None = None
        """The load-balancing loss of the last pass, on the last stage of a mixture whose config asks for it."""
        device = next(network.parameters()).device
        for name in part.foreign_modules():
            module = network.get_submodule(name)
            module.__dict__["forward"].place(module, device)
        blocks = cast("nn.ModuleList", network.get_submodule(part.anatomy.blocks))
        for number, block in enumerate(blocks):
            if number < part.first:
                _become(block, _Before, self._route)
            elif number >= part.last:
                _become(block, _Behind, self._route)
        if not part.is_first:
            _become(blocks[part.first], _Entry, self._route)

    def forward(self, inputs: Mapping[str, Any], received: torch.Tensor | None = None) -> torch.Tensor:
        """Return the hidden states [batch, sequence, hidden] for the next stage, or the logits.

        ``inputs`` are the arguments of the model's forward pass, the same in every stage; ``received`` is what the
        stage before returned. Where the model balances the load of its experts, what is returned for the next stage
        has the router logits of all blocks so far behind the hidden states.
        """
        arguments = dict(inputs)
        if received is not None and self._route.routers is not None:
            received = self._route.routers.split(received)
        self._route.received, self._route.entered = received, False
        try:
            return self._checked(self._run(arguments), received)
        except _UNFIT as error:
            if received is None or not self._unproven:
                raise
            if self._route.entered or self._route.as_tuple:
                raise self._refusal(f"fails without what runs before ({type(error).__name__}: {error})") from error
        finally:
            self._route.received = None
        return self._forward_with_tuples(arguments, received)

    def _forward_with_tuples(self, arguments: dict[str, Any], received: torch.Tensor) -> torch.Tensor:
        """Try again: the blocks of this family may return tuples."""
        self._route.received, self._route.as_tuple = received, True
        try:
            return self._checked(self._run(arguments), received)
        except _UNFIT as error:
            raise self._refusal(f"fails without what runs before ({type(error).__name__}: {error})") from error
        finally:
            self._route.received = None

    def _checked(self, output: torch.Tensor, received: torch.Tensor | None) -> torch.Tensor:
        """Return ``output``; in the first pass refuse a model that needs more than what the stage before returned."""
        if self._unproven and output.isnan().any():
            if received is None:
                raise self._refusal("gives NaN to the first block, or uses in front what is defined behind the blocks")
            if received.isfinite().all():
                raise self._refusal("uses its embeddings, or what one block told the next, in later blocks too")
        self._unproven = False
        return output

    def _refusal(self, rule: str) -> RecipeError:
        return _refused(str(self.network.config.model_type), rule)

    def _run(self, arguments: dict[str, Any]) -> torch.Tensor:
        self.auxiliary = None
        try:
            outputs = self.network(**arguments, use_cache=False)
            if self._route.routers is not None:
                self.auxiliary = getattr(outputs, "aux_loss", None)
            return outputs.logits
        except _LeftStageError as end:
            return end.hidden_states.contiguous()  # as it is sent


def prune(network: nn.Module, part: StagePart) -> None:
    """Remove every parameter that ``part`` does not need."""
    for name in part.foreign_modules():
        vacate(network.get_submodule(name))


def vacate(module: nn.Module) -> None:
    """Leave the shell of a module: its class and plain attributes, which the model may ask for."""
    if isinstance(module.__dict__.get("forward"), _Hollow):
        return
    module.__dict__["forward"] = _Hollow(module)
    for table in (module._modules, module._parameters, module._buffers):
        table.clear()
    module.__dict__["extra_repr"] = lambda: "in another stage"
    module.__dict__["_is_hf_initialized"] = True  # transformers has nothing to initialise here


class _Hollow:
    """Forward pass of a vacated module in front of the blocks: the right shape, full of NaN.

    What comes out is meant for the first block, which is elsewhere. A model that uses it in later blocks too would
    compute something else without it; so it gets NaN, and ``Stage`` refuses it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._embedding_dim: int | None = getattr(module, "embedding_dim", None)
        self._out_features: int | None = getattr(module, "out_features", None)
        weight = next(module.parameters(), None)
        self._dtype = weight.dtype if weight is not None else torch.float32
        self._placeholders = {name: p.dtype for name, p in module.named_parameters(recurse=False)}

    def place(self, module: nn.Module, device: torch.device) -> None:
        """Leave empty tensors where parameters were: models look up the device or dtype of their embeddings."""
        for name, dtype in self._placeholders.items():
            module.__dict__[name] = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        value = tensors[0]
        if self._embedding_dim is None and self._out_features is None:  # of ids and embeddings, it returns the latter
            value = next((tensor for tensor in tensors if tensor.is_floating_point()), value)
        dtype = value.dtype if value.is_floating_point() else self._dtype
        shape = value.shape
        if self._embedding_dim is not None:
            shape = (*value.shape, self._embedding_dim)
        elif self._out_features is not None:
            shape = (*value.shape[:-1], self._out_features)
        return torch.full(shape, torch.nan, dtype=dtype, device=value.device)


class _LeftStageError(Exception):
    """The forward pass has left the stage; caught by ``Stage``."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


class _Route:
    """What the blocks of one stage know of the pass under way."""

    def __init__(self, routers: RouterLogits | None) -> None:
        self.routers = routers
        self.received: torch.Tensor | None = None
        self.entered = False
        self.as_tuple = False
        """Whether blocks return (hidden states, ...), found out in the first pass."""


class _Before:
    """A block of an earlier stage."""

    _stage_route: _Route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        received = self._stage_route.received
        if not self._stage_route.as_tuple:
            return received
        # Attention weights or the like, which nobody asked for. A model that hands them on to its next block gets NaN.
        assert received is not None
        return received, received.new_full((), torch.nan)


class _Behind:
    """A block of a later stage."""

    _stage_route: _Route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states, routers = args[0] if args else kwargs["hidden_states"], self._stage_route.routers
        raise _LeftStageError(hidden_states if routers is None else routers.join(hidden_states))


class _Entry:
    """The first block of a stage. Outside of activation checkpointing, which keeps what it is called with."""

    _stage_route: _Route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._stage_route.entered = True
        received, routers = self._stage_route.received, self._stage_route.routers
        if received is not None and routers is not None:
            routers.enter()
        if received is None:  # recomputed in the backward pass, with what the forward pass gave
            pass
        elif args:
            args = (received, *args[1:])
        else:
            kwargs["hidden_states"] = received
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _become(block: nn.Module, role: type, route: _Route) -> None:
    """Give a block the ``__call__`` of its role; isinstance, name and attributes stay."""
    kind = type(block)
    block.__class__ = type(kind.__name__, (role, kind), {"__module__": kind.__module__})
    block.__dict__["_stage_route"] = route


def find_blocks(network: PreTrainedModel) -> str | None:
    """Return the path of the blocks: from the pipeline plan transformers publishes, else the largest fitting list."""
    base, config = network.base_model, cast("Any", network.config.get_text_config())
    prefix = next((name for name, module in network.named_modules() if module is base), "")
    plan: Mapping[str, Any] = getattr(base, "_pp_plan", None) or getattr(config, "base_model_pp_plan", None) or {}
    for name in plan:
        if isinstance(getattr(base, name, None), nn.ModuleList):
            return f"{prefix}.{name}" if prefix else name
    depth = getattr(config, "num_hidden_layers", None)
    fitting = {
        name: sum(math.prod(whole_shape_of(p)) for p in module.parameters())
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    return max(fitting, key=lambda name: (fitting[name], -len(name)), default=None)


def _around(network: nn.Module, path: str) -> tuple[list[str], list[str]]:
    """Return the modules with parameters that are defined before and behind the blocks, at every level above them."""
    front, back = list[str](), list[str]()
    above, module = "", network
    for part in path.split("."):
        side = front
        for name, child in module.named_children():
            if name == part:
                side = back
            elif next(child.parameters(), None) is not None:
                side.append(f"{above}{name}")
        above, module = f"{above}{part}.", module.get_submodule(part)
    return front, back


def _ties(network: nn.Module, kind: str, path: str, front: Sequence[str], back: Sequence[str]) -> dict[str, str]:
    """Return the parameters that front and back share. Raises RecipeError for any other sharing between parts."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append((_part_of(name, path, front, back), name))
    ties: dict[str, str] = {}
    for found in places.values():
        parts = {part for part, _ in found}
        if None in parts or "" in parts:
            raise _refused(kind, f"has a parameter outside of its modules: {found[0][1]}")
        if len(parts) == 1:
            continue
        sides = {"front" if part in front else "back" if part in back else "block" for part in parts}
        if sides != {"front", "back"} or len(found) != 2:
            names = ", ".join(name for _, name in found[:3])
            raise _refused(kind, f"shares parameters between blocks: {names}")
        (_, at_front), (_, at_back) = sorted(found, key=lambda item: item[0] in back)
        ties[at_back] = at_front
    return ties


def _part_of(name: str, path: str, front: Sequence[str], back: Sequence[str]) -> str:
    if name.startswith(f"{path}."):
        return f"{path}.{name[len(path) + 1 :].split('.', 1)[0]}"
    return next((part for part in (*front, *back) if name.startswith(f"{part}.")), "")


def _refused(kind: str, rule: str) -> RecipeError:
    return RecipeError(Problem("parallel.pipeline", None, f"{kind} {rule}: it can't be cut into stages", "set it to 1"))
