"""``trainer checkpoint import SOURCE --output RUN_DIR``: another's checkpoint, or weights, as a run of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainer.checkpoint.import_source import Source


def import_checkpoint(
    source: Annotated[
        str, typer.Argument(help="DeepSpeed checkpoint directory, or Hugging Face directory or id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Run directory to make.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="Directory with config.json, or id (default: beside the checkpoint).", show_default=False),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="DeepSpeed's tag (default: what latest says).")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Steps done (default: what the source says).")] = None,
    consumed_samples: Annotated[int, typer.Option(min=0, help="Where the data of this run go on.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer to keep for exports (default: what lies beside config.json).", show_default=False),
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave out the optimizer's state.")] = False,
    compare_loss: Annotated[
        bool, typer.Option(help="Compare the loss of a batch; needs memory for the model in float32.")
    ] = True,
) -> None:
    """Import a DeepSpeed checkpoint or Hugging Face weights; no code of the source is run."""
    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.checkpoint.import_fit import fitted
    from trainer.checkpoint.import_open import model_path, open_source, tokenizer_beside
    from trainer.checkpoint.import_run import refuse_output, write_run
    from trainer.config.model import ModelConfig
    from trainer.core.private import keep_private
    from trainer.models.build import skeleton
    from trainer.models.config import hugging_face_config
    from trainer.training.state import TrainState

    refuse_output(output)
    found = open_source(source, model, tag, weights_only=weights_only)
    section = ModelConfig.model_validate({"path": model_path(source, model), "dtype": found.dtype})
    config = hugging_face_config(section)
    imported = fitted(found, skeleton(section, config))
    imported.step = found.step if step is None else step
    state = TrainState(
        step=imported.step,
        consumed_samples=consumed_samples,
        optimizer_steps=imported.optimizer_steps,
        skipped_steps=max(0, imported.step - imported.optimizer_steps) if imported.moments else 0,
    )
    kept = tokenizer or tokenizer_beside(model_path(source, model))
    keep_private("none")
    losses = write_run(imported, config, output, state.to_json(), kept, found, compare_loss)
    _say(imported, output, losses)


def _say(source: Source, output: Path, losses: tuple[float, float] | None) -> None:
    """Tell what was imported and how to go on from it."""
    import math

    from trainer.core.units import format_count

    count = format_count(sum(math.prod(tensor.shape) for tensor in source.weights.values()))
    contents = f"with the moments of {len(source.moments)}" if source.moments else "weights only"
    typer.echo(f"imported {source.kind}: {count} parameters in {len(source.weights)} tensors, {contents}")
    compared = f", loss {losses[0]:.6g} = {losses[1]:.6g}" if losses else ""
    typer.echo(f"compared with the source: every tensor equal{compared}")
    for note in source.notes:
        typer.echo(note)
    if source.frozen:
        names = sorted(source.frozen)
        typer.echo(f"not trained there, name them in model.freeze: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    typer.echo(f"to start from its weights with a fresh optimizer: model.path: {output}")
    if source.moments:
        typer.echo(
            f"to continue at step {source.step} with its moments: run.directory: {output}, model.path: {output} and "
            "checkpoint.accept_changes: [data] (which data it has read can't be known)"
        )
