"""families.json is what the installed transformers says. Not marked fast: importing every config takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from trainer.config.model import ModelConfig
from trainer.config.model_fields import FAMILIES, family_table, model_fields

ROOT = Path(__file__).resolve().parents[2]


def test_families_are_those_of_the_installed_transformers(tmp_path: Path) -> None:
    output = tmp_path / "families.json"
    subprocess.run([sys.executable, str(ROOT / "tools/generate_families.py"), str(output)], check=True, timeout=200)
    assert output.read_text(encoding="utf-8") == FAMILIES.read_text(encoding="utf-8")
    assert len(family_table()["families"]) > 150
    assert FAMILIES.stat().st_size < 1_500_000


def test_model_fields(tmp_path: Path) -> None:
    scratch = model_fields(ModelConfig(config={"model_type": "gpt2", "hidden_size": 32}))
    assert scratch.number("hidden_size") == 32
    assert scratch.values["n_embd"] == 32
    assert scratch.number("max_position_embeddings") == 1024
    assert model_fields(ModelConfig(path="gpt2")).model_type is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}), encoding="utf-8")
    local = model_fields(ModelConfig(path=str(tmp_path), config={"head_dim": 4}))
    assert (local.number("vocab_size"), local.number("head_dim"), local.number("hidden_size")) == (7, 4, 4096)
