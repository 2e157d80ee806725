"""Rules about token shards."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule
from trainer.preflight.shard_facts import MAGIC


def _readable(facts: Facts) -> Iterator[Problem]:
    for key, shard in facts.shards:
        for rule, fix in shard.defects:
            yield Problem(key, shard.path, rule, fix)


def _samples(facts: Facts) -> Iterator[Problem]:
    length = facts.recipe.data.sequence_length
    if facts.recipe.data.packing != "documents":
        return  # a short document is a padded sample
    for key, shard in facts.shards:
        # A sample is sequence_length inputs and the target after the last one.
        if shard.num_tokens is not None and not shard.defects and shard.num_tokens < length + 1:
            rule = f"has {shard.num_tokens} tokens, too few for one sample of data.sequence_length = {length}"
            yield Problem(key, shard.path, rule, "use more text or a shorter data.sequence_length")


def _one_step(facts: Facts) -> Iterator[Problem]:
    data, wanted = facts.recipe.data, facts.recipe.batch.global_size
    train = [shard for key, shard in facts.shards if key.startswith("data.train.")]
    if data.packing != "documents" or any(shard.num_tokens is None for shard in train):
        return  # how many samples other packings give is known once the documents are read
    available = sum(max(0, (shard.num_tokens or 0) - 1) // data.sequence_length for shard in train)
    if 0 < available < wanted:  # none at all is what `_samples` says
        rule = f"data.train has only {available} samples, so that one step would repeat them"
        yield Problem("batch.global_size", wanted, rule, "lower it or data.sequence_length, or use more text")


def _vocabulary(facts: Facts) -> Iterator[Problem]:
    """On a GPU a token beyond the embedding is an opaque device-side assert, steps later."""
    size = facts.model.number("vocab_size")
    pretrained, asked = facts.recipe.model.path is not None, facts.recipe.model.vocabulary_size
    if size is None and asked is None:
        return
    size = max(size or 0, asked or 0)  # what pads a vocabulary is no token
    key_of_size = "model.vocabulary_size" if pretrained else "model.config.vocab_size"
    for key, shard in facts.shards:
        if shard.vocab_size is not None and shard.vocab_size > size:
            rule = f"its tokenizer has {shard.vocab_size} tokens, the model's vocab_size is {size}"
            fix = f"set {key_of_size} to at least {shard.vocab_size}, or tokenize with the model's tokenizer"
            yield Problem(key, shard.path, rule, fix)


def _dtype(facts: Facts) -> Iterator[Problem]:
    for key, shard in facts.shards:
        stated = shard.sidecar.get("dtype")
        if shard.dtype is not None and isinstance(stated, str) and stated != shard.dtype:
            rule = f"its index says {shard.dtype} and its side-car {stated}"
            yield Problem(key, shard.path, rule, "tokenize the corpus again")
        elif shard.dtype == "uint16" and (shard.vocab_size or 0) > 2**16:
            rule = f"a vocabulary of {shard.vocab_size} does not fit uint16"
            yield Problem(key, shard.path, rule, "tokenize the corpus again")


def _size(facts: Facts) -> Iterator[Problem]:
    for key, shard in facts.shards:
        stated = shard.sidecar.get("num_tokens")
        if shard.num_tokens is not None and isinstance(stated, int) and stated != shard.num_tokens:
            rule = f"has {shard.num_tokens} tokens where its side-car says {stated}"
            yield Problem(key, shard.path, rule, "tokenize the corpus again, or copy all three files")


def _tokenizers(facts: Facts) -> Iterator[Problem]:
    known = [(key, shard) for key, shard in facts.shards if shard.tokenizer_hash is not None]
    for key, shard in known[1:]:
        first_key, first = known[0]
        if shard.tokenizer_hash != first.tokenizer_hash:
            rule = f"was made with another tokenizer than {first_key} ({first.path})"
            yield Problem(key, shard.path, rule, "tokenize both with the same tokenizer")


def _duplicate_sources(facts: Facts) -> Iterator[Problem]:
    paths = [str(Path(source.path)) for source in facts.recipe.data.train]
    for path, count in Counter(paths).items():
        if count > 1:
            yield Problem("data.train", path, f"is given {count} times", "give it once, with its whole weight")


def _same_files(facts: Facts) -> Iterator[Problem]:
    """A link or another spelling gives a source twice the weight it seems to have."""
    known: dict[tuple[int, int], str] = {}
    for path, shard in {shard.path: shard for key, shard in facts.shards if key.startswith("data.train.")}.items():
        first = next((known[file] for file in shard.files if file in known), None)
        if first is not None and Path(first) != Path(path):
            rule = f"reads a file that {first} reads too"
            yield Problem("data.train", path, rule, "give each file once, with its whole weight")
        known |= dict.fromkeys(shard.files, path)


def _duplicate_names(facts: Facts) -> Iterator[Problem]:
    names = [source.name for source in facts.recipe.data.validation]
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem("data.validation", name, f"{count} sources have this name", "give each its own name")


def write_tiny_shard(prefix: Path, length: int = 64, code: int = 8, **sidecar: Any) -> str:
    """Write a shard of zeros, for the failing recipes of the rules and for tests; return its prefix.

    ``length`` tokens of dtype ``code`` (8: uint16, 4: int32); ``sidecar`` is what PREFIX.json says, right or wrong.
    """
    item = {8: 2, 4: 4}[code]
    prefix.with_suffix(".bin").write_bytes(bytes(length * item))
    header = struct.pack("<9sQBQQ", MAGIC, 1, code, 1, 2)
    prefix.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", length, 0, 0, 1))
    if sidecar:
        prefix.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")
    return str(prefix)


def _train(prefix: str) -> dict[str, Any]:
    return {"data.train": [{"path": prefix}]}


def _bad_magic(tmp: Path) -> dict[str, Any]:
    prefix = write_tiny_shard(tmp / "bad")
    (tmp / "bad.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(64))
    return _train(prefix)


def _cut_index(tmp: Path) -> dict[str, Any]:
    prefix = write_tiny_shard(tmp / "cut")
    (tmp / "cut.idx").write_bytes((tmp / "cut.idx").read_bytes()[:-8])
    return _train(prefix)


def _two_tokenizers(tmp: Path) -> dict[str, Any]:
    first = write_tiny_shard(tmp / "a", tokenizer={"name": "a", "hash": "1"})
    second = write_tiny_shard(tmp / "b", tokenizer={"name": "b", "hash": "2"})
    return {"data.train": [{"path": first}, {"path": second}]}


def _same_source_twice(tmp: Path) -> dict[str, Any]:
    prefix = write_tiny_shard(tmp / "a")
    return {"data.train": [{"path": prefix}, {"path": prefix}]}


def _same_file_twice(tmp: Path) -> dict[str, Any]:
    prefix = write_tiny_shard(tmp / "a")
    for suffix in (".bin", ".idx"):
        (tmp / "b").with_suffix(suffix).symlink_to(f"a{suffix}")
    return {"data.train": [{"path": prefix}, {"path": str(tmp / "b")}]}


def _same_name_twice(tmp: Path) -> dict[str, Any]:
    prefix = write_tiny_shard(tmp / "a")
    return {"data.validation": [{"name": "v", "path": prefix}, {"name": "v", "path": prefix}]}


RULES = (
    Rule("shards exist", _readable, Failing({"data.train.0.path": "data/none"})),
    Rule("shards are MMIDIDX", _readable, Failing(prepare=_bad_magic)),
    Rule("index is whole", _readable, Failing(prepare=_cut_index)),
    Rule("at least one sample", _samples, Failing(prepare=lambda tmp: _train(write_tiny_shard(tmp / "few", 16)))),
    Rule(
        "one step repeats no sample",
        _one_step,
        Failing(prepare=lambda tmp: _train(write_tiny_shard(tmp / "small", 20))),
    ),
    Rule(
        "vocabulary fits the model",
        _vocabulary,
        Failing(prepare=lambda tmp: _train(write_tiny_shard(tmp / "big", vocab_size=1000))),
    ),
    Rule(
        "vocabulary fits the dtype",
        _dtype,
        Failing(
            {"model.config.vocab_size": 70_000},
            prepare=lambda tmp: _train(write_tiny_shard(tmp / "wide", vocab_size=70_000)),
        ),
    ),
    Rule(
        "index and side-car agree on the dtype",
        _dtype,
        Failing(prepare=lambda tmp: _train(write_tiny_shard(tmp / "mixed", dtype="int32"))),
    ),
    Rule(
        "side-car and tokens agree",
        _size,
        Failing(prepare=lambda tmp: _train(write_tiny_shard(tmp / "short", num_tokens=63))),
    ),
    Rule("one tokenizer", _tokenizers, Failing(prepare=_two_tokenizers)),
    Rule("sources differ", _duplicate_sources, Failing(prepare=_same_source_twice)),
    Rule("files of sources differ", _same_files, Failing(prepare=_same_file_twice)),
    Rule("validation names differ", _duplicate_names, Failing(prepare=_same_name_twice)),
)
