"""What a rank says of its own end."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer.core import phases
from trainer.core.environ import RankEnvironment
from trainer.core.errors import EXIT_DO_NOT_RESTART, DoNotRestartError
from trainer.training import rank


def test_status_and_supervisor_know_the_exit_code_before_the_group_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving may hang, and is then ended from outside."""
    said = list[Any]()
    directory = SimpleNamespace(started=True, status=lambda **changes: said.append(changes["exit_code"]))

    def join(*_: Any, **__: Any) -> None:
        raise DoNotRestartError("the loss is NaN")

    from trainer.engine import build
    from trainer.training import asking

    monkeypatch.setattr(build, "join_group", join)
    monkeypatch.setattr(build, "leave_group", lambda: said.append("left"))
    monkeypatch.setattr(asking, "request_sources", lambda *_: None)
    monkeypatch.setattr(phases, "board", phases.Board())
    watchdog = SimpleNamespace(start_seconds=1.0)
    recipe = SimpleNamespace(
        launch=SimpleNamespace(rendezvous_timeout_seconds=1), resilience=SimpleNamespace(watchdog=watchdog)
    )
    log = SimpleNamespace(console_stream=sys.stdout)
    ranks = RankEnvironment(0, 1, 0, 1, 0, "127.0.0.1", 1, "environment")
    arguments: Any = (recipe, SimpleNamespace(total_steps=1), {}, ranks, directory, log, None, None)
    with pytest.raises(DoNotRestartError):
        cast("Any", rank)._train(*arguments)
    assert said == [EXIT_DO_NOT_RESTART, "left"]
    raised = phases.board.snapshot().raised
    assert raised is not None
    assert raised.exit_code == EXIT_DO_NOT_RESTART
