"""Read ranges of many files through few descriptors, with patience for a file system that stumbles."""

from __future__ import annotations

import errno
import os
import time
from collections import OrderedDict

from trainer.core import phases
from trainer.core.errors import DataError, Problem

# The ordinary limit of a process is 1,024 descriptors, and everything else needs some too.
_MAX_OPEN = 128
# What network file systems answer while a server restarts or a mount recovers; not ENOENT, not EACCES.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN}
_PAUSES_SECONDS = (0.1, 0.3, 1.0, 3.0)


class FileCache:
    """The most recently used descriptors of read-only files. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self.num_retries = 0
        """Reads that were repeated since the start."""

    def descriptor(self, path: str) -> int:
        """Return an open descriptor of ``path``; valid until the next call. Raises OSError."""
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        while len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        return descriptor

    def read_into(self, path: str, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on.

        Raises DataError if the file ends before, and for an error that four more tries, in four seconds, don't cure.
        """
        phases.board.read_begins(path)
        done, tries = 0, 0
        while done < len(view):  # one read returns at most 2 GiB
            try:
                got = os.preadv(self.descriptor(path), [view[done:]], offset + done)
            except OSError as error:
                if error.errno not in _TRANSIENT or tries == len(_PAUSES_SECONDS):
                    again = f" ({tries + 1} tries)" if tries else ""
                    raise _refused(path, f"byte {offset + done}", f"can't be read: {error.strerror}{again}") from None
                self.forget(path)  # a stale handle stays stale
                time.sleep(_PAUSES_SECONDS[tries])
                tries += 1
                self.num_retries += 1
                continue
            if got == 0:
                rule = f"has become shorter: expected at least {offset + len(view)} bytes"
                fix = "was it replaced while in use? restore it and start again"
                raise _refused(path, f"{os.stat(path).st_size} bytes", rule, fix)
            done += got
        phases.board.read_ends()

    def forget(self, path: str) -> None:
        """Close the descriptor of ``path``, if it is open."""
        if (descriptor := self._open.pop(path, None)) is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])


def _refused(path: str, value: str, rule: str, fix: str = "") -> DataError:
    return DataError(Problem(path, value, rule, fix), title="token shards")
