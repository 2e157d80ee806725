"""Inputs of ``benchmark_data.py``: real text, a tokenizer, shards of random tokens, thousands of sparse shards.

Each is made once in the scratch directory and reused by later runs that ask for the same sizes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.shard_index import HEADER, MAGIC
from trainer.data.shard_manifest import SetManifest, SetMember, write_set_manifest
from trainer.data.shard_sidecar import BLOCK_BYTES, SideCar, block_hash
from trainer.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
END_OF_DOCUMENT = "<|endoftext|>"
CORPUS_FILES = 4
# Below 65,500, so that Megatron stores uint16 as well.
RANDOM_VOCABULARY = 65_000
# Two sequences a document index entry would change nothing: what counts is files, not entries.
SPARSE_DOCUMENTS = 100


def made(folder: Path, sizes: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return ``folder`` with what ``make`` writes into it, made anew unless it was made with the same sizes."""
    marker = folder / "SIZES"
    wanted = json.dumps(dict(sizes), sort_keys=True)
    if not marker.exists() or marker.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        marker.write_text(wanted)
    return folder


def write_corpus(folder: Path, num_bytes: int, vocab_size: int) -> None:
    """Write ``corpus/*.jsonl``, Python's standard library, and ``tokenizer/``, byte-level BPE trained on it.

    A corpus larger than the library repeats it: each copy of a file begins with another line.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    (folder / "corpus").mkdir()
    files = [(folder / "corpus" / f"{i:02d}.jsonl").open("w", encoding="utf-8") for i in range(CORPUS_FILES)]
    written = documents = copy = 0
    while written < num_bytes:
        for path in sources:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # test data in other encodings
            text = f"# Copy {copy} of {path.relative_to(library)}\n{text}"
            files[documents % CORPUS_FILES].write(json.dumps({"text": text}) + "\n")
            written, documents = written + len(text.encode()), documents + 1
            if written >= num_bytes:
                break
        copy += 1
    for file in files:
        file.close()
    run_trainer(
        "data", "tokenizer", "--input", str(folder / "corpus"), "--output", str(folder / "tokenizer"),
        "--vocab-size", str(vocab_size),
    )  # fmt: skip


def write_random(folder: Path, num_tokens: int) -> None:
    """Write ``ours.bin/.idx/.json`` (Megatron reads them too) and the same tokens as datatrove's ``ds/tokens.ds``."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder / "ours", RANDOM_VOCABULARY, end_of_document_id=0)
    left, ends = num_tokens, list[int]()
    while left:
        # Median 403 tokens, mean 665, a long tail: like web text.
        length = min(left, max(2, int(random.lognormal(6.0, 1.0))))
        length += 1 if left - length == 1 else 0
        document = random.integers(1, RANDOM_VOCABULARY, length)
        document[-1] = 0
        writer.add(document)
        left -= length
        ends.append(num_tokens - left)
    writer.commit()
    (folder / "ds").mkdir()
    os.link(folder / "ours.bin", folder / "ds" / "tokens.ds")
    np.array(ends, dtype="<u8").tofile(folder / "ds" / "tokens.ds.index")


def write_sparse_set(folder: Path, num_shards: int, tokens_a_shard: int) -> None:
    """Write ``all.json`` and its shards. Their .bin are sparse: zeros that take no space on disk, with true checksums.

    ``folder/members`` links to the same shards without the set's manifest, for reading a directory.
    """
    length = tokens_a_shard // SPARSE_DOCUMENTS
    tokens, size = length * SPARSE_DOCUMENTS, length * SPARSE_DOCUMENTS * 2
    blocks = [block_hash(bytes(BLOCK_BYTES))] * (size // BLOCK_BYTES)
    if size % BLOCK_BYTES:
        blocks.append(block_hash(bytes(size % BLOCK_BYTES)))
    starts = np.arange(SPARSE_DOCUMENTS + 1, dtype="<i8")
    index = HEADER.pack(MAGIC, 1, 8, SPARSE_DOCUMENTS, SPARSE_DOCUMENTS + 1)
    index += np.full(SPARSE_DOCUMENTS, length, dtype="<i4").tobytes()
    index += (starts[:-1] * length * 2).astype("<i8").tobytes() + starts.tobytes()
    sidecar = SideCar(
        tokens, SPARSE_DOCUMENTS, "uint16", RANDOM_VOCABULARY, None, None, None,
        BLOCK_BYTES, tuple(blocks), block_hash(index), "",
    )  # fmt: skip
    members: list[SetMember] = []
    (folder / "members").mkdir()
    for i in range(num_shards):
        name = f"all-{i:05d}"
        (folder / f"{name}.idx").write_bytes(index)
        (folder / f"{name}.json").write_text(sidecar.to_json())
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(size)
        for suffix in (".bin", ".idx", ".json"):
            os.link(folder / (name + suffix), folder / "members" / (name + suffix))
        members.append(SetMember(name, tokens, SPARSE_DOCUMENTS, "uint16", sidecar.fingerprint))
    write_set_manifest(str(folder / "all"), SetManifest(tuple(members), RANDOM_VOCABULARY, None, None, None, ""))


def trainer_command(*arguments: str) -> list[str]:
    """Return the argv of ``trainer ARGUMENTS``."""
    return [sys.executable, "-m", "trainer", *arguments]


def run_trainer(*arguments: str) -> None:
    """Run ``trainer ARGUMENTS`` or end with what it said."""
    done = subprocess.run(trainer_command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"trainer {' '.join(arguments)} failed:\n{done.stderr}")
