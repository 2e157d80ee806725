"""Signals as a terminal has them: jobs of a script and nohup start with some ignored, and children inherit that."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
