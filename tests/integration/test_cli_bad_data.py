"""Bad token data as a user meets it: real shards, really damaged, and the real command line.

Every fault must end with exit code 2 and one message that names file or key, value, rule and fix, before a model is
built. What can be known from headers, sizes, side-cars and the recipe is refused by ``trainer check`` and by the parent
of ``trainer train``, which starts no rank then. What needs a look at the tokens is refused by the ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from trainer.data.shards import ShardWriter

TIMEOUT = 60
# tiny.write_shards: header of 34 bytes, int32 lengths, int64 offsets, int64 document index.
LENGTHS = 34
MODEL_MODULE = "transformers.models.llama.modeling_llama"
# transformers imports the code of a model when the first one is built: the import is the proof that one was.
TRACE = f"""
import os, sys
class Trace:
    def find_spec(self, name, path=None, target=None):
        if name == {MODEL_MODULE!r}:
            open(os.environ["MODEL_TRACE"], "a").write(name)
sys.meta_path.insert(0, Trace())
"""


@dataclass(frozen=True)
class Case:
    """One fault, made on a fresh world of tests/tiny.py."""

    make: Callable[[Path], object]
    words: tuple[str, ...]
    """What the message must say, in any order: file or key, value, rule, fix."""
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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


def train(path: str) -> dict[str, Any]:
    return {"data": {"train": [{"path": path}]}}


SMALLER_MODEL = {"model": {"config": {"vocab_size": 300}}}

KNOWN_BEFORE: dict[str, Case] = {
    "shard missing": Case(lambda f: bin_of(f).unlink(), ("data/train.bin", "does not exist", "trainer data tokenize")),
    "index missing": Case(lambda f: idx_of(f).unlink(), ("data/train.idx", "does not exist", "trainer data tokenize")),
    "bad magic": Case(lambda f: patch(idx_of(f), 0, b"X"), ("data/train.idx", "MMIDIDX", "magic", "again")),
    "older format": Case(lambda f: patch(idx_of(f), 0, b"TNTIDX\0\0"), ("data/train.idx", "TNTIDX", "again")),
    "bad version": Case(lambda f: patch(idx_of(f), 9, b"\x02"), ("data/train.idx", "version 2", "not 1", "again")),
    "size no multiple": Case(
        lambda f: os.truncate(bin_of(f), 10_241), ("data/train.bin", "10241 bytes", "multiple of 2", "uint16", "again")
    ),
    "bin cut off": Case(lambda f: os.truncate(bin_of(f), 10_000), ("data/train", "5000 tokens", "5121", "again")),
    "foreign bin cut off": Case(
        lambda f: (foreign(f), os.truncate(bin_of(f), 10_000)), ("data/train.bin", "10000 bytes", "10242", "again")
    ),
    "index cut off": Case(
        lambda f: os.truncate(idx_of(f), idx_of(f).stat().st_size - 8), ("data/train.idx", "bytes", "header", "again")
    ),
    "index past the end": Case(last_offset_beyond, ("data/train", str(2**40)[:6], "index ends at byte", "again")),
    "dtypes disagree": Case(sidecar(dtype="int32"), ("data/train", "uint16", "side-car int32", "again")),
    "big-endian": Case(big_endian, ("data/train.idx", "big-endian", "again")),
    "empty shard": Case(empty_shard, ("data/train", "empty", "tokeniz")),
    "no shards": Case(
        lambda f: (f / "empty").mkdir(), ("'empty'", "holds no token shards", "trainer data tokenize"), train("empty")
    ),
    "no match": Case(nothing, ("data/code-*", "holds no token shards", "trainer data tokenize"), train("data/code-*")),
    "listed twice": Case(
        nothing,
        ("data/train", "2 times", "give it once"),
        {"data": {"train": [{"path": "data/train"}, {"path": "data/train"}]}},
    ),
    "listed twice by a link": Case(
        linked_twice,
        ("data/link", "data/train", "give it once"),
        {"data": {"train": [{"path": "data/train"}, {"path": "data/link"}]}},
    ),
    "twice in a directory": Case(
        linked_twice, ("same shard twice", "data/train", "data/link", "remove"), train("data")
    ),
    "loop of links": Case(looping, ("data/train.bin", "symbolic link", "check the path")),
    "loop of directories": Case(looping_directory, ("data/again", "loop", "remove the link"), train("data")),
    "bin a directory": Case(directory_instead(".bin"), ("data/train.bin", "not a file", "prefix of token shards")),
    "index a directory": Case(directory_instead(".idx"), ("data/train.idx", "not a file", "prefix of token shards")),
    "side-car a directory": Case(directory_instead(".json"), ("data/train.json", "can't be read", "again")),
    "side-car cut off": Case(
        lambda f: os.truncate(f / "data" / "train.json", 40), ("data/train.json", "can't be read", "again")
    ),
    "sequence too long": Case(
        nothing,
        ("data.train.0.path", "5121 tokens", "data.sequence_length = 6000", "shorter"),
        {
            "data": {"sequence_length": 6000, "validation": []},
            "evaluation": {"every_steps": None},
            "model": {"config": {"max_position_embeddings": 8192}},
        },
    ),
    "fewer samples than a step": Case(
        nothing, ("batch.global_size = 256", "160 samples", "lower it"), {"batch": {"global_size": 256}}
    ),
    "another tokenizer": Case(
        other_tokenizer, ("data/train", "tokenizer", "'other'", "tokenize"), {"tokenizer": {"path": "tokenizer"}}
    ),
    "embedding too small": Case(
        nothing,
        ("data.train.0.path", "512 tokens", "vocab_size is 300", "at least 512"),
        {**SMALLER_MODEL, "data": {"validation": []}, "evaluation": {"every_steps": None}},
    ),
    "embedding smaller than tokenizer": Case(
        lambda f: (foreign(f), (f / "data" / "valid.json").unlink(), tiny.write_tokenizer(f / "tokenizer")),
        ("tokenizer.path", "512 tokens", "vocab_size is 300", "at least 512"),
        {**SMALLER_MODEL, "tokenizer": {"path": "tokenizer"}},
    ),
    "vocabulary beyond uint16": Case(
        sidecar(vocab_size=70_000),
        ("data/train", "70000", "does not fit uint16", "again"),
        {"model": {"config": {"vocab_size": 70_000}}},
    ),
}
"""What ``trainer check`` refuses."""

KNOWN_FROM_TOKENS: dict[str, Case] = {
    "flipped bit": Case(flip_byte, ("data/train.bin", "checksum", "expected", "restore")),
    "index out of order": Case(swap_offsets, ("data/train.idx", "before the one in front", "restore")),
    "id beyond the vocabulary": Case(
        foreign_with(100, 512), ("data/train.bin at token 100 (byte 400)", "512", "outside 0..511", "tokenizer")
    ),
    "id below zero": Case(
        foreign_with(5_000, -1), ("data/train.bin at token 5000 (byte 20000)", "-1", "outside 0..511", "tokenizer")
    ),
    "uint16 id beyond the vocabulary": Case(
        foreign_with(200, 65_535, "<u2", 8),
        ("data/train.bin at token 200 (byte 400)", "65535", "outside 0..511", "tokenizer"),
    ),
}
"""What the ranks refuse, before they build a model."""

THROUGH_BOTH = ["shard missing", "bad magic", "big-endian", "no shards", "fewer samples than a step"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_world(tmp_path_factory.mktemp("template"))


def prepare(template: Path, folder: Path, case: Case, **sections: Mapping[str, Any]) -> Path:
    """Make the case in ``folder`` and return it."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    tiny.write_recipe(folder, **{**case.recipe, **sections})
    case.make(folder)
    return folder


def assert_refused(done: subprocess.CompletedProcess[str], case: Case) -> None:
    """One problem with its words and a fix, exit code 2, no traceback."""
    problems = re.findall(r"^  - .*", done.stderr, re.MULTILINE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(problems) == 1, done.stderr
    assert ": 1 problem\n" in done.stderr
    missing = [word for word in case.words if word not in problems[0]]
    assert not missing, f"{missing} not in: {problems[0]}"
    assert " → " in problems[0], f"says no fix: {problems[0]}"


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_check_refuses(template: Path, tmp_path: Path, name: str) -> None:
    folder = prepare(template, tmp_path, KNOWN_BEFORE[name])
    before = tiny.tree(folder)
    done = tiny.run(tiny.command("check", "tiny.yaml"), folder, timeout=TIMEOUT)
    assert_refused(done, KNOWN_BEFORE[name])
    assert tiny.tree(folder) == before


@pytest.mark.parametrize("name", THROUGH_BOTH)
def test_train_refuses_before_it_starts_ranks(template: Path, tmp_path: Path, name: str) -> None:
    folder = prepare(template, tmp_path, KNOWN_BEFORE[name])
    before = tiny.tree(folder)
    done = tiny.run(tiny.command("train", "tiny.yaml"), folder, timeout=TIMEOUT)
    assert_refused(done, KNOWN_BEFORE[name])
    assert done.stdout == ""
    assert tiny.tree(folder) == before  # no run directory, no log: no rank was started


def traced(tmp_path: Path) -> dict[str, str]:
    """Return variables under which a process notes that it builds a model."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(TRACE)
    return {"PYTHONPATH": f"{hook}:{tiny.ROOT}", "MODEL_TRACE": str(hook / "trace")}


@pytest.mark.parametrize("name", KNOWN_FROM_TOKENS)
def test_train_refuses_before_a_model_is_built(template: Path, tmp_path: Path, name: str) -> None:
    variables = traced(tmp_path)
    folder = prepare(template, tmp_path / "world", KNOWN_FROM_TOKENS[name])
    done = tiny.run(tiny.command("train", "tiny.yaml"), folder, timeout=TIMEOUT, variables=variables)
    assert_refused(done, KNOWN_FROM_TOKENS[name])
    assert not Path(variables["MODEL_TRACE"]).exists()
    written = {path.relative_to(folder / "runs" / "tiny").parts[0] for path in (folder / "runs" / "tiny").iterdir()}
    assert written <= {"logs", ".lock"}  # nothing of a run: no facts, status, metrics or checkpoints


def test_file_cut_off_while_it_is_read(template: Path, tmp_path: Path) -> None:
    """A shard that shrinks under a running job is a message and the end of all ranks, not SIGBUS or a hang."""
    variables = traced(tmp_path)
    sections = {
        "run": {"steps": 100_000},
        "checkpoint": {"every_steps": None},
        "evaluation": {"every_steps": None},
    }
    folder = prepare(template, tmp_path / "world", Case(nothing, ()), **sections)
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            tiny.command("train", "tiny.yaml"), cwd=folder, env=tiny.environment(**variables), stdout=file, stderr=file
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (metrics.exists() and metrics.read_text().count("\n") > 20):
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, "no steps"
                time.sleep(0.05)
            os.truncate(folder / "data" / "train.bin", 1_000)
            code = process.wait(30)
        finally:
            process.kill()
            process.wait()
    text = output.read_text()
    assert code not in (0, 128 + signal.SIGBUS, -signal.SIGBUS), text
    assert "data/train.bin" in text
    assert "has become shorter" in text
    assert "Traceback" not in text
    assert "SIGBUS" not in text
    assert json.loads((folder / "runs" / "tiny" / "status.json").read_text())["state"] == "failed"
    assert Path(variables["MODEL_TRACE"]).exists()  # the trace of the tests above does see a model


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_file_without_the_right_to_read_it(template: Path, tmp_path: Path, suffix: str) -> None:
    case = Case(lambda f: (f / "data" / f"train{suffix}").chmod(0), (f"data/train{suffix}", "can't be read", "rights"))
    folder = prepare(template, tmp_path, case)
    argv = tiny.command("check", "tiny.yaml")
    if os.geteuid() == 0:  # root may read everything, unless it gives that up
        argv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", *argv]
    done = tiny.run(argv, folder, timeout=TIMEOUT)
    assert_refused(done, case)


def test_empty_documents_of_other_tools_are_no_error(template: Path, tmp_path: Path) -> None:
    """They hold no token, so that nothing of them can be trained on or lost."""
    tokens = np.ones(20 * tiny.TOKENS_PER_STEP + 1, dtype="<u2")
    make = lambda folder: write_foreign(folder, tokens, [0, 100, 0, 0, tokens.size - 100, 0], 8)  # noqa: E731
    folder = prepare(template, tmp_path, Case(make, ()))
    for command in (["check", "tiny.yaml"], ["data", "verify", "data/train", "--full"]):
        done = tiny.run(tiny.command(*command), folder, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
    info = tiny.run(tiny.command("data", "info", "data/train"), folder, timeout=TIMEOUT)
    assert "5,121" in info.stdout
    assert "6" in info.stdout


def test_tokenizer_without_an_end_of_document_token(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    argv = tiny.command("data", "tokenize", "--input", "text.txt", "--tokenizer", "tokenizer", "--output", "out/a")
    done = tiny.run(argv, tmp_path, timeout=TIMEOUT)
    assert_refused(done, Case(nothing, ("tokenizer", "end-of-document", "--end-of-document")))
    assert not (tmp_path / "out").exists()
