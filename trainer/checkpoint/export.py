"""From a checkpoint to a Hugging Face directory; only what reloads to the same logits is handed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files
from trainer.core.errors import CheckpointError, Problem, RefusedError
from trainer.models.tokenizer import load_tokenizer

_DTYPES = ("float32", "bfloat16")


def export_checkpoint(
    run_directory: Path, output: Path, *, step: int | None = None, dtype: str | None = None, overwrite: bool = False
) -> Path:
    """Write safetensors, config, generation config and tokenizer to ``output`` and return it.

    The weights are the float32 masters, cast to ``dtype`` (default: what the run computed in). Everything is written
    beside ``output``, loaded by plain transformers, compared (every weight, and logits on fixed tokens) and only then
    renamed. Raises RefusedError for bad arguments, CheckpointError when the checkpoint is damaged or the logits differ.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise RefusedError(
            Problem("--dtype", dtype, f"must be one of {', '.join(_DTYPES)}", "leave it out for the run's")
        )
    if output.exists() and not overwrite and any(output.iterdir()):
        raise RefusedError(Problem("--output", str(output), "is not empty", "give another directory or --overwrite"))
    reader = CheckpointReader(_find(run_directory, step))
    problems = damaged_files(reader.directory)
    if problems:
        raise CheckpointError(f"{reader.directory} is damaged: " + "; ".join(problems))
    model = load_checkpoint_model(reader, dtype)
    temporary = output.with_name(f".{output.name}.tmp-export")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        _save_tokenizer(reader, model, temporary)
        _compare(model, temporary)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def load_checkpoint_model(reader: CheckpointReader, dtype: str | None) -> PreTrainedModel:
    """Return the checkpoint's model on the CPU in ``dtype`` (default: the run's), dropout off, vocabulary unpadded.

    Raises CheckpointError if names or shapes don't match the model its config describes.
    """
    fields = dict(reader.model["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    target = getattr(torch, dtype or reader.model["dtype"])
    config.dtype = target
    model = AutoModelForCausalLM.from_config(config, dtype=target).eval()
    wanted = dict(model.named_parameters())
    held = set(reader.names())
    missing = sorted(wanted.keys() - held)
    if missing:
        raise CheckpointError(f"{reader.directory} lacks {', '.join(missing[:5])}")
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name in held:
            tensor = wanted.get(name, buffers.get(name))
            if tensor is None or tuple(tensor.shape) != reader.shape(name):
                raise CheckpointError(f"{reader.directory}: {name} {reader.shape(name)} does not fit the model")
            tensor.copy_(reader.whole(name))
    unpadded = reader.model.get("unpadded_vocabulary_size")
    if unpadded is not None:
        model.resize_token_embeddings(unpadded)
    return model


def _find(run_directory: Path, step: int | None) -> Path:
    found = layout.step_directories(run_directory)
    if step is None:
        newest = layout.newest(run_directory)
        if newest is None:
            raise RefusedError(Problem("RUN_DIR", str(run_directory), "holds no complete checkpoint", "train it first"))
        return newest[1]
    for number, path in found:
        if number == step:
            return path
    held = ", ".join(str(number) for number, _ in found) or "none"
    raise RefusedError(Problem("--step", step, f"there is no such checkpoint (there are: {held})", "give one of them"))


def kept_tokenizer(run_directory: Path) -> Path:
    """Return where a run keeps a copy of its tokenizer, so that it can be exported anywhere, later."""
    return run_directory / "tokenizer"


def _save_tokenizer(reader: CheckpointReader, model: PreTrainedModel, target: Path) -> None:
    path = reader.model.get("tokenizer")
    generation = GenerationConfig.from_model_config(model.config)
    if path is not None:
        kept = kept_tokenizer(reader.directory.parents[1])
        if kept.is_dir():
            tokenizer = load_tokenizer(str(kept))
        else:
            tokenizer = load_tokenizer(path, reader.model.get("tokenizer_revision"))
        tokenizer.save_pretrained(target)
        generation.bos_token_id = tokenizer.bos_token_id
        generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(target)


def _compare(model: PreTrainedModel, directory: Path) -> None:
    """Raise CheckpointError unless plain transformers loads the same weights and computes the same logits."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False).eval()
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    different = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if different or expected.keys() != found.keys():
        raise CheckpointError(f"export refused: weights differ after reloading: {', '.join(different[:5])}")
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.arange(24).mul(7919).remainder(vocabulary).reshape(2, 12)
    with torch.inference_mode():
        here, there = model(input_ids=prompt).logits, loaded(input_ids=prompt).logits
    if not torch.equal(here, there):
        raise CheckpointError(f"export refused: logits differ by {(here - there).abs().max():.3g} after reloading")
