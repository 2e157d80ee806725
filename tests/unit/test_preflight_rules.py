"""Every rule speaks where it must and is silent on a good recipe."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import merge
from trainer.config.run import Recipe
from trainer.core.errors import RecipeError
from trainer.preflight.check import check, check_facts, prepare
from trainer.preflight.checkpoint import _identity, _written
from trainer.preflight.data import write_tiny_shard
from trainer.preflight.environment import KNOWN_BAD, SUPPORTED, release
from trainer.preflight.facts import Facts, Rule
from trainer.preflight.launch import time_seconds
from trainer.preflight.rules import RULES

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[2]


def good_values(directory: Path) -> dict[str, Any]:
    shard = write_tiny_shard(directory / "good", 200, vocab_size=64, dtype="uint16", num_tokens=200)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "run": {"directory": str(directory / "run"), "steps": 4},
        "model": {"config": {"model_type": "llama", "vocab_size": 64, **sizes}, "dtype": "float32"},
        "data": {"train": [{"path": shard}], "sequence_length": 16},
        "batch": {"global_size": 2},
        "launch": {"processes": 2},
    }


def set_dotted(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        *parents, last = key.split(".")
        below: Any = values
        for part in parents:
            below = below[int(part)] if part.isdecimal() else below.setdefault(part, {})
        below[last] = value


def write_recipe(directory: Path, **sections: Any) -> Path:
    import yaml

    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(good_values(directory), sections)), encoding="utf-8")
    return path


def test_a_good_recipe_has_no_problem(tmp_path: Path) -> None:
    assert check(Recipe.model_validate(good_values(tmp_path)), 2) == []


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rule_speaks_for_its_failing_recipe(rule: Rule, tmp_path: Path) -> None:
    values = good_values(tmp_path)
    good = Facts(Recipe.model_validate(values), 2)
    assert list(rule.check(good)) == []
    prepared = rule.failing.prepare(tmp_path) if rule.failing.prepare is not None else {}
    set_dotted(values, {**rule.failing.overrides, **prepared})
    facts = Facts(Recipe.model_validate(values), rule.failing.world_size, **rule.failing.facts)
    own = list(rule.check(facts))
    assert own
    assert all(problem.key and problem.rule and problem.fix for problem in own)
    shown = {(problem.key, problem.rule) for problem in check_facts(facts)}
    assert {(problem.key, problem.rule) for problem in own} <= shown


@pytest.mark.parametrize(
    ("size", "multiple", "refused"),
    [(100, 64, None), (100, 128, None), (100, None, 100), (100, 50, 100), (101, 64, 101), (128, None, 128)],
)
def test_a_resume_with_a_padded_vocabulary(
    tmp_path: Path, size: int, multiple: int | None, refused: int | None
) -> None:
    """The checkpoint is of 100 tokens, padded to 128."""
    written = _written(
        tmp_path, model={"config": {"model_type": "llama", "vocab_size": 128}, "unpadded_vocabulary_size": 100}
    )
    values = good_values(tmp_path)
    set_dotted(values, written | {"model.vocabulary_multiple": multiple, "checkpoint.accept_changes": ["data"]})
    values["model"]["config"] = {"model_type": "llama", "vocab_size": size}
    problems = list(_identity(Facts(Recipe.model_validate(values), 2)))
    assert [(p.key, p.value) for p in problems] == ([("model.config.vocab_size", refused)] if refused else [])


def test_rule_names_differ() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_several_problems_are_reported_at_once(tmp_path: Path) -> None:
    mess = {"override": {"gradient_clippin": 1, "zero_optimization": {"stage": 7}}}
    parallel = {"expert": 2}
    path = write_recipe(
        tmp_path, deepspeed=mess, parallel=parallel, schedule={"warmup_steps": 99}, kernels={"compile": True}
    )
    with pytest.raises(RecipeError) as caught:
        prepare(path)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == [
        "parallel.expert",
        "kernels.compile",
        "schedule.warmup_steps",
        "deepspeed.override.gradient_clippin",
        "deepspeed.override.zero_optimization.stage",
    ]
    assert caught.value.exit_code == 2


def test_a_typo_in_the_recipe_hides_nothing_else(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, deepspeed={"override": {"bf61": {}}}, optimizer={"learnin_rate": 1})
    with pytest.raises(RecipeError) as caught:
        prepare(path, ["schedule.warmup_steps=99"])
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["optimizer.learnin_rate", "schedule.warmup_steps", "deepspeed.override.bf61"]


def test_deepspeed_typos_are_found_where_the_recipe_does_not_parse(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, deepspeed={"override": {"bf61": {}}}, batch={"global_size": "many"})
    with pytest.raises(RecipeError) as caught:
        prepare(path)
    assert [problem.key for problem in caught.value.problems] == ["batch.global_size", "deepspeed.override.bf61"]


def test_deepspeed_problems_are_found_without_a_batch_triangle(tmp_path: Path) -> None:
    override = {"bf61": {}, "fp16": {"enabled": True}}
    path = write_recipe(tmp_path, deepspeed={"override": override}, batch={"global_size": 3})
    with pytest.raises(RecipeError) as caught:
        prepare(path)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["batch.global_size", "deepspeed.override.bf61", "deepspeed.override.fp16.enabled"]


def test_prepare_returns_the_run(tmp_path: Path) -> None:
    prepared = prepare(
        write_recipe(tmp_path), ["batch.global_size=4", "deepspeed.base=zero2", "run.tokens=100", "run.steps="]
    )
    assert prepared.derived.accumulation == 2
    assert prepared.derived.total_steps == 2  # 100 tokens are more than one step of 4 x 16
    assert prepared.deepspeed["zero_optimization"]["stage"] == 2
    assert prepare(write_recipe(tmp_path), world_size=1).derived.accumulation == 2


def test_hub_ids_need_no_network(tmp_path: Path) -> None:
    values = good_values(tmp_path)
    values["model"] = {"path": "meta-llama/Llama-3.2-1B", "config": {"attention_dropout": 0.1}}
    values["tokenizer"] = {"path": "gpt2"}
    assert check(Recipe.model_validate(values), 2) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-00:00:01", 86401),
        ("1 day", None),
        ("1:2:3:4", None),
        ("", None),
        ("10\n", None),
    ],
)
def test_slurm_time(text: str, seconds: int | None) -> None:
    assert time_seconds(text) == seconds


def test_supported_versions_are_those_of_the_package() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for name, (least, below) in SUPPORTED.items():
        line = next(line for line in stated if line.startswith(name + ">"))
        bounds = line.removeprefix(name + ">=").split(",<")
        assert [release(bound) for bound in bounds] == [least, below]
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert all(first <= last < SUPPORTED[name][0] for name, rows in KNOWN_BAD.items() for first, last, _ in rows)


def test_check_prints_what_follows_and_loads_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, typer; from trainer.cli.check import check; app = typer.Typer(); app.command()(check);"
        "app(sys.argv[1:], standalone_mode=False);"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(write_recipe(tmp_path)), "batch.global_size=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ}, check=True)
    assert "4 = 1 micro x 2 accumulation x 2 ranks" in done.stdout
    assert "stage 1, float32" in done.stdout
    assert done.stdout.rstrip().endswith("[]")
    assert list(tmp_path.glob("run*")) == []  # nothing was written


def test_check_prints_the_warm_up_of_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli.check import check

    warmup = {"start_size": 2, "increment": 2, "steps": 2}
    check(write_recipe(tmp_path, batch={"global_size": 4, "warmup": warmup}))
    printed = capsys.readouterr().out
    assert "4 = 1 micro x 2 accumulation x 2 ranks after a warm-up from 2 by 2 over 2 steps" in printed
    assert "4 of up to 64 tokens = 192 tokens" in printed  # 2 + 2 + 4 + 4 sequences of 16


def test_refusal_of_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "check", "nowhere.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "no such file" in done.stderr
