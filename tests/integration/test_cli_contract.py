"""The command line refuses what is wrong: exit code 2, every problem at once, on stderr, with nothing written.

Written from the contract of the commands, run as a user runs them. Nothing here starts a rank.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny

RANK_VARIABLES = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
    "TORCHELASTIC_RUN_ID": "none",
}
BAD_COMMAND_LINES = [
    ["frobnicate"],
    ["train"],
    ["check"],
    ["check", "tiny.yaml", "--no-such-option"],
    ["train", "tiny.yaml", "--no-such-option"],
    ["check", "tiny.yaml", "--world-size", "two"],
    ["check", "tiny.yaml", "--world-size", "0"],
    ["submit"],
    ["status"],
    ["status", "no/such/run"],
    ["generate", "data"],
    ["evaluate", "data"],
    ["data"],
    ["data", "frobnicate"],
]
BAD_RECIPES = {
    "missing": (None, "no such file"),
    "directory": (None, "is a directory"),
    "empty": (b"", "empty"),
    "comment": (b"# nothing\n", "empty"),
    "tab": (b"run:\n\tname: x\n", "line 2"),
    "list": (b"- a\n", "list"),
    "scalar": (b"hello\n", "mapping"),
    "unclosed": (b"run: {name: x\nmodel: y\n", "line 2"),
    "not_text": (b"\xff\xfe\x00", "UTF-8"),
    "twice": (b"run: {steps: 1, steps: 2}\n", "steps"),
    "python_tag": (b"run: !!python/object/apply:os.system ['touch pwned']\n", "not a valid recipe"),
}
BAD_OVERRIDES = {
    "no_equals": (["hello"], ["hello", "section.key=value"]),
    "no_key": (["=3"], ["=3"]),
    "unknown_section": (["optimiser.learning_rate=1"], ["optimiser", "optimizer"]),
    "unknown_key": (["batch.globl_size=8"], ["batch.globl_size", "global_size"]),
    "foreign_key": (["optimizer.lr=1"], ["optimizer.lr", "optimizer.learning_rate"]),
    "wrong_type": (["run.steps=many"], ["run.steps", "'many'"]),
    "too_small": (["run.steps=0"], ["run.steps", "0"]),
    "not_finite": (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate"]),
    "no_choice": (["schedule.name=cosin"], ["schedule.name", "cosine"]),
    "steps_and_tokens": (["run.tokens=1000"], ["run.steps", "run.tokens"]),
    "neither": (["run.steps=null"], ["run.steps", "run.tokens"]),
    "unknown_family": (["model.config.model_type=lama"], ["model.config.model_type", "'lama'", "llama"]),
    "unknown_field": (["model.config.hiden_size=32"], ["model.config.hiden_size", "hidden_size"]),
    "heads": (["model.config.num_attention_heads=3"], ["num_attention_heads", "hidden_size"]),
    "no_data": (["data.train.0.path=data/nothing"], ["data.train.0.path", "data/nothing"]),
    "no_validation_data": (["data.validation.0.path=data/nothing"], ["data.validation.0.path", "data/nothing"]),
    "no_sources": (["data.train=[]"], ["data.train"]),
    "vocabulary": (["model.config.vocab_size=500"], ["vocab_size", "500", "512"]),
    "truncated_data": (["data.train.0.path=data/truncated"], ["data/truncated"]),
    "index_is_missing": (["data.train.0.path=data/unindexed"], ["data/unindexed.idx"]),
    "index_is_garbage": (["data.train.0.path=data/garbage"], ["data/garbage.idx"]),
    "too_long": (["data.sequence_length=128"], ["data.sequence_length", "max_position_embeddings"]),
    "batch": (["batch.global_size=7"], ["batch.global_size", "7"]),
    "ranks": (["launch.processes=3"], ["batch.global_size", "3"]),
    "not_yet": (["kernels.compile=true"], ["kernels.compile"]),
    "directory_is_a_file": (["run.directory=tiny.yaml"], ["run.directory", "tiny.yaml"]),
    "directory_below_a_file": (["run.directory=tiny.yaml/run"], ["run.directory", "tiny.yaml"]),
    "no_model_directory": (["model.path=./no-model", "model.config=null"], ["model.path", "./no-model"]),
    "no_tokenizer_directory": (["tokenizer.path=./no-tokenizer"], ["tokenizer.path", "./no-tokenizer"]),
    "resume_require": (["checkpoint.resume=require"], ["checkpoint.resume"]),
    "no_deepspeed_json": (["deepspeed.base=./no.json"], ["deepspeed.base", "./no.json"]),
    "no_deepspeed_name": (["deepspeed.base=zero12"], ["deepspeed.base", "zero12", "zero1"]),
}
MANY_PROBLEMS = {
    "optimizer.lr": "1",
    "run.seed": "-1",
    "data.train.0.path": "data/nothing",
    "model.config.model_type": "lama",
    "batch.global_size": "7",
    "deepspeed.base": "zero12",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny.write_world(tmp_path_factory.mktemp("contract"))
    tiny.write_recipe(path)
    for name in ("truncated", "unindexed", "garbage"):
        tiny.write_shards(path / "data" / name, tokens=4000)
    (path / "data" / "unindexed.idx").unlink()
    (path / "data" / "garbage.idx").write_bytes(b"MMIDIDX garbage")
    whole = path / "data" / "truncated.bin"
    whole.write_bytes(whole.read_bytes()[:-100])
    (path / "directory").mkdir()
    for name, (content, _) in BAD_RECIPES.items():
        if content is not None:
            (path / f"{name}.yaml").write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def nothing_written(folder: Path) -> Iterator[None]:
    """Every test of this file: the folder is the same before and after."""
    before = tiny.tree(folder)
    yield
    assert tiny.tree(folder) == before


def refuse(folder: Path, *arguments: object, variables: dict[str, str] | None = None) -> str:
    """Run a command that must be refused; return what it says on stderr."""
    done = tiny.run(tiny.command(*arguments), folder, variables=variables)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def refuse_alike(folder: Path, recipe: str, *overrides: str) -> str:
    """Give a recipe to ``check`` and to ``train``; both must refuse it with the same text. Return the text."""
    commands = [("check", recipe, *overrides), ("train", recipe, *overrides)]
    with ThreadPoolExecutor(len(commands)) as pool:
        by_check, by_train = pool.map(lambda arguments: refuse(folder, *arguments), commands)
    assert by_check == by_train
    return by_check


def problems(said: str) -> int:
    return len(re.findall(r"^  - ", said, re.MULTILINE))


@pytest.mark.parametrize("arguments", BAD_COMMAND_LINES, ids=" ".join)
def test_bad_command_line(arguments: list[str], folder: Path) -> None:
    done = tiny.run(tiny.command(*arguments), folder)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    # `trainer data` alone shows its help on stdout; everything else is an error.
    assert done.stderr or arguments == ["data"]


def test_mistyped_command_is_suggested(folder: Path) -> None:
    assert "train" in refuse(folder, "trian", "tiny.yaml")


@pytest.mark.parametrize("command", ["train", "check", "submit", "status", "export", "generate", "evaluate", "data"])
def test_every_command_has_help(command: str, folder: Path) -> None:
    done = tiny.run(tiny.command(command, "--help"), folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout
    assert command in done.stdout


def test_good_recipe(folder: Path) -> None:
    done = tiny.run(tiny.command("check", "tiny.yaml"), folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok" in done.stdout


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipe_file(name: str, folder: Path) -> None:
    path = "directory" if name == "directory" else f"{name}.yaml"
    said = refuse_alike(folder, path)
    assert path in said
    assert BAD_RECIPES[name][1] in said


@pytest.mark.parametrize("name", BAD_OVERRIDES)
def test_bad_value(name: str, folder: Path) -> None:
    overrides, expected = BAD_OVERRIDES[name]
    said = refuse_alike(folder, "tiny.yaml", *overrides)
    for text in expected:
        assert text in said


def test_problems_of_different_kinds_come_at_once(folder: Path) -> None:
    said = refuse_alike(folder, "tiny.yaml", *(f"{key}={value}" for key, value in MANY_PROBLEMS.items()))
    missing = [key for key in MANY_PROBLEMS if key not in said]
    assert not missing, f"{missing} are problems too, but only these were told:\n{said}"


def test_problems_across_sections_come_at_once(folder: Path) -> None:
    overrides = ["data.train.0.path=data/nothing", "model.config.model_type=lama", "batch.global_size=7"]
    said = refuse_alike(folder, "tiny.yaml", *overrides)
    for key in ("data.train.0.path", "model.config.model_type", "batch.global_size"):
        assert key in said


@pytest.mark.parametrize("name", ["unknown_key", "no_data", "missing"])
def test_one_rank_speaks(name: str, folder: Path) -> None:
    """As ranks of torchrun: all refuse, one says why, with the text of ``check``."""
    arguments = ["missing.yaml"] if name == "missing" else ["tiny.yaml", *BAD_OVERRIDES[name][0]]
    ranks = [
        subprocess.Popen(
            tiny.command("train", *arguments),
            cwd=folder,
            env=tiny.environment(**RANK_VARIABLES, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert outputs == [("", refuse(folder, "check", *arguments)), ("", "")]


def test_contradicting_rank_variables(folder: Path) -> None:
    said = refuse(folder, "train", "tiny.yaml", variables={**RANK_VARIABLES, "RANK": "2", "LOCAL_RANK": "x"})
    assert "RANK" in said
    assert "LOCAL_RANK" in said


def test_world_size_of_the_launcher_counts(folder: Path) -> None:
    """`check --world-size 3` refuses what three ranks would refuse."""
    said = refuse(folder, "check", "tiny.yaml", "--world-size", 3)
    three = RANK_VARIABLES | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}
    assert refuse(folder, "train", "tiny.yaml", variables=three) == said


def test_precedence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(json.dumps(tiny.recipe(batch={"global_size": 64, "micro_size": 2})))
    data = {"train": [{"path": str(folder / "data/train")}], "validation": []}
    (tmp_path / "run.yaml").write_text(json.dumps({"extends": "base.yaml", "data": data, "batch": {"micro_size": 4}}))
    for overrides, micro in (([], 4), (["batch.micro_size=8"], 8)):
        done = tiny.run(tiny.command("check", tmp_path / "run.yaml", *overrides), folder)
        assert done.returncode == 0, done.stderr
        assert f"64 = {micro} micro" in done.stdout


def test_schema_is_valid_and_describes_every_field(folder: Path) -> None:
    done = tiny.run(tiny.command("check", "--schema"), folder)
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    definitions = schema.get("$defs", {})
    assert set(tiny.recipe()) | {"extends"} <= set(schema["properties"])
    bare = []
    for name, node in {"recipe": schema, **definitions}.items():
        if node.get("type") == "object":
            assert node.get("additionalProperties") is False, f"{name} accepts unknown keys"
        for key, field in node.get("properties", {}).items():
            nodes = [field, *field.get("anyOf", [])]  # a section is described where it is defined
            nodes += [definitions.get(node.get("$ref", "").removeprefix("#/$defs/"), {}) for node in nodes]
            if not any(node.get("description") for node in nodes):
                bare.append(f"{name}.{key}")
    assert not bare
    for reference in re.findall(r'"\$ref": "([^"]+)"', done.stdout):
        assert reference.startswith("#/$defs/")
        assert reference.removeprefix("#/$defs/") in definitions


def test_schema_accepts_the_recipe_that_check_accepts(folder: Path) -> None:
    schema = json.loads(tiny.run(tiny.command("check", "--schema"), folder).stdout)
    assert list(violations(tiny.recipe(), schema, schema)) == []
    wrong = tiny.recipe(run={"steps": 0}, batch={"globl_size": 1}, schedule={"name": "cosin"})
    found = list(violations(wrong, schema, schema))
    assert len(found) == 3, found


def violations(value: Any, node: dict[str, Any], root: dict[str, Any], place: str = "") -> Iterator[str]:
    """Yield what of ``value`` breaks the JSON schema: the keywords that pydantic writes for recipes."""
    if "$ref" in node:
        beside = {key: below for key, below in node.items() if key != "$ref"}
        node = root["$defs"][node["$ref"].removeprefix("#/$defs/")] | beside
    choices = node.get("anyOf") or node.get("oneOf")
    if choices and all(any(violations(value, choice, root, place)) for choice in choices):
        yield f"{place}: matches no alternative"
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = node.get("type")
    if kind in kinds and not isinstance(value, kinds[kind]):
        yield f"{place}: is no {kind}"
        return
    if kind == "null" and value is not None:
        yield f"{place}: is not null"
    if "enum" in node and value not in node["enum"]:
        yield f"{place}: is none of {node['enum']}"
    if "const" in node and value != node["const"]:
        yield f"{place}: is not {node['const']}"
    if "minimum" in node and value < node["minimum"]:
        yield f"{place}: is too small"
    if isinstance(value, dict):
        known = node.get("properties", {})
        for key, below in value.items():
            if key in known:
                yield from violations(below, known[key], root, f"{place}.{key}")
            elif node.get("additionalProperties") is False:
                yield f"{place}.{key}: is unknown"
        yield from (f"{place}.{key}: is missing" for key in node.get("required", []) if key not in value)
    if isinstance(value, list):
        for number, below in enumerate(value):
            yield from violations(below, node.get("items", {}), root, f"{place}.{number}")


OWN_DEEPSPEED_JSON = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
}


class TestDeepSpeedJson:
    """The user's own DeepSpeed configuration."""

    def check(self, folder: Path, tmp_path: Path, mapping: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "mine.json").write_text(json.dumps(mapping))
        return tiny.run(tiny.command("check", "tiny.yaml", f"deepspeed.base={tmp_path / 'mine.json'}"), folder)

    def test_accepted(self, folder: Path, tmp_path: Path) -> None:
        done = self.check(folder, tmp_path, OWN_DEEPSPEED_JSON)
        assert (done.returncode, done.stderr) == (0, "")
        assert "stage 2" in done.stdout

    def test_mismatches_come_at_once(self, folder: Path, tmp_path: Path) -> None:
        wrong = {
            "train_batch_size": 99,
            "train_micro_batch_size_per_gpu": 5,
            "gradient_accumulation_steps": 7,
            "gradient_clipping": 0.3,
            "bf16": {"enabled": True},
            "zero_optimisation": {"stage": 2},
            "zero_optimization": {"overlap_com": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1}},
        }
        done = self.check(folder, tmp_path, wrong)
        assert (done.returncode, done.stdout) == (2, "")
        told = ["train_batch_size = 99", "train_micro_batch_size_per_gpu = 5", "gradient_accumulation_steps = 7"]
        told += ["gradient_clipping = 0.3", "bf16.enabled = True", "optimizer.params.lr = 1"]
        told += ["did you mean zero_optimization?", "did you mean overlap_comm?"]
        assert [text for text in told if text not in done.stderr] == []
        assert problems(done.stderr) == 8

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"train_batch_size": 8,}', '{"a": 1} extra'])
    def test_not_json(self, text: str, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text(text)
        said = refuse(folder, "check", "tiny.yaml", f"deepspeed.base={tmp_path / 'mine.json'}")
        assert "mine.json" in said
        assert problems(said) == 1


class TestSubmit:
    def test_dry_run_prints_a_script_and_writes_nothing(self, folder: Path) -> None:
        done = tiny.run(tiny.command("submit", "tiny.yaml", "--gpus-per-node", 2, "--dry-run"), folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("#!/bin/bash\n#SBATCH")
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=10, check=False).returncode == 0

    def test_checks_at_the_size_it_asks_for(self, folder: Path) -> None:
        said = refuse(folder, "submit", "tiny.yaml", "--gpus-per-node", 3, "--dry-run")
        assert "batch.global_size" in said

    @pytest.mark.parametrize("time", ["soon", "", "-1"])
    def test_bad_time_limit(self, time: str, folder: Path) -> None:
        said = refuse(folder, "submit", "tiny.yaml", "--gpus-per-node", 2, f"--time={time}", "--dry-run")
        assert "time" in said


def test_what_is_no_model(folder: Path) -> None:
    """Also a name that is neither a directory nor cached: said in words, not as upstream's retries."""
    commands = [
        ("generate", "./no-model", "--prompt", "x"),
        ("generate", "nobody/nothing", "--prompt", "x"),
        ("evaluate", "./no-model", "--data", "data/valid"),
    ]
    with ThreadPoolExecutor(2) as pool:
        for (_, path, *_), said in zip(
            commands, pool.map(lambda arguments: refuse(folder, *arguments), commands), strict=True
        ):
            assert path in said
            assert len(said.splitlines()) <= 6
