"""Checkpoints that somebody made to do harm: each is refused with one message, and costs neither memory nor a crash."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint import layout, ownership
from trainer.checkpoint.assemble import load_checkpoint_model
from trainer.checkpoint.export import export_checkpoint
from trainer.checkpoint.model_card import model_card
from trainer.checkpoint.ownership import ownership_problems
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.verify import damaged_files
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.checkpoint import CheckpointConfig
from trainer.core.errors import CheckpointError, RefusedError
from trainer.engine.base import StateSlice
from trainer.models.config import config_to_dictionary
from trainer.parallel.cut import Cut
from trainer.training.state import TrainState

CONFIG = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
NORM = "model.norm.weight"
HEADROOM_BYTES = 2**30


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of a small model: whole tensors, slices, parts, optimizer state, counters."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    run = tmp_path_factory.mktemp("hostile") / "run"
    fields = dict(CONFIG)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.dtype = "float32"
    network = AutoModelForCausalLM.from_config(config)
    slices: list[StateSlice] = []
    for name, parameter in network.named_parameters():
        flat, shape = parameter.detach().flatten(), tuple(parameter.shape)
        cut = Cut(0, 0, 1) if name.endswith("up_proj.weight") else None
        slices.append(StateSlice(name, "weight", shape, 0, flat, primary=True, cut=cut))
        slices.append(StateSlice(name, "exp_avg", shape, 0, torch.zeros_like(flat), primary=True, cut=cut))
    facts = {
        "state": {"train": TrainState(step=3).to_json(), "identity": {"run.seed": 0, "data.sequence_length": 8}},
        "model": {"config": config_to_dictionary(config), "dtype": "float32", "tokenizer": None},
        "recipe": {"run": {"name": "x"}, "model": {"path": None}},
        "topology": {"world_size": 1},
        "libraries": {"torch": torch.__version__},
        "frozen": [],
    }
    done = CheckpointWriter(run, attempt="0001", settings=CheckpointConfig()).save(3, slices, facts, wait=True)
    distributed.destroy_process_group()
    assert done is not None
    assert done.error is None
    return run


@pytest.fixture
def run(real: Path, tmp_path: Path) -> Path:
    shutil.copytree(real, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Let whoever allocates what a manifest asks for fail."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def step_of(run: Path) -> Path:
    return layout.step_directory(run, 3)


def change(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = layout.manifest_path(step_of(run))
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def load(run: Path) -> None:
    """Read everything that a resume, an export or an evaluation reads, without hashes: their author knows them too."""
    reader = CheckpointReader(step_of(run))
    for name in reader.names():
        reader.whole(name)
    TrainState.from_json(reader.state.get("train", {}))
    load_checkpoint_model(reader, None)
    manifest = layout.read_manifest(reader.directory)
    assert manifest is not None
    model_card(run, reader.directory, manifest, "float32")


def test_the_real_one_loads(run: Path) -> None:
    assert damaged_files(step_of(run)) == []
    load(run)


def weight(manifest: dict[str, Any], name: str = NORM) -> dict[str, Any]:
    return manifest["tensors"][name]["states"]["weight"]


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "shape": ("tensors.*shape", lambda m: m["tensors"][NORM].update(shape=[2**62])),
    "shape that overflows": ("tensors.*shape", lambda m: m["tensors"][NORM].update(shape=[2**31, 2**31, 2**31])),
    "shape below 0": ("tensors.*shape", lambda m: m["tensors"][NORM].update(shape=[-16])),
    "shape of truth": ("tensors.*shape", lambda m: m["tensors"][NORM].update(shape=[True])),
    "shape of many dims": ("tensors.*shape", lambda m: m["tensors"][NORM].update(shape=[1] * 10_000)),
    "count": (r"slices\[0\]", lambda m: weight(m)["slices"][0].__setitem__(2, 2**40)),
    "more than there is": ("slices", lambda m: weight(m)["slices"][0].__setitem__(2, 17)),
    "less than there is": ("lacks elements", lambda m: weight(m)["slices"][0].__setitem__(2, 3)),
    "start below 0": (r"slices\[0\]", lambda m: weight(m)["slices"][0].__setitem__(1, -1)),
    "overlap": ("overlap at element 8", lambda m: weight(m).update(slices=[[0, 0, 16], [0, 8, 8]])),
    "gap": ("lacks elements", lambda m: weight(m).update(slices=[[0, 0, 4], [0, 8, 8]])),
    "no slices": ("has no slices", lambda m: weight(m).update(slices=[])),
    "shard": (r"slices\[0\]", lambda m: weight(m)["slices"][0].__setitem__(0, 7)),
    "part of nothing": (r"slices\[0\]", lambda m: weight(m).update(slices=[[0, 0, 16, [0, 0, 0, 1]]])),
    "part of too many": (r"slices\[0\]", lambda m: weight(m).update(slices=[[0, 0, 16, [0, 0, 2**62, 1]]])),
    "dtype": ("states", lambda m: weight(m).update(dtype="Tensor")),
    "dtype that calls": ("states", lambda m: weight(m).update(dtype="load")),
    "tensor named a path": ("no name", lambda m: m["tensors"].update({"../../x": m["tensors"].pop(NORM)})),
    "tensor with a newline": ("no name", lambda m: m["tensors"].update({"a\nb": m["tensors"].pop(NORM)})),
    "tensor with NUL": ("no name", lambda m: m["tensors"].update({"a\0b": m["tensors"].pop(NORM)})),
    "tensors a list": ("tensors", lambda m: m.update(tensors=[])),
    "state a list": ("state", lambda m: m.update(state=[])),
    "counter below 0": ("consumed_samples", lambda m: m["state"]["train"].update(consumed_samples=-1)),
    "counter beyond 64 bits": ("tokens", lambda m: m["state"]["train"].update(tokens=2**70)),
    "model a text": ("model", lambda m: m.update(model="x")),
    "model dtype": ("model.dtype", lambda m: m["model"].update(dtype="nn")),
    "endless layers": ("num_hidden_layers", lambda m: m["model"]["config"].update(num_hidden_layers=10**9)),
    "huge model": ("fit the model|config", lambda m: m["model"]["config"].update(hidden_size=2**24)),
    "kernel of a stranger": ("implementation", lambda m: m["model"]["config"].update(_attn_implementation="a/b")),
    "unknown family": ("config", lambda m: m["model"]["config"].update(model_type="../x")),
    "deep recipe": ("recipe is nested", lambda m: m.update(recipe=json.loads('{"a":' * 500 + "1" + "}" * 500))),
    "ranks": ("world_size", lambda m: m.update(world_size=2**62)),
    "ranks without shards": ("shards", lambda m: m.update(world_size=2)),
    "shards not listed": ("shards", lambda m: m.update(shards=["x.safetensors"])),
    "shard outside": ("shards", lambda m: m.update(shards=["../../../etc/passwd"])),
    "shards of lists": ("shards", lambda m: m.update(shards=[[]])),
    "frozen numbers": ("frozen", lambda m: m.update(frozen=[[]])),
    "version": ("version", lambda m: m.update(version={})),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_can_not_be_true_is_refused_by_field(run: Path, case: str) -> None:
    words, edit = EDITS[case]
    change(run, edit)
    with pytest.raises(CheckpointError, match=words) as refused:
        load(run)
    assert "step-00000003" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("case", ["less than there is", "gap", "no slices", "overlap", "shape"])
def test_verification_says_it_without_reading(run: Path, case: str) -> None:
    change(run, EDITS[case][1])
    (problem,) = damaged_files(step_of(run))
    assert problem.startswith(f"manifest.json: tensors.'{NORM}'")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "a\nb", "a\0b", "..", "", "a" * 5000, "manifest.json"]
)
def test_files_outside_are_not_read(run: Path, name: str) -> None:
    (run / "checkpoints" / "secret").write_bytes(b"12345")
    change(run, lambda m: m["files"].update({name: {"bytes": 5, "xxh3_64": "0" * 16}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        load(run)
    assert any("no plain file name" in problem for problem in damaged_files(step_of(run)))


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    shard = next(step_of(run).glob("*.safetensors"))
    shutil.move(shard, tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(run)
    shard.unlink()
    shutil.move(tmp_path / shard.name, shard)
    shutil.move(step_of(run), tmp_path / "elsewhere")
    step_of(run).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        load(run)
    assert layout.step_directories(run) == []


def test_checkpoints_that_lead_out_of_the_run(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for look in (layout.newest, layout.step_directories, layout.read_pointer, layout.temporary_directories):
        with pytest.raises(RefusedError, match="out of the run"):
            look(run)
    shutil.move(tmp_path / "elsewhere", run / "inside")
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to("inside")
    assert layout.newest(run) is not None


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b'{"a":' * 10**5, b"1" * 10**6, b"\xff" * 100, b'"' + b"\\u0000" * 9]
)
def test_json_that_is_none_of_ours(run: Path, content: bytes) -> None:
    layout.manifest_path(step_of(run)).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(run)


def test_a_manifest_of_more_than_512_mb_is_not_read(run: Path) -> None:
    os.truncate(layout.manifest_path(step_of(run)), 2**29 + 1)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*larger than 536870912 bytes"):
        load(run)
    os.truncate(layout.manifest_path(step_of(run)), 2**40)
    assert layout.newest(run) is None


def test_a_manifest_that_is_a_fifo(run: Path) -> None:
    path = layout.manifest_path(step_of(run))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*not a regular file"):
        load(run)


def swap_shard(run: Path, content: bytes) -> str:
    """Put other content under a shard's name, with the size and hash it has: as whoever writes it would."""
    shard = next(step_of(run).glob("*.safetensors"))
    shard.write_bytes(content)
    facts = {"bytes": len(content), "xxh3_64": xxhash.xxh3_64(content).hexdigest()}
    change(run, lambda m: m["files"].update({shard.name: facts}))
    return shard.name


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def header_of(facts: Any) -> bytes:
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()) + b" " * 4000,
        (2**63).to_bytes(8, "little") + b"{}" + b" " * 8000,
        (2**64 - 1).to_bytes(8, "little") + b" " * 8000,
        header_of({f"{NORM}::weight": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}) + b" " * 8000,
        header_of({f"{NORM}::weight": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}) + b" " * 8000,
        header_of({f"{NORM}::weight": {"dtype": "I64", "shape": [16], "data_offsets": [0, 128]}}) + b" " * 128,
        header_of({f"{NORM}::weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b" " * 4,
        header_of({f"{NORM}::weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}) + b" " * 64,
        header_of(b"[" * 10_000) + b" " * 8000,
        b"x" * 20_000,
    ],
)
def test_a_shard_that_is_something_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    old_size = next(step_of(run).glob("*.safetensors")).stat().st_size
    name = swap_shard(run, content.ljust(old_size))
    with pytest.raises(CheckpointError, match=name):
        CheckpointReader(step_of(run)).whole(NORM)
    with pytest.raises(CheckpointError):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "unpickled").exists()
    assert not (tmp_path / "out").exists()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9), st.just([]), st.just({}),
    st.sampled_from(["../x", "/etc/passwd", "a\nb", "float32", [2**62], [[0, 0, 16]], [0, 0, 2**62], {"a": [[]]}, -1]),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value of a manifest lies."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_a_manifest_changed_anywhere_loads_or_is_refused(real: Path, fuzzed: Path, data: st.DataObject) -> None:
    manifest = json.loads(layout.manifest_path(step_of(real)).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(manifest, data)
    layout.manifest_path(step_of(fuzzed)).write_text(json.dumps(manifest))
    try:
        damaged_files(step_of(fuzzed))
        layout.newest(fuzzed)
        load(fuzzed)
    except (CheckpointError, RefusedError) as error:
        message = str(error)
    else:
        message = "loaded"
    assert message.strip()


@pytest.fixture(scope="module")
def fuzzed(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("fuzzed") / "run"
    shutil.copytree(real, copied)
    return copied


def mutate(manifest: dict[str, Any], data: st.DataObject) -> None:
    """Replace, remove, rename or double one value somewhere."""
    sections = [name for name in ("tensors", "state", "model", "files") for _ in range(5) if name in manifest]
    section = data.draw(st.sampled_from([*sections, *sorted(manifest)]))
    *parents, last = data.draw(st.sampled_from([(section, *path) for path in [*places(manifest[section]), ()]]))
    holder: Any = manifest
    for key in parents:
        holder = holder[key]
    match data.draw(st.sampled_from(["replace", "remove", "rename", "double"])):
        case "remove":
            del holder[last]
        case "rename" if isinstance(holder, dict):
            holder[data.draw(st.text(max_size=9))] = holder.pop(last)
        case "double" if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        case _:
            holder[last] = copy.deepcopy(data.draw(VALUES))


def test_others_may_not_have_been_able_to_change_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (run, *run.rglob("*")):
        path.chmod(0o700)
    assert ownership_problems(run, "run.directory", "none") == []
    shard = next(step_of(run).glob("*.safetensors"))
    for path in (run, run / "checkpoints", step_of(run), shard, layout.manifest_path(step_of(run))):
        for mode, group, refused in (
            (0o702, "none", True), (0o702, "read", True), (0o720, "none", True), (0o720, "read", False),
            (0o755, "none", False),
        ):  # fmt: skip
            path.chmod(mode)
            found = ownership_problems(run, "run.directory", group)
            assert bool(found) == refused, (path, oct(mode), group)
            assert all("chmod -R go-w" in problem.fix and path.name in problem.rule for problem in found)
        path.chmod(0o700)
    own = os.geteuid()
    monkeypatch.setattr(ownership.os, "geteuid", lambda: own + 1)
    if own == 0:  # root's are trusted
        assert ownership_problems(run, "run.directory", "none") == []
        os.chown(shard, 12345, -1)
    (problem,) = ownership_problems(run, "model.path", "none")
    assert "12345" in problem.rule or own != 0
    assert "cp -r" in problem.fix
    assert stat.S_IMODE(shard.stat().st_mode) == 0o700
