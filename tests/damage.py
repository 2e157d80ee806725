"""Ways to damage the training shards of ``tiny.write_world``, each on the folder of one world."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from trainer.data.shards import ShardWriter

# tiny.write_shards: header of 34 bytes, int32 lengths, int64 offsets, int64 document index.
LENGTHS = 34


def nothing(folder: Path) -> None:
    """Leave the shards as they are: the recipe is the fault."""


def bin_of(folder: Path) -> Path:
    return folder / "data" / "train.bin"


def idx_of(folder: Path) -> Path:
    return folder / "data" / "train.idx"


def num_sequences(folder: Path) -> int:
    return struct.unpack_from("<Q", idx_of(folder).read_bytes(), 18)[0]


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def foreign(folder: Path) -> None:
    """Make the training shards those of another tool: no side-car."""
    (folder / "data" / "train.json").unlink()


def write_foreign(folder: Path, tokens: np.ndarray[Any, Any], lengths: list[int], code: int) -> None:
    """Replace the training shards by ones of another tool, one sequence a document."""
    foreign(folder)
    sizes = np.array(lengths, dtype="<i8")
    starts = (np.cumsum(sizes) - sizes) * tokens.itemsize
    bin_of(folder).write_bytes(tokens.tobytes())
    idx_of(folder).write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1)
        + sizes.astype("<i4").tobytes()
        + starts.astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )


def foreign_with(position: int, token: int, dtype: str = "<i4", code: int = 4) -> Callable[[Path], None]:
    """Return what writes foreign shards of 5,121 tokens with one wrong id."""

    def make(folder: Path) -> None:
        tokens = np.ones(20 * tiny.TOKENS_PER_STEP + 1, dtype=dtype)
        tokens[position] = token
        write_foreign(folder, tokens, [tokens.size], code)

    return make


def swap_offsets(folder: Path) -> None:
    """Let the second document begin after the third."""
    foreign(folder)
    pointers = LENGTHS + 4 * num_sequences(folder)
    second, third = struct.unpack_from("<qq", idx_of(folder).read_bytes(), pointers + 8)
    patch(idx_of(folder), pointers + 8, struct.pack("<qq", third, second))


def last_offset_beyond(folder: Path) -> None:
    patch(idx_of(folder), LENGTHS + 12 * num_sequences(folder) - 8, struct.pack("<q", 2**40))


def big_endian(folder: Path) -> None:
    raw = idx_of(folder).read_bytes()
    patch(idx_of(folder), 0, struct.pack(">9sQBQQ", *struct.unpack_from("<9sQBQQ", raw)))


def empty_shard(folder: Path) -> None:
    bin_of(folder).write_bytes(b"")
    foreign(folder)
    idx_of(folder).write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0))


def sidecar(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "data" / "train.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def flip_byte(folder: Path) -> None:
    middle = bin_of(folder).stat().st_size // 2
    patch(bin_of(folder), middle, bytes([bin_of(folder).read_bytes()[middle] ^ 0x01]))


def directory_instead(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "data" / f"train{suffix}"
        path.unlink()
        path.mkdir()

    return make


def looping(folder: Path) -> None:
    bin_of(folder).unlink()
    bin_of(folder).symlink_to("train.bin")


def looping_directory(folder: Path) -> None:
    (folder / "data" / "again").symlink_to(folder / "data")


def linked_twice(folder: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (folder / "data" / f"link{suffix}").symlink_to(f"train{suffix}")


def other_tokenizer(folder: Path) -> None:
    """Write shards that state the hash of another tokenizer than the one in ``tokenizer/``."""
    tiny.write_tokenizer(folder / "tokenizer")
    with ShardWriter(
        folder / "data" / "train", tiny.VOCABULARY, tokenizer_name="other", tokenizer_hash="0" * 64, overwrite=True
    ) as writer:
        writer.add(np.ones(20 * tiny.TOKENS_PER_STEP + 1, dtype=np.int64))


def small_ids_large_tokenizer(folder: Path) -> None:
    """Foreign shards whose ids the model knows, and a tokenizer with more."""
    foreign_with(0, 1)(folder)
    tiny.write_tokenizer(folder / "tokenizer")


def large_tokenizer_of_a_pretrained_model(folder: Path) -> None:
    """As before, and the config of a pretrained model: weights are not asked for before the tokenizer fits."""
    small_ids_large_tokenizer(folder)
    (folder / "model").mkdir()
    fields = tiny.recipe()["model"]["config"] | {"vocab_size": 300}
    (folder / "model" / "config.json").write_text(json.dumps(fields), encoding="utf-8")
