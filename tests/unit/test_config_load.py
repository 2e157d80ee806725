"""Recipes: precedence, extends, overrides, and every refusal in plain words."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.load import json_schema, load_recipe, merge, recipe_problems, recipe_to_yaml
from trainer.config.run import Recipe
from trainer.config.schema import _dotted_names
from trainer.config.yaml_text import YamlTextError, dump_yaml, parse_yaml
from trainer.core.errors import Problem, RecipeError

pytestmark = pytest.mark.fast

GOOD: dict[str, Any] = {
    "run": {"name": "first", "directory": "runs/first", "steps": 10},
    "model": {"config": {"model_type": "llama", "hidden_size": 64}},
    "data": {"train": [{"path": "data/a"}], "sequence_length": 128},
    "batch": {"global_size": 8},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(content: Any, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else dump_yaml(content), encoding="utf-8")
        return path

    return write_file


def problems_of(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(path) in str(caught.value)
    return caught.value.problems


def changed(**sections: Any) -> dict[str, Any]:
    return merge(GOOD, sections)


def test_precedence(write: Callable[..., Path]) -> None:
    write({**GOOD, "batch": {"global_size": 8, "micro_size": 2}, "launch": {"processes": 3}}, "base.yaml")
    path = write({"extends": "base.yaml", "batch": {"micro_size": 4}, "data": {"train": [{"path": "data/b"}]}})
    recipe = load_recipe(path)
    assert (recipe.batch.micro_size, recipe.batch.global_size, recipe.launch.processes) == (4, 8, 3)
    assert [source.path for source in recipe.data.train] == ["data/b"]  # lists are replaced
    assert recipe.data.sequence_length == 128
    assert recipe.optimizer.clip_norm == 1.0
    assert load_recipe(path, ["batch.micro_size=8"]).batch.micro_size == 8


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("optimizer.learning_rate=1e-4", lambda r: r.optimizer.learning_rate == 1e-4),
        ("data.train.0.path=x", lambda r: r.data.train[0].path == "x"),
        ("data.train.1.path=y", lambda r: [s.path for s in r.data.train] == ["data/a", "y"]),
        ("data.validation.0.path=v", lambda r: r.data.validation[0].path == "v"),
        ("optimizer.betas=[0.8, 0.9]", lambda r: r.optimizer.betas == (0.8, 0.9)),
        ("model.config.rms_norm_eps=1e-6", lambda r: r.model.config["rms_norm_eps"] == 1e-6),
        (
            "deepspeed.override.zero_optimization.stage=2",
            lambda r: r.deepspeed.override["zero_optimization"]["stage"] == 2,
        ),
        ("tokenizer.path=", lambda r: r.tokenizer.path is None),
        ("launch.slurm.time=01:30:00", lambda r: r.launch.slurm.time == "01:30:00"),
        ("run.directory=a=b", lambda r: r.run.directory == "a=b"),
        ("telemetry.tensorboard=no", lambda r: r.telemetry.tensorboard is False),
        ("run.steps=2e2", lambda r: r.run.steps == 200),
        ("resilience=", lambda r: r.resilience.max_skipped_steps == 10),
        ("adapter={rank: 4}", lambda r: r.adapter.rank == 4),
    ],
)
def test_overrides(write: Callable[..., Path], override: str, check: Callable[[Recipe], bool]) -> None:
    assert check(load_recipe(write(GOOD), [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps", "section.key=value"),
        ("run..steps=1", "empty key"),
        ("run.stepz=1", "did you mean steps?"),
        ("data.train.5.path=x", "is a list of 1"),
        ("data.train.x.path=x", "is a list of 1"),
        ("run.steps.more=1", "has no keys"),
        ("run.steps=[1", "not valid YAML"),
        ("extends=other.yaml", "not a known key"),
        ("bogus.key=1", "not a known key"),
    ],
)
def test_bad_overrides(write: Callable[..., Path], override: str, words: str) -> None:
    assert any(words in str(problem) for problem in problems_of(write(GOOD), override))


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"run": {"name": 12}}, "run.name", 'put it in quotes: "12"'),
        ({"run": {"name": "a b"}}, "run.name", "use letters, digits"),
        ({"run": {"seed": -1}}, "run.seed", "at least 0"),
        ({"run": {"steps": 0}}, "run.steps", "at least 1"),
        ({"run": {"steps": True}}, "run.steps", "whole number"),
        ({"run": {"steps": 1.5}}, "run.steps", "whole number"),
        ({"run": {"steps": "10"}}, "run.steps", "remove the quotes"),
        ({"run": {"tokens": 5}}, "run", "not both"),
        ({"run": {"steps": None}}, "run", "not neither"),
        ({"run": {"steps": None, "bogus": 1}}, "run", "not neither"),
        ({"run": {"directory": None}}, "run.directory", "text"),
        ({"model": {"config": None}}, "model", "path (pretrained) or config"),
        ({"model": {"config": {"model_type": 3}}}, "model.config.model_type", "family"),
        ({"model": {"config": "llama"}}, "model.config", "mapping"),
        ({"model": {"dtype": "float16"}}, "model.dtype", "did you mean bfloat16?"),
        ({"model": {"freeze": "all"}}, "model.freeze", "must be a list"),
        ({"data": {"train": []}}, "data.train", "at least 1 entry"),
        ({"data": {"train": [{"weight": 1}]}}, "data.train.0.path", "is required"),
        ({"data": {"train": [{"path": "a", "weight": -1}]}}, "data.train.0.weight", "at least 0"),
        ({"data": {"train": [{"path": "a", "weight": 0}]}}, "data.train", "every weight is 0"),
        ({"data": {"train": [{"path": "a", "weight": 1, "epochs": 2}]}}, "data.train.0", "one of weight"),
        ({"data": {"train": [{"path": "a", "epochs": 1}, {"path": "b"}]}}, "data.train", "have a budget"),
        ({"data": {"train": [{"path": "x/a"}, {"path": "y/a"}]}}, "data.train", "called 'a'"),
        ({"data": {"stages": [{"after_tokens": 1, "weights": {"b": 1}}]}}, "data.stages.0.weights", "no source"),
        ({"data": 3}, "data", "must be a mapping"),
        ({"optimizer": {"learning_rate": math.nan}}, "optimizer.learning_rate", "finite"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate", "finite"),
        ({"optimizer": {"learning_rate": "3e-4"}}, "optimizer.learning_rate", "remove the quotes"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1", "is required"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1", "less than 1"),
        ({"optimizer": {"betas": [0.9, "x"]}}, "optimizer.betas.1", "a number"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name", "did you mean adamw?"),
        ({"schedule": {"learning_rate": 1}}, "schedule.learning_rate", "belongs to optimizer.learning_rate"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr", "optimizer.learning_rate"),
        ({"max_steps": 1}, "max_steps", "called run.steps"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", "derived"),
        ({"learning_rate": 1}, "learning_rate", "belongs to optimizer.learning_rate"),
        ({"telemetry": {"tensorboard": 1}}, "telemetry.tensorboard", "true or false"),
        ({"telemetry": {"wandb": {}}}, "telemetry.wandb", "not available"),
        ({"adapter": {"targets": 3}}, "adapter.targets", "text"),
        ({"launch": {"slurm": {"nodes": 0}}}, "launch.slurm.nodes", "at least 1"),
    ],
)
def test_schema_problems(sections: dict[str, Any], key: str, words: str) -> None:
    problems = {problem.key: problem for problem in recipe_problems(changed(**sections))}
    assert key in problems
    assert words in str(problems[key])
    for problem in problems.values():
        assert not any(jargon in str(problem) for jargon in ("Input should", "validation error", "pydantic", "type="))


def test_missing_sections_say_what_belongs_there() -> None:
    problems = recipe_problems({})
    assert {problem.key for problem in problems} == {"run", "model", "data", "batch"}
    missing = recipe_problems(changed(batch={"global_size": 1}, data={"sequence_length": None}))
    assert [problem.key for problem in missing] == ["data.sequence_length"]


def test_all_problems_at_once(write: Callable[..., Path]) -> None:
    broken = changed(run={"sead": 1, "steps": -1}, batch={"micro_size": 0}, optimizer={"lr": 1}, launch=3)
    keys = [problem.key for problem in problems_of(write(broken), "foo")]
    assert keys == ["command line", "run.steps", "run.sead", "batch.micro_size", "optimizer.lr", "launch"]


def typo(word: str, rng: random.Random) -> str:
    place = rng.randrange(1, len(word) - 1)
    kind = rng.choice(["drop", "double", "swap", "replace"])
    if kind == "drop":
        return word[:place] + word[place + 1 :]
    if kind == "double":
        return word[:place] + word[place] + word[place:]
    if kind == "swap" and word[place] != word[place + 1]:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + ("q" if word[place] != "q" else "z") + word[place + 1 :]


@pytest.mark.parametrize("seed", range(20))
def test_typos_name_the_right_key(seed: int) -> None:
    rng = random.Random(seed)
    known = [name for name in _dotted_names() if len(name.rsplit(".", 1)[-1]) >= 4]
    path = rng.choice([name for name in known if ("." in name) == bool(seed % 2)]).split(".")
    wrong = typo(path[-1], rng)
    section: dict[str, Any] | list[Any] = {wrong: None}
    for part in reversed(path[:-1]):
        section = [section] if part == "0" else {part: section}
    problems = {problem.key: problem for problem in recipe_problems(merge(GOOD, section))}  # type: ignore[arg-type]
    key = ".".join([*path[:-1], wrong])
    assert f"did you mean {path[-1]}?" in problems[key].fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00run", "not UTF-8"),
        ("", "empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("run: {a: 1\nmodel: 2", "line"),
        ("run: {steps: 1}\nrun: {steps: 2}", "'run' is given twice"),
        ("run: {steps: 1, steps: 2}", "'steps' is given twice"),
        ("a: " + "[" * 100 + "]" * 100, "levels deep"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &a [*a]", "recursive"),
        ("a: &a {b: *a}", "recursive"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{n}: &{n} [{','.join([f'*{p}'] * 10)}]\n" for p, n in zip("abcdef", "bcdefg", strict=True)),
            "more than 100000 values",
        ),
        ("1: 2", "must be text"),
        ("a: \x00", "special characters"),
        ("? [a]\n: 1", "a key must be text"),
        ("# " + "x" * 1_000_001, "larger than"),
    ],
)
def test_unreadable_recipes(write: Callable[..., Path], content: Any, words: str) -> None:
    (problem,) = problems_of(write(content))
    assert words in str(problem)


def test_paths_that_are_no_recipe(tmp_path: Path) -> None:
    assert "no such file" in str(problems_of(tmp_path / "none.yaml")[0])
    assert "is a directory" in str(problems_of(tmp_path)[0])


def test_extends_refusals(write: Callable[..., Path]) -> None:
    write({**GOOD, "extends": "root.yaml"}, "base.yaml")
    assert "only one level" in str(problems_of(write({"extends": "base.yaml"}))[0])
    assert "no such file" in str(problems_of(write({"extends": "none.yaml"}))[0])
    assert "must be the path" in str(problems_of(write({**GOOD, "extends": ["a", "b"]}))[0])


def test_extends_is_relative_to_the_recipe(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(GOOD, "base.yaml")
    path = write({"extends": "../base.yaml", "run": {"steps": 3}}, "deep/recipe.yaml")
    assert load_recipe(path).run.steps == 3


def test_home_is_expanded(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = changed(run={"directory": "~/runs", "name": "n"}, data={"train": [{"path": "~/data"}]})
    recipe = load_recipe(write(values), ["deepspeed.base=~/ds.json", "model.config.note=~/kept"])
    assert recipe.run.directory == "/home/me/runs"
    assert recipe.data.train[0].path == "/home/me/data"
    assert recipe.deepspeed.base == "/home/me/ds.json"
    assert recipe.model.config is not None
    assert recipe.model.config["note"] == "~/kept"


def test_recipe_round_trips(write: Callable[..., Path]) -> None:
    odd = changed(
        run={"name": "1e5", "directory": "no"},
        model={"revision": "12e4567", "config": {"eps": 1e-6, "note": "3e-4", "flag": True, "none": None, "n": "0x1f"}},
        launch={"slurm": {"time": "24:00:00", "setup": ["a: b # c", "", "true"]}},
        optimizer={"epsilon": 1e-30},
    )
    recipe = load_recipe(write(odd))
    assert load_recipe(write(recipe_to_yaml(recipe), "again.yaml")) == recipe


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1), st.recursive(scalars, lambda s: st.lists(s, max_size=3), max_leaves=6), max_size=4
    )
)
def test_yaml_round_trips(value: dict[str, Any]) -> None:
    try:
        text = dump_yaml(value)
        assert parse_yaml(text) == value
    except YamlTextError as error:
        # YAML has no way to write some characters raw; the dumper escapes them, so only keys of odd shape remain.
        pytest.fail(f"{error}: {text!r}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1_000", 1000),
        ("012", 12),
        ("24:00:00", "24:00:00"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("-.inf", -math.inf),
        ("v1.2.3", "v1.2.3"),
    ],
)
def test_yaml_scalars(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


def test_schema_describes_every_field() -> None:
    schema = json_schema()
    json.dumps(schema)
    sections = {"Recipe": schema, **schema["$defs"]}
    for section, content in sections.items():
        assert content.get("description"), section
        for name, field in content["properties"].items():
            reference = field.get("$ref") or next((o["$ref"] for o in field.get("anyOf", []) if "$ref" in o), "")
            described = field.get("description") or schema["$defs"].get(reference.rsplit("/", 1)[-1], {}).get(
                "description"
            )
            assert described, f"{section}.{name}"
    assert schema["additionalProperties"] is False
