"""Clock, rates and utilization."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.telemetry.throughput import (
    MovingRate,
    StepClock,
    model_flops_utilization,
    peak_flops_per_second,
    peak_memory_bytes,
)

pytestmark = pytest.mark.fast


class Clock:
    seconds = 50.0

    def __call__(self) -> float:
        return self.seconds


def test_phases_add_up_and_inner_ones_are_taken_out_of_outer_ones() -> None:
    time = Clock()
    clock = StepClock(time)
    time.seconds += 100  # building the model
    clock.start_step()
    with clock.phase("data_wait"):
        time.seconds += 1
    time.seconds += 2
    with clock.phase("forward_backward"):
        time.seconds += 4
        with clock.phase("optimizer"):
            time.seconds += 8
        time.seconds += 16
    times = clock.finish_step()
    assert times.data_wait_seconds == 1
    assert times.other_seconds == 2
    assert times.forward_backward_seconds == 20
    assert times.optimizer_seconds == 8
    assert times.step_seconds == 31


def test_time_between_steps_is_not_counted_and_nothing_carries_over() -> None:
    time = Clock()
    clock = StepClock(time)
    with clock.phase("data_wait"):
        time.seconds += 5
    clock.finish_step()
    time.seconds += 1000  # evaluation
    clock.start_step()
    time.seconds += 3
    times = clock.finish_step()
    assert (times.step_seconds, times.data_wait_seconds) == (3, 0)


def test_a_phase_ends_when_its_block_raises() -> None:
    time = Clock()
    clock = StepClock(time)

    def fail() -> None:
        with clock.phase("optimizer"):
            time.seconds += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    time.seconds += 2
    times = clock.finish_step()
    assert (times.optimizer_seconds, times.other_seconds) == (1, 2)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.01, 10)), min_size=1, max_size=20))
def test_rate_is_amount_over_time_of_the_window(observations: list[tuple[int, float]]) -> None:
    rate = MovingRate(window=5)
    for amount, seconds in observations:
        rate.observe(amount, seconds)
    window = observations[-5:]
    expected = sum(amount for amount, _ in window) / sum(seconds for _, seconds in window)
    assert rate.per_second == pytest.approx(expected)
    assert rate.seconds_for(10 * expected) == pytest.approx(10)


def test_nothing_observed_means_nothing_known() -> None:
    rate = MovingRate()
    assert rate.per_second is None
    assert rate.seconds_for(5) is None
    rate.observe(0, 1)
    assert rate.seconds_for(5) is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert peak_flops_per_second(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops_per_second(name) is None
    assert model_flops_utilization(1000.0, 6e9, 1, peak_flops_per_second(name)) is None


def test_utilization() -> None:
    # Two devices of 300 TFLOP/s, 100,000 tokens/s of a model of 1e9 parameters: 6e14 of 6e14.
    assert model_flops_utilization(100_000.0, 6e9, 2, 300e12) == pytest.approx(1.0)


def test_peak_memory_counts_what_was_freed() -> None:
    before = peak_memory_bytes()
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert peak_memory_bytes() >= before
    assert 200 << 20 < peak_memory_bytes() < 1 << 40
