"""Exports of real runs, loaded by plain transformers, hold what the shards of the checkpoint hold, bit by bit.

The expected weights are put together here from the safetensors shards and the manifest by a reader of its own, which
imports nothing of trainer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from forked_runs import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.checkpoint import export as export_module
from trainer.checkpoint import export_check
from trainer.checkpoint.export import export_checkpoint
from trainer.core.errors import CheckpointError, RefusedError

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"deepspeed": {"base": "zero3"}},
    "pipeline2": {"parallel": {"pipeline": 2}},
}
SHORT = {"run.steps": 2, "checkpoint.every_steps": 2}
PROMPT = torch.arange(40).mul(37).remainder(512).reshape(2, 20)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("export")) as made:
        tiny.write_tokenizer(made.directory / "tok")
        yield made


def run_of(trainer: Trainer, name: str, model: str | dict[str, Any], **sections: Any) -> Path:
    """Train two steps, once a name, and return the run."""
    run = trainer.directory / name
    if not run.exists():
        section = {"config": MODELS[model]} if isinstance(model, str) else model
        sections |= {"tokenizer": {"path": str(trainer.directory / "tok")}, "model": section}
        recipe = trainer.recipe(name, **sections)
        trainer.check(trainer.train(recipe, *(f"{key}={value}" for key, value in SHORT.items())), recipe)
    return run


def newest(run: Path) -> Path:
    return max(run.glob("checkpoints/step-*"))


def assembled(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Put every weight together from the slices that the manifest lists."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: load_file(checkpoint / name) for name in set(manifest["shards"])}
    found: dict[str, torch.Tensor] = {}
    for name, entry in manifest["tensors"].items():
        flat = torch.full((math.prod(entry["shape"]),), math.nan)
        for index, start, count in entry["states"]["weight"]["slices"]:
            held = files[manifest["shards"][index]]
            keys = (f"{name}::weight", f"rank-{index:05d}/{name}::weight")
            flat[start : start + count] = next(held[key] for key in keys if key in held).float()
        found[name] = flat.reshape(entry["shape"])
    return found


def reference(model: str, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of plain transformers with these weights."""
    fields = dict(MODELS[model])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    left = network.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    network.tie_weights()
    assert not any(parameter.isnan().any() for parameter in network.parameters())
    with torch.inference_mode():
        return network(input_ids=PROMPT).logits


def reloaded(directory: Path) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    with torch.inference_mode():
        return network(input_ids=PROMPT).logits


def written_names(directory: Path) -> list[str]:
    names: list[str] = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


EXPORTS = [
    pytest.param(model, layout, marks=[pytest.mark.sweep] if (i + j) % 2 else [])
    for i, model in enumerate(MODELS)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("model", "layout"), EXPORTS)
def test_an_export_computes_what_the_shards_hold(trainer: Trainer, tmp_path: Path, model: str, layout: str) -> None:
    run = run_of(trainer, f"{model}-{layout}", model, **LAYOUTS[layout])
    export_checkpoint(run, tmp_path / "out")
    weights = assembled(newest(run))
    expected, found = reference(model, weights), reloaded(tmp_path / "out")
    assert (expected - found).abs().max().item() == 0
    names = written_names(tmp_path / "out")
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) == (model in ("llama", "mixtral"))
    changed = weights | {"model.norm.weight" if model != "gpt2" else "transformer.ln_f.weight": torch.ones(32) * 1.01}
    assert not torch.equal(reference(model, changed), found), "the comparison sees a difference"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_a_cast_of_the_masters(trainer: Trainer, tmp_path: Path, dtype: str) -> None:
    run = run_of(trainer, "llama-tied-zero3", "llama-tied", **LAYOUTS["zero3"])
    export_checkpoint(run, tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    weights = assembled(newest(run))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].to(kind)) for name in weights)
    assert torch.equal(reference("llama-tied", weights, kind), reloaded(tmp_path / "out"))


def test_large_models_are_written_in_shards(trainer: Trainer, tmp_path: Path) -> None:
    run = run_of(trainer, "llama-zero3", "llama", **LAYOUTS["zero3"])
    export_checkpoint(run, tmp_path / "out", max_shard_bytes=70_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert sorted(index["weight_map"]) == sorted(written_names(tmp_path / "out"))
    assert all((tmp_path / "out" / name).stat().st_size < 80_000 for name in files)
    assert torch.equal(reference("llama", assembled(newest(run))), reloaded(tmp_path / "out"))


def test_the_card_says_where_the_weights_come_from(trainer: Trainer, tmp_path: Path) -> None:
    run = run_of(trainer, "llama-zero3", "llama", **LAYOUTS["zero3"])
    export_checkpoint(run, tmp_path / "out")
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["trainer"],
    }  # fmt: skip
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["loss"] for line in reversed(lines) if "kind" not in line)
    validation = next(line["validation_loss"] for line in reversed(lines) if "kind" in line)
    digest = hashlib.sha256((newest(run) / "manifest.json").read_bytes()).hexdigest()
    for fact in (
        "| step | 2 |", f"| tokens seen | {2 * 8 * 32} |", f"{loss:.6g}", f"{validation:.6g}", digest,
        manifest["state"]["identity"]["data.train"], f"| version of torch | {torch.__version__} |", "from_pretrained",
    ):  # fmt: skip
        assert fact in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == manifest["recipe"]


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(trainer, "llama-zero3", "llama", **LAYOUTS["zero3"])
    load = export_module.load_checkpoint_model

    def one_weight_off(*arguments: Any) -> Any:
        network = load(*arguments)
        with torch.no_grad():
            network.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
        return network

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "load_checkpoint_model", one_weight_off)
        with pytest.raises(CheckpointError, match=r"weights differ.*layers\.1\.mlp\.up_proj"):
            export_checkpoint(run, tmp_path / "out")
    save = export_module._save_tokenizer

    def other_tokens(tokenizer: Any, model: Any, target: Path) -> None:
        save(tokenizer, model, target)
        text = (target / "tokenizer.json").read_text()
        (target / "tokenizer.json").write_text(text.replace('"a": ', '"_": ').replace('"b": ', '"a": '))

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_save_tokenizer", other_tokens)
        with pytest.raises(CheckpointError, match="has other tokens"):
            export_checkpoint(run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(export_check, "_refuse_other_weights", lambda *_: None)
        patch.setattr(export_module, "logits_of", lambda *_: [logits + 1 for logits in export_check.logits_of(*_)])
        with pytest.raises(CheckpointError, match="logits differ"):
            export_checkpoint(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused_by_name(trainer: Trainer, tmp_path: Path) -> None:
    run = run_of(trainer, "damaged", "gpt2")
    shard = newest(run) / "rank-00001.safetensors"
    shard = shard if shard.exists() else next(newest(run).glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff\x01")
    with pytest.raises(CheckpointError, match=shard.name):
        export_checkpoint(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_an_output_may_be(trainer: Trainer, tmp_path: Path) -> None:
    run = run_of(trainer, "gpt2-pipeline2", "gpt2", **LAYOUTS["pipeline2"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for output in (run, run.parent, run / "checkpoints", run / "logs" / "x", tmp_path / "mine", newest(run) / "x"):
        with pytest.raises(RefusedError, match="--output"):
            export_checkpoint(run, output, overwrite=True)
    with pytest.raises(RefusedError, match="float32, bfloat16, float16"):
        export_checkpoint(run, tmp_path / "out", dtype="int8")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    export_checkpoint(run, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    export_checkpoint(run, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.sweep)]
)
def test_an_interrupted_export_leaves_what_was_there(trainer: Trainer, tmp_path: Path, number: int) -> None:
    run = run_of(trainer, "gpt2-pipeline2", "gpt2", **LAYOUTS["pipeline2"])
    export_checkpoint(run, tmp_path / "out")
    before = tiny.tree(tmp_path)
    argv = tiny.command("export", run, "--output", tmp_path / "out", "--overwrite")
    process = subprocess.Popen(argv, env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.export-*-new")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) != 0
    kept = {name: facts for name, facts in tiny.tree(tmp_path).items() if not name.startswith(".out.export-")}
    assert kept == before
    if number == signal.SIGKILL:  # what it left is hidden, and gone with the next export
        export_checkpoint(run, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_only_what_was_trained(trainer: Trainer, tmp_path: Path) -> None:
    base = export_checkpoint(run_of(trainer, "gpt2-pipeline2", "gpt2", **LAYOUTS["pipeline2"]), tmp_path / "base")
    frozen = {"path": str(base), "config": None, "freeze": [r"wte|wpe|h\.0\.", "ln_f"]}
    run = run_of(trainer, "frozen", frozen, **LAYOUTS["zero3"])
    export_checkpoint(run, tmp_path / "trained", only_trained=True)
    weights = assembled(newest(run))
    found = load_file(tmp_path / "trained" / "trained.safetensors")
    assert set(found) == {name for name in weights if ".h.1." in name}
    assert all(torch.equal(found[name], weights[name]) for name in found)
    facts = json.loads((tmp_path / "trained" / "trained.json").read_text())
    assert facts["base_model"]["path"] == str(base)
    assert sorted(facts["trained"] + facts["base_model"]["frozen"]) == sorted(weights)
    # As the card says: the base model and these tensors are the whole.
    network = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    network.load_state_dict(found, strict=False)
    with torch.inference_mode():
        assert torch.equal(network(input_ids=PROMPT).logits, reference("gpt2", weights))
    path = newest(run) / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    manifest["recipe"]["model"]["path"] = str(trainer.directory / "gpt2-pipeline2")
    path.write_text(json.dumps(manifest))
    export_checkpoint(run, tmp_path / "of-a-run", only_trained=True)
    path.write_text(text)
    card = (tmp_path / "of-a-run" / "README.md").read_text()
    assert f"trainer export {trainer.directory / 'gpt2-pipeline2'} --output BASE_DIR" in card
    code = card.split("```python\n")[1].split("```")[0].replace("BASE_DIR", str(base))
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(tmp_path / "of-a-run")), names)
    assert all(torch.equal(names["model"].state_dict()[name], weights[name]) for name in weights)
    with safe_open(base / "model.safetensors", framework="pt") as file:
        other = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    other["transformer.wpe.weight"][0, 0] += 1
    network.load_state_dict(other, strict=False)
    network.save_pretrained(base)
    with pytest.raises(CheckpointError, match="has other weights than the frozen ones"):
        export_checkpoint(run, tmp_path / "again", only_trained=True)
    assert not (tmp_path / "again").exists()


def test_a_file_of_nothing_is_never_written(trainer: Trainer, tmp_path: Path) -> None:
    run = run_of(trainer, "gpt2-pipeline2", "gpt2", **LAYOUTS["pipeline2"])
    path = newest(run) / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    cases = {
        "nothing was frozen": [],
        "does not say what was frozen": None,
        "nothing was trained": sorted(manifest["tensors"]),
        "started from no model": ["transformer.wpe.weight"],
    }
    try:
        for words, frozen in cases.items():
            path.write_text(json.dumps(manifest | {"frozen": frozen}))
            with pytest.raises(RefusedError, match=words):
                export_checkpoint(run, tmp_path / "out", only_trained=True)
    finally:
        path.write_text(text)
    assert list(tmp_path.iterdir()) == []
