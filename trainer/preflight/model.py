"""Rules about the model: its family, its fields, its sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.model_fields import family_table
from trainer.config.suggest import nearest
from trainer.core.errors import Problem
from trainer.preflight.facts import NOT_AVAILABLE, Facts, Failing, Rule
from trainer.preflight.paths import is_path_like, looks_like_hub_id

# Taken by every PretrainedConfig although they are fields of none: older names and settings of generation.
ALWAYS_KNOWN = {
    *("name_or_path", "auto_map", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "use_cache"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "is_decoder", "torch_dtype", "text_config"),
    *("attn_implementation", "_attn_implementation"),
}
OURS = {
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "_attn_implementation": "model.attention",
}
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "max_position_embeddings"),
)


def _family(facts: Facts) -> Iterator[Problem]:
    families = family_table()["families"]
    name = facts.model.model_type
    if name is not None and name not in families and not facts.recipe.model.trust_remote_code:
        close = nearest(name, families)
        given = "model_type" in (facts.recipe.model.config or {})
        fix = f"did you mean {close}?" if close else "use a causal-LM family of transformers, e.g. llama"
        rule = "is no causal-LM family of transformers"
        yield Problem("model.config.model_type" if given else "model.path", name, rule, fix)


def _fields(facts: Facts) -> Iterator[Problem]:
    """Unknown fields end up as attributes that nothing reads: transformers does not complain."""
    family = family_table()["families"].get(facts.model.model_type)
    if family is None or facts.recipe.model.trust_remote_code:
        return
    known = {*family["fields"], *family.get("attribute_map", {})}
    accepted = known | set(family_table()["common"]) | ALWAYS_KNOWN
    for name, value in (facts.recipe.model.config or {}).items():
        if name not in accepted:
            close = nearest(name, known)
            fix = f"did you mean {close}?" if close else f"known: {', '.join(sorted(known))}"
            shown = None if isinstance(value, dict | list) else value
            yield Problem(f"model.config.{name}", shown, f"is no field of {facts.model.model_type}", fix)


def _ours(facts: Facts) -> Iterator[Problem]:
    for name, value in (facts.recipe.model.config or {}).items():
        if name in OURS:
            yield Problem(f"model.config.{name}", value, f"is set by {OURS[name]}", f"remove it and set {OURS[name]}")


def _types(facts: Facts) -> Iterator[Problem]:
    family = family_table()["families"].get(facts.model.model_type, {})
    names: dict[str, str] = family.get("attribute_map", {})
    for name, value in (facts.recipe.model.config or {}).items():
        default = family.get("fields", {}).get(names.get(name, name))
        wants_number = isinstance(default, int | float) and not isinstance(default, bool)
        if wants_number and isinstance(value, str):
            yield Problem(f"model.config.{name}", value, "must be a number", "remove the quotes")


def _sizes(facts: Facts) -> Iterator[Problem]:
    for name in SIZES:
        value = facts.model.get(name)
        if isinstance(value, int | float) and value < 1:
            yield Problem(f"model.config.{_own_name(facts, name)}", value, "must be at least 1", "use a positive size")


def _heads(facts: Facts) -> Iterator[Problem]:
    hidden, heads = facts.model.number("hidden_size"), facts.model.number("num_attention_heads")
    if not hidden or not heads or heads < 1:
        return
    if facts.model.get("head_dim") is None and hidden % heads:
        key = f"model.config.{_own_name(facts, 'num_attention_heads')}"
        rule = f"does not divide {_own_name(facts, 'hidden_size')} = {hidden}"
        divisors = [str(n) for n in range(1, min(hidden, 256) + 1) if hidden % n == 0]
        yield Problem(key, heads, rule, f"use one of {', '.join(divisors)}, or set head_dim")


def _key_value_heads(facts: Facts) -> Iterator[Problem]:
    heads, groups = facts.model.number("num_attention_heads"), facts.model.number("num_key_value_heads")
    if heads and groups and groups > 0 and heads % groups:
        rule = f"does not divide num_attention_heads = {heads}"
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        yield Problem("model.config.num_key_value_heads", groups, rule, f"use one of {', '.join(divisors)}")


def _length(facts: Facts) -> Iterator[Problem]:
    positions, length = facts.model.number("max_position_embeddings"), facts.recipe.data.sequence_length
    if positions is not None and positions > 0 and length > positions:
        own = _own_name(facts, "max_position_embeddings")
        rule = f"is more than the model's {own} = {positions}"
        yield Problem("data.sequence_length", length, rule, f"use at most {positions}, or raise model.config.{own}")


def _attention(facts: Facts) -> Iterator[Problem]:
    model = facts.recipe.model
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        fix = "set model.dtype: bfloat16 or model.attention: sdpa"
        yield Problem("model.attention", model.attention, "FlashAttention 2 has no float32", fix)


def _path(facts: Facts) -> Iterator[Problem]:
    path = facts.recipe.model.path
    if path is None:
        return
    directory = Path(path)
    if directory.is_dir():
        marks = ("config.json", "run.yaml", "checkpoints", "export")
        if not any((directory / mark).exists() for mark in marks):
            fix = "give a directory written by save_pretrained or `trainer export`, or a run directory"
            yield Problem("model.path", path, "has neither config.json nor checkpoints", fix)
    elif directory.exists():
        yield Problem("model.path", path, "is a file", "give the directory")
    elif is_path_like(path):
        yield Problem("model.path", path, "no such directory", "check the path")
    elif not looks_like_hub_id(path):
        yield Problem("model.path", path, "is neither a directory nor a Hugging Face id", "write owner/name")


def _tokenizer(facts: Facts) -> Iterator[Problem]:
    path = facts.recipe.tokenizer.path
    if path is None or Path(path).is_dir():
        return
    if is_path_like(path):
        yield Problem(
            "tokenizer.path", path, "no such directory", "check the path, or train one: trainer data tokenizer"
        )
    elif not looks_like_hub_id(path):
        yield Problem("tokenizer.path", path, "is neither a directory nor a Hugging Face id", "write owner/name")


def _freeze(facts: Facts) -> Iterator[Problem]:
    for index, pattern in enumerate(facts.recipe.model.freeze):
        try:
            re.compile(pattern)
        except re.error as error:
            yield Problem(f"model.freeze.{index}", pattern, f"is no regular expression: {error}", "correct it")


def _initialization(facts: Facts) -> Iterator[Problem]:
    model = facts.recipe.model
    if model.initialization != "huggingface" and model.path is not None:
        rule = "pretrained weights are not initialised"
        yield Problem("model.initialization", model.initialization, rule, "remove it")
    elif model.initialization == "scaled_residual" and facts.model.model_type == "gpt2":
        yield Problem("model.initialization", model.initialization, "GPT-2 scales its own already", "remove it")


def _vocabulary_size(facts: Facts) -> Iterator[Problem]:
    model, key = facts.recipe.model, "model.vocabulary_size"
    asked, given, size = model.vocabulary_size, (model.config or {}).get("vocab_size"), facts.model.number("vocab_size")
    if model.path is None:
        if asked is not None:
            rule, fix = "adds tokens to a pretrained model", f"remove it and set model.config.vocab_size: {asked}"
            yield Problem(key, asked, rule, fix)
    elif given is not None:
        rule = "a pretrained model has its own, and its weights would not fit"
        yield Problem("model.config.vocab_size", given, rule, f"remove it; to add tokens set {key}: {given}")
    elif asked is not None and size is not None and asked < size:
        rule = f"is less than the {size} tokens that the model has, and none can be taken away"
        yield Problem(key, asked, rule, f"set it to {size} or more, or remove it")


def _adapter(facts: Facts) -> Iterator[Problem]:
    if facts.recipe.adapter is not None:
        yield Problem("adapter", None, NOT_AVAILABLE, "set it to null")


def _kernels(facts: Facts) -> Iterator[Problem]:
    kernels = facts.recipe.kernels
    for name in ("loss", "norm", "attention"):
        if getattr(kernels, name) == "fused":
            yield Problem(f"kernels.{name}", "fused", NOT_AVAILABLE, "set it to auto")
    if kernels.compile:
        yield Problem("kernels.compile", True, NOT_AVAILABLE, "set it to false")


def _own_name(facts: Facts, name: str) -> str:
    return facts.model.attribute_map.get(name, name)


def _run(tmp: Path) -> dict[str, Any]:
    """Make a run of 64 tokens, padded to 128."""
    step = tmp / "teacher" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    model = {"config": {"model_type": "llama", "vocab_size": 128}, "unpadded_vocabulary_size": 64}
    (step / "rank-00000.safetensors").write_text("1", encoding="utf-8")
    files = {"rank-00000.safetensors": {"bytes": 1, "xxh3_64": "0" * 16}}
    manifest = {"format": "trainer-checkpoint", "version": 1, "step": 1, "files": files, "model": model}
    (step / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return {"model.path": str(tmp / "teacher"), "model.config": None}


def _empty_directory(tmp: Path) -> dict[str, Any]:
    (tmp / "model").mkdir()
    return {"model.path": str(tmp / "model"), "model.config": None}


def _local_config(tmp: Path) -> dict[str, Any]:
    (tmp / "model").mkdir()
    text = '{"model_type": "llama", "max_position_embeddings": 8, "vocab_size": 64}'
    (tmp / "model" / "config.json").write_text(text, encoding="utf-8")
    return {"model.path": str(tmp / "model"), "model.config": None}


RULES = (
    Rule("known family", _family, Failing({"model.config.model_type": "lama"})),
    Rule("known fields", _fields, Failing({"model.config.hiden_size": 8})),
    Rule("fields that the recipe sets", _ours, Failing({"model.config.torch_dtype": "float16"})),
    Rule("types of fields", _types, Failing({"model.config.hidden_size": "16"})),
    Rule("positive sizes", _sizes, Failing({"model.config.num_hidden_layers": 0})),
    Rule("heads divide the hidden size", _heads, Failing({"model.config.num_attention_heads": 3})),
    Rule("key-value heads divide heads", _key_value_heads, Failing({"model.config.num_key_value_heads": 3})),
    Rule("sequence fits the positions", _length, Failing({"model.config.max_position_embeddings": 8})),
    Rule("sequence fits a local model", _length, Failing(prepare=_local_config)),
    Rule("attention fits the dtype", _attention, Failing({"model.attention": "flash_attention_2"})),
    Rule("model path", _path, Failing({"model.path": "./nowhere"})),
    Rule("model directory", _path, Failing(prepare=_empty_directory)),
    Rule("model id", _path, Failing({"model.path": "no id at all"})),
    Rule("tokenizer path", _tokenizer, Failing({"tokenizer.path": "runs/none/tokenizer"})),
    Rule("freeze patterns", _freeze, Failing({"model.freeze": ["layers.(0"]})),
    Rule(
        "initialisation from scratch",
        _initialization,
        Failing({"model.initialization": "scaled_residual"}, prepare=_local_config),
    ),
    Rule(
        "initialisation of GPT-2",
        _initialization,
        Failing({"model.initialization": "scaled_residual", "model.config": {"model_type": "gpt2"}}),
    ),
    Rule("tokens are added to a pretrained model", _vocabulary_size, Failing({"model.vocabulary_size": 128})),
    Rule("tokens of a run are only added", _vocabulary_size, Failing({"model.vocabulary_size": 63}, prepare=_run)),
    Rule("tokens are only added", _vocabulary_size, Failing({"model.vocabulary_size": 63}, prepare=_local_config)),
    Rule(
        "a pretrained model has its own vocabulary",
        _vocabulary_size,
        Failing(prepare=lambda tmp: _local_config(tmp) | {"model.config": {"vocab_size": 65}}),
    ),
    Rule("adapter available", _adapter, Failing({"adapter": {"rank": 4}})),
    Rule("kernels available", _kernels, Failing({"kernels.loss": "fused"})),
    Rule("compile available", _kernels, Failing({"kernels.compile": True})),
)
