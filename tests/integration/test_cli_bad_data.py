"""Bad token data as a user meets it: real shards, really damaged, and the real command line.

Every fault must end with exit code 2 and one message that names file or key, value, rule and fix, before a model is
built. What can be known from headers, ends of the index, sizes, side-cars and the recipe is refused by
``trainer check`` and by the parent of ``trainer train``, which starts no rank then. What needs a look at the tokens or
at a tokenizer is refused by the ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from damage import (
    big_endian,
    bin_of,
    directory_instead,
    empty_shard,
    flip_byte,
    foreign,
    foreign_with,
    idx_of,
    large_tokenizer_of_a_pretrained_model,
    last_offset_beyond,
    linked_twice,
    looping,
    looping_directory,
    nothing,
    other_tokenizer,
    patch,
    sidecar,
    small_ids_large_tokenizer,
    swap_offsets,
    write_foreign,
)

TIMEOUT = 90
"""Seconds for one command: a start that is refused takes 4 on a quiet machine."""
# transformers imports the code of a model when the first one is built: the import is the proof that one was.
TRACE = """
import os, sys
class Trace:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.models.llama.modeling_llama":
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


def train(path: str) -> dict[str, Any]:
    return {"data": {"train": [{"path": path}]}}


NO_EVALUATION = {"evaluation": {"every_steps": None}}
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
    "bin cut off": Case(lambda f: os.truncate(bin_of(f), 10_000), ("data/train.bin", "10000 bytes", "10242", "again")),
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
        ("data.train", "data/link", "once"),
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
            **NO_EVALUATION,
            "model": {"config": {"max_position_embeddings": 8192}},
        },
    ),
    "fewer samples than a step": Case(
        nothing, ("batch.global_size = 256", "160 samples", "lower it"), {"batch": {"global_size": 256}}
    ),
    "embedding too small": Case(
        nothing,
        ("data.train.0.path", "512 tokens", "vocab_size is 300", "at least 512"),
        {**SMALLER_MODEL, "data": {"validation": []}, **NO_EVALUATION},
    ),
    "vocabulary beyond uint16": Case(
        sidecar(vocab_size=70_000),
        ("data/train", "70000", "does not fit uint16", "again"),
        {"model": {"config": {"vocab_size": 70_000}}},
    ),
}
"""What ``trainer check`` refuses."""

KNOWN_BY_RANKS: dict[str, Case] = {
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
    "another tokenizer": Case(
        other_tokenizer,
        ("tokenizer.path = 'tokenizer'", "data/train", "0" * 32, "tokenize the text again"),
        {"tokenizer": {"path": "tokenizer"}},
    ),
    "embedding smaller than the tokenizer": Case(
        small_ids_large_tokenizer,
        ("tokenizer.path = 'tokenizer'", "512", "300", "raise the model's vocab_size"),
        {**SMALLER_MODEL, "tokenizer": {"path": "tokenizer"}, "data": {"validation": []}, **NO_EVALUATION},
    ),
    "pretrained embedding smaller than the tokenizer": Case(
        large_tokenizer_of_a_pretrained_model,
        ("tokenizer.path = 'tokenizer'", "512", "300", "set model.vocabulary_size to 512"),
        {
            "model": {"path": "./model", "config": None},
            "tokenizer": {"path": "tokenizer"},
            "data": {"validation": []},
            **NO_EVALUATION,
        },
    ),
}
"""What the ranks refuse, before they build a model."""

THROUGH_BOTH = ["shard missing", "bad magic", "big-endian", "no shards", "fewer samples than a step"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended on one case, and the world before it."""

    done: subprocess.CompletedProcess[str]
    folder: Path
    before: dict[str, tuple[int, int]]

    @property
    def trace(self) -> Path:
        return self.folder.with_name("trace")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged world, and beside it the hook that notes that a model is built."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(TRACE)
    return tiny.write_world(folder / "world")


def prepare(template: Path, folder: Path, case: Case, **sections: Mapping[str, Any]) -> Path:
    """Make the case in ``folder`` and return it."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    tiny.write_recipe(folder, **{**sections, **case.recipe})
    case.make(folder)
    return folder


def traced(template: Path, trace: Path) -> dict[str, str]:
    """Return variables under which a process writes ``trace`` when it builds a model."""
    return {"PYTHONPATH": f"{template.with_name('hook')}:{tiny.ROOT}", "MODEL_TRACE": str(trace)}


def run_all(template: Path, folder: Path, verb: str, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """Run ``trainer VERB`` on every case, two at a time: a start waits more than it computes."""

    def run(name: str) -> Outcome:
        world = prepare(template, folder / name / "world", cases[name], launch={"processes": 1})
        before, variables = tiny.tree(world), traced(template, folder / name / "trace")
        done = tiny.run(tiny.command(verb, "tiny.yaml"), world, timeout=TIMEOUT, variables=variables)
        return Outcome(done, world, before)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.fixture(scope="module")
def checked(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_all(template, tmp_path_factory.mktemp("checked"), "check", KNOWN_BEFORE)


@pytest.fixture(scope="module")
def trained(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    cases = {name: KNOWN_BEFORE[name] for name in THROUGH_BOTH} | KNOWN_BY_RANKS
    return run_all(template, tmp_path_factory.mktemp("trained"), "train", cases)


def assert_refused(done: subprocess.CompletedProcess[str], words: tuple[str, ...]) -> None:
    """One problem with its words and a fix, exit code 2, no traceback."""
    problems = re.findall(r"^  - .*", done.stderr, re.MULTILINE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(problems) == 1, done.stderr
    assert ": 1 problem\n" in done.stderr
    missing = [word for word in words if word not in problems[0]]
    assert not missing, f"{missing} not in: {problems[0]}"
    assert " → " in problems[0], f"says no fix: {problems[0]}"


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_check_refuses(checked: dict[str, Outcome], name: str) -> None:
    assert_refused(checked[name].done, KNOWN_BEFORE[name].words)
    assert tiny.tree(checked[name].folder) == checked[name].before


@pytest.mark.parametrize("name", THROUGH_BOTH)
def test_train_refuses_before_it_starts_ranks(trained: dict[str, Outcome], name: str) -> None:
    assert_refused(trained[name].done, KNOWN_BEFORE[name].words)
    assert trained[name].done.stdout == ""
    assert tiny.tree(trained[name].folder) == trained[name].before  # no run directory, no log: no rank was started


@pytest.mark.parametrize("name", KNOWN_BY_RANKS)
def test_train_refuses_before_a_model_is_built(trained: dict[str, Outcome], name: str) -> None:
    assert_refused(trained[name].done, KNOWN_BY_RANKS[name].words)
    assert not trained[name].trace.exists()
    written = {path.name for path in (trained[name].folder / "runs" / "tiny").iterdir()}
    assert written <= {"logs", ".lock"}  # nothing of a run: no facts, status, metrics or checkpoints


def test_file_cut_off_while_it_is_read(template: Path, tmp_path: Path) -> None:
    """A shard that shrinks under a running job is a message and the end of all ranks, not SIGBUS or a hang."""
    variables = traced(template, tmp_path / "trace")
    sections = {"run": {"steps": 100_000}, "checkpoint": {"every_steps": None}, **NO_EVALUATION}
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
    assert (tmp_path / "trace").exists()  # the trace of the tests above does see a model


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_file_without_the_right_to_read_it(template: Path, tmp_path: Path, suffix: str) -> None:
    case = Case(lambda f: (f / "data" / f"train{suffix}").chmod(0), (f"data/train{suffix}", "can't be read", "rights"))
    folder = prepare(template, tmp_path, case)
    argv = tiny.command("check", "tiny.yaml")
    if os.geteuid() == 0:  # root may read everything, unless it gives that up
        argv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", *argv]
    done = tiny.run(argv, folder, timeout=TIMEOUT)
    assert_refused(done, case.words)


def test_empty_documents_of_other_tools_are_no_error(template: Path, tmp_path: Path) -> None:
    """They hold no token, so that nothing of them can be trained on or lost."""
    tokens = np.ones(20 * tiny.TOKENS_PER_STEP + 1, dtype="<u2")
    make = partial(write_foreign, tokens=tokens, lengths=[0, 100, 0, 0, tokens.size - 100, 0], code=8)
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
    assert_refused(done, ("tokenizer", "end-of-document", "--end-of-document"))
    assert not (tmp_path / "out").exists()
