"""Compute some tokens of a sequence at a time where a long sequence would not fit.

The recipe of Arctic Long Sequence Training (Bekman et al. 2025, https://arxiv.org/abs/2506.13996): the logits, and what
is between the matrices of an MLP, exist for one tile of tokens only, and are computed again in the backward pass.

These are torch's checkpoints, one a tile, in one graph: every weight gets its gradient once and whole, as DeepSpeed's
hooks want it at any ZeRO stage, and dropout is the same when it is recomputed. DeepSpeed's ``TiledMLP`` and
``TiledFusedLogitsLoss`` (0.19.8) run a backward pass a tile inside of the backward pass, which only ZeRO is told of,
sum in the dtype of the weights, draw other dropout, and need every family's head written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from trainer.core.errors import Problem, RecipeError
from trainer.models.loss import LossSpec
from trainer.models.stages import find_blocks

MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block", "shared_mlp")
"""What families call the MLP of a block."""


class TiledLoss:
    """The loss of a causal LM whose logits are never whole.

    What the model does behind its base model is its own code: its forward pass, in which a stand-in for the base model
    returns the final hidden states of a tile. So head, bias, scaled and soft-capped logits need no code here.
    """

    def __init__(self, network: PreTrainedModel, loss: LossSpec, size: int) -> None:
        self._forward = network.forward
        self._model_type = str(network.config.get_text_config().model_type)
        self._loss = loss
        self._size = size
        self._above = list(_above_the_blocks(network))
        self._empty: ModelOutput | None = None

    def __call__(self, targets: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss sum of each row, [batch], and the load-balancing loss of a mixture that has one.

        ``targets`` is [batch, sequence], ``inputs`` are the arguments of the model's forward pass.
        """
        states, auxiliary = self.states(**inputs)
        return self.losses(states, targets), auxiliary

    def states(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the final hidden states [batch, sequence, hidden] and the load-balancing loss, if there is one.

        Raises RecipeError for a model whose forward pass does not get them from its base model.
        """

        def leave(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._put_back()
            raise _LeftBaseError(module(*args, **kwargs))

        try:
            with self._stand_in(leave):
                self._forward(**inputs)
        except _LeftBaseError as end:
            outputs = end.outputs
        else:
            raise self._refused("computes its logits without its base model")
        if not isinstance(outputs, ModelOutput) or not isinstance(outputs.get("last_hidden_state"), torch.Tensor):
            raise self._refused("has a base model that does not name its last hidden state")
        states = cast("torch.Tensor", outputs["last_hidden_state"])
        auxiliary = None
        if outputs.get("router_logits"):  # of all tokens, whatever the states are
            auxiliary = getattr(self._behind(outputs, states[:, :1].detach()), "aux_loss", None)
        self._empty = dataclasses.replace(cast("Any", outputs), **dict.fromkeys(outputs))
        return states, auxiliary

    def losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss sum of each row, [batch], given what ``states`` returned."""
        parts, empty = targets.split(self._size, dim=1), self._empty

        def loss(number: int, tile: torch.Tensor) -> torch.Tensor:
            return self._loss.function(self._behind(empty, tile).logits, parts[number])

        # FlashAttention takes the rows of a micro-batch as one.
        return torch.stack(_in_tiles(loss, states.reshape(*targets.shape, -1), self._size)).sum(dim=0)

    def _behind(self, outputs: Any, states: torch.Tensor) -> Any:
        """Return what the model makes of the outputs of its base model, with other hidden states."""
        given = dataclasses.replace(outputs, last_hidden_state=states)
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)  # some ask for their shape
        with self._stand_in(lambda module, *args, **kwargs: given):
            return self._forward(input_ids=ids, use_cache=False)

    @contextlib.contextmanager
    def _stand_in(self, call: Callable[..., Any]) -> Iterator[None]:
        """Have ``call(module, ...)`` called in place of the base model, be it the outermost module or one inside."""
        for owner, name, module in self._above:
            owner._modules[name] = cast("nn.Module", _StandIn(module, call))
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for owner, name, module in self._above:
            owner._modules[name] = module

    def _refused(self, rule: str) -> RecipeError:
        fix = "set it to null"
        return RecipeError(Problem("memory.tiled_loss", self._size, f"{self._model_type} {rule}", fix))


def tile_last_stage(network: PreTrainedModel, loss: LossSpec, size: int) -> LossSpec:
    """Have the last pipeline stage return its final hidden states as if they were logits; return the loss of those."""
    tiled = TiledLoss(network, loss, size)

    def forward(**inputs: Any) -> MoeCausalLMOutputWithPast:
        states, auxiliary = tiled.states(**inputs)
        return MoeCausalLMOutputWithPast(logits=cast("Any", states), aux_loss=cast("Any", auxiliary))

    network.forward = forward
    return LossSpec(loss.name, tiled.losses)


class _LeftBaseError(Exception):
    """The base model is done; caught by ``TiledLoss``."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs


class _StandIn:
    """In place of a module: somebody else is called, attributes are the module's."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _above_the_blocks(network: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (owner, name, module) of the modules around the blocks: one of them is what the head is fed from."""
    path = find_blocks(network)
    if path is None:
        path = next(f"{name}." for name, module in network.named_modules() if module is network.base_model)
    owner: nn.Module = network
    for name in path.split(".")[:-1]:
        module = owner.get_submodule(name)
        yield owner, name, module
        owner = module


def mlp_names(network: PreTrainedModel, size: int) -> list[str]:
    """Return the MLPs that can be computed in tiles: they take and return one tensor, and route to no experts.

    Experts are left alone: the tokens they get are few already, and ranks exchange them. Raises RecipeError if there is
    nothing else.
    """
    path = find_blocks(network)
    blocks = cast("nn.ModuleList", network.get_submodule(path)) if path else []
    found = [
        f"{path}.{number}.{name}"
        for number, block in enumerate(blocks)
        for name, child in block.named_children()
        if name in MLP_NAMES and _is_plain(child)
    ]
    if not found:
        kind = network.config.get_text_config().model_type
        rule = f"{kind} has no MLP that takes and returns hidden states and nothing else"
        raise RecipeError(Problem("memory.tiled_mlp", size, rule, "set it to null"))
    return found


def _is_plain(module: nn.Module) -> bool:
    takes = inspect.signature(module.forward).parameters
    return len(takes) == 1 and not any(name.endswith("experts") for name, _ in module.named_modules())


def tile_mlp(module: nn.Module, size: int) -> None:
    """Compute an MLP for ``size`` tokens of each sequence at a time. Its forward pass may raise RecipeError."""
    own_forward = module.forward

    def of_tile(number: int, tile: torch.Tensor) -> torch.Tensor:
        output: object = own_forward(tile)
        if not isinstance(output, torch.Tensor) or output.shape != tile.shape:
            rule = f"{type(module).__name__} does not return hidden states"
            raise RecipeError(Problem("memory.tiled_mlp", size, rule, "set it to null"), title="recipe refused")
        return output

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat(_in_tiles(of_tile, hidden_states, size), dim=1)

    module.forward = forward


def _in_tiles(
    function: Callable[[int, torch.Tensor], torch.Tensor], states: torch.Tensor, size: int
) -> list[torch.Tensor]:
    """Return ``function(number, tile)`` of each tile of ``states`` [batch, sequence, hidden], and forget the rest."""
    sums, outputs = _Float32Sums(), list[torch.Tensor]()
    for number, tile in enumerate(states.split(size, dim=1)):
        # contiguous where it is forgotten again: MLPs may take a view of it
        output = checkpoint(lambda n, t: function(n, t.contiguous()), number, tile, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        sums.watch(output, tile)
        outputs.append(output)
    return outputs


class _Float32Sums:
    """Sums of gradients over tiles in float32, as they are over micro-batches.

    autograd would sum in the dtype of the weight, where what a tile adds to many others is lost.
    """

    def __init__(self) -> None:
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._left: Counter[torch.Tensor] = Counter()

    def watch(self, output: torch.Tensor, tile: torch.Tensor) -> None:
        """Take what the nodes between ``tile`` and ``output`` hand to weights; the last one hands over the sum."""
        seen, ahead = {tile.grad_fn}, [output.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            following = [function for function, _ in node.next_functions]
            weights = {i: cast("Any", f).variable for i, f in enumerate(following) if hasattr(f, "variable")}
            low = {i: weight for i, weight in weights.items() if weight.dtype != torch.float32}
            if low:
                self._left.update(low.values())
                node.register_hook(functools.partial(self._take, low))
            ahead += following

    def _take(self, weights: dict[int, torch.Tensor], found: Any, given: Any) -> tuple[torch.Tensor | None, ...]:
        replaced = list(found)
        for index, weight in weights.items():
            gradient, replaced[index] = replaced[index], None
            self._left[weight] -= 1
            if gradient is not None:
                total = self._sums.get(weight)
                self._sums[weight] = gradient.float() if total is None else total.add_(gradient)
            if not self._left[weight] and weight in self._sums:
                replaced[index] = self._sums.pop(weight).to(weight.dtype)
        return tuple(replaced)
