"""Write an imported checkpoint into a new run directory, which gets its name when it equals the source."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.export import kept_tokenizer, load_checkpoint_model
from trainer.checkpoint.import_source import ForeignTensor, Source
from trainer.checkpoint.output import output_problem
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.checkpoint import CheckpointConfig
from trainer.core.durable import fsync_directory
from trainer.core.errors import CheckpointError, Problem, RefusedError
from trainer.core.private import private_like
from trainer.engine.base import StateSlice
from trainer.models.config import config_to_dictionary
from trainer.models.tokenizer import load_tokenizer

_TOLERANCE = 1e-5
"""Relative: the same weights through the same code; sums may be in another order."""


@dataclass(frozen=True)
class _Piece:
    """Implements trainer.engine.base.Swapped: a whole foreign tensor, read when it is written."""

    tensor: ForeignTensor
    dtype: torch.dtype

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.tensor.shape)

    def fetch(self) -> torch.Tensor:
        """Return the elements."""
        return self.tensor.read().to(self.dtype).reshape(-1)

    def fill(self, values: torch.Tensor) -> None:
        """Nothing may be put into another's checkpoint."""
        raise NotImplementedError


def refuse_output(output: Path) -> None:
    """Raise RefusedError unless ``output`` can become a new run directory."""
    problem = output_problem(output)
    if problem is None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        fix = "give a directory that is not there yet"
        problem = Problem("--output", str(output), "is there already", fix)
    if problem is not None:
        raise RefusedError(problem, title="import refused")


def write_run(
    source: Source, config: PretrainedConfig, output: Path, state: dict[str, Any], tokenizer: str | None,
    unfitted: Source, compare_loss: bool,
) -> tuple[float, float] | None:  # fmt: skip
    """Commit ``source`` as the one checkpoint of the run directory ``output``; ``state`` are its counters.

    It is written beside ``output``, compared with the source (every tensor; the loss of one batch by plain
    transformers, from ``unfitted`` and from what was written) and then renamed. Returns the two losses. Raises
    CheckpointError if anything differs, RefusedError for a tokenizer that can't be used; nothing is left behind then.
    """
    temporary = output.with_name(f".{output.name}.tmp-import")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        model = {
            "config": config_to_dictionary(config),
            "dtype": source.dtype,
            "tokenizer": tokenizer,
            "tokenizer_revision": None,
            "commit": getattr(config, "_commit_hash", None),
            "unpadded_vocabulary_size": None,
        }
        with private_like(temporary), _alone():
            if tokenizer is not None:
                _keep_tokenizer(tokenizer, temporary, config)
            facts = {"state": {"train": state, "identity": {}}, "model": model}
            _write(temporary, source, facts | _provenance(source))
        reader = CheckpointReader(layout.step_directory(temporary, state["step"]))
        _refuse_different(reader, source)
        losses = _losses(reader, unfitted, config) if compare_loss else None
        temporary.rename(output)
        fsync_directory(output.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return losses


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Be a process group of one rank, for what ranks do together."""
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage] - torch documents it as public
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _write(run_directory: Path, source: Source, facts: dict[str, Any]) -> None:
    step = facts["state"]["train"]["step"]
    random_state.seed_everything(0, 0, step)  # generators are part of a checkpoint; the source's are not known
    slices = [
        StateSlice(name, key, tensor.shape, 0, _Piece(tensor, _stored_dtype(source, name, tensor)), primary=True)
        for name, key, tensor in source.tensors()
    ]
    settings = CheckpointConfig(asynchronous=False, files="rank")
    saved = CheckpointWriter(run_directory, attempt="0000", settings=settings).save(step, slices, facts, wait=True)
    assert saved is not None
    if (wrong := saved.error or saved.warning) is not None:
        raise CheckpointError(f"import given up, nothing was written: {wrong}")


def _provenance(source: Source) -> dict[str, Any]:
    """Return the manifest's further fields, as far as they are known of a foreign checkpoint."""
    trained = {"optimizer": {"name": "adamw"}} if source.moments else {}
    return {"frozen": sorted(source.frozen), "imported": source.kind, "created_unix": time.time(), **trained}


def _stored_dtype(source: Source, name: str, tensor: ForeignTensor) -> torch.dtype:
    """Return float32 for what is trained; frozen parameters and buffers keep theirs, float16 becomes float32."""
    kept = name in source.frozen or name in source.buffers
    return tensor.dtype if kept and tensor.dtype != torch.float16 else torch.float32


def _keep_tokenizer(path: str, run_directory: Path, config: PretrainedConfig) -> None:
    tokenizer = load_tokenizer(path, key="--tokenizer")
    ids, rows = max(tokenizer.get_vocab().values()) + 1, config.get_text_config().vocab_size
    if ids > rows:
        rule = f"has {ids} ids, the model's embedding {rows} rows"
        raise RefusedError(
            Problem("--tokenizer", path, rule, "give the one that belongs to the model"), "import refused"
        )
    tokenizer.save_pretrained(kept_tokenizer(run_directory))


def _refuse_different(reader: CheckpointReader, source: Source) -> None:
    """Raise CheckpointError unless every tensor equals the source's, and the masters, rounded, its compute weights."""
    for name, key, tensor in source.tensors():
        here, there = reader.whole(name, key), tensor.read()
        if not torch.equal(here.to(there.dtype), there):
            raise CheckpointError(f"import given up, nothing was written: {key} of {name} differs from the source")
    for name, tensor in source.rounded.items():
        there = tensor.read()
        if not torch.equal(reader.whole(name).to(there.dtype), there):
            raise CheckpointError(
                f"import given up, nothing was written: {name} in the source's model states is not its float32 master "
                "rounded; it was changed after the last step, or this is a layout of another DeepSpeed"
            )


def _losses(reader: CheckpointReader, unfitted: Source, config: PretrainedConfig) -> tuple[float, float]:
    """Return the loss of one batch from the source's weights, and from what was written. Raises CheckpointError."""
    there = _loss(_plain_model(unfitted, config))
    here = _loss(load_checkpoint_model(reader, "float32"))
    if not math.isclose(here, there, rel_tol=_TOLERANCE):
        raise CheckpointError(f"import given up, nothing was written: loss {here:.8g}, from the source {there:.8g}")
    return there, here


def _plain_model(unfitted: Source, config: PretrainedConfig) -> PreTrainedModel:
    """Return plain transformers' model with the source's weights under the source's names, in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    values = {name: tensor.read() for name, tensor in (unfitted.weights | unfitted.buffers).items()}
    values |= {name: values[first] for name, first in unfitted.shared.items() if first in values}
    missing, unexpected = model.load_state_dict(values, strict=False)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    if unexpected or set(missing) - tied:
        raise CheckpointError(f"import given up: plain transformers lacks {', '.join([*missing, *unexpected][:5])}")
    return model


@torch.inference_mode()
def _loss(model: PreTrainedModel) -> float:
    """Return the mean loss of two sequences of fixed tokens."""
    text = model.config.get_text_config()
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    tokens = torch.arange(2 * length).mul(7919).remainder(text.vocab_size).reshape(2, length)
    return float(model(input_ids=tokens, labels=tokens).loss)
