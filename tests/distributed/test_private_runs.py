"""What real ranks leave behind: private modes whatever the umask, and no secret in the files that say what ran."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml

SECRET = "s3cr3tValue0123456789abc"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A tiny world under the most open umask there is."""
    tmp_path.chmod(0o700)
    previous = os.umask(0)
    yield tiny.write_world(tmp_path)
    os.umask(previous)


def train(folder: Path, *overrides: str, **sections: dict[str, object]) -> Path:
    tiny.write_tokenizer(folder / "tokenizer")
    sections = {"tokenizer": {"path": str(folder / "tokenizer")}, **sections}
    recipe = tiny.write_recipe(folder, **sections)
    done = tiny.run(tiny.command("train", recipe, "run.steps=4", *overrides), folder, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def modes(run: Path) -> dict[str, int]:
    paths = [run, *run.rglob("*")]
    return {path.relative_to(run).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in paths}


def test_everything_in_a_run_is_its_owners(folder: Path) -> None:
    run = train(folder)
    done = tiny.run(tiny.command("export", run), folder, timeout=100)
    assert done.returncode == 0, done.stderr
    found = modes(run)
    expected = {name: 0o700 if (run / name).is_dir() else 0o600 for name in found}
    assert found == expected
    first = {name.partition("/")[0] for name in found}
    assert first >= {"logs", "checkpoints", "tensorboard", "attempts", "tokenizer", "export", "status.json", ".lock"}


def test_a_group_may_read_and_nobody_write_or_look(folder: Path) -> None:
    run = train(folder, "run.group_access=read")
    done = tiny.run(tiny.command("export", run), folder, timeout=100)
    assert done.returncode == 0, done.stderr
    found = modes(run)
    expected = {name: 0o2750 if (run / name).is_dir() else 0o640 for name in found}
    assert found == expected


def test_no_secret_is_written_down(folder: Path) -> None:
    """Keys of the DeepSpeed JSON, hooks and the command itself are where people put them."""
    hook = json.dumps(["/bin/true", f"--token={SECRET}", f"https://me:{SECRET}@host/x"])
    section = {"override": {"comet": {"enabled": False, "api_key": SECRET}}}
    run = train(folder, f"checkpoint.hook={hook}", deepspeed=section)
    written = [*run.rglob("*.json"), *run.rglob("*.yaml")]
    assert {path.name for path in written} >= {"run.yaml", "deepspeed.json", "environment.json", "manifest.json"}
    assert [path for path in written if SECRET in path.read_text()] == []
    hook = yaml.safe_load((run / "run.yaml").read_text())["checkpoint"]["hook"]
    assert hook == ["/bin/true", "--token=<redacted>", "https://<redacted>@host/x"]
    assert "api_key" in (run / "deepspeed.json").read_text()
    manifest = json.loads(next(run.glob("checkpoints/step-*/manifest.json")).read_text())
    assert manifest["recipe"]["checkpoint"]["hook"] == hook
