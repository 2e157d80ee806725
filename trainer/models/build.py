"""Build or load an unmodified Hugging Face causal LM without ever holding more than is needed.

Every ZeRO stage takes the same road, so that initial weights are the same for the same seed: the model is made with
parameters on the meta device (buffers are real), then visited module by module in the order transformers initialises
it; each module's parameters are allocated, initialised by the model's own ``_init_weights``, cast, and, with ZeRO-3,
sharded at once. Upstream, ``from_config`` under ``deepspeed.zero.Init`` loses the initialisation.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as hf_initialization

from trainer.config.model import ModelConfig
from trainer.core.errors import Problem, RecipeError
from trainer.models.config import own_vocabulary_size
from trainer.models.initialization import residual_factor, scale_residual
from trainer.models.load import loading_options
from trainer.models.load_part import load_part
from trainer.models.stages import StagePart, prune, vacate
from trainer.models.vocabulary import config_of_files, with_rows
from trainer.parallel.cut import Cut, cut_of

_CONSTRUCTED = "_constructor_values"
_SMALL = 1 << 16
"""Numbers of elements up to which the constructor's values are kept."""


class Sharding(Protocol):
    """What ZeRO-3 needs while a model is built; implemented by the engine."""

    def shard(self, parameter: nn.Parameter) -> None:
        """Keep only this rank's part of ``parameter``; rank 0's values win."""
        ...

    def is_sharded(self, tensor: torch.Tensor) -> bool:
        """Tell whether ``tensor`` is a sharded parameter whose full value is not at hand."""
        ...

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
        """Hold the full values inside the context; changes made there are kept."""
        ...


def build_model(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    sharding: Sharding | None = None,
    part: StagePart | None = None,
    cuts: Mapping[str, Cut] | None = None,
) -> PreTrainedModel:
    """Return the model in ``model.dtype`` on ``device``: initialised from ``seed``, or loaded from ``model.path``.

    With ``sharding`` no rank holds a full copy; of a pretrained model only rank 0 does, while it hands it out.
    With ``part`` only the parameters of that pipeline stage are kept, or read. With ``cuts``, by name, only parts of
    parameters are kept, for a model that a checkpoint is going to fill: its values are those of no seed.
    Raises RecipeError when transformers can't build or load it.
    """
    torch.manual_seed(seed)
    try:
        if model.path is None:
            network = skeleton(model, config)
            torch.manual_seed(seed)  # again: some constructors draw, and stages must all draw the same
            fill = _Initialiser(network, sharding, scaled=model.initialization == "scaled_residual")
            _fill(network, device, getattr(torch, model.dtype), fill, sharding, part, cuts or {})
            if fill.scaled and not fill.num_scaled:
                raise ValueError("model.initialization: scaled_residual finds no matrix that ends a block")
        else:
            network = _pretrained(model, config, device, rank, sharding, part)
    except (ValueError, OSError, ImportError) as error:
        key = "model.config" if model.path is None else "model.path"
        raise RecipeError(
            Problem(key, model.path, f"transformers can't build this model ({error})", "check model.*")
        ) from error
    freeze(part.parameters(network) if part else network.named_parameters(), model.freeze)
    return network


def _pretrained(
    model: ModelConfig, config: PretrainedConfig, device: torch.device, rank: int, sharding: Sharding | None,
    part: StagePart | None,
) -> PreTrainedModel:  # fmt: skip
    """Load as transformers does; if it is to be sharded, or tokens are added, copy that into a model as it shall be."""
    resized = model.vocabulary_size is not None or model.vocabulary_multiple is not None
    size = config.get_text_config().vocab_size
    own_size = own_vocabulary_size(model) if resized else size
    if sharding is None and own_size == size:
        # cast: transformers wraps .to() in a decorator that hides that it is a method
        return cast("Any", _load(model, config, part)).to(device)
    source = _load(model, config_of_files(config, own_size), part) if sharding is None or rank == 0 else None
    network = skeleton(model, config)
    dtype = getattr(torch, model.dtype)
    if part is not None:
        for parameter in network.parameters():  # on the meta device; what is left out leaves its dtype behind
            parameter.data = parameter.data.to(dtype)
        prune(network, part)
    _fill(network, device, dtype, _Copier(source, (model.vocabulary_size or own_size) - own_size), sharding)
    return network


def _load(model: ModelConfig, config: PretrainedConfig, part: StagePart | None) -> PreTrainedModel:
    if part is not None:
        return load_part(model, config, part)
    return AutoModelForCausalLM.from_pretrained(model.path or "", config=config, **loading_options(model))


def skeleton(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """Build the module tree with parameters on the meta device and real buffers, tied as the config says."""
    with hf_initialization.no_init_weights(), init_empty_weights(include_buffers=False), _constructor_values():
        network = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=model.attention,
            dtype=torch.float32,
            trust_remote_code=model.trust_remote_code,
        )
    network.tie_weights()
    config.dtype = model.dtype
    return network


def cuts_of(network: PreTrainedModel) -> dict[str, Cut]:
    """Return how the parameters of a divided model, or skeleton, are cut, by each of their names."""
    named = network.named_parameters(remove_duplicate=False)
    return {name: cut for name, parameter in named if (cut := cut_of(parameter)) is not None}


@contextlib.contextmanager
def _constructor_values() -> Iterator[None]:
    """Keep what constructors give small parameters: some families leave it at that (Apertus' activation)."""
    register = nn.Module.register_parameter

    def keep(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        # torch's own modules fill theirs in reset_parameters
        if param is not None and param.numel() <= _SMALL and not _resets(self):
            self.__dict__.setdefault(_CONSTRUCTED, {})[name] = param.detach()

    nn.Module.register_parameter = keep
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _resets(module: nn.Module) -> bool:
    return callable(getattr(module, "reset_parameters", None))


class _Initialiser:
    """Fill a module by the model's own ``_init_weights``; what that leaves alone, by torch's default."""

    def __init__(self, network: PreTrainedModel, sharding: Sharding | None, *, scaled: bool = False) -> None:
        self.sharding = sharding
        self.scaled = scaled
        self.num_scaled = 0
        self._factor = residual_factor(network.config)

    def __call__(self, owner: PreTrainedModel, module: nn.Module, prefix: str) -> None:
        direct = [p for p in module.parameters(recurse=False) if self.sharding and self.sharding.is_sharded(p)]
        with self.sharding.gathered(direct) if direct and self.sharding else contextlib.nullcontext():
            owner._init_weights(module)
            if self.scaled:
                self.num_scaled += scale_residual(module, prefix, self._factor)
        mine = [(n, p) for n, p in module.named_parameters(recurse=False) if p.numel()]
        untouched = {name for name, parameter in mine if parameter.flatten()[0].isnan()}
        if not untouched:
            return
        if not _resets(module):
            raise ValueError(f"nothing initialises {prefix}.{min(untouched)}")
        done = {name: parameter.clone() for name, parameter in mine if name not in untouched}
        module.reset_parameters()  # type: ignore[operator]
        for name, values in done.items():
            module.get_parameter(name).copy_(values)


class _Copier:
    """Fill a module with pretrained values, which may lack tokens; a rank without gets its own when it is sharded."""

    def __init__(self, source: PreTrainedModel | None, num_new_tokens: int) -> None:
        self.source = source
        self.num_new_tokens = num_new_tokens

    def __call__(self, owner: PreTrainedModel, module: nn.Module, prefix: str) -> None:
        if self.source is None:
            return
        origin = self.source.get_submodule(prefix)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel():  # a tied parameter met again is sharded already, with the same values
                parameter.copy_(with_rows(origin.get_parameter(name), parameter.shape, self.num_new_tokens))
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(origin.get_buffer(name))


def _fill(
    network: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    fill: _Initialiser | _Copier,
    sharding: Sharding | None,
    part: StagePart | None = None,
    cuts: Mapping[str, Cut] = MappingProxyType({}),
) -> None:
    """Allocate, fill, cast and shard module by module, children first (the order of transformers' own pass).

    A rank that keeps only a ``part`` fills everything else too, and lets it go at once: so the generator is where it
    would be in the whole model.
    """
    made: dict[int, nn.Parameter] = {}  # id of a meta parameter -> its real one, so that tied weights stay tied
    kept: list[nn.Parameter] = []  # keeps meta parameters alive: ids of the dead are given out again
    foreign = set(part.foreign_modules()) if part else set[str]()
    shared = {id(parameter) for _, parameter in part.tied_copies(network)} if part else set[int]()

    def allocate(module: nn.Module) -> dict[str, nn.Parameter]:
        fresh: dict[str, nn.Parameter] = {}
        constructed = module.__dict__.pop(_CONSTRUCTED, {})
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                kept.append(parameter)
                value = constructed.get(name)
                value = torch.full(parameter.shape, math.nan, device=device) if value is None else value.float()
                real = nn.Parameter(value.to(device), requires_grad=parameter.requires_grad)
                made[id(parameter)] = real
                fresh[name] = real
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        return fresh

    def visit(module: nn.Module, owner: PreTrainedModel, prefix: str) -> None:
        for name, child in module.named_children():
            visit(child, child if isinstance(child, PreTrainedModel) else owner, f"{prefix}.{name}" if prefix else name)
        fresh = allocate(module)
        fill(owner, module, prefix)
        for name, parameter in fresh.items():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
            cut = cuts.get(f"{prefix}.{name}" if prefix else name)
            if cut is not None:
                parameter.data = cut.take(parameter.data)
                parameter.cut = cut  # type: ignore[attr-defined]
            if sharding is not None:
                sharding.shard(parameter)
        if prefix in foreign:
            gone = {id(parameter) for parameter in module.parameters()}
            for key in [key for key, real in made.items() if id(real) in gone and key not in shared]:
                del made[key]
            vacate(module)

    with torch.no_grad(), hf_initialization.guard_torch_init_functions(), _late_touches(sharding):
        visit(network, network, "")


@contextlib.contextmanager
def _late_touches(sharding: Sharding | None) -> Iterator[None]:
    """Let a parent's ``_init_weights`` reach into children that are sharded already (GPT-2 rescales c_proj so)."""
    if sharding is None:
        yield
        return
    table = hf_initialization.TORCH_INIT_FUNCTIONS
    originals = dict(table)

    def reach(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            if not sharding.is_sharded(tensor):
                return function(tensor, *args, **kwargs)
            with sharding.gathered([tensor]):  # type: ignore[list-item]
                return function(tensor, *args, **kwargs)

        return wrapped

    table.update({name: reach(function) for name, function in originals.items()})
    try:
        yield
    finally:
        table.update(originals)


def freeze(parameters: Iterable[tuple[str, nn.Parameter]], patterns: tuple[str, ...]) -> None:
    """Freeze what a pattern matches the name of. Raises RecipeError if nothing is left to train."""
    named = list(parameters)
    for name, parameter in named:
        if any(re.search(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in named):
        raise RecipeError(Problem("model.freeze", list(patterns), "every parameter is frozen", "freeze fewer"))
