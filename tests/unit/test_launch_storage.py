"""Actions on a file system that may not answer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from trainer.launch.storage import Storage

pytestmark = pytest.mark.fast


def test_what_does_not_answer_is_left() -> None:
    calls, go = list[int](), threading.Event()
    storage = Storage(lambda: calls.append(1))
    assert storage.ask(lambda: 1, 0, 5) == 1
    assert storage.ask(go.wait, None, 0.3) is None
    assert len(calls) > 2  # signals were looked for meanwhile
    began = time.monotonic()
    assert storage.ask(lambda: 1, 0, 5) == 0  # still busy: nothing is waited for
    assert time.monotonic() - began < 1
    go.set()
    time.sleep(0.2)
    assert storage.ask(lambda: 1, 0, 5) == 1


def test_errors_and_a_lack_of_threads_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise RuntimeError("can't start new thread")

    storage = Storage(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda self: fail())
        assert storage.ask(lambda: 1, 0, 5) == 0
    assert storage.ask(fail, 0, 5) == 0
    assert storage.ask(lambda: Path("/nowhere/at/all").read_text(), None, 5) is None
    assert storage.ask(lambda: 1, 0, 5) == 1
    assert capsys.readouterr().err.count("the watchdog failed") == 1
