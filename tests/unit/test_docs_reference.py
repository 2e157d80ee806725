"""The documents say what the code does: generated tables are current, names, files, links and commands exist."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
import typer.main
from pydantic import Field
from typer.core import TyperGroup

from trainer.cli.main import app
from trainer.config.schema import build_recipe, json_schema
from trainer.config.section import Section
from trainer.core.errors import Problem
from trainer.preflight.check import check
from trainer.preflight.facts import NOT_AVAILABLE
from trainer.telemetry.record import EVALUATION_FIELDS, STEP_FIELDS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "generate_recipe_reference.py"
RECIPE_PAGE = ROOT / "docs" / "recipe.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_recipe_reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_tool_writes(tmp_path: Path) -> None:
    page = tmp_path / "recipe.md"
    shutil.copy(RECIPE_PAGE, page)
    subprocess.run([sys.executable, str(TOOL), str(page)], check=True, timeout=60)
    assert page.read_text(encoding="utf-8") == RECIPE_PAGE.read_text(encoding="utf-8")


def test_a_changed_table_is_noticed(tool: ModuleType) -> None:
    page = RECIPE_PAGE.read_text(encoding="utf-8")
    changed = page.replace("| `batch.micro_size` | whole number ≥ 1 | `1` |", "| `batch.micro_size` | text | `2` |")
    assert changed != page
    assert tool.updated(changed) == page
    with pytest.raises(ValueError, match="lacks"):
        tool.updated(page.replace(tool.END, ""))


def test_every_key_of_the_schema_has_a_row_with_a_meaning() -> None:
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| (.+) \| (.+) \| (.*) \|$", RECIPE_PAGE.read_text(encoding="utf-8"), re.M)
    described = {key for key, *_ in rows}
    assert len(described) == len(rows)
    schema = json_schema()
    for name, section in schema["properties"].items():
        if name == "extends":
            continue
        reference = section.get("$ref") or next(option["$ref"] for option in section["anyOf"] if "$ref" in option)
        for key in schema["$defs"][reference.rsplit("/", 1)[1]]["properties"]:
            assert f"{name}.{key}" in described
    assert not [key for key, *_, meaning in rows if not meaning.strip()]


def test_keys_that_are_called_not_available_are_refused() -> None:
    page = RECIPE_PAGE.read_text(encoding="utf-8")
    (named,) = re.findall(r"refused unless they have their default: (.+?)\. No", page, re.S)
    keys = re.findall(r"`([\w.]+)`", named)
    assert {"adapter", "kernels.compile"} <= {*keys}
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", page, re.M))
    values = {key: True if rows.get(key) == "true or false" else {} for key in keys}
    recipe: dict[str, dict] = {"run": {"directory": "x", "steps": 1}, "model": {"config": {"model_type": "llama"}}}
    recipe |= {"data": {"train": [{"path": "x"}], "sequence_length": 2}, "batch": {"global_size": 1}}
    for key, value in values.items():
        section, _, name = key.partition(".")
        refused = recipe | {section: {**recipe.get(section, {}), name: value} if name else value}
        assert NOT_AVAILABLE in {problem.rule for problem in _problems(refused) if problem.key == key}, key


def _problems(values: dict[str, dict]) -> list[Problem]:
    recipe, problems = build_recipe(values)
    return check(recipe, 1) if recipe is not None else problems


class _Inner(Section):
    share: float = Field(gt=0, le=1)
    """Share | part."""


class _Toy(Section):
    count: int | None = Field(default=None, ge=2)
    """How many."""
    kind: Literal["a", "b"] = "b"
    """Which ``kind``."""
    pair: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.5, 1.0)
    """Two."""
    items: tuple[_Inner, ...] = Field(min_length=1)
    """Several."""
    name: str = Field(default="x", pattern="^[a-z]$")
    """Name."""


def test_rows_show_types_limits_defaults_and_lists(tool: ModuleType) -> None:
    assert [str(row) for row in tool.rows(_Toy, "toy")] == [
        "| `toy.count` | whole number ≥ 2 or null | `null` | How many. |",
        "| `toy.kind` | `a` or `b` | `b` | Which `kind`. |",
        "| `toy.pair` | list of 2: each number ≥ 0 | `[0.5, 1.0]` | Two. |",
        "| `toy.items` | list of sections, at least 1 | required | Several. |",
        "| `toy.items[].share` | number > 0, ≤ 1 | required | Share \\| part. |",
        "| `toy.name` | text, `^[a-z]$` | `x` | Name. |",
    ]


@pytest.mark.parametrize("field", STEP_FIELDS + EVALUATION_FIELDS, ids=lambda field: field.name)
def test_metrics_are_described_as_they_are_recorded(field) -> None:
    page = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
    assert f"| `{field.name}` | {field.unit} | {field.meaning} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:trainer|tools|launch|slurm|ds_configs|docs)/[\w./]*)`", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    known = set(commands.commands)
    data = commands.commands["data"]
    assert isinstance(data, TyperGroup)
    known |= {f"data {name}" for name in data.commands}
    text = page.read_text(encoding="utf-8")
    for first, second in re.findall(r"(?:`|^)trainer ([a-z]+)(?: ([a-z]+))?", text, re.M):
        assert (f"data {second}" if first == "data" and second else first) in known
