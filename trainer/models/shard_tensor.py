"""Divide the layers of a Hugging Face model over tensor ranks, by the plan that transformers publishes with it.

Weights are cut in place, so names stay as they are; what ranks exchange is added around the modules' own forward
passes (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). DeepSpeed's AutoTP reads the same plans, but refuses
GPT-2 and experts, leaves the logits of a tied head divided and knows no pipeline stages (0.19.8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.core.errors import Problem, RecipeError
from trainer.models.tensor_plans import COUNTS, PLANS
from trainer.parallel.cut import Cut, cut_of
from trainer.parallel.exchange import enter, gather, split, sum_parts

Group = distributed.ProcessGroup
_COLUMNS = ("colwise", "colwise_gather_output", "packed_colwise")
_ROWS = ("rowwise", "rowwise_split_input", "packed_rowwise")
_OTHERS = ("moe_tp_experts", "replicated_with_grad_allreduce")


def shard_tensor(network: PreTrainedModel, group: Group) -> PreTrainedModel:
    """Keep this rank's part of every layer the plan divides, and of embedding and head where they can be divided.

    Returns ``network``, which may be a skeleton. Raises RecipeError, on all ranks alike, for a model that can't be
    divided so.
    """
    config: Any = network.config.get_text_config()
    plan = tensor_plan(network)
    _refuse_heads(config, group.size())
    done: set[str] = set()
    for name, style in _matches(network, plan):
        done.add(style)
        _apply(network, name, style, group)
    if not done:
        raise _refused(config.model_type, "has no layers that its plan names")
    for pattern, attribute in COUNTS.get(config.model_type, {}).items():
        for name, _ in _matches(network, {_prefix(network) + pattern: attribute}):
            module = network.get_submodule(name)
            setattr(module, attribute, getattr(module, attribute) // group.size())
    _share_vocabulary(network, group)
    return network


def tensor_plan(network: PreTrainedModel) -> dict[str, str]:
    """Return {pattern of module or parameter names: style}. Raises RecipeError if there is none, or an unknown style.

    The head is left out: it is divided whatever the plan says of it.
    """
    config: Any = network.config.get_text_config()
    own = PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None)
    if not own:
        raise _refused(config.model_type, "has no tensor-parallel plan in transformers")
    unknown = sorted({style.split(":")[0] for style in own.values()} - {*_COLUMNS, *_ROWS, *_OTHERS})
    if unknown:
        raise _refused(config.model_type, f"has layers of the style {', '.join(unknown)}")
    return {f"{_prefix(network)}{pattern}": style for pattern, style in own.items()}


def _prefix(network: PreTrainedModel) -> str:
    base = network.base_model
    name = next((name for name, module in network.named_modules() if module is base), "")
    return f"{name}." if name else ""


def _matches(network: nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, str]]:
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    names += [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        yield from ((name, style) for name in names if expression.fullmatch(name))


def _apply(network: nn.Module, name: str, style: str, group: Group) -> None:
    style, _, given = style.partition(":")
    owner, _, last = name.rpartition(".")
    parent = network.get_submodule(owner)
    if last in parent._parameters:  # of experts: [experts, out, in], or transposed where the plan says so
        parameter = cast("nn.Parameter", parent._parameters[last])
        dim = parameter.dim() - (1 if style in _ROWS else 2)
        _cut(parameter, dim, group, chunks=2 if style.startswith("packed") else 1)
        return
    module = network.get_submodule(name)
    if style == "moe_tp_experts":
        _share_experts(module, group)
    elif style == "replicated_with_grad_allreduce":
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: sum_parts(gradient, group))
    elif not isinstance(module, nn.Linear | Conv1D):
        raise _refused(type(module).__name__, f"({name}) is neither Linear nor Conv1D")
    elif style in _COLUMNS:
        _columns(module, group, int(given or (2 if style.startswith("packed") else 1)))
        if style == "colwise_gather_output":
            module.register_forward_hook(_gathering(group))
    else:
        _rows(module, group, splits=style == "rowwise_split_input")


def _columns(module: Any, group: Group, chunks: int = 1) -> None:
    """Each rank computes some of the outputs."""
    _cut(module.weight, 1 if isinstance(module, Conv1D) else 0, group, chunks)
    if module.bias is not None:
        _cut(module.bias, 0, group, chunks)
    if isinstance(module, Conv1D):
        module.nf //= group.size()  # the width its forward pass gives the output
    module.register_forward_pre_hook(lambda _module, inputs: (enter(inputs[0], group), *inputs[1:]))


def _gathering(group: Group) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
    return lambda _module, _inputs, output: gather(output, group)


def _rows(module: Any, group: Group, splits: bool) -> None:
    """Each rank computes with some of the inputs; the bias, which all hold, is added once."""
    transposed = isinstance(module, Conv1D)
    _cut(module.weight, 0 if transposed else 1, group)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        mine = split(inputs, group) if splits else inputs
        weight = module.weight.t() if transposed else module.weight
        output = sum_parts(functional.linear(mine, weight), group)
        return output if module.bias is None else output + module.bias

    module.forward = forward


def _share_experts(module: nn.Module, group: Group) -> None:
    """Each rank computes with a part of every expert; weights of the routing get their gradient from all parts."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def entered(value: Any) -> Any:
            return enter(value, group) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tuple(map(entered, args)), {name: entered(value) for name, value in kwargs.items()}

    def after(_module: nn.Module, _inputs: Any, output: Any) -> torch.Tensor:
        return sum_parts(output, group)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _share_vocabulary(network: PreTrainedModel, group: Group) -> None:
    """Divide head and embedding by tokens, both or none: they may be tied. A stage may hold only one of them."""
    embedding, head = cast("Any", network.get_input_embeddings()), cast("Any", network.get_output_embeddings())
    if network.config.get_text_config().vocab_size % group.size():
        return
    if isinstance(head, nn.Linear) and "weight" in head._parameters:
        _columns(head, group)
        head.register_forward_hook(_gathering(group))
    if isinstance(embedding, nn.Embedding) and "weight" in embedding._parameters:
        _share_embedding(embedding, group)


def _share_embedding(embedding: nn.Embedding, group: Group) -> None:
    _cut(cast("nn.Parameter", embedding.weight), 0, group)
    rows = embedding.weight.shape[0]
    first = rows * group.rank()
    own_forward = embedding.forward
    padding = embedding.padding_idx
    embedding.padding_idx = padding - first if padding is not None and first <= padding < first + rows else None
    embedding.num_embeddings = rows

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        own = (input_ids >= first) & (input_ids < first + rows)
        found = own_forward((input_ids - first).clamp(0, rows - 1))
        return sum_parts(found.masked_fill(~own.unsqueeze(-1), 0.0), group)

    embedding.forward = forward  # type: ignore[method-assign]


def _cut(parameter: nn.Parameter, dim: int, group: Group, chunks: int = 1) -> None:
    if cut_of(parameter) is None:  # neither tied and cut already, nor built so
        cut = Cut(dim, group.rank(), group.size(), chunks)
        try:
            parameter.data = cut.take(parameter.data)
        except ValueError as error:
            raise RecipeError(Problem("parallel.tensor", group.size(), str(error), "use a smaller degree")) from None
        parameter.cut = cut  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined] # DeepSpeed: counted by each rank in the norm


def _refuse_heads(config: Any, degree: int) -> None:
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % degree:
            rule = f"does not divide the model's {field} = {heads}"
            raise RecipeError(Problem("parallel.tensor", degree, rule, "use a divisor of both numbers of heads"))


def _refused(kind: str, rule: str) -> RecipeError:
    return RecipeError(Problem("parallel.tensor", None, f"{kind} {rule}: it can't be divided", "set it to 1"))
