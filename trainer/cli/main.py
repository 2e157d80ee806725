"""The ``trainer`` command: one verb a file, each imports its package only when it runs."""

from __future__ import annotations

import sys

import typer

from trainer.cli import check, data, evaluate, export, generate, quickstart, status, submit, train
from trainer.core.errors import EXIT_REFUSED, TrainerError

app = typer.Typer(
    name="trainer",
    help="Train Hugging Face causal LMs with DeepSpeed, on a laptop and under SLURM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train.train)
app.command("check")(check.check)
app.add_typer(data.app, name="data")
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("quickstart")(quickstart.quickstart)


def main() -> None:
    """Run the command line; a TrainerError becomes its text on stderr and its exit code."""
    try:
        app()
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `trainer ... | head`
        sys.stderr.close()
        sys.exit(EXIT_REFUSED)
