"""Which model is trained, and how its operations are carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.section import Section, broken_rule


def source_rule(model: Mapping[str, Any]) -> PydanticCustomError | None:
    """Return the error of a ``model`` section that says neither what to load nor what to build."""
    path, config = model.get("path"), model.get("config")
    if path is None and config is None:
        fix = "set model.path, or model.config with model_type and the fields of its Hugging Face config"
        return broken_rule("needs path (pretrained) or config (from scratch)", fix)
    named = isinstance(config, Mapping) and isinstance(cast("Mapping[str, Any]", config).get("model_type"), str)
    if path is None and isinstance(config, Mapping) and not named:
        rule = "a model from scratch needs the name of its family"
        return broken_rule(rule, "set it, e.g. to llama", key="config.model_type")
    return None


class ModelConfig(Section):
    """An unmodified Hugging Face causal LM: from scratch (``config``) or pretrained (``path``)."""

    path: str | None = None
    """Hugging Face id, directory, or run directory (weights only, fresh optimizer). Null: from scratch."""
    config: dict[str, Any] | None = None
    """Fields of the Hugging Face config, ``model_type`` among them. With ``path``: overrides of its config."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face id. Give a commit: branches move."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Only for repositories you have read."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. bfloat16 keeps float32 master weights and optimizer state at every ZeRO stage."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """``attn_implementation`` of transformers."""
    vocabulary_multiple: int | None = Field(default=None, ge=1)
    """Pad the vocabulary up to a multiple of this (64 or 128 is good for GPUs, and tensor ranks divide it). The padding
    gets no probability and is cut off at export."""
    vocabulary_size: int | None = Field(default=None, ge=1)
    """Add tokens to a pretrained model, up to so many. What a new one has in embedding and head starts as the mean of
    the old ones: their probabilities hardly move, and every layout starts from the same weights (no random numbers)."""
    initialization: Literal["huggingface", "scaled_residual"] = "huggingface"
    """Of a model from scratch. ``scaled_residual``: the family's own, but what each block adds to the residual stream
    starts smaller by sqrt(2 x number of blocks) (GPT-2, Megatron-LM)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; parameters whose Hugging Face name matches one are not trained."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        problem = source_rule(self.model_dump())
        if problem is not None:
            raise problem
        return self


Choice = Literal["auto", "fused", "reference"]


class KernelsConfig(Section):
    """Fused operations. ``auto`` is the reference one in this version; ``fused`` is refused."""

    loss: Choice = "auto"
    """Cross-entropy over the vocabulary."""
    norm: Choice = "auto"
    """RMSNorm / LayerNorm."""
    attention: Choice = "auto"
    """Attention core; ``model.attention`` names the reference."""
    compile: bool = False
    """torch.compile the model."""
