"""`trainer data info|verify|merge|split|convert`: look at finished token shards, check and rewrite them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainer.data.shard_set import ShardSet
    from trainer.data.shard_set_writer import Written

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Prefix of shards or of a set, directory, pattern or .ds file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def info(source: Source, as_json: AsJson = False) -> None:
    """Print the facts of token shards."""
    from trainer.data.shard_set import ShardSet

    facts = _facts(ShardSet(source))
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items()) or "unknown"
        for line in value if isinstance(value, list) else [value]:
            shown = "unknown" if line is None else f"{line:,}" if isinstance(line, int) else line
            typer.echo(f"{key.replace('_', ' '):<20} {shown}")


def verify(
    source: Source,
    full: Annotated[bool, typer.Option("--full", help="Read every byte, not a sample of blocks.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check token shards for damage; exit code 2 if there is any."""
    from trainer.core.errors import DataError
    from trainer.data.shard_set import ShardSet
    from trainer.data.shard_verify import verify_source

    problems = verify_source(source, full)
    if as_json:
        listed = [{"key": p.key, "value": str(p.value), "rule": p.rule, "fix": p.fix} for p in problems]
        typer.echo(json.dumps({"prefix": source, "full": full, "ok": not problems, "problems": listed}))
        if problems:
            raise typer.Exit(DataError.exit_code)
        return
    if problems:
        raise DataError(problems, title=f"{source} is damaged")
    shards = ShardSet(source)
    extent = "every block" if full else "index and a sample of blocks (--full reads everything)"
    several = f"{shards.num_shards:,} shards, " if shards.num_shards > 1 else ""
    typer.echo(f"{source}: sound, {extent}: {several}{shards.num_documents:,} documents, {shards.num_tokens:,} tokens")
    for note in shards.notes:
        typer.echo(f"note: {note}", err=True)


def _facts(shards: ShardSet) -> dict[str, Any]:
    stated = shards.stated
    return {
        "prefix": shards.path,
        "num_shards": shards.num_shards,
        "num_documents": shards.num_documents,
        "num_tokens": shards.num_tokens,
        "tokens_per_document": round(shards.num_tokens / shards.num_documents, 1),
        "dtype": shards.shards[0].dtype.name,
        "bin_bytes": sum(shard.num_tokens * shard.dtype.itemsize for shard in shards.shards),
        "vocab_size": shards.vocab_size,
        "end_of_document_id": shards.end_of_document_id,
        "tokenizer": {"name": stated.tokenizer_name, "hash": stated.tokenizer_hash} if stated else None,
        "fingerprint": shards.fingerprint,
        "tool_version": stated.tool_version if stated else None,
        "report": stated.report if stated else None,
        "notes": list(shards.notes),
    }


Output = Annotated[str, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Bytes of each shard (500M, 2G): PREFIX-00000.bin, …", show_default=False),
]


def merge(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Prefixes, sets, directories, .ds files.")],
    output: Output,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Join token shards, one source after the other."""
    from trainer.data.shard_copy import merge as merge_shards

    written = merge_shards(sources, output, shard_bytes=parse_shard_size(shard_size), overwrite=overwrite)
    _say(output, written)


def split(
    source: Source,
    output: Output,
    shard_size: ShardSize = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Number of shards, about.", show_default=False)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write token shards anew as a set of smaller ones."""
    from trainer.core.errors import Problem, RefusedError
    from trainer.data.shard_copy import merge as merge_shards
    from trainer.data.shard_copy import shard_bytes_for

    if (shard_size is None) == (shards is None):
        raise RefusedError(Problem("split", None, "needs --shard-size or --shards", "give one of them"))
    size = shard_bytes_for(source, shards) if shards is not None else parse_shard_size(shard_size)
    _say(output, merge_shards([source], output, shard_bytes=size, overwrite=overwrite))


def convert(
    source: Source,
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Tokenizer that made it.", show_default=False)
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Instead of a tokenizer.", show_default=False)] = None,
    end_of_document_id: Annotated[
        int | None, typer.Option(min=0, help="Id that ends every document.", show_default=False)
    ] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out documents without tokens.")] = False,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn shards of Megatron, GPT-NeoX or datatrove into shards with a side-car: vocabulary and checksums."""
    from trainer.data.encoder import Encoder
    from trainer.data.shard_copy import Labels
    from trainer.data.shard_copy import merge as merge_shards

    encoder = Encoder.load(tokenizer) if tokenizer is not None else None
    labels = Labels(
        vocab_size or (encoder.vocab_size if encoder else None),
        end_of_document_id,
        encoder.name if encoder else None,
        encoder.hash if encoder else None,
    )
    size = parse_shard_size(shard_size)
    written = merge_shards(
        [source], output, shard_bytes=size, overwrite=overwrite, drop_empty=drop_empty, labels=labels
    )
    _say(output, written)


def parse_shard_size(text: str | None, key: str = "--shard-size") -> int | None:
    """Return a size in bytes: 1000, 500M, 2G, 100MB. Raises RefusedError that names the option ``key``."""
    from trainer.core.errors import Problem, RefusedError

    if text is None:
        return None
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = text.upper().removesuffix("B"), ""
    if number and number[-1] in units:
        number, unit = number[:-1], number[-1]
    try:
        size = int(float(number) * units[unit])
    except ValueError:
        size = 0
    if size < 1:
        raise RefusedError(Problem(key, text, "must be a number of bytes", "write for example 500M or 2G"))
    return size


def _say(output: str, written: Written) -> None:
    typer.echo(f"{output}: {written.num_documents:,} documents, {written.num_tokens:,} tokens")
