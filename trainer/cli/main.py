"""The ``trainer`` command: one verb a file, each imports its package only when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from trainer.cli import (
    cancel,
    check,
    checkpoint,
    control,
    data,
    data_shards,
    data_which,
    evaluate,
    export,
    fetch,
    generate,
    quickstart,
    report,
    status,
    submit,
    train,
    verify,
)
from trainer.core.errors import EXIT_FAILURE, TrainerError
from trainer.resilience.signals import StopFlag, early_stop_flag

app = typer.Typer(
    name="trainer",
    help="Train Hugging Face causal LMs with DeepSpeed, on a laptop and under SLURM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Train Hugging Face causal LMs with DeepSpeed, on a laptop and under SLURM."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"trainer {installed('trainer')}")
        raise typer.Exit


app.command("train")(train.train)
app.command("check")(check.check)
app.command("verify")(verify.verify)
data.app.command("info")(data_shards.info)
data.app.command("verify")(data_shards.verify)
data.app.command("merge")(data_shards.merge)
data.app.command("split")(data_shards.split)
data.app.command("convert")(data_shards.convert)
data.app.command("which")(data_which.which)
app.add_typer(data.app, name="data")
app.command("fetch")(fetch.fetch)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("report")(report.report)
app.command("cancel")(cancel.cancel)
app.command("control")(control.control)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("quickstart")(quickstart.quickstart)


def main(stop: StopFlag | None = None) -> None:
    """Run the command line; a TrainerError becomes its text on stderr and its exit code.

    ``stop`` holds what signals a rank got so far.
    """
    try:
        app(obj=stop or early_stop_flag(os.environ, sys.argv))
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `trainer ... | head`
            sys.stderr.close()
            sys.exit(EXIT_FAILURE)
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILURE)
