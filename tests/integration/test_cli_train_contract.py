"""`trainer train`, `export`, `generate` and `evaluate` as a user runs them: real DeepSpeed, two gloo ranks.

Written from the contract of commands, files and exit codes. Runs are expensive (seconds of imports), so the tests
share them: each fixture is one run or one small story, each test looks at one promise of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from story import (
    MORE_STEPS,
    NOISE,
    STEPS,
    TIMEOUT,
    Story,
    curve,
    damage,
    evaluations,
    run_together,
    train,
    write_world,
)

NAME = "läuf eins (ü)"
"""A run directory with spaces, brackets and letters outside ASCII."""
FIELDS = {
    "step", "loss", "grad_norm", "learning_rate", "tokens", "samples", "target_tokens", "step_seconds",
    "tokens_per_second", "model_flops_utilization", "data_wait_seconds", "skipped", "time_unix",
}  # fmt: skip
CHANGES = ["run.seed=1", "model.config.hidden_size=64", "data.train.0.path=data/other"]
"""What a run may not change when it continues."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(folder: Path) -> Story:
    """The undisturbed run of STEPS steps, without a tokenizer. Tests don't change it: they ask for ``copy``."""
    return train(folder, NAME)


@pytest.fixture(scope="module")
def by_torchrun(folder: Path) -> Story:
    """The undisturbed run of MORE_STEPS steps, with a tokenizer, started by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
    return train(folder, "torchrun", f"run.steps={MORE_STEPS}", "tokenizer.path=tokenizer", prefix=launcher)


@pytest.fixture
def copy(folder: Path, finished: Story) -> Iterator[Callable[[str], Path]]:
    """Copy the finished run to ``runs/NAME``."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(folder / "runs" / name)
        shutil.copytree(finished.directory, made[-1])
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory)


class TestFinished:
    """One undisturbed run."""

    def test_exit_code_and_status(self, finished: Story) -> None:
        assert finished.done.returncode == 0, finished.done.stderr
        status = finished.status
        assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, STEPS)
        assert (status["last_checkpoint_step"], status["restarts"]) == (STEPS, 0)

    def test_console_is_quiet_and_plain(self, finished: Story) -> None:
        assert finished.done.stderr == ""
        assert not NOISE.search(finished.done.stdout)
        assert "\x1b" not in finished.done.stdout
        assert "\r" not in finished.done.stdout
        assert f"step {STEPS}/{STEPS}" in finished.done.stdout
        assert len(finished.done.stdout.splitlines()) < 2 * STEPS

    def test_files_are_the_promised_ones(self, finished: Story) -> None:
        directory = finished.directory
        facts = {"run.yaml", "deepspeed.json", "environment.json"}
        seen = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
        others = {
            "metrics.jsonl",
            "tensorboard",
            "status.json",
            "report.json",
            "DONE",
            "logs",
            "attempts",
            "checkpoints",
        }
        assert seen == facts | others
        assert {path.name for path in (directory / "logs").iterdir()} == {"rank-00000.log", "rank-00001.log"}
        assert [path.name for path in (directory / "attempts").iterdir()] == ["0001"]
        assert {path.name for path in (directory / "attempts" / "0001").iterdir()} == facts | {"timing.json"}
        for name in facts:
            assert (directory / name).read_bytes() == (directory / "attempts" / "0001" / name).read_bytes()
        assert [path.name[:19] for path in (directory / "tensorboard").iterdir()] == ["events.out.tfevents"]

    def test_checkpoints(self, finished: Story) -> None:
        directory = finished.directory / "checkpoints"
        kept = ["step-00000010", "step-00000015", "step-00000020"]  # keep_last: 3
        assert sorted(path.name for path in directory.iterdir()) == ["latest", *kept]
        assert (directory / "latest").read_text().strip() == kept[-1]
        for name in kept:
            manifest = json.loads((directory / name / "manifest.json").read_text())
            assert {path.name for path in (directory / name).iterdir()} == {"manifest.json", *manifest["files"]}

    def test_metrics(self, finished: Story) -> None:
        first, *rest = finished.lines
        assert (first["kind"], first["step"]) == ("evaluation", 0)
        steps = [line for line in rest if "kind" not in line]
        assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
        assert all(line.keys() >= FIELDS for line in steps)
        assert [step for step, _ in evaluations(finished.directory)] == [0, 10, 20]
        for number, line in enumerate(steps, 1):
            assert line["samples"] == number * tiny.GLOBAL_BATCH
            assert line["global_batch_size"] == tiny.GLOBAL_BATCH
            assert line["tokens"] == line["target_tokens"] == number * tiny.TOKENS_PER_STEP
            assert line["tokens_per_second"] == pytest.approx(tiny.TOKENS_PER_STEP / line["step_seconds"], rel=0.01)
            assert line["learning_rate"] == 1e-3
            assert line["skipped"] == 0
            assert 0 <= line["data_wait_seconds"] < line["step_seconds"]
        assert [line["time_unix"] for line in steps] == sorted(line["time_unix"] for line in steps)
        text = (finished.directory / "metrics.jsonl").read_text()
        assert all(f'"loss": {line["loss"]!r}' in text for line in steps), "full precision"

    def test_it_learns(self, finished: Story) -> None:
        """Random tokens: what can be learnt is to hold them all equally likely, from a start close to it."""
        losses = [loss for _, loss, _ in curve(finished.directory)]
        assert all(abs(loss - 6.238) < 0.15 for loss in losses)  # ln 512
        assert sum(losses[-5:]) < sum(losses[:5])

    def test_run_yaml_is_a_recipe(self, finished: Story, folder: Path) -> None:
        done = tiny.run(tiny.command("check", finished.directory / "run.yaml"), folder)
        assert (done.returncode, done.stderr) == (0, "")
        resolved = yaml.safe_load((finished.directory / "run.yaml").read_text())
        assert resolved["run"]["directory"] == f"runs/{NAME}"
        deepspeed = json.loads((finished.directory / "deepspeed.json").read_text())
        assert "auto" not in json.dumps(deepspeed)
        assert deepspeed["train_batch_size"] == tiny.GLOBAL_BATCH

    def test_asked_for_again(self, finished: Story, folder: Path) -> None:
        before = tiny.tree(folder)
        again = train(folder, NAME)
        assert (again.done.returncode, again.done.stderr) == (0, "")
        assert "finished" in again.done.stdout
        assert tiny.tree(folder) == before

    def test_status_command(self, finished: Story, folder: Path) -> None:
        done = tiny.run(tiny.command("status", finished.directory), folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert "finished" in done.stdout
        assert f"{STEPS} of {STEPS}" in done.stdout
        found = json.loads(tiny.run(tiny.command("status", finished.directory, "--json"), folder).stdout)
        assert (found["state"], found["step"]) == ("finished", STEPS)


class TestContinued:
    """Starts on a directory that holds checkpoints."""

    def test_more_steps_equal_a_longer_run(self, copy, folder: Path, by_torchrun: Story) -> None:
        directory = copy("more")
        story = train(folder, "more", f"run.steps={MORE_STEPS}")
        assert story.done.returncode == 0, story.done.stderr
        assert not NOISE.search(story.done.stdout + story.done.stderr)
        assert curve(directory) == curve(by_torchrun.directory)
        assert evaluations(directory) == evaluations(by_torchrun.directory)
        assert (story.status["state"], story.status["step"]) == ("finished", MORE_STEPS)
        assert sorted(path.name for path in (directory / "attempts").iterdir()) == ["0001", "0002"]

    def test_newest_damaged_falls_back(self, copy, folder: Path, finished: Story) -> None:
        directory = copy("fallback")
        damage(directory / "checkpoints" / "step-00000020")
        story = train(folder, "fallback", f"run.steps={STEPS + 1}")
        assert story.done.returncode == 0, story.done.stderr
        said = story.done.stdout + story.done.stderr
        assert "step-00000020" in said
        assert "damaged" in said
        assert curve(directory)[:STEPS] == curve(finished.directory)
        assert [step for step, _, _ in curve(directory)] == list(range(1, STEPS + 2))

    def test_all_damaged(self, copy, folder: Path) -> None:
        directory = copy("damaged")
        kept = sorted((directory / "checkpoints").glob("step-*"))
        for checkpoint in kept:
            damage(checkpoint)
        before = tiny.tree(directory / "checkpoints")
        metrics = (directory / "metrics.jsonl").read_bytes()
        story = train(folder, "damaged", f"run.steps={MORE_STEPS}")
        assert story.done.returncode == 1, story.done
        assert "damaged" in story.done.stderr
        assert "Traceback" not in story.done.stderr
        assert tiny.tree(directory / "checkpoints") == before
        assert (directory / "metrics.jsonl").read_bytes() == metrics
        assert story.status["state"] == "failed"

    def test_never(self, copy, folder: Path) -> None:
        copy("never")
        before = tiny.tree(folder)
        story = train(folder, "never", "checkpoint.resume=never", f"run.steps={MORE_STEPS}")
        assert story.done.returncode == 2
        assert "checkpoint.resume" in story.done.stderr
        assert tiny.tree(folder) == before


@pytest.fixture(scope="module")
def changed(folder: Path, finished: Story) -> Iterator[tuple[Story, dict[str, bytes], dict[str, bytes]]]:
    def facts() -> dict[str, bytes]:
        # The refusal itself is noted: who held the lock, and why the ranks left.
        paths = [path for path in directory.rglob("*") if path.is_file()]
        paths = [path for path in paths if path.name != ".lock" and path.parent.name != "logs"]
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}

    directory = folder / "runs" / "changed"
    shutil.copytree(finished.directory, directory)
    before = facts()
    story = train(folder, "changed", f"run.steps={MORE_STEPS}", *CHANGES)
    yield story, before, facts()
    shutil.rmtree(directory)


class TestChangedRecipe:
    """A resume with another seed, model and data is refused, field by field."""

    def test_refused_field_by_field(self, changed) -> None:
        done = changed[0].done
        assert done.returncode == 2, done
        for key in ("run.seed", "hidden_size", "data.train"):
            assert key in done.stderr
        assert "Traceback" not in done.stderr

    def test_nothing_is_written(self, changed) -> None:
        _, before, after = changed
        touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not touched, "exit code 2 promises that nothing was written"

    def test_status_still_says_finished(self, changed) -> None:
        assert changed[0].status["state"] == "finished"

    def test_check_refuses_it_too(self, finished: Story, folder: Path) -> None:
        arguments = ["check", "tiny.yaml", f"run.directory='runs/{NAME}'", f"run.steps={MORE_STEPS}", *CHANGES]
        done = tiny.run(tiny.command(*arguments), folder)
        assert (done.returncode, done.stdout) == (2, ""), done


class TestTorchrun:
    def test_same_losses_as_local(self, by_torchrun: Story, finished: Story) -> None:
        assert by_torchrun.done.returncode == 0, by_torchrun.done.stderr
        assert curve(by_torchrun.directory)[:STEPS] == curve(finished.directory)
        assert by_torchrun.status["state"] == "finished"

    def test_console(self, by_torchrun: Story) -> None:
        own = [line for line in by_torchrun.done.stderr.splitlines() if "torch/distributed/run.py" not in line]
        assert not [line for line in own if NOISE.search(line)]
        assert by_torchrun.done.stdout.count(f"step {MORE_STEPS}/{MORE_STEPS} loss") == 1


REFERENCE = """
import json, sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.from_numpy(numpy.fromfile(sys.argv[2], dtype=numpy.uint16).astype(numpy.int64))
length = int(sys.argv[3])
losses = []
with torch.no_grad():
    for begin in range(0, len(tokens) - length, length):
        window = tokens[begin : begin + length + 1][None]
        logits = model(window[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
assert "trainer" not in sys.modules
print(json.dumps({"loss": sum(losses) / len(losses), "sequences": len(losses)}))
"""


@pytest.fixture(scope="module")
def exported(folder: Path, by_torchrun: Story) -> Story:
    assert by_torchrun.done.returncode == 0, by_torchrun.done.stderr
    done = tiny.run(tiny.command("export", by_torchrun.directory), folder, timeout=TIMEOUT)
    return Story(done, by_torchrun.directory / "export")


class TestExport:
    def test_files(self, exported: Story) -> None:
        assert exported.done.returncode == 0, exported.done.stderr
        assert not NOISE.search(exported.done.stdout + exported.done.stderr)
        names = {path.name for path in exported.directory.iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json"}

    def test_plain_transformers_computes_the_same_loss(self, exported: Story, by_torchrun: Story, folder: Path) -> None:
        arguments = [str(exported.directory), str(folder / "data" / "valid.bin"), str(tiny.SEQUENCE_LENGTH)]

        # -I: PYTHONPATH is not read, so that the reference stands alone.
        done = tiny.run([sys.executable, "-I", "-c", REFERENCE, *arguments], exported.directory, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["sequences"] == tiny.VALIDATION_BATCHES * tiny.GLOBAL_BATCH
        step, trained = evaluations(by_torchrun.directory)[-1]
        assert step == MORE_STEPS
        assert found["loss"] == pytest.approx(trained, abs=1e-5)

    def test_second_export_and_unknown_step_are_refused(
        self, exported: Story, by_torchrun: Story, folder: Path
    ) -> None:
        before = tiny.tree(folder)
        again, unknown = run_together(
            folder,
            tiny.command("export", by_torchrun.directory),
            tiny.command("export", by_torchrun.directory, "--step", 7, "--output", "x"),
        )
        assert tiny.tree(folder) == before
        assert (again.returncode, unknown.returncode) == (2, 2)
        assert "--overwrite" in again.stderr
        assert "7" in unknown.stderr
        assert f"{MORE_STEPS}" in unknown.stderr, "the steps that exist are named"

    def test_damaged_checkpoint_and_another_working_directory(
        self, copy, by_torchrun: Story, folder: Path, tmp_path: Path
    ) -> None:
        directory = copy("bad export")
        damage(directory / "checkpoints" / "step-00000020")
        damaged, elsewhere = run_together(
            tmp_path,
            tiny.command("export", directory, "--output", "bad"),
            tiny.command("export", by_torchrun.directory, "--output", "good"),
        )
        assert damaged.returncode in (1, 2), damaged
        assert "step-00000020" in damaged.stderr
        assert "Traceback" not in damaged.stderr
        # The run's tokenizer.path is relative to where the run was started.
        assert "Traceback" not in elsewhere.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["good"], elsewhere.stderr


class TestGenerate:
    def test_same_seed_same_text(self, exported: Story, folder: Path) -> None:
        argv = tiny.command("generate", exported.directory, "--prompt", "Grüße", "--max-new-tokens", 8, "--seed", 1)
        first, second = run_together(folder, argv, argv)
        assert first.returncode == 0, first.stderr
        assert first.stderr == ""
        assert first.stdout == second.stdout
        assert first.stdout.startswith("Grüße")


class TestEvaluate:
    def test_run_and_export_and_training_agree(self, exported: Story, by_torchrun: Story, folder: Path) -> None:
        _, trained = evaluations(by_torchrun.directory)[-1]
        length = ["--sequence-length", tiny.SEQUENCE_LENGTH]
        commands = [
            tiny.command("evaluate", model, "--data", "data/valid", "--json", *more)
            for model, more in ((by_torchrun.directory, []), (exported.directory, length))
        ]
        for done in run_together(folder, *commands):
            assert (done.returncode, done.stderr) == (0, "")
            found = json.loads(done.stdout)
            assert found["target_tokens"] == tiny.VALIDATION_BATCHES * tiny.TOKENS_PER_STEP
            assert found["loss"] == pytest.approx(trained, abs=1e-5)

    def test_missing_data(self, by_torchrun: Story, folder: Path) -> None:
        done = tiny.run(tiny.command("evaluate", by_torchrun.directory, "--data", "data/nothing"), folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert "data/nothing" in done.stderr
        assert "Traceback" not in done.stderr
