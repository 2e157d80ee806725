"""From a checkpoint to a Hugging Face directory; only what reloads to the same logits is handed over."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from trainer.checkpoint import layout
from trainer.checkpoint.assemble import load_checkpoint_model
from trainer.checkpoint.export_check import logits_of, prompts_of, refuse_unlike
from trainer.checkpoint.export_trained import FACTS_NAME, trained_names, write_trained
from trainer.checkpoint.locate import newest_or_refuse
from trainer.checkpoint.model_card import CARD_NAME, model_card
from trainer.checkpoint.output import output_problem
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files
from trainer.core.durable import fsync_directory
from trainer.core.errors import CheckpointError, Problem, RefusedError
from trainer.core.private import directory_mode, file_mode, private_like
from trainer.models.tokenizer import load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_BYTES = 5 * 10**9


def export_checkpoint(
    run_directory: Path,
    output: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    only_trained: bool = False,
    problems: Sequence[Problem] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write safetensors, config, generation config, tokenizer and model card to ``output`` and return it.

    The weights are the float32 masters, cast to ``dtype`` (default: what the run computed in), in files of at most
    ``max_shard_bytes`` with an index where it takes several. Everything is written beside ``output``, loaded by plain
    transformers, compared (every weight with the checkpoint's own, logits of fixed prompts, token ids of fixed texts)
    and only then renamed. With ``only_trained`` it is the trained tensors alone. One model is held at a time: the peak
    is the model in ``dtype``, one file of it, and its largest tensor in float32. ``say`` is told which step it was.
    Raises RefusedError for bad arguments and what else the caller found (``problems``), CheckpointError when the
    checkpoint is damaged or what was written differs from it.
    """
    _refuse_arguments(run_directory, output, dtype, overwrite, max_shard_bytes, problems)
    directory = _find(run_directory, step)
    with _while_it_is_kept(directory), private_like(run_directory):
        _export(directory, output, dtype, max_shard_bytes, only_trained=only_trained)
    say(f"exported step {layout.parse_step_name(directory.name)} to {output}")
    return output


def _export(directory: Path, output: Path, dtype: str | None, max_shard_bytes: int, *, only_trained: bool) -> None:
    reader = CheckpointReader(directory)
    manifest = layout.read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} is damaged: {'; '.join(layout.find_problems(directory))}")
    if only_trained:
        trained_names(reader, manifest)
    wrong = damaged_files(directory)
    if wrong:
        raise CheckpointError(f"{directory} is damaged: " + "; ".join(wrong))
    written_dtype = dtype or reader.model["dtype"]

    def write(target: Path) -> None:
        if only_trained:
            write_trained(reader, manifest, load_checkpoint_model(reader, dtype), target)
        else:
            _write_whole(reader, dtype, target, max_shard_bytes)
        text = model_card(directory.parents[1], directory, manifest, written_dtype, trained=only_trained)
        (target / CARD_NAME).write_text(text, encoding="utf-8")

    _publish(output, write)


@contextlib.contextmanager
def _while_it_is_kept(directory: Path) -> Iterator[None]:
    """Raise CheckpointError in place of whatever it is that fails when a checkpoint is deleted inside the context."""
    try:
        yield
    except Exception as error:
        if directory.exists():
            raise
        rule = f"{directory} was deleted while it was read (a job trains there)"
        raise CheckpointError(f"{rule}: try again, or give --step of one that is kept") from error


def kept_tokenizer(run_directory: Path) -> Path:
    """Return where a run keeps a copy of its tokenizer, so that it can be exported anywhere, later."""
    return run_directory / "tokenizer"


def _refuse_arguments(
    run_directory: Path,
    output: Path,
    dtype: str | None,
    overwrite: bool,
    max_shard_bytes: int,
    found: Sequence[Problem],
) -> None:
    problems = [*found]
    if dtype is not None and dtype not in DTYPES:
        problems.append(Problem("--dtype", dtype, f"must be one of {', '.join(DTYPES)}", "leave it out for the run's"))
    if max_shard_bytes < 1:
        problems.append(Problem("--max-shard-size", max_shard_bytes, "must be a number of bytes", "write 5GB"))
    run, target = run_directory.resolve(), output.resolve()
    inside = target.relative_to(run).parts if target.is_relative_to(run) else ("",)
    if run.is_relative_to(target) or inside[0] in _PARTS_OF_A_RUN:
        rule = "is the run's own directory, or one that the run writes"
        problems.append(Problem("--output", str(output), rule, "give another directory"))
    elif (problem := output_problem(output)) is not None:
        problems.append(problem)
    elif output.exists():
        if not output.is_dir():
            problems.append(Problem("--output", str(output), "is no directory", "give another directory"))
        elif any(output.iterdir()):
            if not overwrite:
                fix = "give another directory or --overwrite"
                problems.append(Problem("--output", str(output), "is not empty", fix))
            elif not any((output / name).is_file() for name in ("config.json", FACTS_NAME)):
                rule = "holds something else than an earlier export, which --overwrite would delete"
                problems.append(Problem("--output", str(output), rule, "give another directory"))
    if problems:
        raise RefusedError(problems)


_PARTS_OF_A_RUN = ("checkpoints", "logs", "attempts", "tensorboard", "slurm", "tokenizer", "data")


def _find(run_directory: Path, step: int | None) -> Path:
    found = layout.step_directories(run_directory)
    if step is None:
        newest = newest_or_refuse(run_directory, "RUN_DIR", "--step ")
        if newest is None:
            raise RefusedError(Problem("RUN_DIR", str(run_directory), "holds no complete checkpoint", "train it first"))
        return newest
    for number, path in found:
        if number == step:
            return path
    held = ", ".join(str(number) for number, _ in found) or "none"
    raise RefusedError(Problem("--step", step, f"there is no such checkpoint (there are: {held})", "give one of them"))


def _write_whole(reader: CheckpointReader, dtype: str | None, target: Path, max_shard_bytes: int) -> None:
    """Write the whole model into ``target`` and compare it with the checkpoint."""
    tokenizer = _tokenizer(reader)
    model = load_checkpoint_model(reader, dtype)
    prompts = prompts_of(model, tokenizer)
    expected = logits_of(model, prompts)
    model.save_pretrained(target, max_shard_size=max_shard_bytes)
    _save_tokenizer(tokenizer, model, target)
    del model  # what is loaded to be compared takes its place
    refuse_unlike(reader, target, prompts, expected, tokenizer)


def _tokenizer(reader: CheckpointReader) -> Any | None:
    path = reader.model.get("tokenizer")
    if path is None:
        return None
    kept = kept_tokenizer(reader.directory.parents[1])
    return load_tokenizer(str(kept)) if kept.is_dir() else load_tokenizer(path, reader.model.get("tokenizer_revision"))


def _save_tokenizer(tokenizer: Any | None, model: PreTrainedModel, target: Path) -> None:
    generation = GenerationConfig.from_model_config(model.config)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
        generation.bos_token_id = tokenizer.bos_token_id
        generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(target)


def _publish(output: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a directory beside ``output``, then give it the name: it is there whole or not at all."""
    output.parent.mkdir(mode=directory_mode(), parents=True, exist_ok=True)
    with _beside(output) as (temporary, aside):
        write(temporary)
        _seal(temporary)
        if output.exists():
            output.rename(aside)  # renamed first: half a deleted export must not look like one
        temporary.rename(output)
        fsync_directory(output.parent)


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield two names beside ``output`` that are gone afterwards, as are those of exports that were killed here."""
    mark = f".{output.name}.export-{socket.gethostname()}-"
    for path in output.parent.glob(".*.export-*"):
        number = path.name.removeprefix(mark).partition("-")[0]
        if path.name.startswith(mark) and number.isdigit() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(path, ignore_errors=True)
    temporary, aside = (output.with_name(f"{mark}{os.getpid()}-{kind}") for kind in ("new", "old"))
    try:
        yield temporary, aside
    finally:
        if aside.exists() and not output.exists():
            aside.rename(output)
        for path in (temporary, aside):
            shutil.rmtree(path, ignore_errors=True)


def _seal(directory: Path) -> None:
    """Give every file the run's mode (libraries have their own idea of it) and bring it to the disk."""
    for path in directory.rglob("*"):
        path.chmod(path.stat().st_mode & 0o7000 | (directory_mode() if path.is_dir() else file_mode()))
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_directory(directory)
