"""A command of the user's that is run after each commit, beside training: upload, export, evaluation elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from trainer.core.environ import without_ranks


class Hook:
    """Runs one command at a time; of the commits that come meanwhile the newest is next."""

    def __init__(self, command: tuple[str, ...], timeout_seconds: float, run_directory: Path) -> None:
        self._command = command
        self._timeout_seconds = timeout_seconds
        self._run = run_directory
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._running: tuple[int, Path] | None = None
        self._next: tuple[int, Path] | None = None

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints it needs."""
        return {commit[0] for commit in (self._running, self._next) if commit is not None}

    def committed(self, step: int, directory: Path) -> list[str]:
        """Run the command for a checkpoint, after the one that is running. Return sentences for the user."""
        said: list[str] = []
        if self._next is not None:
            said.append(f"warning: the hook is still busy: step {self._next[0]} is passed over")
        self._next = step, directory
        return said + self.poll()

    def poll(self) -> list[str]:
        """See whether it has ended and start the next. Return sentences for the user."""
        said: list[str] = []
        if self._process is not None:
            code = self._process.poll()
            if code is None and time.monotonic() - self._started > self._timeout_seconds:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                code = f"no end after {self._timeout_seconds:g} s"  # not waited for: its file system may hang
            if code is None:
                return said
            if code != 0:
                said.append(self._failed(f"exit code {code}" if isinstance(code, int) else code))
            self._process = self._running = None
        if self._next is not None:
            self._running, self._next = self._next, None
            said += self._start(*self._running)
        return said

    def wait(self) -> list[str]:
        """Return when nothing is left to run; each command may take as long as its timeout."""
        said: list[str] = []
        while self._process is not None or self._next is not None:
            said += self.poll()
            time.sleep(0.05)
        return said

    def leave(self) -> list[str]:
        """Start what is next, wait for nothing. Return sentences for the user."""
        said = self.poll()
        if self._running is not None:
            said.append(f"the hook of step {self._running[0]} is still running; this run does not wait for it")
        if self._next is not None:
            said.append(f"warning: the hook does not run for step {self._next[0]}: the one before is still running")
        return said

    def _start(self, step: int, directory: Path) -> list[str]:
        places = {"{step}": str(step), "{directory}": str(directory.absolute()), "{run}": str(self._run.absolute())}
        arguments = list(self._command)
        for place, value in places.items():
            arguments = [argument.replace(place, value) for argument in arguments]
        self._started = time.monotonic()
        try:
            with (self._run / "logs" / "hook.log").open("ab") as log:
                # Of a session of its own: Ctrl-C and a launcher's signals are not for it.
                self._process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=without_ranks(os.environ),
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            said = [self._failed(str(error))]
            self._running = None
            return said
        return []

    def _failed(self, why: str) -> str:
        step = self._running[0] if self._running else "?"
        return f"warning: checkpoint.hook failed for step {step}: {why} (see {self._run / 'logs' / 'hook.log'})"
