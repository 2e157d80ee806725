"""StopFlag: which signals stop a run, how ranks agree, and what never cuts a save short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from trainer.resilience.signals import StopFlag

pytestmark = pytest.mark.fast

RANK = """
import sys, time
from trainer.resilience.signals import StopFlag
flag = StopFlag()
flag.install()
print("ready", flush=True)
while flag.received is None:
    time.sleep(0.01)
print("saving", flush=True)
time.sleep(float(sys.argv[1]))
print(flag.received, flush=True)
sys.exit(75)
"""


@pytest.fixture
def flag():
    made = StopFlag()
    with made:
        yield made


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_signal_sets_the_flag(flag, name):
    before = time.time()
    assert flag.received is None
    assert flag.received_unix is None
    os.kill(os.getpid(), signal.Signals[name])
    assert flag.received == name
    assert before - 1 <= flag.received_unix <= time.time() + 1


def test_first_signal_is_the_reason(flag):
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.received == "SIGUSR1"


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def start_rank(save_seconds: float) -> subprocess.Popen[str]:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(save_seconds)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    return rank


def test_repeated_sigterm_never_cuts_a_save_short():
    rank = start_rank(save_seconds=1.5)
    for _ in range(4):
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    out, _ = rank.communicate(timeout=10)
    assert (rank.returncode, out) == (75, "saving\nSIGTERM\n")


def test_interrupt_delivered_twice_at_once_is_one():
    rank = start_rank(save_seconds=0.5)
    rank.send_signal(signal.SIGINT)
    time.sleep(0.1)
    rank.send_signal(signal.SIGINT)
    out, _ = rank.communicate(timeout=10)
    assert (rank.returncode, out) == (75, "saving\nSIGINT\n")


def test_second_interrupt_stops_at_once():
    rank = start_rank(save_seconds=60)
    rank.send_signal(signal.SIGINT)
    time.sleep(0.7)
    rank.send_signal(signal.SIGINT)
    out, _ = rank.communicate(timeout=5)
    assert (rank.returncode, out) == (130, "saving\n")
