"""Checkpoints of plain DeepSpeed, and Hugging Face weights, become runs of ours: same tensors, same next losses."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Trainer
from ranks import TESTS, run_workers
from safetensors.torch import load_file
from tiny import write_tokenizer
from typer.testing import CliRunner

from trainer.checkpoint import layout
from trainer.checkpoint.export import export_checkpoint
from trainer.checkpoint.import_pickle import load_pickle
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.checkpoint import app
from trainer.config.load import load_recipe
from trainer.core.errors import CheckpointError, RefusedError
from trainer.data.loader import TrainLoader
from trainer.data.shards import ShardWriter
from trainer.evaluation.standalone import evaluate_model

pytestmark = pytest.mark.timeout(600)  # the first test waits for five processes that import DeepSpeed

LEARNING_RATE = 3e-3
ROWS = 12
# Odd sizes: every stage has to pad, and cuts parameters in the middle.
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 9, "intermediate_size": 11, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TIED = LLAMA | {"tie_word_embeddings": True}
# Experts, and a buffer that belongs to the model's state.
EXPERTS: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 8,
    "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 2, "v_head_dim": 4, "qk_nope_head_dim": 2,
    "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip
FROZEN = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
CASES: dict[str, dict[str, Any]] = {
    "zero0-float32": {"stage": 0, "dtype": "float32", "config": LLAMA},
    "zero0-bfloat16": {"stage": 0, "dtype": "bfloat16", "config": TIED, "frozen": FROZEN},
    "zero1-float32": {"stage": 1, "dtype": "float32", "config": TIED, "frozen": FROZEN},
    "zero1-bfloat16": {"stage": 1, "dtype": "bfloat16", "config": LLAMA},
    "BF16_Optimizer": {
        "stage": 1, "dtype": "bfloat16", "config": LLAMA, "frozen": FROZEN,
        "settings": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "elastic": {"stage": 1, "dtype": "float32", "config": LLAMA, "zero": {"elastic_checkpoint": True}},
    "zero2-float32": {"stage": 2, "dtype": "float32", "config": LLAMA},
    "zero2-bfloat16": {"stage": 2, "dtype": "bfloat16", "config": TIED, "frozen": FROZEN},
    "zero3-float32": {"stage": 3, "dtype": "float32", "config": TIED, "zero": {"sub_group_size": 900}},
    "zero3-bfloat16": {"stage": 3, "dtype": "bfloat16", "config": LLAMA, "frozen": FROZEN},
    "zero3-offload": {
        "stage": 3, "dtype": "bfloat16", "config": LLAMA,
        "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "settings": {"zero_force_ds_cpu_optimizer": False},
    },
}  # fmt: skip
THREE_RANKS = {name: CASES[name] for name in ("zero2-bfloat16", "zero3-float32")}


@dataclass
class Made:
    """What plain DeepSpeed has written, and a trainer to go on from it."""

    trainer: Trainer
    directory: Path
    losses: dict[str, list[float]]

    def source(self, case: str) -> Path:
        return self.directory / case / "checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    directory = tmp_path_factory.mktemp("import")
    with Trainer(directory) as trainer:
        after = batches(trainer, 3)
        before = [[[1 + (7 * s + 5 * row + i * i) % 511 for i in range(33)] for row in range(ROWS)] for s in range(3)]
        spec: dict[str, Any] = {"learning_rate": LEARNING_RATE, "rows": ROWS, "before": before, "after": after}
        script = TESTS / "distributed" / "plain_deepspeed_worker.py"
        losses: dict[str, list[float]] = {}
        for world, cases in ((2, CASES), (3, THREE_RANKS)):
            folder = directory / f"ranks-{world}"
            found = run_workers(script, spec | {"cases": cases, "directory": str(folder)}, world, folder)
            losses |= {f"ranks-{world}/{case}": values for case, values in found.items()}
        yield Made(trainer, directory, losses)


def batches(trainer: Trainer, steps: int) -> list[list[list[int]]]:
    """Return the tokens that a run of ours reads first, [step][row][token]."""
    recipe = load_recipe(trainer.recipe("reads", batch={"global_size": ROWS, "micro_size": ROWS}))
    loader = TrainLoader(recipe.data, recipe.run.seed, ROWS, ROWS, 0, 1, 0, 512)
    found = []
    for _ in range(steps):
        [batch] = loader.next_step()
        found.append(torch.cat([batch.input_ids, batch.targets[:, -1:]], dim=1).tolist())
        assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    loader.close()
    return found


def run_import(source: Path | str, output: Path, *options: str) -> str:
    """Import in this process and return what was printed; raises what it raises."""
    result = CliRunner().invoke(app, ["import", str(source), "--output", str(output), *options])
    if result.exception is not None:
        raise result.exception
    return result.output


def reader_of(run: Path) -> CheckpointReader:
    found = layout.newest(run)
    assert found is not None
    return CheckpointReader(found[1])


@pytest.mark.parametrize("case", [f"ranks-2/{name}" for name in CASES] + [f"ranks-3/{name}" for name in THREE_RANKS])
def test_tensors_of_deepspeed_arrive_bit_by_bit(made: Made, tmp_path: Path, case: str) -> None:
    said = run_import(made.source(case), tmp_path / "run")
    reader = reader_of(tmp_path / "run")
    expected = load_file(made.directory / case / "state.safetensors")
    held = {f"{name}::{key}" for name in reader.names() for key in reader._tensors[name]["states"]}
    assert held == expected.keys()
    different = [key for key, tensor in expected.items() if not torch.equal(reader.whole(*key.split("::")), tensor)]
    assert not different
    trained = CASES[case.split("/")[1]]
    steps = 4 if case.endswith("zero0-bfloat16") else 3  # DeepSpeed takes one more there, to make the state
    assert (reader.step, reader.state["train"]["optimizer_steps"]) == (3, steps)
    assert reader.model["dtype"] == trained["dtype"]
    manifest = layout.read_manifest(reader.directory) or {}
    assert manifest["frozen"] == sorted(trained.get("frozen", []))
    assert manifest["optimizer"] == {"name": "adamw"}
    assert ("model.freeze" in said) == bool(trained.get("frozen"))
    assert "accept_changes: [data]" in said


@pytest.mark.parametrize(
    ("case", "base", "world"),
    [
        ("ranks-2/zero0-float32", "zero2", 2),
        ("ranks-2/zero1-float32", "zero3", 2),
        ("ranks-3/zero3-float32", "zero1", 1),
    ],
)
def test_our_trainer_goes_on_with_the_same_losses(made: Made, case: str, base: str, world: int) -> None:
    name = f"goes-on-{base}-{world}"
    run = made.directory / name
    run_import(made.source(case), run)
    recipe = made.trainer.recipe(
        name,
        model={"path": str(run), "config": None, "freeze": CASES[case.split("/")[1]].get("frozen", [])},
        batch={"global_size": ROWS, "micro_size": ROWS // world},
        optimizer={"learning_rate": LEARNING_RATE, "weight_decay": 0.1, "betas": [0.9, 0.95], "epsilon": 1e-8},
        schedule={"name": "constant"},
        deepspeed={"base": base},
        checkpoint={"accept_changes": ["data"]},
        evaluation={"every_steps": 100},
        launch={"processes": world},
    )
    made.trainer.check(made.trainer.train(recipe, "run.steps=6", world=world), recipe)
    metrics = made.trainer.metrics(name)
    assert [metrics[step, "step"] for step in (4, 5, 6)] == pytest.approx(made.losses[case], rel=1e-6)
    assert "accepted (checkpoint.accept_changes: [data])" in recipe.with_suffix(".out").read_text()


def test_an_imported_run_is_a_start_for_another_and_is_exported(made: Made, tmp_path: Path) -> None:
    source = made.directory / "imported"
    run_import(made.source("ranks-2/zero2-bfloat16"), source)
    recipe = made.trainer.recipe("starts", model={"path": str(source), "config": None})
    made.trainer.check(made.trainer.train(recipe, "run.steps=1"), recipe)
    assert f"weights of {source}, step 3" in recipe.with_suffix(".out").read_text()
    exported = export_checkpoint(source, tmp_path / "exported", dtype="float32")
    expected = load_file(made.directory / "ranks-2/zero2-bfloat16/state.safetensors")
    for name, tensor in load_file(exported / "model.safetensors").items():
        assert torch.equal(tensor, expected[f"{name}::weight"].float()), name


def test_weights_alone(made: Made, tmp_path: Path) -> None:
    said = run_import(made.source("ranks-2/zero3-float32"), tmp_path / "run", "--weights-only", "--step", "7")
    reader = reader_of(tmp_path / "run")
    assert {key for name in reader.names() for key in reader._tensors[name]["states"]} == {"weight"}
    assert reader.step == 7
    assert "weights only" in said
    assert "accept_changes" not in said


def refused(source: Path | str, tmp_path: Path, *options: str) -> str:
    """Import and return why it was refused; nothing may be written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RefusedError) as error:
        run_import(source, tmp_path / "refused", *options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(error.value)


def test_what_does_not_fit_the_model_is_named(made: Made, tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 3, "intermediate_size": 12, "tie_word_embeddings": True}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    said = refused(made.source("ranks-2/zero3-bfloat16"), tmp_path, "--model", str(tmp_path / "other"))
    assert "model.layers.2.mlp.up_proj.weight: is missing" in said
    assert "model.layers.1.mlp.up_proj.weight = [11, 9]: the model's is [12, 9]" in said
    assert "lm_head.weight: is one tensor with model.embed_tokens.weight by the config" in said
    (tmp_path / "other/config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    said = refused(made.source("ranks-2/zero2-bfloat16"), tmp_path, "--model", str(tmp_path / "other"))
    assert "model.layers.1.mlp.up_proj.weight: is left over" in said
    assert "lm_head.weight: is one tensor with model.embed_tokens.weight in the checkpoint" in said


def test_damage_is_refused(made: Made, tmp_path: Path) -> None:
    case = "ranks-2/zero2-float32"
    copy = tmp_path / "copy"
    shutil.copytree(made.source(case), copy)
    said = refused(copy, tmp_path)
    assert "--model" in said
    shutil.copy(made.directory / case / "config.json", copy)
    assert "no checkpoint of that name" in refused(copy, tmp_path, "--tag", "../copy")
    [second] = copy.glob("global_step3/*rank_1*optim_states.pt")
    second.rename(second.with_name("aside"))
    assert "divided over 2 ranks, there are files of 1" in refused(copy, tmp_path)
    (copy / "global_step3/aside").rename(second)
    second.write_bytes(second.read_bytes()[:5000])
    assert second.name in refused(copy, tmp_path)
    for name, word in (("mp_rank_01_model_states.pt", "tensor"), ("layer_01-model_00-model_states.pt", "pipeline")):
        (copy / "global_step3" / name).write_bytes(b"")
        assert word in refused(copy, tmp_path)
        (copy / "global_step3" / name).unlink()


@pytest.mark.parametrize("case", ["zero0-bfloat16", "zero1-float32", "zero3-float32"])
def test_whatever_a_file_says_is_refused_in_words_or_imported(made: Made, tmp_path: Path, case: str) -> None:
    """One value of a file is replaced by another type, size or sign at a time."""
    chosen = random.Random(case)
    copy = tmp_path / "copy"
    shutil.copytree(made.source(f"ranks-2/{case}"), copy)
    shutil.copy(made.directory / f"ranks-2/{case}/config.json", copy)
    ends: set[str] = set()
    for number in range(40):
        path = chosen.choice(sorted((copy / "global_step3").glob("*.pt")))
        kept = path.read_bytes()
        state = torch.load(path, weights_only=False)
        spot, key = chosen.choice(list(spots(state)))
        junk = chosen.choice([None, -1, 2**70, float("nan"), "text", [], {}, [[1]], torch.zeros(3), torch.zeros(2, 2)])
        spot[key] = junk
        torch.save(state, path)
        try:
            run_import(copy, tmp_path / f"run-{number}")
            ends.add("imported")
        except (RefusedError, CheckpointError) as error:
            ends.add(type(error).__name__)
        path.write_bytes(kept)
    assert {"imported", "RefusedError"} <= ends


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a nested value as a container that can be changed, and a key."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "ds_config":
                yield value, key
                yield from spots(part)


def test_weights_that_are_not_the_rounded_masters_are_refused(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.source("ranks-2/zero2-bfloat16"), copy)
    shutil.copy(made.directory / "ranks-2/zero2-bfloat16/config.json", copy)
    path = copy / "global_step3/mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["module"]["model.layers.1.mlp.down_proj.weight"] += 1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"down_proj.weight .* is not its float32 master"):
        run_import(copy, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


class Setter:
    """A class of the checkpoint's own, with a state."""

    def __init__(self) -> None:
        self.value = 1


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_pickle_that_runs_code_is_refused(made: Made, tmp_path: Path, file: str) -> None:
    copy, proof = tmp_path / "copy", tmp_path / "proof"
    shutil.copytree(made.source("ranks-2/zero2-float32"), copy)
    shutil.copy(made.directory / "ranks-2/zero2-float32/config.json", copy)
    path = copy / "global_step3" / file
    state = torch.load(path, weights_only=False)
    state["extra"] = Malicious(proof)
    torch.save(state, path)
    said = refused(copy, tmp_path)
    assert "pathlib" in said
    assert file in said
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # it would have


def test_an_unknown_class_is_named(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.source("ranks-2/zero2-float32"), copy)
    shutil.copy(made.directory / "ranks-2/zero2-float32/config.json", copy)
    path = copy / "global_step3/mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=True) | {"client": Setter()}, path)
    assert f"{Setter.__module__}.Setter" in refused(copy, tmp_path)


def test_allowed_classes_are_inert_ones_of_ours(tmp_path: Path) -> None:
    """DeepSpeed's names lead to nothing of DeepSpeed's, whatever they are called with."""
    path = tmp_path / "file.pt"
    torch.save({"tensor": torch.ones(2)}, path)
    pickled = (
        b"\x80\x02}X\x06\x00\x00\x00scalercdeepspeed.runtime.fp16.loss_scaler\nDynamicLossScaler\n"
        b"X\x05\x00\x00\x00touch\x85R}X\x01\x00\x00\x00xK\x01sbs."
    )
    with zipfile.ZipFile(path) as old:
        parts = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(name, pickled if name.endswith("data.pkl") else content)
    scaler = load_pickle(path)["scaler"].value
    assert type(scaler).__module__ == "trainer.checkpoint.import_pickle"
    assert vars(scaler) == {"x": 1}


def hugging_face(directory: Path, dtype: torch.dtype, **saving: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    smol = TIED | {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(**smol)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory, **saving)
    return model


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, "50GB"), (torch.float32, "20KB")])
def test_hugging_face_weights(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    model = hugging_face(tmp_path / "source", dtype, max_shard_size=size)
    sharded = (tmp_path / "source/model.safetensors.index.json").exists()
    assert sharded == (size == "20KB")
    write_tokenizer(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "source", dirs_exist_ok=True)
    said = run_import(tmp_path / "source", tmp_path / "run")
    assert "weights only" in said
    readable = [path for path in (tmp_path / "run").rglob("*") if path.stat().st_mode & 0o077]
    assert not readable
    assert (tmp_path / "run/tokenizer/tokenizer.json").exists()
    reader = reader_of(tmp_path / "run")
    assert reader.model["dtype"] == str(dtype).removeprefix("torch.")
    assert sorted(reader.names()) == sorted(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.whole(name), parameter.detach().float()), name


def test_an_imported_run_is_evaluated_and_its_card_tells_what_it_is(tmp_path: Path) -> None:
    hugging_face(tmp_path / "source", torch.float32)
    run_import(tmp_path / "source", tmp_path / "run")
    with ShardWriter(tmp_path / "valid", 512, end_of_document_id=0) as writer:
        writer.add([1 + 7 * i % 511 for i in range(1100)] + [0])
        writer.commit()
    here, there = (
        evaluate_model(str(tmp_path / name), tmp_path / "valid", sequence_length=None, batch_size=2)
        for name in ("run", "source")
    )
    assert here == pytest.approx(there, rel=1e-6)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"`llama`, not trained by `trainer`: imported from Hugging Face weights {tmp_path / 'source'}." in card
    assert "from scratch" not in card


def test_an_output_that_can_get_no_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(tmp_path / "source", torch.float32)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "here")
    for output, rule in ((".", "current directory"), ("../link", "is a link"), ("../dangling", "is a link")):
        with pytest.raises(RefusedError, match=f"--output = '{output}': .*{rule}"):
            run_import(tmp_path / "source", Path(output))
    assert not list((tmp_path / "here").iterdir())


def test_buffers_of_hugging_face_weights(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**EXPERTS), dtype=torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).uniform_(0, 1e-3)
    model.save_pretrained(tmp_path / "source")
    run_import(tmp_path / "source", tmp_path / "run")
    assert torch.equal(reader_of(tmp_path / "run").whole(name), model.get_buffer(name))


def test_pickled_or_incomplete_hugging_face_weights_are_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path / "source", torch.float32, max_shard_size="20KB")
    [first, *_] = sorted((tmp_path / "source").glob("*.safetensors"))
    first.rename(tmp_path / "aside")
    assert "SOURCE" in refused(tmp_path / "source", tmp_path)
    (tmp_path / "aside").rename(first)
    config = tmp_path / "source/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    assert "model.layers.2.mlp.up_proj.weight: is missing" in refused(tmp_path / "source", tmp_path)
    for path in (tmp_path / "source").glob("*.safetensors"):
        path.unlink()
    torch.save({}, tmp_path / "source/pytorch_model.bin")
    assert "safetensors" in refused(tmp_path / "source", tmp_path)


def test_output_that_is_there_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/file").write_text("")
    assert "--output" in refused(made.source("ranks-2/zero2-float32"), tmp_path)
