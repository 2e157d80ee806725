"""``trainer verify RECIPE``: the recipe on a small clone of the model, against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainer.verification.compare import Deviations
    from trainer.verification.verify import Verification


def verify(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 3,
    world_size: Annotated[int | None, typer.Option(help="Ranks to start here.", show_default="as the recipe")] = None,
) -> None:
    """Compare loss, gradient norm and every gradient of the exact recipe, on a small clone of its model, with one
    plain process. Nothing is written."""
    import tempfile

    from trainer.core.errors import EXIT_FAILURE
    from trainer.launch.local import run_local
    from trainer.preflight.check import prepare

    prepared = prepare(recipe, overrides or [], world_size)
    from trainer.core.quiet import quiet_transformers

    quiet_transformers()
    from trainer.verification.verify import verify as run

    with tempfile.TemporaryDirectory(prefix="trainer-verify-") as folder:
        found = run(prepared.recipe, prepared.derived, steps, Path(folder), run_local)
    show(found)
    if not found.passed:
        raise typer.Exit(EXIT_FAILURE)


def show(found: Verification) -> None:
    """Print the comparison."""
    print("step  loss      reference  deviation  gradient norm  reference  deviation")
    for step, ((loss, plain), (norm, other)) in enumerate(zip(found.steps.losses, found.steps.norms, strict=True), 1):
        deviation = abs(norm - other) / other if other else abs(norm - other)
        losses = f"{step:4}  {loss:8.5f}  {plain:9.5f}  {abs(loss - plain):9.1e}"
        print(f"{losses}  {norm:13.5f}  {other:9.5f}  {deviation:9.1e}")
    print(_gradients(found.first))
    bounds = found.bounds
    text = f"loss {bounds.loss:g}, gradient norm {bounds.norm:g}, each gradient {bounds.gradient:g}"
    print(f"{'passed' if found.passed else 'FAILED'}: the bounds are {text}")


def _gradients(found: Deviations) -> str:
    if found.missing:
        return f"parameters that were not trained: {', '.join(found.missing[:5])}"
    deviations = sorted((found.gradients or {}).items(), key=lambda item: -item[1])
    worst = ", ".join(f"{name} {value:.1e}" for name, value in deviations[:3])
    return f"gradients of {len(deviations)} parameters; largest deviations: {worst}"
