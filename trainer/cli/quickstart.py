"""``trainer quickstart``: from the Python standard library's source to a trained, evaluated, exported model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import typer

_NOT_SOURCE = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),
    *("test", "idlelib", "ensurepip", "turtledemo"),
}
_PROMPT = "def read_file(path):\n"
_OTHER_STAGES_SECONDS = 75
"""Tokenizer, shards, probe, start-up, export and sample on two cores; the rest of the budget trains."""
_EVALUATIONS = 5
_STEPS = (100, 800)


def quickstart(
    directory: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(min=1.5, help="Time the whole may take; sets the number of steps.")] = 5.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Take this number of steps instead.", show_default=False)
    ] = None,
) -> None:
    """Train a 10 M-parameter Llama on Python's own source code in a few minutes. Run again, it continues."""
    from trainer.core.private import keep_private, make_run_directory

    started = time.monotonic()
    keep_private("none")
    make_run_directory(directory, "none")
    recipe = directory / "recipe.yaml"
    tokenizer, data = directory / "tokenizer", directory / "data"
    if not (tokenizer / "tokenizer.json").exists():
        _stage(1, "train a tokenizer on the Python standard library's source")
        _run("data", "tokenizer", "--input", *_standard_library(), "--output", str(tokenizer), "--vocab-size", "8192")
    if not (data / "code-valid.json").exists():
        _stage(2, "write token shards")
        data.mkdir(mode=0o700, exist_ok=True)
        _run(
            "data", "tokenize", "--input", *_standard_library(), "--tokenizer", str(tokenizer),
            "--output", str(data / "code"), "--overwrite",
            "--validation-fraction", "0.008", "--validation-output", str(data / "code-valid"),
        )  # fmt: skip
    if not recipe.exists():
        _stage(3, "measure this machine")
        _write_recipe(recipe, directory, minutes * 60 - _OTHER_STAGES_SECONDS, steps)
    _stage(4, "train")
    _run("train", str(recipe))
    _stage(5, "export to Hugging Face format")
    if not _is_exported(directory):
        _run("export", str(directory), "--overwrite")
    _stage(6, "let it write")
    _run("generate", str(directory / "export"), "--prompt", _PROMPT, "--max-new-tokens", "96")
    _farewell(directory, recipe, time.monotonic() - started)


def _is_exported(directory: Path) -> bool:
    """Return whether the export is newer than the newest checkpoint."""
    exported, newest = directory / "export" / "config.json", directory / "checkpoints" / "latest"
    return exported.exists() and exported.stat().st_mtime > newest.stat().st_mtime


def _stage(number: int, text: str) -> None:
    typer.secho(f"[{number}/6] {text}", bold=True)


def _standard_library() -> list[str]:
    """Return the standard library's files and packages, without what is installed beside them and its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    source = [path for path in library.iterdir() if path.is_dir() or path.suffix == ".py"]
    named = [path for path in source if path.name not in _NOT_SOURCE and not path.name.startswith("config-")]
    return [str(path) for path in sorted(named)]


def _write_recipe(target: Path, directory: Path, training_seconds: float, steps: int | None) -> None:
    """Choose ranks, dtype and steps by a measurement, and write the recipe that is run from now on."""
    from trainer.config.load import load_recipe, recipe_to_yaml
    from trainer.core.durable import replace_text
    from trainer.core.resources import resource_directory

    base = resource_directory("recipes") / "quickstart.yaml"
    data = directory / "data"
    settings = [
        f"run.directory={json.dumps(str(directory))}",
        f"tokenizer.path={json.dumps(str(directory / 'tokenizer'))}",
        f"data.train.0.path={json.dumps(str(data / 'code'))}",
        f"data.validation.0.path={json.dumps(str(data / 'code-valid'))}",
    ]
    measured = _probe(base)
    ranks = min(2, measured["devices"]) if measured["devices"] else 2
    dtype = min(measured["dtypes"], key=measured["dtypes"].get)
    recipe = load_recipe(base, settings)
    micro = measured["dtypes"][dtype]
    step = recipe.batch.global_size / recipe.batch.micro_size / ranks * micro * 1.15 + 0.1
    samples = json.loads((data / "code-valid.json").read_text())["num_tokens"] // recipe.data.sequence_length
    evaluation = samples / recipe.batch.micro_size / ranks * micro / 3  # forward only
    fitting = int(max(_STEPS[0], min(_STEPS[1], (training_seconds - _EVALUATIONS * evaluation) / step)))
    steps = steps or fitting
    every = -(-steps // (_EVALUATIONS - 1))
    settings += [
        f"run.steps={steps}",
        f"schedule.warmup_steps={min(20, steps // 4)}", f"model.dtype={dtype}", f"launch.processes={ranks}",
        f"checkpoint.every_steps={every}", f"evaluation.every_steps={every}",
    ]  # fmt: skip
    replace_text(target, recipe_to_yaml(load_recipe(base, settings)))
    typer.echo(f"{dtype} on {ranks} ranks, {step:.2f} s a step: {steps} steps, about {steps * step / 60:.1f} minutes")


def _probe(recipe: Path) -> dict:
    """Run the probe as two processes at once, as the ranks will share the machine; return the slower's figures."""
    from trainer.core.environ import usable_cores

    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // 2)), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "trainer.models.probe", str(recipe)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes]
    dtypes = {name: max(answer["dtypes"][name] for answer in answers) for name in answers[0]["dtypes"]}
    return {"dtypes": dtypes, "devices": answers[0]["devices"]}


def _run(*arguments: str) -> None:
    """Run a trainer command in a process of its own; leave with its exit code when it fails or was stopped."""
    child = subprocess.Popen([sys.executable, "-m", "trainer", *arguments])
    # Ctrl-C reaches the child as well, which saves and exits 75: only wait for it. SIGTERM is passed on.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == 75:
        typer.echo("stopped; the same command continues")
    if code != 0:
        raise typer.Exit(code if code > 0 else 1)


def _farewell(directory: Path, recipe: Path, seconds: float) -> None:
    losses = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [line["validation_loss"] for line in losses if line.get("kind") == "evaluation"]
    program = Path(sys.executable).parent
    typer.secho(f"\ndone in {seconds / 60:.1f} minutes: validation loss {curve[0]:.2f} → {curve[-1]:.2f}", bold=True)
    typer.echo(f"""
watch the curves     {program}/tensorboard --logdir {directory}/tensorboard
train on             {program}/trainer train {recipe} run.steps=1000
write more           {program}/trainer generate {directory}/export --prompt 'import '
your own text        {program}/trainer data tokenize --input texts/ --tokenizer {directory}/tokenizer --output data/mine
on a cluster         {program}/trainer submit {recipe} batch.global_size=64 --nodes 2 --gpus-per-node 8 --dry-run""")
