"""`trainer data`: train a tokenizer and tokenize corpora."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trainer.cli.data_shards import Overwrite, ShardSize, parse_shard_size

if TYPE_CHECKING:
    from trainer.data.tokenize import Progress

app = typer.Typer(help="Tokenizers and token shards.", no_args_is_help=True)

# Lines of a log file, where nobody watches a bar.
_PLAIN_SECONDS = 10.0


class _Kind(StrEnum):
    bpe = "bpe"
    sentencepiece = "sentencepiece"


class ManyInputs(TyperCommand):
    """A command whose ``--input`` takes several values: ``--input a b c`` is ``--input a --input b --input c``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeat_input(args)))


def _repeat_input(args: list[str]) -> Iterator[str]:
    after_input = False
    for position, arg in enumerate(args):
        if arg == "--":
            yield from args[position:]
            return
        if arg.startswith("-"):
            after_input = arg == "--input" or arg.startswith("--input=")
        elif after_input and args[position - 1] != "--input":
            yield "--input"
        yield arg


Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="PATH...",
        help="Files (text and .jsonl, also .gz or .zst; .parquet, .arrow), directories (also of `datasets`) or a "
        "`datasets` id; several may follow.",
        show_default=False,
    ),
]
TextKey = Annotated[str, typer.Option(help="Key or column that holds the text of a row.")]
Split = Annotated[str, typer.Option(help="Split of a `datasets` directory or id.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Only rows with KEY=VALUE, KEY!=VALUE, KEY>=NUMBER or KEY<=NUMBER; repeat it for several.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only files of directories with such a name ('*.py').", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="No files or folders with such a name ('test*').", show_default=False),
]
MinCharacters = Annotated[
    int | None, typer.Option(metavar="N", help="Leave out shorter documents.", show_default=False)
]
MaxCharacters = Annotated[int | None, typer.Option(metavar="N", help="Leave out longer documents.", show_default=False)]
Separator = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help=r"Cut text files into documents at this text ('\n%\n').", show_default=False),
]


@app.command("tokenizer", cls=ManyInputs)
def tokenizer_command(
    inputs: Inputs,
    output: Annotated[str, typer.Option(metavar="DIR", help="Directory that AutoTokenizer will load.")],
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Number of token ids.")],
    kind: Annotated[
        _Kind, typer.Option(help="bpe: byte-level BPE; sentencepiece: BPE with byte fallback.")
    ] = _Kind.bpe,
    text_key: TextKey = "text",
    split: Split = "train",
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer."""
    from trainer.data.tokenizer import train_tokenizer

    start = time.monotonic()
    num_ids = train_tokenizer(
        inputs, output, vocab_size, kind.value, text_key=text_key, split=split, overwrite=overwrite
    )
    typer.echo(f"{output}: {kind.value} tokenizer with {num_ids:,} ids ({time.monotonic() - start:.1f} s)")
    if num_ids < vocab_size:
        typer.echo(f"warning: the text is too small for {vocab_size:,} ids", err=True)


@app.command("tokenize", cls=ManyInputs)
def tokenize_command(
    inputs: Inputs,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="DIR_OR_ID", help="Tokenizer directory, Hugging Face id, tokenizer.json or SentencePiece .model."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes; default: one a core.")] = None,
    text_key: TextKey = "text",
    split: Split = "train",
    validation_fraction: Annotated[
        float,
        typer.Option(metavar="F", help="Share of documents, chosen by a hash of their text, kept for validation."),
    ] = 0.0,
    validation_output: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Where the validation documents go.")
    ] = None,
    end_of_document: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Token that ends a document; default: the tokenizer's eos token."),
    ] = None,
    parse_special_tokens: Annotated[
        bool, typer.Option("--parse-special-tokens", help="Special tokens spelled out in the text become their ids.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hugging Face id.")] = None,
    where: Where = None,
    min_characters: MinCharacters = None,
    max_characters: MaxCharacters = None,
    include: Include = None,
    exclude: Exclude = None,
    separator: Separator = None,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn corpora into token shards. Interrupted or killed, the same command goes on where it was."""
    from trainer.data.corpus_files import Patterns
    from trainer.data.corpus_filters import Filters, unescape
    from trainer.data.tokenize import tokenize

    with _progress() as (progress, notice):
        written = tokenize(
            inputs,
            tokenizer,
            output,
            workers,
            text_key,
            split,
            revision=revision,
            end_of_document=end_of_document,
            parse_special_tokens=parse_special_tokens,
            validation_fraction=validation_fraction,
            validation_output=validation_output,
            overwrite=overwrite,
            shard_bytes=parse_shard_size(shard_size),
            filters=Filters.parse(where or (), min_characters, max_characters),
            patterns=Patterns(tuple(include or ()), tuple(exclude or ())),
            separator=None if separator is None else unescape(separator),
            progress=progress,
            notice=notice,
        )
    for result in written:
        report = result.report
        typer.echo(
            f"{result.prefix}: {result.num_documents:,} documents, {result.num_tokens:,} tokens, "
            f"{report['bytes_per_token']:.2f} bytes a token, {report['unknown_fraction']:.2%} unknown, "
            f"{report['unigram_entropy_bits']:.2f} bits of entropy a token"
        )
    for warning in dict.fromkeys(warning for result in written for warning in result.warnings):
        typer.echo(f"warning: {warning}", err=True)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """A bar on a terminal, a line every ten seconds elsewhere; on stderr, so that stdout holds results only."""
    if not sys.stderr.isatty():
        yield _PlainProgress(), lambda text: print(text, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, facts="")

        def show(progress: Progress) -> None:
            bar.update(task, total=progress.total_bytes, completed=progress.bytes_done, facts=_line(progress))

        yield show, lambda text: bar.console.print(text, highlight=False, markup=False)


class _PlainProgress:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= _PLAIN_SECONDS:
            self._last = time.monotonic()
            print(_line(progress), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    rate = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {progress.tokens_per_second:,.0f} tokens/s"
    left = progress.remaining_seconds
    return rate if left is None else f"{rate}, {left:.0f} s left"
