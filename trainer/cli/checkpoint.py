"""``trainer checkpoint list|verify|repair|diff|prune|reshape|import``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.checkpoint_import import import_checkpoint

app = typer.Typer(help="Look after the checkpoints of a run.", no_args_is_help=True)
app.command("import")(import_checkpoint)
_RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.", show_default=False)]
_Step = Annotated[int | None, typer.Option(metavar="N", help="Only this one.", show_default=False)]
_LEAST_BYTES_OF_A_RATE = 10**8  # less than that, starting up takes most of the time
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]


@app.command("list")
def list_checkpoints(
    run_directory: _RunDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the checkpoints of a run, oldest first: step, size, ranks, dtype, age, and which ones are whole."""
    import json
    import time

    from trainer.checkpoint.report import survey_lines, survey_object
    from trainer.checkpoint.survey import survey

    found = survey(run_directory)
    lines = [json.dumps(survey_object(found))] if as_json else survey_lines(found, time.time())
    typer.echo("\n".join(lines))


@app.command("verify")
def verify(
    run_directory: _RunDirectory,
    step: _Step = None,
    nan_scan: Annotated[bool, typer.Option("--nan-scan", help="Look at every element for NaN and Inf.")] = False,
) -> None:
    """Read every file of every checkpoint and compare it with its manifest; exit code 1 if anything is wrong."""
    from trainer.checkpoint.doctor import known_files
    from trainer.checkpoint.survey import survey

    found, known = survey(run_directory), known_files(run_directory)
    held = {checkpoint.step: checkpoint.directory for checkpoint in found.checkpoints}
    _refuse_absent(step, list(held))
    wrong = found.pointer_problem is not None and step is None
    for number, directory in held.items() if step is None else [(step, held[step])]:
        said = _examined(directory, known, nan_scan)
        if said is None:
            typer.echo(f"step {number}: deleted meanwhile")
            continue
        wrong |= bool(said)
        typer.echo(f"step {number}: " + (f"{len(said)} wrong" if said else "ok"))
        for line in said:
            typer.echo(f"  {line}")
    if found.pointer_problem is not None and step is None:
        typer.echo(found.pointer_problem)
    raise typer.Exit(1 if wrong else 0)


@app.command("repair")
def repair(run_directory: _RunDirectory, dry_run: _DryRun = False) -> None:
    """Mend what can be mended: leftovers, the pointer, modes. Damaged checkpoints are moved aside, never deleted."""
    from trainer.checkpoint.repair import plan_repair
    from trainer.core.private import private_like
    from trainer.core.run_lock import RunLock, refuse_if_held

    _refuse_no_directory(run_directory)
    refuse_if_held(run_directory)
    lock = None if dry_run else RunLock(run_directory, say=typer.echo)
    try:
        treatment = plan_repair(run_directory)
        for action in treatment.actions:
            if not dry_run:
                with private_like(run_directory):
                    action.do()
            typer.echo(("would do: " if dry_run else "") + action.text)
    finally:
        if lock is not None:
            lock.release()
    for note in treatment.notes:
        typer.echo(note)
    if not treatment.actions and not treatment.notes:
        typer.echo("nothing to repair")
    raise typer.Exit(1 if treatment.hopeless else 0)


@app.command("diff")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A step-* directory, or RUN_DIR or RUN_DIR@STEP.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Compare every element; only tensors count then.")] = False,
) -> None:
    """Compare two checkpoints; exit code 0: the same, 1: not."""
    from trainer.checkpoint import layout
    from trainer.checkpoint.diff import manifest_differences
    from trainer.checkpoint.locate import locate
    from trainer.checkpoint.reader import CheckpointReader
    from trainer.checkpoint.tensor_diff import tensor_differences

    first, second = CheckpointReader(locate(a, "A")), CheckpointReader(locate(b, "B"))
    manifests = [layout.read_manifest(reader.directory) or {} for reader in (first, second)]
    fields = manifest_differences(*manifests)
    differences = tensor_differences(first, second, values=tensors)
    for line in fields + [str(difference) for difference in differences]:
        typer.echo(line)
    what = "tensors, every element" if tensors else "tensors' names, states, shapes and dtypes"
    typer.echo(f"{what}: {f'{len(differences)} differ' if differences else 'same'}")
    typer.echo(f"fields of the manifest: {f'{len(fields)} differ' if fields else 'same'}")
    raise typer.Exit(1 if differences or (fields and not tensors) else 0)


@app.command("prune")
def prune(
    run_directory: _RunDirectory,
    keep_last: Annotated[int | None, typer.Option(metavar="N", help="Newest to keep.", show_default="recipe's")] = None,
    keep_every: Annotated[
        int | None, typer.Option(metavar="N", help="Keep multiples of N steps.", show_default="recipe's")
    ] = None,
    dry_run: _DryRun = False,
) -> None:
    """Delete checkpoints that need not be kept; never the newest sound one. Reads those that it keeps."""
    from trainer.checkpoint.doctor import damage
    from trainer.checkpoint.prune import delete, plan_prune
    from trainer.core.run_lock import RunLock, refuse_if_held
    from trainer.core.units import format_bytes

    _refuse_no_directory(run_directory)
    refuse_if_held(run_directory)
    pruning = plan_prune(run_directory, keep_last, keep_every, damage)
    lock = None if dry_run or not pruning.delete else RunLock(run_directory, say=typer.echo)
    try:
        for held in pruning.delete:
            if not dry_run:
                delete(run_directory, held.step)
            typer.echo(f"step {held.step}: {'would be deleted' if dry_run else 'deleted'}")
    finally:
        if lock is not None:
            lock.release()
    for step, problem in pruning.damaged:
        typer.echo(f"step {step}: damaged ({problem}), left alone: see trainer checkpoint repair")
    every = f" and multiples of {pruning.keep_every}" if pruning.keep_every else ""
    freed = format_bytes(sum(held.num_bytes for held in pruning.delete))
    kept = ", ".join(map(str, pruning.keep)) or "none"
    rule = f"the newest {pruning.keep_last}{every}"
    typer.echo(f"kept ({rule}): {kept}; {'to be freed' if dry_run else 'freed'}: {freed}")


@app.command("reshape")
def reshape(
    run_directory: _RunDirectory,
    output: Annotated[Path, typer.Option(metavar="RUN2", help="Run directory to write; must not exist, or be empty.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Which one.", show_default="newest complete")] = None,
    ranks: Annotated[int | None, typer.Option(metavar="N", help="Shards to write.", show_default="as before")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave out optimizer state.")] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16", help="Of weights alone.", show_default="as stored")
    ] = None,
) -> None:
    """Rewrite a checkpoint for another number of ranks, offline: N shards, each an equal part of every tensor."""
    import resource

    import torch

    from trainer.checkpoint.reshape import Reshaping, open_source, refuse_bad_request
    from trainer.checkpoint.reshape import reshape as write
    from trainer.core.private import private_like
    from trainer.core.units import format_bytes

    refuse_bad_request(ranks, weights_only, dtype)
    reader = open_source(run_directory, step, output)
    wanted = Reshaping(ranks or reader.world_size, weights_only, getattr(torch, dtype) if dtype else None)
    with private_like(run_directory):
        done = write(reader, output, wanted)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    what = "weights" if weights_only else "tensors"
    generators = "" if done.generators else ", random generators left out"
    typer.echo(f"{done.directory}: {what} in {wanted.num_ranks} shards{generators}")
    large = done.num_bytes >= _LEAST_BYTES_OF_A_RATE
    speed = f"{done.seconds / done.num_bytes * 1e9:.1f} s per GB, " if large else ""
    typer.echo(f"{format_bytes(done.num_bytes)}, {speed}peak memory {format_bytes(peak)}")


def _examined(directory: Path, known: Mapping[str, str], nan_scan: bool) -> list[str] | None:
    """Return what is wrong with a checkpoint, None if it was deleted while it was read."""
    from trainer.checkpoint.doctor import examine
    from trainer.checkpoint.scan import not_finite
    from trainer.core.errors import CheckpointError

    said: list[str] = []
    try:
        findings = examine(directory, known)
        said = [finding.text for finding in findings]
        if nan_scan and not any(finding.damage or finding.kind == "newer" for finding in findings):
            said += map(str, not_finite(directory))
    except (CheckpointError, OSError):
        if directory.exists():
            raise
    return said if directory.exists() or directory.is_symlink() else None


def _refuse_absent(step: int | None, held: list[int]) -> None:
    from trainer.core.errors import Problem, RefusedError

    if step is not None and step not in held:
        there = ", ".join(map(str, held)) or "none"
        rule = f"there is no such checkpoint (there are: {there})"
        raise RefusedError(Problem("--step", step, rule, "give one of them"))


def _refuse_no_directory(run_directory: Path) -> None:
    """Raise RefusedError where a lock file would be made in a directory that is no run's."""
    from trainer.checkpoint.survey import survey

    survey(run_directory)
