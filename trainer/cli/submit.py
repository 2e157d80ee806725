"""`trainer submit`: check a recipe at the size it will run, write the batch script and submit it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trainer.config.run import Recipe
    from trainer.core.errors import Problem
    from trainer.launch.hub_files import Wanted
    from trainer.launch.profile import Profile
    from trainer.launch.slurm import LaunchPlan

_CHAINS, _SWEEPS, _PROBE = "Chains", "Sweeps", "Site profile"


def submit(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="Recipe (YAML).", show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="launch.slurm.nodes")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="launch.slurm.gpus_per_node")] = None,
    time: Annotated[str | None, typer.Option(help="launch.slurm.time, e.g. 12:00:00")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit and write nothing.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="Site profile: a name or a path; none: not even yours", rich_help_panel=_PROBE)
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Write a profile: a short job looks at a node.", rich_help_panel=_PROBE)
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Where --probe writes; default: among your profiles", rich_help_panel=_PROBE)
    ] = None,
    chain: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="So many jobs, each after the one before", rich_help_panel=_CHAINS),
    ] = None,
    array: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The same as one job array, 1-N%1", rich_help_panel=_CHAINS)
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="JOBID[:TYPE]", help="Start after that job's end", rich_help_panel=_CHAINS)
    ] = None,
    singleton: Annotated[
        bool, typer.Option("--singleton", help="After all jobs of this name and user", rich_help_panel=_CHAINS)
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2,...", help="A run for every combination", rich_help_panel=_SWEEPS),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Runs of the sweep at once", rich_help_panel=_SWEEPS)
    ] = None,
) -> None:
    """Submit a run to SLURM. The job checkpoints before its time limit and goes back into the queue."""
    from trainer.core.errors import RefusedError
    from trainer.launch.profile import profile_of_recipe
    from trainer.launch.submit import dependency

    if probe:
        others = {
            "--nodes": nodes, "--gpus-per-node": gpus_per_node, "--time": time, "--dry-run": dry_run or None,
            "--chain": chain, "--array": array, "--after": after, "--singleton": singleton or None,
            "--sweep": sweep or None, "--max-running": max_running,
        }  # fmt: skip
        _probe(profile, output, recipe, overrides, [name for name, value in others.items() if value is not None])
        return
    if output is not None:
        raise RefusedError("--output says where --probe writes → add --probe, or remove it")
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --probe", param_hint="RECIPE")
    if sum((chain is not None, array is not None, bool(sweep))) > 1:
        raise RefusedError("--chain, --array and --sweep exclude each other → use one of them")
    if max_running is not None and not sweep:
        raise RefusedError("--max-running limits a sweep → add --sweep KEY=V1,V2, or remove it")
    waits_for = dependency(after, singleton=singleton)
    settings = [*(overrides or []), *_launch_overrides(nodes, gpus_per_node, time, profile)]
    site = profile_of_recipe(recipe, settings, os.environ)
    if sweep:
        _submit_sweep(recipe, settings, site, sweep, max_running, waits_for, dry_run=dry_run)
        return
    checked, plan = _plan(recipe, settings, site, array)
    _hand_over(plan, checked, site, waits_for, chain or 1, [plan.run_directory], dry_run=dry_run)


def _plan(recipe: Path, settings: list[str], site: Profile | None, tasks: int | None) -> tuple[Recipe, LaunchPlan]:
    from trainer.config.deepspeed_json import builds_operations
    from trainer.launch.slurm import plan
    from trainer.preflight.check import prepare

    # launch.launcher=slurm: at the size that SLURM is asked for
    prepared = prepare(recipe, settings, None, site.under if site else None)
    checked = prepared.recipe
    _refuse_not_cached(recipe, checked, {})
    shared = settings + (site.for_ranks(checked.launch.slurm) if site else [])
    return checked, plan(
        checked,
        command=(_python(checked), "-m", "trainer", "train", os.path.abspath(recipe), *shared),
        node_check=(_python(checked), "-m", "trainer", "check", os.path.abspath(recipe), *shared, "--on-node"),
        builds=builds_operations(prepared.deepspeed),
        python=sys.executable,
        working_directory=Path.cwd(),
        run_directory=Path(os.path.abspath(checked.run.directory)),
        array=f"1-{tasks}%1" if tasks is not None else None,
    )


def _refuse_not_cached(recipe: Path, checked: Recipe, known: dict[tuple[Wanted, ...], list[Problem]]) -> None:
    """Raise RecipeError where jobs have no internet and would miss files. ``known`` keeps what was looked for."""
    from trainer.core.errors import RecipeError
    from trainer.launch.hub_files import not_cached, wanted

    if checked.launch.slurm.online:
        return
    repositories = tuple(wanted(checked))
    if repositories not in known:
        known[repositories] = not_cached(checked)
    if known[repositories]:
        raise RecipeError(known[repositories], title=f"{recipe} refused")


def _submit_sweep(
    recipe: Path, settings: list[str], site: Profile | None, axes: list[str], max_running: int | None,
    waits_for: str | None, *, dry_run: bool,
) -> None:  # fmt: skip
    import dataclasses

    from trainer.core.errors import RefusedError
    from trainer.launch.slurm import render
    from trainer.launch.submit import make_submittable, refuse_stopped
    from trainer.launch.sweep import plan_sweep, read_axes
    from trainer.launch.sweep_file import is_written, withdraw_sweep, write_sweep
    from trainer.preflight.check import prepare

    values = read_axes(axes)
    first = [f"{key}={_yaml(among[0])}" for key, among in values.items()]
    under = site.under if site else None

    looked_for: dict[tuple[Wanted, ...], list[Problem]] = {}

    def check(overrides: list[str]) -> None:
        _refuse_not_cached(recipe, prepare(recipe, overrides, None, under).recipe, looked_for)

    try:
        checked, plan = _plan(recipe, [*settings, *first], site, None)
    except RefusedError:  # of the first task: say what is wrong with the others as well
        plan_sweep("sweep", recipe, settings, values, Path("sweep"), check)
        raise
    shared = settings + (site.for_ranks(checked.launch.slurm) if site else [])
    found = plan_sweep(plan.job_name, Path(os.path.abspath(recipe)), shared, values, plan.run_directory, check)
    plan = dataclasses.replace(
        plan,
        command=(_python(checked), "-m", "trainer.launch.sweep_task", str(plan.run_directory)),
        node_check=(),  # each task has a recipe of its own
        array=f"1-{len(found.tasks)}%{min(max_running or len(found.tasks), len(found.tasks))}",
        sweep=True,
    )
    written = is_written(plan.run_directory, found)
    render(plan)  # refuses what can't be submitted, before anything is written
    if not dry_run:
        refuse_stopped([plan.run_directory / task.name for task in found.tasks])
    if not dry_run and not written:
        make_submittable(plan.run_directory, checked.run.group_access)
        write_sweep(plan.run_directory, found)
    for task in found.tasks:
        shown = " ".join(f"{key}={_yaml(value)}" for key, value in task.values.items())
        typer.echo(f"{task.number:>4}  {task.name}  {shown}", err=True)
    directories = [plan.run_directory / task.name for task in found.tasks]
    try:
        _hand_over(plan, checked, site, waits_for, 1, directories, dry_run=dry_run)
    except RefusedError:
        if not dry_run and not written:
            withdraw_sweep(plan.run_directory)
        raise


def _hand_over(
    plan: LaunchPlan, checked: Recipe, site: Profile | None, waits_for: str | None, jobs: int, directories: list[Path],
    *, dry_run: bool,
) -> None:  # fmt: skip
    """Render the script and submit it for the runs in ``directories``, or show it."""
    from trainer.launch.avoided_nodes import with_avoided_nodes
    from trainer.launch.slurm import render
    from trainer.launch.stale_stop import withdraw_stale_stop
    from trainer.launch.submit import refuse_stopped, submit_chain, write_script
    from trainer.launch.submit import submit as submit_job

    plan = with_avoided_nodes(plan, lambda text: typer.echo(text, err=True))
    script = render(plan)
    if site:
        typer.echo(f"profile: {site.name} ({site.path})", err=True)
    if dry_run:
        typer.echo(script, nl=False)
        return
    refuse_stopped([plan.run_directory])
    path = write_script(plan.run_directory, script, checked.run.group_access)
    for directory in directories:  # before a job can start, which would end by it
        withdraw_stale_stop(directory, _say)
    if plan.array is None:
        ids = submit_chain(path, jobs, _say, first=waits_for)
    else:
        ids = [submit_job(path, _say, dependency=waits_for, array=plan.array)]
    for job_id in ids:
        typer.echo(job_id)
    typer.echo(f"submitted {path}; follow it with: trainer status {checked.run.directory}", err=True)


def _probe(
    profile: str | None, output: Path | None, recipe: Path | None, overrides: list[str] | None, others: list[str]
) -> None:
    from trainer.core.errors import RefusedError
    from trainer.launch.probe import probe_site

    if recipe is not None or overrides:
        raise RefusedError("--probe takes no recipe → give --profile NAME or --output FILE, or neither")
    if others:
        raise RefusedError(f"--probe runs a short job of its own, without {', '.join(others)} → remove one of the two")
    raise typer.Exit(probe_site(profile, output, os.environ, _say))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _python(checked: Recipe) -> str:
    """The interpreter of the ranks: the one that runs this, or the image's."""
    container = checked.launch.slurm.container
    return container.python if container is not None else sys.executable


def _yaml(value: object) -> str:
    from trainer.launch.sweep_file import as_yaml

    return as_yaml(value)


def _launch_overrides(nodes: int | None, gpus_per_node: int | None, time: str | None, profile: str | None) -> list[str]:
    """The options as recipe overrides, so that the job resolves the same recipe that was checked here."""
    overrides = ["launch.launcher=slurm"]
    if nodes is not None:
        overrides.append(f"launch.slurm.nodes={nodes}")
    if gpus_per_node is not None:
        overrides.append(f"launch.slurm.gpus_per_node={gpus_per_node}")
    # Quoted: to YAML 24:00:00 is a number in base 60, and 30 is not text.
    for key, text in (("time", time), ("profile", profile)):
        if text is not None:
            quoted = text.replace("'", "''")
            overrides.append(f"launch.slurm.{key}='{quoted}'")
    return overrides
