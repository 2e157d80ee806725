"""Merge, split and convert token shards: documents of one or several sources, written anew as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.core.errors import DataError, Problem
from trainer.data.shard_set import ShardSet
from trainer.data.shard_set_writer import SetWriter, Written

# Documents that are looked up, and tokens that are copied, at a time: bounds memory to about 100 MB.
_DOCUMENTS = 1 << 16
_TOKENS = 1 << 22


@dataclass(frozen=True)
class Labels:
    """What the side-car of the output says of the tokens; None: what the sources say."""

    vocab_size: int | None = None
    end_of_document_id: int | None = None
    tokenizer_name: str | None = None
    tokenizer_hash: str | None = None


def merge(
    sources: Sequence[str],
    output: str,
    *,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    drop_empty: bool = False,
    labels: Labels | None = None,
) -> Written:
    """Write all documents of ``sources``, one source after the other, to ``output``.

    With one source this is a split (``shard_bytes``) or a conversion (``labels``). Memory does not grow with the
    sources. Raises DataError for sources of different tokenizers or end-of-document ids, an unknown vocabulary, an id
    outside of it, empty documents unless ``drop_empty``, and an output that is one of the sources.
    """
    opened = [ShardSet(source) for source in sources]
    said = _agreed(opened, labels or Labels(), output)
    with SetWriter(
        output,
        said.vocab_size or 0,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        end_of_document_id=said.end_of_document_id,
        tokenizer_name=said.tokenizer_name,
        tokenizer_hash=said.tokenizer_hash,
    ) as writer:
        dropped = 0
        for source in opened:
            for tokens, lengths in _documents(source, said.vocab_size):
                empty = lengths == 0
                if empty.any() and not drop_empty:
                    rule = f"holds empty documents, the first after {writer.num_documents} others"
                    raise _refused(source.path, rule, "leave them out with --drop-empty")
                dropped += int(empty.sum())
                writer.add_many(tokens, lengths[~empty])
            source.close()
        return writer.commit({"merged_from": len(opened), "empty_documents": dropped})


def shard_bytes_for(source: str, num_shards: int) -> int:
    """Return the size of shards that makes about ``num_shards`` of them."""
    opened = ShardSet(source)
    size = sum(shard.num_tokens * shard.dtype.itemsize for shard in opened.shards)
    opened.close()
    return max(1, -(-size // num_shards))


def _documents(source: ShardSet, limit: int | None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (tokens end to end, length of each document)."""
    for first in range(0, source.num_documents, _DOCUMENTS):
        numbers = np.arange(first, min(first + _DOCUMENTS, source.num_documents), dtype=np.int64)
        starts, lengths = source.document_spans(numbers)
        ends = np.cumsum(lengths)
        done = 0
        while done < numbers.size:
            base = int(ends[done] - lengths[done])
            stop = max(done + 1, int(np.searchsorted(ends, base + _TOKENS, side="right")))
            count = int(ends[stop - 1]) - base
            out = np.empty((1, count), dtype=np.int64)
            if count:
                source.read_many(starts[done : done + 1], count, out, limit)
            yield out[0], lengths[done:stop]
            done = stop


def _agreed(opened: Sequence[ShardSet], given: Labels, output: str) -> Labels:
    problems: list[Problem] = []
    hashes = {source.tokenizer_hash: source.path for source in opened if source.tokenizer_hash}
    if len(hashes) > 1:
        rule = "were made with different tokenizers: the same id means different text"
        problems.append(Problem("sources", list(hashes.values()), rule, "tokenize them with one tokenizer"))
    ends = {source.end_of_document_id for source in opened}
    if given.end_of_document_id is None and len(ends - {None}) > 1:
        problems.append(Problem("sources", sorted(ends - {None}, key=str), "end their documents with different ids"))
    sizes = [source.vocab_size for source in opened]
    if given.vocab_size is None and None in sizes:
        path = next(source.path for source in opened if source.vocab_size is None)
        fix = "give --tokenizer, or --vocab-size"
        problems.append(Problem(path, None, "doesn't say how large its vocabulary is", fix))
    written = os.path.realpath(output + ".bin")
    if any(os.path.realpath(shard.tokens_path) == written for source in opened for shard in source.shards):
        problems.append(Problem("output", output, "is one of the sources", "choose another prefix"))
    if problems:
        raise DataError(problems, title="token shards")
    named = next((source.stated for source in opened if source.stated and source.stated.tokenizer_hash), None)
    end = given.end_of_document_id
    return Labels(
        given.vocab_size or max(size or 0 for size in sizes),
        # An id that only some sources promise is promised by none of the whole.
        end if end is not None else next(iter(ends)) if len(ends) == 1 else None,
        given.tokenizer_name or (named.tokenizer_name if named else None),
        given.tokenizer_hash or (named.tokenizer_hash if named else None),
    )


def _refused(path: str, rule: str, fix: str) -> DataError:
    return DataError(Problem(path, None, rule, fix), title="token shards")
