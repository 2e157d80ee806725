"""The model of a checkpoint, on one process's CPU."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as hf_initialization

from trainer.checkpoint.reader import CheckpointReader
from trainer.core.errors import CheckpointError


def load_checkpoint_model(reader: CheckpointReader, dtype: str | None) -> PreTrainedModel:
    """Return the checkpoint's model on the CPU in ``dtype`` (default: the run's), dropout off, vocabulary unpadded.

    Shapes are compared before anything is allocated. At its peak it needs the model in that dtype and its largest
    tensor in float32. Raises CheckpointError if names or shapes don't match the model its config describes, or a
    weight is too large for the dtype.
    """
    network = _skeleton(reader, dtype)
    wanted = dict(network.named_parameters())
    buffers = dict(network.named_buffers())
    held = reader.names()
    if missing := sorted(wanted.keys() - set(held)):
        raise CheckpointError(f"{reader.directory} lacks {', '.join(missing[:5])}")
    for name in held:
        tensor = wanted.get(name, buffers.get(name))
        if tensor is None or tuple(tensor.shape) != reader.shape(name):
            raise CheckpointError(f"{reader.directory}: {name} {list(reader.shape(name))} does not fit the model")
    made = {id(parameter): _parameter(reader, name, parameter) for name, parameter in wanted.items()}
    with torch.no_grad():
        for name in held:
            if name not in wanted:
                buffers[name].copy_(reader.whole(name))
    for module in network.modules():  # by identity, so that tied weights stay tied
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in made:
                module._parameters[name] = made[id(parameter)]
    unpadded = reader.model.get("unpadded_vocabulary_size")
    if unpadded is not None:
        network.resize_token_embeddings(unpadded)
    return network


def checkpoint_tensor(reader: CheckpointReader, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor of the checkpoint as an export holds it: in ``like``'s dtype, and without padding."""
    whole = reader.whole(name)
    if reader.model.get("unpadded_vocabulary_size") is not None and whole.dim():
        whole = whole[: like.shape[0]]
    return whole.to(like.dtype)


def _skeleton(reader: CheckpointReader, dtype: str | None) -> PreTrainedModel:
    """Return the model its config describes, parameters on the meta device and buffers real."""
    try:
        fields = dict(reader.model["config"])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        target = getattr(torch, dtype or reader.model["dtype"])
        config.dtype = target
        with hf_initialization.no_init_weights(), init_empty_weights(include_buffers=False):
            network: Any = AutoModelForCausalLM.from_config(config, dtype=target, trust_remote_code=False)
        network.tie_weights()
        return network.eval()
    except Exception as error:  # whatever fields that nobody checked make transformers raise
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise CheckpointError(f"{reader.directory}: transformers can't build model.config ({text[:300]})") from error


def _parameter(reader: CheckpointReader, name: str, like: torch.nn.Parameter) -> torch.nn.Parameter:
    whole = reader.whole(name)
    cast = whole.to(like.dtype)
    # bfloat16 reaches as far as float32, float16 only to 65504.
    if cast.dtype == torch.float16 and bool((cast.isinf() & whole.isfinite()).any()):
        raise CheckpointError(f"{reader.directory}: {name} has values beyond float16's range; choose another dtype")
    return torch.nn.Parameter(cast, requires_grad=cast.is_floating_point())
