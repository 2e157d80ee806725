"""`trainer data info|verify`: look at token shards and check them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trainer.data.shards import TokenShards

Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx, without the suffix.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def info(prefix: Prefix, as_json: AsJson = False) -> None:
    """Print the facts of token shards."""
    from trainer.data.shards import TokenShards

    facts = _facts(TokenShards(prefix))
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
    prefix: Prefix,
    full: Annotated[bool, typer.Option("--full", help="Read every byte, not a sample of blocks.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check token shards for damage; exit code 2 if there is any."""
    from trainer.core.errors import DataError
    from trainer.data import shards as token_shards

    problems = token_shards.verify(prefix, full)
    if as_json:
        listed = [{"key": p.key, "value": str(p.value), "rule": p.rule, "fix": p.fix} for p in problems]
        typer.echo(json.dumps({"prefix": prefix, "full": full, "ok": not problems, "problems": listed}))
        if problems:
            raise typer.Exit(DataError.exit_code)
        return
    if problems:
        raise DataError(problems, title=f"{prefix} is damaged")
    shards = token_shards.TokenShards(prefix)
    extent = "every block" if full else "index and a sample of blocks (--full reads everything)"
    typer.echo(f"{prefix}: sound, {extent}: {shards.num_documents:,} documents, {shards.num_tokens:,} tokens")
    for note in shards.notes:
        typer.echo(f"note: {note}", err=True)


def _facts(shards: TokenShards) -> dict[str, Any]:
    sidecar = shards.sidecar
    return {
        "prefix": shards.prefix,
        "num_documents": shards.num_documents,
        "num_tokens": shards.num_tokens,
        "tokens_per_document": round(shards.num_tokens / shards.num_documents, 1),
        "dtype": shards.dtype.name,
        "bin_bytes": shards.num_tokens * shards.dtype.itemsize,
        "vocab_size": shards.vocab_size,
        "end_of_document_id": shards.end_of_document_id,
        "tokenizer": {"name": sidecar.tokenizer_name, "hash": sidecar.tokenizer_hash} if sidecar else None,
        "fingerprint": shards.fingerprint,
        "tool_version": sidecar.tool_version if sidecar else None,
        "report": sidecar.report if sidecar else None,
        "notes": list(shards.notes),
    }
