"""Runs that add tokens to a pretrained model or to another run: the same in every layout, resumed, exported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Trainer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint import layout
from trainer.checkpoint.export import export_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.evaluation.standalone import evaluate_model

OWN, ASKED, PADDED = 501, 512, 576
"""The data has ids up to 511."""
SIZES: dict[str, Any] = {
    "vocab_size": OWN, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # tied
    "phi": {"intermediate_size": 64},  # untied, the head has a bias
}
KEYS = {"vocabulary_size": ASKED, "vocabulary_multiple": 96}
SECTIONS: dict[str, Any] = {
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    "evaluation": {"every_steps": 3, "batches": None},
}
SHORT = ("run.steps=3", "checkpoint.every_steps=3")
LAYOUTS: dict[str, tuple[int, str, dict[str, int]]] = {
    "one": (1, "zero0", {}),
    "zero2": (2, "zero2", {}),
    "zero3": (2, "zero3", {}),
    "pipeline": (2, "zero1", {"pipeline": 2}),
    "tensor": (2, "zero1", {"tensor": 2}),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("vocabulary")) as made:
        yield made


@pytest.fixture(scope="module")
def pretrained(trainer: Trainer) -> dict[str, Path]:
    paths = {family: trainer.directory / f"{family}-model" for family in FAMILIES}
    for family, fields in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(paths[family])
    return paths


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = layout.newest(run)
    assert found is not None
    reader = CheckpointReader(found[1])
    return {name: reader.whole(name) for name in reader.names()}


def start(trainer: Trainer, run: str, layout_name: str, model: dict[str, Any], *overrides: str) -> Path:
    world, base, parallel = LAYOUTS[layout_name]
    sections = {**SECTIONS, "deepspeed": {"base": base}, "parallel": parallel, "launch": {"processes": world}}
    recipe = trainer.recipe(run, dropout=0.0, model=model, **sections)
    trainer.check(trainer.train(recipe, *SHORT, *overrides, world=world), recipe)
    return trainer.directory / run


def by_hand(path: Path, output: Path) -> Path:
    """The model with tokens added by plain transformers, what they have replaced by the mean."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(ASKED, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, head.weight, head.bias):
            if parameter is not None:
                parameter[OWN:] = parameter[:OWN].mean(dim=0)
    model.save_pretrained(output)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_added_alike_in_every_layout(
    trainer: Trainer, pretrained: dict[str, Path], family: str, tmp_path: Path
) -> None:
    model = {"path": str(pretrained[family]), "config": None, **KEYS}
    runs = {name: start(trainer, f"{family}-{name}", name, model) for name in LAYOUTS}
    expected = weights(runs["one"])
    before = evaluate_model(str(by_hand(pretrained[family], tmp_path / "hand")), trainer.directory / "valid",
                            sequence_length=32, batch_size=4)  # fmt: skip
    for name, run in runs.items():
        losses, found = trainer.metrics(run.name), weights(run)
        assert abs(losses[0, "evaluation"] - before["loss"]) < 1e-5, name
        assert abs(losses[1, "step"] - trainer.metrics(f"{family}-one")[1, "step"]) < 1e-5, name
        assert found.keys() == expected.keys()
        assert max((found[key] - expected[key]).abs().max().item() for key in expected) < 1e-6, name
        padding = [value[ASKED:] for value in found.values() if value.shape[0] == PADDED]
        assert len(padding) == (1 if family == "gpt2" else 3)
        assert not any(rows.any() for rows in padding)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_export_every_token_and_no_padding(
    trainer: Trainer, pretrained: dict[str, Path], family: str, tmp_path: Path
) -> None:
    run = start(trainer, f"{family}-export", "pipeline", {"path": str(pretrained[family]), "config": None, **KEYS})
    export_checkpoint(run, tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values())
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == ASKED
    assert model.get_output_embeddings().weight.shape[0] == ASKED
    held = weights(run)
    for name, value in load_file(tmp_path / "export" / "model.safetensors").items():
        assert torch.equal(value, held[name][: len(value)])
    found = evaluate_model(str(tmp_path / "export"), trainer.directory / "valid", sequence_length=32, batch_size=4)
    assert abs(found["loss"] - trainer.metrics(run.name)[3, "evaluation"]) < 1e-5


@pytest.mark.parametrize("layout_name", ["zero3", "pipeline"])
def test_a_run_with_added_tokens_resumes(trainer: Trainer, pretrained: dict[str, Path], layout_name: str) -> None:
    model = {"path": str(pretrained["phi"]), "config": None, **KEYS}
    straight = start(trainer, f"straight-{layout_name}", layout_name, model, "run.steps=6")
    resumed = trainer.directory / f"resumed-{layout_name}"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    start(trainer, resumed.name, layout_name, model, "run.steps=6")
    assert trainer.status(resumed.name)["resumed_step"] == 3
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.fixture(scope="module")
def padded_run(trainer: Trainer) -> Path:
    """A run whose padding, 512 to 767, is as random as from-scratch weights are."""
    return start(trainer, "source", "zero2", {"vocabulary_multiple": 384})


@pytest.mark.parametrize("layout_name", ["zero3", "pipeline", "tensor"])
@pytest.mark.parametrize(
    ("keys", "real", "total"),
    [({}, 512, 512), ({"vocabulary_multiple": 100}, 512, 600), ({"vocabulary_size": 768}, 768, 768)],
    ids=["unpadded", "padded otherwise", "tokens where padding was"],
)
def test_a_padded_run_is_the_start_of_another(
    trainer: Trainer, padded_run: Path, layout_name: str, keys: dict[str, int], real: int, total: int
) -> None:
    model = {"path": str(padded_run), "config": None, **keys}
    run = start(trainer, f"after-{layout_name}-{total}", layout_name, model, "optimizer.learning_rate=1e-30")
    source, found = weights(padded_run), weights(run)
    for name, value in found.items():
        if name != "transformer.wte.weight":
            assert torch.allclose(value, source[name], rtol=0, atol=1e-7)
    rows, old = found["transformer.wte.weight"], source["transformer.wte.weight"][:512]
    assert rows.shape[0] == total
    assert torch.allclose(rows[:512], old, rtol=0, atol=1e-7)
    assert torch.allclose(rows[512:real], old.mean(dim=0).expand(real - 512, -1), rtol=0, atol=1e-7)
    assert not rows[real:].any()


def test_a_larger_tokenizer_is_told_of_the_key(trainer: Trainer, pretrained: dict[str, Path]) -> None:
    recipe = trainer.recipe("too-small", model={"path": str(pretrained["gpt2"]), "config": None})
    assert set(trainer.train(recipe)) == {2}
    assert "set model.vocabulary_size to at least 512" in recipe.with_suffix(".out").read_text()
