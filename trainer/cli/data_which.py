"""`trainer data which`: the documents a step of a run read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainer.config.run import Recipe
    from trainer.data.ledger import Ledger, SampleEntry
    from trainer.resilience.guard import Rewind

_SHOWN_CHARACTERS = 200


def which(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory, or a recipe.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")],
    text: Annotated[bool, typer.Option("--text", help="Print the text of every document.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the documents that a step read: source, shard, document, place. Computed, not recorded."""
    from trainer.config.derive import total_steps
    from trainer.data.ledger import Ledger

    recipe = _recipe(run)
    first, count = _samples(run, recipe, step)
    if step > (last := total_steps(recipe)):
        typer.echo(f"note: the run ends at step {last}; this is what step {step} would read", err=True)
    ledger = Ledger.open(recipe.data, recipe.run.seed)
    decode = _decoder(recipe) if text else None
    digest = ledger.batch_hash(first, count)
    if as_json:
        entries = [_as_dict(ledger, entry, decode) for entry in ledger.entries(first, count)]
        typer.echo(json.dumps({"step": step, "batch_hash": digest, "samples": entries}, ensure_ascii=False))
        return
    typer.echo(f"step {step}: samples {first}..{first + count - 1}, batch hash {digest}")
    for entry in ledger.entries(first, count):
        typer.echo(f"sample {entry.sample}: {entry.source}, epoch {entry.epoch}, its sample {entry.sample_of_source}")
        for piece in entry.pieces:
            last = piece.first_token + piece.num_tokens - 1
            typer.echo(f"  {piece.shard} document {piece.document}, tokens {piece.first_token}..{last}")
            if decode is not None:
                shown = decode(ledger.tokens(entry, piece))
                dots = " …" if len(shown) > _SHOWN_CHARACTERS else ""
                typer.echo(f"    {shown[:_SHOWN_CHARACTERS]!r}{dots}")


def _as_dict(ledger: Ledger, entry: SampleEntry, decode: Any) -> dict[str, Any]:
    value = asdict(entry)
    if decode is not None:
        for described, piece in zip(value["pieces"], entry.pieces, strict=True):
            described["text"] = decode(ledger.tokens(entry, piece))
    return value


def _recipe(run: Path) -> Recipe:
    from trainer.config.load import load_recipe
    from trainer.core.errors import Problem, RefusedError

    path = run / "run.yaml" if run.is_dir() else run
    if not path.is_file():
        raise RefusedError(Problem("RUN_DIR", str(run), "is neither a run directory nor a recipe", "correct the path"))
    return load_recipe(path)


def _samples(run: Path, recipe: Recipe, step: int) -> tuple[int, int]:
    """Return (first sample, number of samples) of a step.

    What the run has logged counts first: its global batch may have changed at a restart.
    """
    from trainer.config.batch_schedule import batch_size, samples_through
    from trainer.resilience.guard import samples_left_out

    rewinds = _rewinds(run)
    left_out = samples_left_out(rewinds, step)
    logged = _logged_samples(run / "metrics.jsonl", rewinds)
    before = max((known for known in logged if known < step), default=0)
    after = min((known for known in logged if known >= step), default=None)
    planned = {known: samples_through(recipe.batch, known) for known in (before, step - 1, after) if known is not None}
    if after is not None and logged[after] - logged[before] != planned[after] - planned[before]:
        # Not by this recipe. The sizes between two lines are known only where they are equal.
        size = (logged[after] - logged[before]) // (after - before)
        return left_out + logged[before] + (step - 1 - before) * size, size
    return left_out + logged[before] + planned[step - 1] - planned[before], batch_size(recipe.batch, step)


def _rewinds(run: Path) -> list[Rewind]:
    """Return the rewinds that led to the newest checkpoint: each is committed before the step that follows it."""
    from trainer.checkpoint import layout
    from trainer.resilience.guard import GuardHistory

    newest = layout.newest(run)
    manifest = layout.read_manifest(newest[1]) if newest else None
    history = GuardHistory.from_json(manifest["state"].get("train", {}).get("guard", {})) if manifest else None
    return history.rewinds if history else []


def _logged_samples(path: Path, rewinds: list[Rewind]) -> dict[int, int]:
    """Return the samples read by the end of each logged step, of the step before it, and of none.

    Those that rewinds left out are not counted, so that steps follow each other without gaps.
    """
    from trainer.resilience.guard import samples_left_out

    ends = {0: 0}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ends
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:  # a line torn by a kill
            continue
        if "samples" in value:
            end = value["samples"] - samples_left_out(rewinds, value["step"])
            ends[value["step"]] = end
            if "global_batch_size" in value:
                ends[value["step"] - 1] = end - value["global_batch_size"]
    return ends


def _decoder(recipe: Recipe) -> Any:
    from trainer.core.errors import Problem, RefusedError
    from trainer.data.encoder import Encoder

    kept = Path(recipe.run.directory) / "tokenizer"
    path = str(kept) if kept.is_dir() else recipe.tokenizer.path
    if path is None:
        rule = "the run names no tokenizer: there is no text without one"
        raise RefusedError(Problem("tokenizer.path", None, rule, "set tokenizer.path, or leave --text out"))
    return Encoder.load(path, recipe.tokenizer.revision).decode
