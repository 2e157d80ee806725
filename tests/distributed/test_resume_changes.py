"""A resume under another recipe: what is refused, what is accepted by name, and what each then computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEPS, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.load import load_recipe
from trainer.core.errors import RecipeError
from trainer.data.loader import TrainLoader
from trainer.preflight.check import prepare

MIDDLE = 10
FROZEN = {"freeze": ["wte", "h.0.mlp"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": {"base": "zero0"}},
    "zero1": {"deepspeed": {"base": "zero1"}},
    "zero2": {"deepspeed": {"base": "zero2"}},
    "zero3": {"deepspeed": {"base": "zero3"}},
    "pipeline": {"deepspeed": {"base": "zero1"}, "parallel": {"pipeline": 2}},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("changes")) as made:
        yield made


@pytest.fixture(scope="module")
def source(trainer: Trainer) -> Callable[..., Path]:
    """Make a run of a checkpoint at step 10, once for each set of settings."""
    made: dict[str, Path] = {}

    def run(name: str, **settings: Any) -> Path:
        if name not in made:
            recipe = trainer.recipe(name, dropout=0.0, **settings)
            trainer.check(trainer.train(recipe, f"run.steps={MIDDLE}", "schedule.name=constant"), recipe)
            made[name] = trainer.directory / name
        return made[name]

    return run


def copied(trainer: Trainer, source: Path, run: str, **settings: Any) -> Path:
    """Copy a run and return the recipe that is to continue it."""
    shutil.copytree(source, trainer.directory / run)
    return trainer.recipe(run, dropout=0.0, **({"schedule": {"name": "constant"}} | settings))


def tensors(run: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    directory = layout.step_directory(run, step)
    reader, manifest = CheckpointReader(directory), layout.read_manifest(directory)
    assert manifest is not None
    held = [(name, key) for name, entry in manifest["tensors"].items() for key in entry["states"]]
    return {(name, key): reader.whole(name, key) for name, key in held}


def snapshot(run: Path) -> dict[str, bytes]:
    """Everything a start may not change before it is sure; logs and the lock are its own."""
    files = [
        path
        for path in run.rglob("*")
        if path.is_file() and "logs" not in path.parts and not path.name.startswith(".lock")
    ]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def changed_manifest(run: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = layout.manifest_path(layout.step_directory(run, step))
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def without_names(manifest: dict[str, Any]) -> None:
    """As older trainers wrote it."""
    for key in ("optimizer", "frozen", "recipe", "recipe_digest", "libraries", "topology", "created_unix"):
        manifest.pop(key, None)
    manifest["state"]["train"].pop("best")


OPTIMIZERS = {
    "lion": ({"name": "lion"}, "holds the state of adamw (exp_avg, exp_avg_sq), lion keeps exp_avg"),
    "muon": ({"name": "muon"}, "holds the state of adamw (exp_avg, exp_avg_sq), muon keeps"),
    "sgd": ({"name": "sgd"}, "holds the state of adamw (exp_avg, exp_avg_sq), sgd keeps no state"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_is_refused_alike_by_check_and_start(
    trainer: Trainer, source: Callable[..., Path], name: str, old: bool
) -> None:
    settings, rule = OPTIMIZERS[name]
    run = f"refused-{name}-{old}"
    recipe = copied(trainer, source("adamw"), run, optimizer=settings)
    if old:
        changed_manifest(trainer.directory / run, MIDDLE, without_names)
    before = snapshot(trainer.directory / run)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe)
    assert [problem.key for problem in caught.value.problems] == ["optimizer.name"]
    assert rule in caught.value.problems[0].rule
    assert "checkpoint.accept_changes: [optimizer]" in caught.value.problems[0].fix
    assert trainer.train(recipe) == [2, 2]
    assert rule in recipe.with_suffix(".out").read_text()
    assert snapshot(trainer.directory / run) == before


def test_momentum_that_a_checkpoint_lacks_or_has_too_much_is_refused(
    trainer: Trainer, source: Callable[..., Path]
) -> None:
    for first, then, rule in (
        (0.0, 0.9, "holds no state, SGD keeps momentum"),
        (0.9, 0.0, "holds momentum, SGD keeps no"),
    ):
        held = source(f"sgd-{first}", optimizer={"name": "sgd", "momentum": first})
        recipe = copied(trainer, held, f"sgd-{first}-{then}", optimizer={"name": "sgd", "momentum": then})
        with pytest.raises(RecipeError) as caught:
            prepare(recipe)
        assert [problem.key for problem in caught.value.problems] == ["optimizer.momentum"]
        assert rule in caught.value.problems[0].rule
        accepted = ["checkpoint.accept_changes=[optimizer]"]
        trainer.check(trainer.train(recipe, *accepted), recipe)


ADAMW = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_accepted_optimizer_starts_afresh_on_the_same_weights(
    trainer: Trainer, source: Callable[..., Path], name: str
) -> None:
    """AdamW after SGD computes what torch's own does from the weights alone, bias correction from its first step."""
    run, held = f"afresh-{name}", source("sgd-0.9", optimizer={"name": "sgd", "momentum": 0.9})
    recipe = copied(trainer, held, run, optimizer=ADAMW, **LAYOUTS[name])
    trainer.check(trainer.train(recipe, "checkpoint.accept_changes=[optimizer]"), recipe)
    output = recipe.with_suffix(".out").read_text()
    assert "accepted (checkpoint.accept_changes: [optimizer])" in output
    manifest = layout.read_manifest(layout.step_directory(trainer.directory / run, STEPS))
    assert manifest is not None
    assert manifest["optimizer"] == {"name": "adamw"}
    counters = manifest["state"]["train"]
    assert (counters["optimizer_steps"], counters["consumed_samples"]) == (STEPS - MIDDLE, 8 * STEPS)
    expected, found = adamw_losses(held), trainer.metrics(run)
    assert max(abs(found[step, "step"] - expected[step]) for step in range(MIDDLE + 1, STEPS + 1)) < 1e-4
    # now the state is AdamW's own: asked again, nothing is different and nothing is thrown away
    trainer.check(trainer.train(recipe, "run.steps=22"), recipe)
    manifest = layout.read_manifest(layout.step_directory(trainer.directory / run, 22))
    assert manifest is not None
    assert manifest["state"]["train"]["optimizer_steps"] == 22 - MIDDLE


class Plain:
    """Plain transformers on the weights of a checkpoint, in this process, reading what steps from 11 on do."""

    def __init__(self, run: Path, frozen: Collection[str] = ()) -> None:
        recipe = load_recipe(run / "run.yaml")
        manifest = layout.read_manifest(layout.step_directory(run, MIDDLE))
        assert manifest is not None
        fields = dict(manifest["model"]["config"])
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).float()
        self.named = dict(self.model.named_parameters())
        self.held = tensors(run, MIDDLE)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(self.held[name, "weight"])
        for name in frozen:
            self.named.pop(name).requires_grad_(False)
        self.loader = TrainLoader(recipe.data, 11, 8, 8, 0, 1, 8 * MIDDLE, 512, None, MIDDLE)

    def step(self) -> float:
        """Leave the clipped gradients of the next step and return its loss."""
        (batch,) = self.loader.next_step()
        logits = self.model(input_ids=batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        return loss.item()


def adamw_losses(run: Path) -> dict[int, float]:
    plain = Plain(run)
    optimizer = torch.optim.AdamW(plain.named.values(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses: dict[int, float] = {}
    for step in range(MIDDLE + 1, STEPS + 1):
        losses[step] = plain.step()
        optimizer.step()
    plain.loader.close()
    return losses


def frozen_names_of(run: Path) -> set[str]:
    manifest = layout.read_manifest(layout.step_directory(run, MIDDLE))
    assert manifest is not None
    return {name for name in manifest["tensors"] if "wte" in name or "h.0.mlp" in name}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("thaw", [False, True])
def test_other_frozen_parameters_are_refused_alike_by_check_and_start(
    trainer: Trainer, source: Callable[..., Path], thaw: bool, old: bool
) -> None:
    held = source("frozen", model=FROZEN) if thaw else source("adamw")
    run = f"frozen-refused-{thaw}-{old}"
    recipe = copied(trainer, held, run, model={} if thaw else FROZEN)
    if old:
        changed_manifest(trainer.directory / run, MIDDLE, without_names)
    before = snapshot(trainer.directory / run)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe)
    assert [problem.key for problem in caught.value.problems] == ["model.freeze"]
    what = "become trained" if thaw else "become frozen"
    rule = "5 parameters (transformer.h.0.mlp.c_fc.bias, transformer.h.0.mlp.c_fc.weight, "
    assert rule + f"transformer.h.0.mlp.c_proj.bias and 2 more) {what}" in caught.value.problems[0].rule
    assert trainer.train(recipe) == [2, 2]
    assert snapshot(trainer.directory / run) == before


@pytest.mark.parametrize("thaw", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_accepted_frozen_parameters_keep_the_state_of_all_others(
    trainer: Trainer, source: Callable[..., Path], name: str, thaw: bool
) -> None:
    """Step 11 leaves the moments that the old ones, or zeros, and plain transformers' gradients give."""
    held = source("frozen", model=FROZEN) if thaw else source("adamw")
    run, changed = f"frozen-{name}-{thaw}", frozen_names_of(held)
    recipe = copied(trainer, held, run, model={} if thaw else FROZEN, **LAYOUTS[name])
    trainer.check(trainer.train(recipe, "run.steps=11", "checkpoint.accept_changes=[frozen]"), recipe)
    output = recipe.with_suffix(".out").read_text()
    what = "trained from now on, without optimizer state" if thaw else "frozen from now on"
    assert f"transformer.h.0.mlp.c_proj.bias and 2 more) {what}" in output
    plain = Plain(held, () if thaw else changed)
    plain.step()
    plain.loader.close()
    after = tensors(trainer.directory / run, 11)
    for parameter_name, parameter in plain.named.items():
        assert parameter.grad is not None
        for key, decay, power in (("exp_avg", 0.9, 1), ("exp_avg_sq", 0.95, 2)):
            nothing = torch.zeros_like(parameter)
            before = nothing if thaw and parameter_name in changed else plain.held[parameter_name, key]
            expected = before * decay + parameter.grad**power * (1 - decay)
            torch.testing.assert_close(after[parameter_name, key], expected, rtol=1e-4, atol=1e-8)
    if not thaw:
        assert {key for name, key in after if name in changed} == {"weight"}
        assert all(torch.equal(after[name, "weight"], plain.held[name, "weight"]) for name in changed)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_masters_frozen_and_trained_again_in_bfloat16(trainer: Trainer, source: Callable[..., Path], name: str) -> None:
    held, run = source("bfloat16", model={"dtype": "bfloat16"}), f"bfloat16-{name}"
    recipe = copied(trainer, held, run, model={"dtype": "bfloat16"} | FROZEN, **LAYOUTS[name])
    accept = "checkpoint.accept_changes=[frozen]"
    trainer.check(trainer.train(recipe, "run.steps=11", accept), recipe)
    before, after = tensors(held, MIDDLE), tensors(trainer.directory / run, 11)
    for parameter in frozen_names_of(held):
        assert torch.equal(after[parameter, "weight"], before[parameter, "weight"].bfloat16())
    trainer.check(trainer.train(recipe, "run.steps=12", "model.freeze=[]", accept), recipe)
    again = tensors(trainer.directory / run, 12)
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    moved = again["transformer.wte.weight", "weight"] - after["transformer.wte.weight", "weight"].float()
    assert 0 < moved.abs().max() < 0.02


def test_optimizer_and_frozen_parameters_are_refused_together_and_accepted_together(
    trainer: Trainer, source: Callable[..., Path]
) -> None:
    recipe = copied(trainer, source("adamw"), "both", model=FROZEN, optimizer={"name": "lion"})
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, ["checkpoint.accept_changes=[data]"])
    assert [problem.key for problem in caught.value.problems] == ["optimizer.name", "model.freeze"]
    trainer.check(trainer.train(recipe, "run.steps=12", "checkpoint.accept_changes=[optimizer, frozen]"), recipe)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"config": {"n_embd": 64}}, ["model.config.n_embd"]),
        ({"config": {"n_layer": 3}}, ["model.config.n_layer"]),
        ({"config": {"vocab_size": 640}}, ["model.config.vocab_size"]),
        ({"sequence_length": 16}, ["data.sequence_length", "data.train"]),
        ({"seed": 12}, ["run.seed", "data.train"]),
    ],
)
def test_another_model_or_order_is_refused_field_by_field(
    trainer: Trainer, source: Callable[..., Path], settings: dict[str, Any], keys: list[str]
) -> None:
    run = "other-" + "-".join(keys)
    recipe = copied(trainer, source("adamw"), run)
    overrides = [f"model.config.{name}={value}" for name, value in settings.pop("config", {}).items()]
    overrides += [f"data.sequence_length={value}" for name, value in settings.items() if name == "sequence_length"]
    overrides += [f"run.seed={value}" for name, value in settings.items() if name == "seed"]
    before = snapshot(trainer.directory / run)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, overrides)
    assert {problem.key for problem in caught.value.problems} <= set(keys)
    assert caught.value.problems[0].key == keys[0]
    assert f"step-{MIDDLE:08d} was written with" in str(caught.value)
    assert trainer.train(recipe, *overrides) == [2, 2]
    assert snapshot(trainer.directory / run) == before


def test_other_shapes_than_the_config_tells_are_refused_at_the_start(
    trainer: Trainer, source: Callable[..., Path]
) -> None:
    recipe = copied(trainer, source("adamw"), "other-n_inner")
    before = snapshot(trainer.directory / "other-n_inner")
    assert trainer.train(recipe, "model.config.n_inner=96") == [2, 2]
    output = recipe.with_suffix(".out").read_text()
    assert "transformer.h.0.mlp.c_fc.bias = (96,): step-00000010 holds (192,)" in output
    assert snapshot(trainer.directory / "other-n_inner") == before


def test_a_newer_format_is_refused(trainer: Trainer, source: Callable[..., Path]) -> None:
    recipe = copied(trainer, source("adamw"), "newer")
    changed_manifest(trainer.directory / "newer", MIDDLE, lambda manifest: manifest.update(version=99))
    before = snapshot(trainer.directory / "newer")
    assert trainer.train(recipe) == [2, 2]
    assert f"format version 99, this trainer reads up to {layout.VERSION}" in recipe.with_suffix(".out").read_text()
    assert snapshot(trainer.directory / "newer") == before


def test_what_check_could_not_know_is_refused_at_the_start(trainer: Trainer, source: Callable[..., Path]) -> None:
    """The newest checkpoint suits the recipe but is damaged; the one before it does not."""
    recipe = copied(trainer, source("adamw"), "damaged", optimizer={"name": "lion"}, model=FROZEN)
    trainer.check(trainer.train(recipe, "run.steps=12", "checkpoint.accept_changes=[optimizer, frozen]"), recipe)
    shard = layout.step_directory(trainer.directory / "damaged", 12) / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    prepare(recipe)
    before = snapshot(trainer.directory / "damaged")
    for old in (False, True):
        if old:
            changed_manifest(trainer.directory / "damaged", MIDDLE, without_names)
            before = snapshot(trainer.directory / "damaged")
        recipe.with_suffix(".out").unlink()
        assert trainer.train(recipe) == [2, 2]
        output = recipe.with_suffix(".out").read_text()
        assert "passing over damaged checkpoint step-00000012" in output
        assert "optimizer.name = 'lion': step-00000010 holds the state of adamw" in output
        assert "5 parameters (transformer.h.0.mlp.c_fc.bias" in output
        assert snapshot(trainer.directory / "damaged") == before


@pytest.mark.parametrize(
    ("settings", "world", "said"),
    [
        ({"deepspeed": {"base": "zero1"}}, 4, "of ZeRO-2 x 2 ranks as ZeRO-1 x 4 ranks"),
        ({"deepspeed": {"base": "zero3"}}, 1, "of ZeRO-2 x 2 ranks as ZeRO-3 x 1 rank"),
        (LAYOUTS["pipeline"], 4, "of ZeRO-2 x 2 ranks as ZeRO-1 x 4 ranks (pipeline 2)"),
        (
            {"model": {"dtype": "bfloat16"}, "deepspeed": {"base": "zero2"}},
            2,
            "in float32 as ZeRO-2 x 2 ranks in bfloat16",
        ),
    ],
)
def test_another_shape_is_accepted_and_said(
    trainer: Trainer, source: Callable[..., Path], settings: dict[str, Any], world: int, said: str
) -> None:
    run = f"shape-{world}-{said[-12:].replace(' ', '-')}"
    held = source("zero2", deepspeed={"base": "zero2"})
    recipe = copied(trainer, held, run, **settings)
    trainer.check(trainer.train(recipe, "run.steps=12", world=world), recipe)
    lines = [line for line in recipe.with_suffix(".out").read_text().splitlines() if "resuming a checkpoint" in line]
    assert len(lines) == 1
    assert lines[0].endswith(said)


def test_a_changed_recipe_is_shown_and_counts(trainer: Trainer, source: Callable[..., Path]) -> None:
    recipe = copied(trainer, source("adamw"), "shown", optimizer={"learning_rate": 1e-3})
    telemetry = ["run.name=another", "telemetry.log_every_steps=2"]
    trainer.check(trainer.train(recipe, *telemetry), recipe)
    output = recipe.with_suffix(".out").read_text().splitlines()
    start = next(number for number, line in enumerate(output) if line.startswith("the recipe differs from that of"))
    assert output[start + 1 : start + 5] == [
        "  optimizer.learning_rate: 0.003 -> 0.001",
        '  run.name: "resume" -> "another"',
        f"  run.steps: {MIDDLE} -> {STEPS}",
        output[start + 4],
    ]
    assert not output[start + 4].startswith("  ")
    rates = [json.loads(line) for line in (trainer.directory / "shown" / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in rates if "kind" not in line][-1] == 1e-3


def test_an_unchanged_recipe_shows_nothing_and_a_long_difference_is_cut(
    trainer: Trainer, source: Callable[..., Path]
) -> None:
    recipe = trainer.recipe("unchanged", dropout=0.0)
    assert trainer.train(recipe, faults="train.step:*:13:kill") == [-9, -9]
    many = ["optimizer.betas=[0.8,0.9]", "optimizer.epsilon=1e-7", "optimizer.weight_decay=0", "optimizer.clip_norm=2"]
    many += [
        "schedule.name=linear",
        "schedule.warmup_steps=5",
        "schedule.minimum_ratio=0",
        "run.name=x",
        "run.steps=21",
    ]
    many += ["data.workers=1", "checkpoint.keep_last=9", "checkpoint.every_steps=7", "evaluation.every_steps=6"]
    copied(trainer, trainer.directory / "unchanged", "long", schedule={})
    trainer.check(trainer.train(recipe), recipe)
    assert "differs" not in recipe.with_suffix(".out").read_text()
    long = trainer.directory / "long.yaml"
    trainer.check(trainer.train(long, *many), long)
    output = long.with_suffix(".out").read_text()
    assert output.count(" -> ") == 11
    assert "  and 2 more, in the log of rank 0" in output
    log = (trainer.directory / "long" / "logs" / "rank-00000.log").read_text()
    assert "recipe: schedule.warmup_steps: 0 -> 5" in log


def test_other_libraries_are_said(trainer: Trainer, source: Callable[..., Path]) -> None:
    recipe = copied(trainer, source("adamw"), "libraries")
    libraries = {"trainer": "0.1.0", "torch": "1.13.1+cu117", "deepspeed": None}
    changed_manifest(trainer.directory / "libraries", MIDDLE, lambda manifest: manifest.update(libraries=libraries))
    trainer.check(trainer.train(recipe, "run.steps=11"), recipe)
    assert f"other versions than the checkpoint's: torch 1.13.1+cu117 -> {torch.__version__.split('+')[0]}" in (
        recipe.with_suffix(".out").read_text()
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_twice_from_one_checkpoint_is_the_same_whatever_reads_ahead(
    trainer: Trainer, source: Callable[..., Path], workers: int
) -> None:
    """The checkpoint was saved right after an evaluation; dropout is on, so generators count too."""
    straight = trainer.recipe("twice-straight")
    if not (trainer.directory / "twice-straight").exists():
        trainer.check(trainer.train(straight), straight)
    for attempt in (1, 2):
        run = f"twice-{workers}-{attempt}"
        shutil.copytree(trainer.directory / "twice-straight", trainer.directory / run)
        shutil.rmtree(layout.step_directory(trainer.directory / run, STEPS))
        recipe = trainer.recipe(run, data={"workers": workers})
        trainer.check(trainer.train(recipe), recipe)
        assert trainer.metrics(run) == trainer.metrics("twice-straight")
        expected, found = (tensors(trainer.directory / name, STEPS) for name in ("twice-straight", run))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
