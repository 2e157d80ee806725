"""``trainer check``: refuse a bad run in under a second, without a GPU and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def check(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).", show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    world_size: Annotated[int | None, typer.Option(help="Ranks; default: as many as the recipe starts.")] = None,
    on_node: Annotated[
        bool, typer.Option("--on-node", help="Check the nodes of this job, as the ranks that a launcher has started.")
    ] = False,
    build_ops: Annotated[
        bool, typer.Option("--build-ops", help="Build the operations that the run needs, for the job to find.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """Check a recipe: every problem at once, exit code 2 if there is any. Nothing is started or written.

    With --on-node also the nodes: versions, the shared directory, disk, limits, GPUs, collectives and speeds.
    """
    if schema:
        from trainer.config.schema import json_schema

        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --schema", param_hint="RECIPE")
    if on_node:
        from trainer.cli.check_on_node import check_on_node

        check_on_node(recipe, overrides or [])
    from trainer.config.batch_schedule import warmup_text
    from trainer.config.deepspeed_json import stage_of
    from trainer.preflight.check import prepare

    prepared = prepare(recipe, overrides or (), world_size)
    if build_ops:
        from trainer.engine.operations import build_operations

        names = build_operations(prepared.deepspeed, typer.echo)
        typer.echo(f"built: {', '.join(names)}" if names else "nothing to build: the run needs no compiled operation")
        return
    derived, batch = prepared.derived, prepared.recipe.batch
    up_to = "up to " if batch.warmup else ""
    lines = {
        "run": f"{prepared.recipe.run.name} in {prepared.recipe.run.directory}",
        "ranks": f"{derived.world_size}, of which {derived.data_parallel} data-parallel",
        "batch": f"{batch.global_size} = {batch.micro_size} micro x {derived.accumulation} accumulation "
        f"x {derived.data_parallel} ranks{warmup_text(batch)}",
        "steps": f"{derived.total_steps:,} of {up_to}{derived.tokens_per_step:,} tokens "
        f"= {derived.total_tokens:,} tokens",
        "ZeRO": f"stage {stage_of(prepared.deepspeed)}, {prepared.recipe.model.dtype}",
    }
    typer.echo(f"{recipe}: ok")
    for name, text in lines.items():
        typer.echo(f"  {name:<6} {text}")
