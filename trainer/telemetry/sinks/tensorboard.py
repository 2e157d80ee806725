"""RUN/tensorboard: event files in which every step stands exactly once, however often the run was killed.

Two things make it so. On a resume, older event files are cut back to the resumed step: the purge that TensorBoard
does when it meets a SessionLog START depends on the order of file names, and its fast loader (written in Rust) ignores
it. The START event is written as well, for a TensorBoard that was watching and has the superseded steps in memory.
"""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

# protobuf makes these classes when the module is imported, so that no type checker can see them
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.telemetry.record import CheckpointRecord, EvaluationRecord, GoodputRecord, StepRecord
from trainer.telemetry.sinks.append import AppendFile, replace_file

_FILE_PREFIX = "events.out.tfevents."
_HEADER_BYTES = 12  # length (uint64) and its masked crc32c (uint32)
_FOOTER_BYTES = 4  # masked crc32c of the data


class TensorBoardSink:
    """Write scalars, one event a record, handed to the kernel at once: a SIGKILL loses none."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        """Cut older files in ``directory`` back to ``resume_step`` (0: to nothing) and begin a new one.

        Raises OSError.
        """
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in event_files(directory):
            _cut(path, resume_step)
        self._file = AppendFile(_next_path(directory))
        now = time.time()
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=now, step=resume_step + 1 if resume_step > 0 else 0, session_log=start))

    def __str__(self) -> str:
        return str(self._directory)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of one step. Raises OSError (the file then still ends with a whole event)."""
        self._record(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the scalars of one evaluation. Raises OSError (the file then still ends with a whole event)."""
        self._record(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Write the scalars of one checkpoint. Raises OSError (the file then still ends with a whole event)."""
        self._record(record)

    def goodput(self, record: GoodputRecord) -> None:
        """Write the scalars of the run's goodput. Raises OSError (the file then still ends with a whole event)."""
        self._record(record)

    def message(self, text: str) -> None:
        """Ignore: messages are no curves."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, record: StepRecord | EvaluationRecord | CheckpointRecord | GoodputRecord) -> None:
        # NaN and Inf are legal: TensorBoard draws them as triangles.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.scalars()]
        self._write(Event(wall_time=record.time_unix, step=record.step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        self._file.append(buffer.getvalue())


def event_files(directory: Path) -> list[Path]:
    """Return the event files of ``directory`` in the order TensorBoard reads them."""
    return sorted(path for path in directory.glob(f"{_FILE_PREFIX}*") if path.is_file())


def _next_path(directory: Path) -> Path:
    """Name a file that sorts after all others, also on a host whose clock is behind or twice in a second."""
    seconds = int(time.time())
    for path in event_files(directory):
        stamp = re.match(r"\d+", path.name.removeprefix(_FILE_PREFIX))
        seconds = max(seconds, int(stamp.group()) + 1 if stamp else 0)
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
    return directory / f"{_FILE_PREFIX}{seconds:010d}.{host}.{os.getpid()}"


def _cut(path: Path, resume_step: int) -> None:
    """Drop events after ``resume_step`` and a torn tail.

    A file that loses all of them stays, with its version alone: a TensorBoard that is reading it would never get past
    a file that vanished.
    """
    replace_file(path, _kept(path, resume_step))


def _kept(path: Path, resume_step: int) -> Iterator[bytes]:
    for event, framed in _read(path):
        if event.HasField("file_version"):
            keep = True
        elif resume_step <= 0:
            keep = False  # training starts over, and so does the evaluation at step 0
        else:
            # The START event of an earlier resume carries the step after it.
            keep = event.step <= resume_step + event.HasField("session_log")
        if keep:
            yield framed


def _read(path: Path) -> Iterator[tuple[Event, bytes]]:
    """Yield events with the bytes that frame them, up to the first torn one (no reader gets past it).

    The checksum of the data is not verified: tensorboard's is pure Python, minutes for the file of a long run.
    """
    with path.open("rb") as file:
        while len(header := file.read(_HEADER_BYTES)) == _HEADER_BYTES:
            length, checksum = struct.unpack("<QI", header)
            if checksum != masked_crc32c(header[:8]):
                return
            body = file.read(length + _FOOTER_BYTES)
            if len(body) < length + _FOOTER_BYTES:
                return
            try:
                yield Event.FromString(body[:length]), header + body
            except DecodeError:
                return
