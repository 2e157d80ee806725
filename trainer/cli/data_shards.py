"""`trainer data info|verify`: look at token shards and check them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainer.data.shard_set import ShardSet

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
