"""Open the sources of a run, with every problem of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.data import DataConfig
from trainer.core.errors import DataError, Problem
from trainer.data.best_fit import BestFit
from trainer.data.packing import DocumentStream, OnePerSequence, Packing
from trainer.data.shard_set import ShardSet

_PACKINGS = {"documents": DocumentStream, "best_fit": BestFit, "one_per_sequence": OnePerSequence}


@dataclass(frozen=True)
class Source:
    """Token shards and how they are cut into samples."""

    label: str
    shards: ShardSet
    packing: Packing


def open_train_sources(data: DataConfig, vocab_size: int | None) -> list[Source]:
    """Open ``data.train``. Raises DataError for shards that can't be read or don't belong together."""
    paths = [(f"data.train.{i}.path", source.path) for i, source in enumerate(data.train)]
    shards = _open([path for _, path in paths], [key for key, _ in paths], vocab_size)
    labels = [source.label for source in data.train]
    return [
        Source(label, opened, cut(opened, data.packing, data.sequence_length))
        for label, opened in zip(labels, shards, strict=True)
    ]


def open_source(key: str, path: str, packing: str, sequence_length: int, vocab_size: int | None) -> Source:
    """Open one source, that of the recipe's ``key``. Raises DataError."""
    (shards,) = _open([path], [key], vocab_size)
    if corrupt := shards.check_blocks(0, 1, full=False):
        raise DataError([Problem(key, path, message) for *_, message in corrupt], title="corrupt token shards")
    return Source(key, shards, cut(shards, packing, sequence_length))


def cut(shards: ShardSet, packing: str, sequence_length: int) -> Packing:
    """Return the samples of opened shards under a packing of ``data.packing``."""
    return _PACKINGS[packing](shards, sequence_length)


def _open(paths: Sequence[str], keys: Sequence[str], vocab_size: int | None) -> list[ShardSet]:
    problems: list[Problem] = []
    opened: list[ShardSet] = []
    for key, path in zip(keys, paths, strict=True):
        try:
            shards = ShardSet(path)
        except DataError as error:
            problems += error.problems
            continue
        opened.append(shards)
        if vocab_size is not None:
            try:
                shards.sample_ids(vocab_size)
            except DataError as error:
                problems += error.problems
        if vocab_size is not None and (shards.vocab_size or 0) > vocab_size:
            rule = f"was written with a larger vocabulary than the model's vocab_size = {vocab_size}"
            fix = "raise it (of a pretrained model: model.vocabulary_size), or tokenize with the model's tokenizer"
            problems.append(Problem(f"{key}: {path}", f"{shards.vocab_size} ids", rule, fix))
    problems += _conflicts(opened)
    if problems:
        for shards in opened:
            shards.close()
        raise DataError(problems, title="data")
    return opened


def _conflicts(opened: Sequence[ShardSet]) -> list[Problem]:
    problems: list[Problem] = []
    hashes = {shards.tokenizer_hash: shards.path for shards in opened if shards.tokenizer_hash}
    if len(hashes) > 1:
        rule = "mixes shards of different tokenizers: the same id means different text"
        fix = "tokenize all sources with one tokenizer"
        problems.append(Problem("data.train", list(hashes.values()), rule, fix))
    seen: dict[str, str] = {}
    for shards in opened:
        if shards.fingerprint in seen:
            rule = f"holds the same tokens as {seen[shards.fingerprint]}: both would be read in the same order"
            fix = "list it once, with the sum of the weights"
            problems.append(Problem(f"data.train: {shards.path}", None, rule, fix))
        seen[shards.fingerprint] = shards.path
    return problems
