"""One log file per rank that catches everything the process prints, C++ libraries and subprocesses included.

``RUN/logs/rank-00000.log`` is appended to across restarts, and put aside as ``rank-00000.log.1`` when it grows too
large. The real console stays reachable through the streams of :class:`RankLog`, so that a person sees only what is
meant for them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from trainer.core.private import directory_mode, file_mode

logger = logging.getLogger(__name__)

STDOUT = 1
STDERR = 2


_DIRECTORY_RANKS = 1000
"""Ranks whose logs lie in one directory: parallel file systems are slow where one holds many thousand files."""
_CHECK_SECONDS = 10.0


def rank_log_path(run_directory: Path, rank: int) -> Path:
    """Return RUN/logs/rank-00000.log; from rank 1000 on, RUN/logs/01xxx/rank-01000.log."""
    logs = run_directory / "logs"
    if rank >= _DIRECTORY_RANKS:
        logs /= f"{rank // _DIRECTORY_RANKS:02d}xxx"
    return logs / f"rank-{rank:05d}.log"


class RankLog:
    """Descriptors 1 and 2, Python's logging and warnings go to a file until :meth:`restore`.

    Made by :func:`open_rank_log`. A context manager: an exception that leaves the block is written to the log, then
    the console is restored, so that the caller can tell the user.
    """

    path: Path
    first_path: Path
    """The log of rank 0."""
    console_stream: TextIO
    """What stdout was on rank 0 (``isatty()`` tells the truth); swallows everything on other ranks."""
    error_stream: TextIO
    """What stderr was, on every rank: for the one message that explains why this rank failed."""

    def __init__(self, path: Path, rank: int) -> None:
        """Redirect to ``path``. Raises OSError, with nothing redirected, if the log can't be opened."""
        self.path = self.first_path = path
        self._restored = False
        _ensure_open(STDOUT)
        _ensure_open(STDERR)
        descriptor = _open_log(path)
        encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
        self._saved = {STDOUT: os.dup(STDOUT), STDERR: os.dup(STDERR)}  # not inheritable: children get the log only
        self._buffering = _line_buffered(sys.stdout), _line_buffered(sys.stderr)
        _flush()
        os.dup2(descriptor, STDOUT)
        os.dup2(descriptor, STDERR)
        os.close(descriptor)
        # A file is block-buffered: without this a SIGKILL would lose the last lines, and the order would be wrong.
        _set_line_buffering(sys.stdout, True)
        _set_line_buffering(sys.stderr, True)
        console = os.dup(self._saved[STDOUT]) if rank == 0 else os.open(os.devnull, os.O_WRONLY)
        self.console_stream = _text_stream(console, encoding)
        self.error_stream = _text_stream(os.dup(self._saved[STDERR]), encoding)
        self._route_logging(rank)
        self._ended = threading.Event()

    def keep_below(self, limit_bytes: int) -> None:
        """Look at the log's size every 10 s from now on, and keep it and what was put aside below ``limit_bytes``."""

        def watch() -> None:
            while not self._ended.wait(_CHECK_SECONDS):
                with contextlib.suppress(OSError):  # a full disk, say: the run is worth more than its log's size
                    self.put_aside_above(limit_bytes // 2)

        threading.Thread(target=watch, name="log size", daemon=True).start()

    def put_aside_above(self, limit_bytes: int) -> bool:
        """Start a new file where the log is larger than ``limit_bytes``, keeping the old one as PATH.1. Raises OSError.

        Only files can be cut: C++ libraries and child processes write to descriptors. Processes that were started
        before go on writing into the old file.
        """
        if os.fstat(STDERR).st_size <= limit_bytes:
            return False
        os.replace(self.path, f"{self.path}.1")
        descriptor = _open_log(self.path)
        os.write(descriptor, f"==== continued; what was before is in {self.path.name}.1 ====\n".encode())
        for target in (STDOUT, STDERR, self._handler.stream.fileno()):
            os.dup2(descriptor, target, inheritable=target in (STDOUT, STDERR))
        os.close(descriptor)
        return True

    def __enter__(self) -> RankLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, SystemExit):
            logger.error("stopped by an exception", exc_info=error)
        self.restore()

    def restore(self) -> None:
        """Give descriptors, logging and warnings back as they were. May be called twice."""
        if self._restored:
            return
        self._restored = True
        self._ended.set()
        logging.captureWarnings(self._captured_warnings)
        root = logging.getLogger()
        root.handlers[:] = self._handlers
        root.setLevel(self._level)
        self._handler.close()
        for stream in (self.console_stream, self.error_stream):
            # The terminal may be gone (ssh closed, `| head`): nobody is left to be told.
            with contextlib.suppress(OSError):
                stream.close()
        _flush()
        for target, saved in self._saved.items():
            os.dup2(saved, target)
            os.close(saved)
        _set_line_buffering(sys.stdout, self._buffering[0])
        _set_line_buffering(sys.stderr, self._buffering[1])

    def _route_logging(self, rank: int) -> None:
        root = logging.getLogger()
        self._handlers, self._level = list(root.handlers), root.level
        # captureWarnings keeps what it replaced in a module variable; there is no public way to ask.
        self._captured_warnings = getattr(logging, "_warnings_showwarning", None) is not None
        # A stream of its own, on descriptor 2's file: it works after somebody replaced or closed sys.stderr.
        self._handler = _OwnedStreamHandler(_text_stream(os.dup(STDERR), "utf-8"))
        self._handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
        root.handlers[:] = [self._handler]
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)


def open_rank_log(run_directory: Path, rank: int, limit_bytes: int | None = None) -> RankLog:
    """Send everything this process prints to RUN/logs/rank-<rank>.log from now on. Raises OSError.

    ``limit_bytes`` bounds the log and the part of it that is put aside. Call it before torch and DeepSpeed are
    imported: they give streams to their loggers when they load.
    """
    log = RankLog(rank_log_path(run_directory, rank), rank)
    log.first_path = rank_log_path(run_directory, 0)
    if limit_bytes is not None:
        log.put_aside_above(limit_bytes // 2)
        log.keep_below(limit_bytes)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"==== start {now} rank {rank} pid {os.getpid()} host {socket.gethostname()} ====", flush=True)
    return log


class _OwnedStreamHandler(logging.StreamHandler[TextIO]):
    """Closes its stream with itself."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()
        super().close()


def _open_log(path: Path) -> int:
    """Open for appending, as private as the run: logs show paths, host names and data."""
    path.parent.mkdir(mode=directory_mode(), parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, file_mode())
    size = os.fstat(descriptor).st_size
    # A SIGKILL may have cut the last line; the header of this start must still begin a line.
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def _ensure_open(descriptor: int) -> None:
    """Put /dev/null where the parent closed a standard stream, or the log itself might get its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _text_stream(descriptor: int, encoding: str) -> TextIO:
    # backslashreplace: a message must never fail because a terminal speaks ASCII.
    return open(descriptor, "w", buffering=1, encoding=encoding, errors="backslashreplace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _line_buffered(stream: object) -> bool:
    return isinstance(stream, io.TextIOWrapper) and stream.line_buffering


def _set_line_buffering(stream: object, value: bool) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(line_buffering=value)
