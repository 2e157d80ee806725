"""`trainer fetch` against a stand-in of the Hub on 127.0.0.1, and what jobs without internet then do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
from hub_stand_in import Hub, Repository
from safetensors.numpy import save

CONFIG = {**tiny.recipe()["model"]["config"], "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny.write_world(tmp_path_factory.mktemp("fetch"))
    tokenizer = tiny.write_tokenizer(folder / "tokenizer-source")
    files = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    files |= {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save({}), "README.md": b"about"}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "original/consolidated.safetensors": b"x"}
    with Hub() as hub:
        hub.repositories["org/small"] = Repository()
        hub.repositories["org/small"].commit(files)
        hub.repositories["org/gated"] = Repository({"a" * 40: files}, {"main": "a" * 40}, gated=True)
        hub.repositories["org/pickle"] = Repository({"b" * 40: {"config.json": b"{}"}}, {"main": "b" * 40})
        yield folder, hub, files


def recipe(folder: Path, repository: str = "org/small", **model: str) -> Path:
    return tiny.write_recipe(
        folder, model={"path": repository, "config": None, **model}, tokenizer={"path": repository},
        launch={"slurm": {"gpus_per_node": 0}},
    )  # fmt: skip


def trainer(folder: Path, hub: Hub | None, *arguments: str):
    endpoint = hub.endpoint if hub else "http://127.0.0.1:9"  # nobody answers there
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0" if hub else "1"}
    return tiny.run(tiny.command(*arguments), folder, variables=variables, timeout=120)


def test_pinned_and_used_offline(world):
    folder, hub, files = world
    small = hub.repositories["org/small"]
    first = small.branches["main"]
    path = recipe(folder)
    refused = trainer(folder, None, "submit", path.name, "--dry-run")
    assert refused.returncode == 2
    assert "model.path = 'org/small': is not in the cache" in refused.stderr
    assert "trainer fetch" in refused.stderr

    done = trainer(folder, hub, "fetch", path.name)
    assert done.returncode == 0, done.stderr
    assert f"org/small at {first[:12]}: 4 files" in done.stdout
    locked = json.loads(path.with_suffix(".lock.json").read_text())
    assert locked["repositories"] == {"org/small": {"revision": None, "commit": first}}
    snapshot = folder / "cache/hub/models--org--small/snapshots" / first
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in snapshot.iterdir()} == names, "no pickles, no code, no other formats"

    # The branch moves: the recipe does not, until it is asked to.
    second = small.commit({**files, "config.json": json.dumps({**CONFIG, "hidden_size": 64}).encode()})
    before = len([request for request in hub.requests if request.startswith("GET /org")])
    again = trainer(folder, hub, "fetch", path.name)
    assert again.returncode == 0, again.stderr
    assert json.loads(path.with_suffix(".lock.json").read_text()) == locked
    assert len([request for request in hub.requests if request.startswith("GET /org")]) == before, "downloaded again"

    # Offline, as a job of a node without internet: the pinned commit is what submit accepts and what is loaded.
    submitted = trainer(folder, None, "submit", path.name, "--dry-run")
    assert submitted.returncode == 0, submitted.stderr
    assert "HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1" in submitted.stdout
    loaded = tiny.run(
        [sys.executable, "-c", LOAD, path.name], folder, timeout=120,
        variables={"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )  # fmt: skip
    assert loaded.stdout.split() == [first, "32", "512"], loaded.stderr

    explicit = trainer(folder, None, "check", path.name, "model.revision=v2")
    assert explicit.returncode == 2
    assert "model.revision = 'v2': contradicts tiny.lock.json" in explicit.stderr
    updated = trainer(folder, hub, "fetch", path.name, "--update")
    assert json.loads(path.with_suffix(".lock.json").read_text())["repositories"]["org/small"]["commit"] == second
    assert updated.returncode == 0


LOAD = """
import sys
from trainer.config.load import load_recipe
from trainer.models.config import hugging_face_config
from trainer.models.tokenizer import load_tokenizer
recipe = load_recipe(sys.argv[1])
tokenizer = load_tokenizer(recipe.tokenizer.path, recipe.tokenizer.revision)
sys.stdout.write(f"{recipe.model.revision} {hugging_face_config(recipe.model).hidden_size} {len(tokenizer)}")
"""


@pytest.mark.parametrize(
    ("repository", "arguments", "code", "words"),
    [
        ("org/gated", [], 2, "model.path = 'org/gated': is gated"),
        ("org/none", [], 2, "has no such repository"),
        (
            "org/small",
            ["model.revision=v9", "tokenizer.revision=v9"],
            2,
            "model.revision = 'v9': org/small has no",
        ),
        ("org/small", ["model.revision=v9"], 2, "is another revision of org/small"),
        ("org/pickle", ["tokenizer.path=null"], 2, "has no safetensors"),
        ("nobody", [], 1, "can't be reached"),
    ],
)
def test_errors(world, tmp_path, repository, arguments, code, words):
    _, hub, _ = world
    path = recipe(tmp_path, repository)
    done = trainer(tmp_path, None if repository == "nobody" else hub, "fetch", path.name, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.with_suffix(".lock.json").exists()


def test_nothing_to_fetch_and_a_damaged_lock(tmp_path):
    path = tiny.write_recipe(tmp_path)
    done = trainer(tmp_path, None, "fetch", path.name)
    assert (done.returncode, "nothing to fetch" in done.stdout) == (0, True)
    path.with_suffix(".lock.json").write_text(
        '{"format": "trainer-recipe-lock", "version": 1, "repositories": {"a": 3}}'
    )
    done = trainer(tmp_path, None, "check", path.name)
    assert done.returncode == 2
    assert "lock = " in done.stderr


def test_data_set_is_pinned_and_tokenized_offline(world, tmp_path):
    _, hub, _ = world
    texts = [f"document {number} of the corpus" for number in range(20)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    card = b"---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: data/*.jsonl}]\n---\n"
    corpus = hub.repositories["datasets/org/corpus"] = Repository()
    commit = corpus.commit(
        {"README.md": card, "data/a.jsonl": rows.encode(), "load.py": b"import os", "other/b.bin": b"large"}
    )
    hub.repositories["datasets/org/gated"] = Repository({"a" * 40: {}}, {"main": "a" * 40}, gated=True)
    path = tiny.write_recipe(tmp_path)
    tiny.write_tokenizer(tmp_path / "tokenizer")

    done = trainer(tmp_path, hub, "fetch", path.name, "--dataset", "org/corpus", "--files", "data/*")
    assert done.returncode == 0, done.stderr
    assert f"org/corpus at {commit[:12]}: 2 files" in done.stdout
    assert f"trainer data tokenize --input org/corpus@{commit}" in done.stdout
    locked = json.loads(path.with_suffix(".lock.json").read_text())["repositories"]
    assert locked == {"datasets/org/corpus": {"revision": None, "commit": commit}}
    assert trainer(tmp_path, hub, "fetch", path.name).returncode == 0
    assert json.loads(path.with_suffix(".lock.json").read_text())["repositories"] == locked, "still pinned"
    snapshot = tmp_path / "cache/hub/datasets--org--corpus/snapshots" / commit
    assert {file.name for file in snapshot.rglob("*") if file.is_file()} == {"README.md", "a.jsonl"}

    for number, name in enumerate(("org/corpus", f"org/corpus@{commit}")):
        tokenize = ["data", "tokenize", "--input", name, "--tokenizer", "tokenizer", "--output", f"shard{number}"]
        done = trainer(tmp_path, None, *tokenize)
        assert done.returncode == 0, done.stderr
        assert f"{len(texts)} documents" in done.stdout, done.stdout

    # Another commit in the cache: which one is meant must be said.
    second = corpus.commit({"README.md": card, "data/a.jsonl": rows.encode() * 2})
    assert trainer(tmp_path, hub, "fetch", path.name, "--dataset", "org/corpus", "--update").returncode == 0
    for name, words in (
        ("org/corpus", f"write one of {', '.join(f'org/corpus@{known}' for known in sorted([commit, second]))}"),
        ("org/nothing", "trainer fetch RECIPE --dataset org/nothing"),
    ):
        done = trainer(tmp_path, None, "data", "tokenize", "--input", name, "--tokenizer", "tokenizer", "--output", "x")
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
    for name, words in (
        ("org/gated", "--dataset = 'org/gated': is gated"),
        ("org/none", "has no such repository"),
        ("org/corpus@v9", "org/corpus has no such revision"),
        ("org/corpus:en", "must be owner/name or owner/name@revision"),
    ):
        done = trainer(tmp_path, hub, "fetch", path.name, "--dataset", name)
        assert done.returncode == 2, done.stdout
        assert words in done.stderr
