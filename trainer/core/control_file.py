"""RUN/control.json, by which a person asks a run for something, and RUN/stop, which ends it and keeps it from starting.

Both are control channels: only a regular file of this user or of root is heeded, and what it says is checked strictly.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import re
import secrets
import socket
import stat
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trainer.core.durable import replace_text
from trainer.core.errors import Problem, RefusedError

Action = Literal["save", "stop", "stop-after", "log-level", "clear"]
ACTIONS: tuple[Action, ...] = get_args(Action)
LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_MAXIMUM_BYTES = 4096
_MAXIMUM_STEP = 10**15
_ID = re.compile(r"[0-9a-f]{16}")
_WHO = re.compile(r"[\x20-\x7e]{1,200}")
Fingerprint = tuple[int, int, int, int]
"""Tells one state of a file from another, by stat alone."""


class ControlFileError(Exception):
    """A control file that may not be heeded; the text says why."""


@dataclass(frozen=True)
class Command:
    """One thing that a run is asked for."""

    id: str
    """16 hex digits, new for every command: a run acts on each once."""
    action: Action
    value: int | str | None
    """The step for stop-after, the name for log-level, nothing for others."""
    who: str
    """Shown to people, e.g. "ada@login1"; proves nothing."""
    time_unix: float
    requeue: bool = False
    """Of stop: the scheduler should run the job again. For batch scripts whose signals don't reach the ranks."""
    version: int = 1


def control_path(run_directory: Path) -> Path:
    """Return RUN/control.json."""
    return run_directory / "control.json"


def stop_path(run_directory: Path) -> Path:
    """Return RUN/stop."""
    return run_directory / "stop"


def new_command(action: Action, value: int | str | None = None, *, who: str = "", requeue: bool = False) -> Command:
    """Return a command of this user. Raises RefusedError for a value that the action doesn't take."""
    command = Command(secrets.token_hex(8), action, value, who or _here(), time.time(), requeue)
    wrong = _wrong(asdict(command))
    if wrong is not None:
        raise RefusedError(Problem("trainer control", f"{action} {value}", wrong))
    return command


def write_command(run_directory: Path, command: Command) -> None:
    """Replace RUN/control.json, mode 0600. Raises OSError."""
    previous = os.umask(0o077)
    try:
        replace_text(control_path(run_directory), json.dumps(asdict(command), indent=2) + "\n")
    finally:
        os.umask(previous)


def withdraw_command(run_directory: Path, command: Command) -> None:
    """Delete RUN/control.json if it still holds ``command``; nothing is raised."""
    with contextlib.suppress(OSError, ControlFileError):
        if read_command(run_directory) == command:
            control_path(run_directory).unlink()


def fingerprint(path: Path) -> Fingerprint | None:
    """Return what changes when the file does, None where there is none or it can't be seen. One stat."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def read_command(run_directory: Path) -> Command | None:
    """Return the command in RUN/control.json, None where there is none. Raises ControlFileError for a bad one."""
    try:
        # O_NONBLOCK: a FIFO of that name must not make us wait.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(control_path(run_directory), flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ControlFileError("is a link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)) from None
    try:
        _check_file(os.fstat(descriptor))
        content = os.read(descriptor, _MAXIMUM_BYTES + 1)
    except OSError as error:
        raise ControlFileError(os.strerror(error.errno or 0)) from None
    finally:
        os.close(descriptor)
    return _parse(content)


def stop_file_problem(run_directory: Path) -> str | None:
    """Return why RUN/stop is not heeded, "" where it is, None where there is none.

    Its mode doesn't matter: it says all by being there, and who could make it could also delete the run.
    """
    try:
        found = stop_path(run_directory).lstat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    return "" if found.st_uid in (0, os.geteuid()) else f"belongs to user {found.st_uid}"


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ControlFileError("is not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ControlFileError(f"belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ControlFileError(f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})")
    if found.st_nlink > 1:
        raise ControlFileError("is another file's second name")
    if found.st_size > _MAXIMUM_BYTES:
        raise ControlFileError(f"has {found.st_size} bytes, at most {_MAXIMUM_BYTES} are read")


def _parse(content: bytes) -> Command:
    if len(content) > _MAXIMUM_BYTES:
        raise ControlFileError(f"has more than {_MAXIMUM_BYTES} bytes")
    try:
        values: object = json.loads(content)
    except (ValueError, RecursionError):
        raise ControlFileError("is no JSON") from None
    wrong = _wrong(values)
    if wrong is not None:
        raise ControlFileError(wrong)
    return Command(**cast("dict[str, Any]", values))


def _wrong(values: object) -> str | None:
    """Return what is wrong with the fields of a command, None where nothing is."""
    names = {field.name for field in fields(Command)}
    if not isinstance(values, dict) or set(cast("dict[object, object]", values)) != names:
        return f"must be an object of {', '.join(sorted(names))}"
    given = cast("dict[str, object]", values)
    for name, pattern in (("id", _ID), ("who", _WHO)):
        text = given[name]
        if not isinstance(text, str) or pattern.fullmatch(text) is None:
            return f"{name} must match {pattern.pattern}"
    if type(given["version"]) is not int or given["version"] != 1:
        return "version must be 1"
    if type(given["time_unix"]) not in (int, float) or type(given["requeue"]) is not bool:
        return "time_unix must be a number, requeue true or false"
    return _wrong_action(given["action"], given["value"], given["requeue"])


def _wrong_action(action: object, value: object, requeue: object) -> str | None:
    if action not in ACTIONS:
        return f"action must be one of {', '.join(ACTIONS)}"
    if requeue and action != "stop":
        return "requeue is for stop alone"
    if action == "stop-after" and not (type(value) is int and 1 <= value <= _MAXIMUM_STEP):
        return "stop-after takes a step, an integer of at least 1"
    if action == "log-level" and not (isinstance(value, str) and value in LOG_LEVELS):
        return f"log-level takes one of {', '.join(LOG_LEVELS)}"
    if action in ("save", "stop", "clear") and value is not None:
        return f"{action} takes no value"
    return None


def _here() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without the user in its passwd
        name = str(os.geteuid())
    return "".join(c if " " <= c <= "~" else "?" for c in f"{name}@{socket.gethostname()}")[:200]
