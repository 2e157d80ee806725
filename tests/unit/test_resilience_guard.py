"""What the guard says of a step: spikes, no false alarms, patience, bounds, restarts; whose copy is the odd one."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.guard import GuardConfig
from trainer.core.errors import CheckpointError
from trainer.engine.replicas import digest, replica_digests, word_weights
from trainer.resilience.guard import GuardHistory, Rewind, Verdict, judge, must_stop, samples_left_out
from trainer.resilience.replicas import Difference, differences
from trainer.training.state import TrainState

pytestmark = pytest.mark.fast

DEFAULTS = GuardConfig()
WEIGHTS = word_weights(torch.device("cpu"))
SHORT = GuardConfig(window_steps=8, warmup_steps=0, patience_steps=2)


def run(
    policy: GuardConfig, steps: list[tuple[float, float]], history: GuardHistory | None = None, first: int = 1
) -> list[Verdict]:
    history = history or GuardHistory()
    verdicts: list[Verdict] = []
    for step, (loss, norm) in enumerate(steps, first):
        verdicts.append(judge(history, policy, step, loss, norm))
        history.note(verdicts[-1], policy, step, loss, norm)
    return verdicts


def noisy(seed: int, count: int, loss_noise: float, norm_noise: float) -> list[tuple[float, float]]:
    """A normal run: the loss falls from 11 to 2.5, norms rise in the warm-up and then fall, both with noise."""
    draw = random.Random(seed)
    found: list[tuple[float, float]] = []
    for step in range(count):
        loss = 2.5 + 8.5 / (1 + step / 60) ** 0.7
        norm = 0.3 + 2 * min(1, step / 150) / (1 + step / 800)
        found.append((loss + draw.gauss(0, loss_noise), norm * math.exp(draw.gauss(0, norm_noise))))
    return found


@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.0, 0.0), (0.005, 0.02), (0.05, 0.2), (0.3, 0.6)])
def test_no_false_alarm_on_a_normal_run(loss_noise: float, norm_noise: float) -> None:
    for seed in range(4):
        verdicts = run(DEFAULTS, noisy(seed, 1500, loss_noise, norm_noise))
        assert [step for step, verdict in enumerate(verdicts, 1) if verdict.kind != "sound"] == []
        assert sum(verdict.loss is not None for verdict in verdicts) == 1400, "judged after the warm-up"


@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.005, 0.02), (0.05, 0.2)])
def test_a_spike_is_told_whatever_the_noise(loss_noise: float, norm_noise: float) -> None:
    steps = noisy(0, 800, loss_noise, norm_noise)
    steps[600] = steps[600][0] + 2.0, steps[600][1]
    steps[700] = steps[700][0], steps[700][1] * 50
    verdicts = run(DEFAULTS, steps)
    kinds = {step: verdict.kind for step, verdict in enumerate(verdicts) if verdict.kind != "sound"}
    assert kinds == {600: "loss spike", 700: "gradient spike"}
    assert verdicts[600].action == verdicts[700].action == "apply", "the default says it and goes on"


def test_a_jump_of_the_loss_is_a_spike_for_a_while_and_then_usual() -> None:
    steps = noisy(1, 600, 0.02, 0.1)
    verdicts = run(DEFAULTS, [(loss + 3.0 * (step >= 400), norm) for step, (loss, norm) in enumerate(steps)])
    bad = [step for step, verdict in enumerate(verdicts) if verdict.kind == "loss spike"]
    assert bad[0] == 400
    assert bad == list(range(400, 400 + len(bad)))
    assert len(bad) <= DEFAULTS.window_steps // 2


QUIET = [(2.0, 1.0)] * 8


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0), (2.0, math.nan)])
@pytest.mark.parametrize("action", ["skip", "rewind", "stop"])
def test_nan_and_inf_never_change_weights(bad: tuple[float, float], action: str) -> None:
    policy = GuardConfig.model_validate({"on_nan": action})
    for before in ([], QUIET):  # in the warm-up as well
        verdict = run(policy, [*before, bad])[-1]
        assert (verdict.kind, verdict.action) == ("not finite", action)


def test_what_each_policy_does_about_spikes() -> None:
    spikes = [*QUIET, (9.0, 1.0), (9.0, 1.0), (2.0, 1.0), (9.0, 1.0), (2.0, 99.0)]
    for policy, actions in (
        ("ignore", ["apply"] * 5),
        ("skip", ["skip", "skip", "apply", "skip", "skip"]),
        ("rewind", ["apply", "rewind", "apply", "apply", "rewind"]),
        ("stop", ["apply", "stop", "apply", "apply", "stop"]),
    ):
        verdicts = run(SHORT.model_copy(update={"on_spike": policy}), spikes)
        assert [verdict.action for verdict in verdicts[8:]] == actions, policy


def test_rewinds_are_bounded_within_a_period() -> None:
    policy = SHORT.model_copy(update={"on_spike": "rewind", "patience_steps": 1, "rewind_period_steps": 100})
    history = GuardHistory(losses=[2.0] * 8, grad_norms=[1.0] * 8, rewound_at=[10, 50, 60])
    found = {step: judge(history, policy, step, 9.0, 1.0) for step in (20, 61, 109, 110, 400)}
    assert {step for step, verdict in found.items() if verdict.action == "stop"} == {20, 61, 109}
    assert all(verdict.exhausted == (verdict.action == "stop") for verdict in found.values())


def test_refused_steps_in_a_row_end() -> None:
    assert [must_stop(skips, 2) for skips in range(4)] == [False, False, False, True]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 20), st.floats(0.01, 500)), min_size=1, max_size=60),
    st.sampled_from(["ignore", "skip", "rewind", "stop"]),
    st.integers(0, 59),
)
def test_a_restart_anywhere_judges_alike(steps: list[tuple[float, float]], policy: str, cut: int) -> None:
    settings_ = SHORT.model_copy(update={"on_spike": policy})
    state = TrainState()
    before = run(settings_, steps[:cut], state.guard)
    state.guard.rewinds.append(Rewind(9, 5, 40, 32))
    text = json.dumps(state.to_json(), allow_nan=False)
    restored = TrainState.from_json(json.loads(text))
    assert restored == state
    assert before + run(settings_, steps[cut:], restored.guard, first=cut + 1) == run(settings_, steps)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 20), min_size=8, max_size=40), st.floats(1e-3, 1e3))
def test_the_verdict_does_not_depend_on_the_scale(losses: list[float], factor: float) -> None:
    scaled = [(loss * factor, 1.0) for loss in losses]
    kinds = [verdict.kind for verdict in run(SHORT, [(loss, 1.0) for loss in losses])]
    near = any(  # a loss at the limit may fall on either side of it
        verdict.loss and math.isclose(loss, verdict.loss.limit, rel_tol=1e-9)
        for loss, verdict in zip(losses, run(SHORT, [(loss, 1.0) for loss in losses]), strict=True)
    )
    assert near or [verdict.kind for verdict in run(SHORT, scaled)] == kinds


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [1.0]}, {"losses": ["x"], "grad_norms": [1.0]}, {"losses": [math.nan], "grad_norms": [1.0]},
        {"bad_since": -1}, {"spikes": 1.5}, {"rewinds": [3]}, {"rewinds": [{"at_step": 1}]}, {"rewound_at": [None]},
    ],
)  # fmt: skip
def test_a_history_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="history of the guard"):
        TrainState.from_json(TrainState().to_json() | {"guard": GuardHistory().to_json() | changes})
    with pytest.raises(CheckpointError, match="history of the guard"):
        TrainState.from_json(TrainState().to_json() | {"guard": 3})


def test_a_state_from_before_the_guard_is_read() -> None:
    values = TrainState(step=7).to_json()
    del values["guard"]
    assert TrainState.from_json(values) == TrainState(step=7)


def test_samples_left_out_count_for_the_steps_behind_them() -> None:
    rewinds = [Rewind(14, 10, 80, 32), Rewind(13, 10, 112, 24), Rewind(40, 30, 300, 8)]
    assert [samples_left_out(rewinds, step) for step in (10, 11, 30, 31)] == [0, 56, 56, 64]


def test_the_odd_one_out_is_named() -> None:
    same = {1: 5, 2: 6}
    assert differences([same, same, {3: 1}, same]) == []
    assert differences([same, {1: 5, 2: 7}, same]) == [Difference(2, (1,), True)]
    assert differences([{1: 5}, {1: 6}]) == [Difference(1, (0, 1), False)]
    assert differences([{1: 5}, {1: 6}, {1: 7}, {1: 5}]) == [Difference(1, (0, 1, 2, 3), False)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.data())
def test_a_digest_changes_with_any_bit_and_not_with_the_place(
    count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    values = torch.arange(count).to(dtype)
    before = int(digest(values, WEIGHTS))
    room = torch.zeros(count + 7, dtype=dtype)
    shift = data.draw(st.integers(0, 7))
    room[shift : shift + count] = values
    assert int(digest(room[shift : shift + count], WEIGHTS)) == before
    flat = values.view(torch.uint8)
    flat[data.draw(st.integers(0, flat.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert int(digest(values, WEIGHTS)) != before


def test_a_digest_of_several_chunks_knows_their_order() -> None:
    halves = torch.zeros(2, WEIGHTS.numel(), dtype=torch.int64)
    halves[0, 5], halves[1, 9] = 3, 4
    assert int(digest(halves, WEIGHTS)) != int(digest(halves.flip(0), WEIGHTS))
    tied = torch.ones(3)
    assert replica_digests([("a", tied), ("b", tied), ("c", torch.empty(0))], ()).keys() == {"a"}
