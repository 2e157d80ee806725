"""A tiny world for tests: token shards, a tokenizer and a recipe that trains in a second, and the command line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 512
END_OF_DOCUMENT = 0
SEQUENCE_LENGTH = 32
GLOBAL_BATCH = 8
TOKENS_PER_STEP = GLOBAL_BATCH * SEQUENCE_LENGTH
VALIDATION_BATCHES = 4

_LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_", "TORCHELASTIC_", "TRAINER_", "LOCAL_", "MASTER_")
_RANK_NAMES = {"RANK", "WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"}


def write_shards(prefix: Path, *, tokens: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Path:
    """Write ``tokens`` random ids in documents of 20 to 80 as PREFIX.bin, .idx and .json; return the prefix."""
    random = np.random.default_rng(seed)
    with ShardWriter(prefix, vocab_size=vocabulary, end_of_document_id=END_OF_DOCUMENT) as writer:
        left = tokens
        while left:
            length = int(random.integers(20, 80))
            length = left if left - length < 2 else length
            writer.add(np.append(random.integers(1, vocabulary, length - 1), END_OF_DOCUMENT))
            left -= length
    return prefix


def write_world(folder: Path) -> Path:
    """Write ``data/train`` and ``data/valid`` shards into ``folder``; return it. ``recipe`` names them.

    The validation shards hold exactly the sequences that one evaluation of the recipe reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder / "data" / "train", tokens=20 * TOKENS_PER_STEP + 1)
    write_shards(folder / "data" / "valid", tokens=VALIDATION_BATCHES * TOKENS_PER_STEP + 1, seed=1)
    return folder


def write_tokenizer(directory: Path) -> Path:
    """Write a byte-level tokenizer of VOCABULARY tokens that AutoTokenizer loads; id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<|unused{number}|>" for number in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([names[END_OF_DOCUMENT]])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[END_OF_DOCUMENT]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def recipe(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tiny recipe whose paths are relative to ``write_world``'s folder; ``sections`` are merged over it."""
    mapping: dict[str, Any] = {
        "run": {"name": "tiny", "directory": "runs/tiny", "seed": 0, "steps": 8},
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "dtype": "float32",
        },
        "data": {
            "train": [{"path": "data/train"}],
            "validation": [{"name": "valid", "path": "data/valid"}],
            "sequence_length": SEQUENCE_LENGTH,
        },
        "batch": {"global_size": GLOBAL_BATCH, "micro_size": 2},
        "optimizer": {"learning_rate": 1.0e-3},
        # Constant: a run whose steps are raised later must compute what a run planned that long computes.
        "schedule": {"name": "constant"},
        "checkpoint": {"every_steps": 4, "asynchronous": False},
        "evaluation": {"every_steps": 4, "batches": VALIDATION_BATCHES},
        "launch": {"processes": 2},
    }
    return _merged(mapping, sections)


def write_recipe(folder: Path, name: str = "tiny.yaml", **sections: Mapping[str, Any]) -> Path:
    """Write ``recipe(**sections)`` as YAML into ``folder`` and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump(recipe(**sections), allow_unicode=True), encoding="utf-8")
    return path


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, offline, one thread a rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _RANK_NAMES
    }
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return {**kept, **fixed, **variables}


def command(*arguments: object) -> list[str]:
    """Return the argv of ``trainer ARGUMENTS``."""
    return [sys.executable, "-m", "trainer", *map(str, arguments)]


def run(
    argv: Sequence[str], cwd: Path, *, timeout: float = 60, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` in ``cwd`` and return how it ended; whatever it started is killed when ``timeout`` seconds pass."""
    return subprocess.run(
        argv,
        cwd=cwd,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path below ``folder`` with its size and modification time: equal trees mean nothing was written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        found[path.relative_to(folder).as_posix()] = (0 if path.is_dir() else facts.st_size, facts.st_mtime_ns)
    return found


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged
