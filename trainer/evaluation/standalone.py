"""Evaluate any Hugging Face directory or run on token shards, in one process, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.checkpoint import layout
from trainer.checkpoint.assemble import load_checkpoint_model
from trainer.checkpoint.locate import newest_or_refuse
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files
from trainer.config.data import DataConfig
from trainer.core.errors import CheckpointError, Problem, RefusedError
from trainer.data.loader import validation_batches
from trainer.models.load import load_model
from trainer.models.loss import cross_entropy_by_row
from trainer.telemetry.record import perplexity


def evaluate_model(model: str, data: Path, *, sequence_length: int | None, batch_size: int) -> dict[str, Any]:
    """Return {"loss" in nats/token, "perplexity", "target_tokens"} over every whole sequence of the shards."""
    network, trained_length = _load(model)
    length = sequence_length or trained_length or 512
    vocabulary = network.config.get_text_config().vocab_size
    loss, count = 0.0, 0
    with torch.inference_mode():
        section = DataConfig.model_validate({"train": [{"path": str(data)}], "sequence_length": length})
        for batch in validation_batches(section, str(data), batch_size, 0, 1, batch_size, None, vocabulary):
            logits = network(input_ids=batch.input_ids, use_cache=False).logits
            loss += float(cross_entropy_by_row(logits, batch.targets).sum())
            count += int((batch.targets >= 0).sum())
    mean = loss / max(1, count)
    return {"loss": mean, "perplexity": perplexity(mean), "target_tokens": count, "sequence_length": length}


def _load(model: str) -> tuple[PreTrainedModel, int | None]:
    if layout.checkpoints_directory(Path(model)).is_dir():
        newest = newest_or_refuse(Path(model), "MODEL_OR_RUN")
        if newest is None:
            raise RefusedError(Problem("MODEL_OR_RUN", model, "holds no complete checkpoint", "train it first"))
        if problems := damaged_files(newest):
            raise CheckpointError(f"{newest} is damaged: " + "; ".join(problems))
        reader = CheckpointReader(newest)
        network = load_checkpoint_model(reader, dtype=None).eval()
        return network, reader.state.get("identity", {}).get("data.sequence_length")
    return load_model(model, "MODEL_OR_RUN"), None
