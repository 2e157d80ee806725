"""The guard in real runs: NaN and spikes refused, rewound or fatal, restarts alike, and copies that differ."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import STEPS, Trainer, exact_lines, tensors
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from typer.testing import CliRunner

from trainer.checkpoint import layout
from trainer.cli.main import app

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": {"base": "zero2"}, "model": {"dtype": "bfloat16"}},
    "stages": {"parallel": {"pipeline": 2}},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("guard")) as started:
        yield started


def recipe(trainer: Trainer, run: str, *, checkpoint: dict[str, Any] | None = None, **sections: Any) -> Path:
    """A run that is checked and judged at every step, from the seventh on."""
    guard = {"window_steps": 8, "warmup_steps": 6, "patience_steps": 2, "replica_check_every_steps": 1}
    resilience = {"guard": guard | sections.pop("guard", {}), **sections.pop("resilience", {})}
    checkpoint = {"every_steps": 5} | (checkpoint or {})
    return trainer.recipe(run, resilience=resilience, checkpoint=checkpoint, **sections)


def train(trainer: Trainer, path: Path, faults: str = "") -> tuple[list[int], str]:
    codes = trainer.train(path, faults=faults, before="poison")
    return codes, path.with_suffix(".out").read_text()


def events(trainer: Trainer, run: str) -> list[dict[str, Any]]:
    path = trainer.directory / run / "guard.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def which(trainer: Trainer, run: str, step: int) -> dict[str, Any]:
    answer = CliRunner().invoke(
        app, ["data", "which", str(trainer.directory / run), "--step", str(step), "--json"], catch_exceptions=False
    )
    return json.loads(answer.stdout)


def curve(run: Path, tag: str) -> list[int]:
    """Return the steps of a curve, in the order in which TensorBoard reads them."""
    paths = sorted((run / "tensorboard").iterdir())
    found = [event for path in paths for event in EventFileLoader(str(path)).Load()]
    return [event.step for event in found if any(value.tag == tag for value in event.summary.value)]


@pytest.mark.parametrize(("layout_name", "rank"), [("zero2", 0), ("stages", 1)])
def test_nan_on_one_rank_refuses_the_step_on_all(trainer: Trainer, layout_name: str, rank: int) -> None:
    path = recipe(trainer, f"nan-{layout_name}", **LAYOUTS[layout_name])
    codes, output = train(trainer, path, f"poison.step:{rank}:7:nan")
    assert codes == [0, 0], output
    lines = exact_lines(trainer, path.stem)
    assert [line["skipped"] for line in lines] == [int(step >= 7) for step in range(1, STEPS + 1)]
    assert [step for step, line in enumerate(lines, 1) if line["loss"] is None] == [7]
    (event,) = events(trainer, path.stem)
    assert (event["step"], event["kind"], event["action"], event["loss"]) == (7, "not finite", "skipped", None)
    read = [(s["sample"], piece["document"]) for s in which(trainer, path.stem, 7)["samples"] for piece in s["pieces"]]
    assert [(entry["sample"], entry["document"]) for entry in event["documents"]] == read
    assert trainer.status(path.stem)["skipped_steps"] == 1


def test_a_refused_spike_leaves_what_a_refused_nan_does(trainer: Trainer) -> None:
    path = recipe(trainer, "skipped", guard={"on_spike": "skip"}, **LAYOUTS["zero2"])
    codes, output = train(trainer, path, "poison.step:1:7:gradient")
    assert codes == [0, 0], output
    (event,) = events(trainer, "skipped")
    assert (event["step"], event["kind"], event["action"]) == (7, "gradient spike", "skipped")
    assert event["grad_norm"] > event["grad_norm_limit"] > event["grad_norm_median"] > 0
    found, expected = exact_lines(trainer, "skipped"), exact_lines(trainer, "nan-zero2")
    assert [line["loss"] for line in found[7:]] == [line["loss"] for line in expected[7:]]
    assert [line["skipped"] for line in found] == [line["skipped"] for line in expected]


@pytest.mark.parametrize(
    ("policy", "words", "step"),
    [
        ({"resilience": {"max_skipped_steps": 2}}, "3 steps in a row had a NaN or Inf", 9),
        ({"guard": {"on_nan": "stop"}}, "resilience.guard.on_nan", 7),
    ],
)
def test_persistent_inf_ends_the_run(trainer: Trainer, policy: dict[str, Any], words: str, step: int) -> None:
    path = recipe(trainer, f"fatal-{step}", **policy)
    codes, output = train(trainer, path, "poison.samples:1:48-200:inf")
    assert codes == [93, 93], output
    status = trainer.status(path.stem)
    assert words in status["reason"]
    assert output.count(f"trainer: {status['reason'].splitlines()[0]}") == 1
    assert output.count("trainer: what each rank did") == 1
    assert "failed in" not in output, "all ranks raised it: rank 0 tells it, in words for the user"
    failure = json.loads((trainer.directory / path.stem / "failure.json").read_text())
    assert (failure["rank"], failure["same_words"], failure["suspect_hosts"]) == (None, [0, 1], [])
    assert [event["step"] for event in events(trainer, path.stem)] == list(range(7, step + 1))
    assert layout.steps_with_manifest(trainer.directory / path.stem) == [5], "nothing of it was saved"


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_spike_is_rewound_and_a_restart_goes_on_alike(trainer: Trainer, layout_name: str) -> None:
    # Samples 136 to 151 are those of steps 18 and 19. What is saved after 18 must not push out the checkpoint of 9.
    settings: dict[str, Any] = {
        "guard": {"on_spike": "rewind"}, "checkpoint": {"every_steps": 9, "keep_last": 1},
        "data": {"workers": 2}, "telemetry": {"tensorboard": True}, **LAYOUTS[layout_name],
    }  # fmt: skip
    straight = recipe(trainer, f"{layout_name}-straight", **settings)
    codes, output = train(trainer, straight, "poison.samples:*:136-151:spike")
    assert codes == [0, 0], output
    run, lines = trainer.directory / straight.stem, exact_lines(trainer, straight.stem)
    steps = list(range(1, STEPS + 1))
    assert [line["step"] for line in lines] == curve(run, "train/loss") == curve(run, "guard/rewinds") == steps
    assert [line["samples"] for line in lines] == [8 * step + 80 * (step > 9) for step in steps]
    assert max(line["loss"] for line in lines) < 7, "no trace of the spike is left"
    assert (lines[-1]["rewinds"], lines[-1]["spikes"], lines[-1]["skipped"]) == (1, 2, 0)
    applied, back = events(trainer, straight.stem)
    assert (applied["step"], applied["kind"], applied["action"]) == (18, "loss spike", "applied")
    assert (back["step"], back["action"]) == (19, "rewound")
    assert back["rewind"] == {"at_step": 19, "to_step": 9, "first_sample": 72, "num_samples": 80}
    assert {entry["sample"] for entry in back["documents"]} == set(range(144, 152))
    assert "back to step 9, samples 72 to 151 are left out" in output
    assert (trainer.status(straight.stem)["rewinds"], trainer.status(straight.stem)["resumed_step"]) == (1, 0)
    assert trainer.status(straight.stem)["goodput"]["lost_steps"] == 10
    for step in (9, 10, STEPS):
        assert which(trainer, straight.stem, step)["batch_hash"] == lines[step - 1]["batch_hash"]

    killed = recipe(trainer, f"{layout_name}-killed", **settings)
    codes, output = train(trainer, killed, "poison.samples:*:136-151:spike,poison.rewound:*:13:kill")
    assert codes == [-9, -9], output
    codes, output = train(trainer, killed)  # with what the rewind left out, though nothing is wrong any more
    assert codes == [0, 0], output
    assert trainer.status(killed.stem)["resumed_step"] == 9
    assert exact_lines(trainer, killed.stem) == lines
    assert curve(trainer.directory / killed.stem, "train/loss") == steps
    expected, found = (tensors(trainer.directory / path.stem) for path in (straight, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_restart_among_ignored_spikes_keeps_what_a_rewind_needs(trainer: Trainer) -> None:
    # Steps 9 to 12 are spikes, that are ignored, and the checkpoints of 10 and 12 lie among them; step 13 is NaN.
    path = recipe(
        trainer, "streak", guard={"on_spike": "ignore", "on_nan": "rewind"},
        checkpoint={"every_steps": 2, "keep_last": 1}, **LAYOUTS["zero2"],
    )  # fmt: skip
    bad = "poison.samples:*:64-95:spike,poison.samples:*:96-103:nan"
    codes, output = train(trainer, path, f"{bad},train.step:*:11:kill")
    assert codes == [-9, -9], output
    codes, output = train(trainer, path, bad)
    assert codes == [0, 0], output
    (back,) = [event for event in events(trainer, "streak") if event["action"] == "rewound"]
    assert (back["step"], back["rewind"]["to_step"]) == (13, 8)
    assert trainer.status("streak")["resumed_step"] == 10


def test_rewinds_end_where_the_spike_stays(trainer: Trainer) -> None:
    path = recipe(trainer, "endless", guard={"on_spike": "rewind", "max_rewinds": 2})
    codes, output = train(trainer, path, "poison.samples:*:96-9999:spike")
    assert codes == [93, 93], output
    assert "went back 2 times within 1000 steps" in trainer.status("endless")["reason"]
    found = [(event["step"], event["action"]) for event in events(trainer, "endless")]
    assert found == [
        (13, "applied"),
        (14, "rewound"),
        (11, "applied"),
        (12, "rewound"),
        (11, "applied"),
        (12, "stopped"),
    ]
    assert layout.steps_with_manifest(trainer.directory / "endless") == [5, 10]


def test_without_a_checkpoint_to_go_back_to_the_step_is_skipped(trainer: Trainer) -> None:
    path = recipe(trainer, "nowhere", checkpoint={"every_steps": 50}, guard={"on_spike": "rewind"})
    codes, output = train(trainer, path, "poison.samples:*:48-63:spike")
    assert codes == [0, 0], output
    assert "no checkpoint from before step 7 to go back to" in output
    assert [(e["step"], e["action"]) for e in events(trainer, "nowhere")] == [(7, "applied"), (8, "skipped")]


@pytest.mark.parametrize(
    ("run", "world", "rank", "sections"),
    [
        ("copies", 4, 2, {"deepspeed": {"base": "zero1"}}),
        ("norms", 4, 3, {"parallel": {"tensor": 2}, "model": {"dtype": "bfloat16"}}),
        ("ties", 2, 1, {"parallel": {"pipeline": 2}}),
    ],
)
def test_a_copy_that_differs_ends_the_run_before_it_is_saved(
    trainer: Trainer, run: str, world: int, rank: int, sections: dict[str, Any]
) -> None:
    name = "lm_head.weight" if run == "ties" else "transformer.ln_f.weight"
    path = recipe(trainer, run, guard={"replica_check_every_steps": 1000}, **sections)
    codes = trainer.train(path, faults=f"poison.weight:{rank}:10:{name}", before="poison", world=world)
    assert codes == [1] * world, path.with_suffix(".out").read_text()
    reason = trainer.status(run)["reason"]
    host = socket.gethostname()
    if run == "ties":  # two copies: who is wrong can't be known
        assert f"one of rank 0 on {host}, rank 1 on {host} is wrong: they differ in transformer.wte.weight" in reason
    else:
        assert f"step 10: rank {rank} on {host} differs from the others in {name}" in reason
    assert layout.steps_with_manifest(trainer.directory / run) == [5]
