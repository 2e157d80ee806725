"""Tell what a source of an import is, and where its config lies."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint import layout
from trainer.checkpoint.import_deepspeed import SUPPORTED, find_deepspeed, read_deepspeed
from trainer.checkpoint.import_huggingface import dtype_of, looks_like_weights, read_hugging_face
from trainer.checkpoint.import_source import Source
from trainer.config.model import ModelConfig
from trainer.core.errors import Problem, RefusedError
from trainer.models.config import hugging_face_config


def open_source(source: str, model: str | None, tag: str | None, *, weights_only: bool) -> Source:
    """Return what ``source`` holds: DeepSpeed's checkpoint, or Hugging Face weights. Raises RefusedError."""
    path = Path(source)
    if path.is_dir():
        if layout.checkpoints_directory(path).is_dir():
            rule, fix = "is a run directory of this trainer already", "give it as model.path or run.directory"
            raise RefusedError(Problem("SOURCE", source, rule, fix), title="import refused")
        directory = find_deepspeed(path, tag)
        if directory is not None:
            model_path(source, model)  # refused before anything is read
            return read_deepspeed(directory, weights_only=weights_only)
        if not looks_like_weights(path):
            rule = "holds neither a DeepSpeed checkpoint nor *.safetensors"
            fix = f"give the directory that was saved to: Hugging Face weights, or {SUPPORTED}"
            raise RefusedError(Problem("SOURCE", source, rule, fix), title="import refused")
    elif path.exists():
        fix = "give the directory that it lies in"
        raise RefusedError(Problem("SOURCE", source, "is a file", fix), title="import refused")
    if tag is not None:
        rule = "names a checkpoint of DeepSpeed, and SOURCE is none"
        raise RefusedError(Problem("--tag", tag, rule, "leave it out"), title="import refused")
    dtype = dtype_of(model_path(source, model))
    section = ModelConfig.model_validate({"path": model_path(source, model), "dtype": dtype})
    return read_hugging_face(source, hugging_face_config(section), dtype)


def tokenizer_beside(model: str) -> str | None:
    """Return the directory of a model's config if a tokenizer lies there too."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return model if any((Path(model) / name).is_file() for name in names) else None


def model_path(source: str, model: str | None) -> str:
    """Return the directory or id whose config.json is the model's. Raises RefusedError if none is found.

    ``model`` where it is given; else ``source`` or the directory above it, where a trainer of Hugging Face puts it.
    """
    path = Path(source)
    if model is not None or not path.is_dir():
        return model or source
    for directory in (path, path.resolve().parent):
        if (directory / "config.json").is_file():
            return str(directory)
    rule = f"no config.json in {path} or above it says what model the weights are of"
    fix = "name a directory with config.json, or a Hugging Face id, with --model"
    raise RefusedError(Problem("--model", None, rule, fix), title="import refused")
