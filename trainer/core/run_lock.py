"""Who trains in a run directory: a lock held for as long as rank 0 lives, gone with it however it ends.

Two things say that the holder lives: the system's lock on RUN/.lock, which goes with the process but is not shared
between hosts by every file system; and a counter in the file, which the holder raises every few seconds. Clocks of
hosts are never compared. A holder that was suspended until another start took its place finds out by the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from trainer.core.errors import Problem, RefusedError
from trainer.core.lock_owner import RECORD_BYTES, Owner, Place, seconds_text
from trainer.core.private import file_mode

INTERVAL_SECONDS = 5.0
"""Between two heartbeats: on a network file system each is a small write."""
_RETRIES, _RETRY_SECONDS = 5, 0.05
"""For as long as this the lock may be that of a process that only looks who has it."""
_REFUSED_LOCK = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

Flock = Callable[[int, int], None]


def lock_path(run_directory: Path) -> Path:
    """Return RUN/.lock."""
    return run_directory / ".lock"


def holder(run_directory: Path, *, watch: bool = True) -> str | None:
    """Return who holds the directory ("pid 17 on node3, since ..."), None if nobody does.

    Where the file system does not share locks between hosts, the heartbeat of an owner on another one is watched, for
    12 s if it is dead. Without ``watch`` it counts as nobody: taking the lock will find out.
    """
    with contextlib.suppress(OSError):
        return _holder(lock_path(run_directory), watch)
    return None


def refuse_if_held(run_directory: Path) -> None:
    """Raise RefusedError if another process is known to train in the directory; waits for nothing."""
    owner = holder(run_directory, watch=False)
    if owner is not None:
        raise _held(run_directory, owner)


class RunLock:
    """Holds a run directory until released or until the process ends."""

    def __init__(
        self,
        run_directory: Path,
        *,
        say: Callable[[str], None] = print,
        place: Place | None = None,
        flock: Flock = fcntl.flock,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        """Take the lock, once it is known that no other process has it. Raises RefusedError if one has.

        ``say`` is told, in one line each, that the owner's heartbeat is watched and that a dead owner's lock was taken
        over. ``place`` and ``flock`` are for tests: another host, a file system without locks.
        """
        self._run, self._path = run_directory, lock_path(run_directory)
        self._say, self._flock = say, flock
        self._place = place or Place.here()
        self._owner = Owner.new(self._place, interval_seconds)
        self._mutex = threading.Lock()  # the heartbeat and still_mine() write the same record
        self._ended = threading.Event()
        self._lost = False
        self._descriptor = self._open_locked()
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another start is known to have taken the directory; a heartbeat old, and costs nothing."""
        return self._lost

    def still_mine(self) -> bool:
        """Return whether no other start has taken the directory; False from then on. One small read and write.

        To be asked before anything is committed that another start may have gone beyond.
        """
        with self._mutex:
            if self._ended.is_set():
                return False
            try:
                if not self._is_mine() and not self._restored():
                    self._lost = True
                    self._ended.set()
                    return False
                self._owner = self._owner.refreshed()
                self._write()
            except OSError:
                pass  # nothing is known of another owner; a disk that is full or away shows elsewhere
            return True

    def release(self) -> None:
        """Let the next job in, without a wait."""
        with self._mutex:
            if not self._ended.is_set():
                with contextlib.suppress(OSError):
                    if self._is_mine():
                        os.ftruncate(self._descriptor, 0)
                        os.fsync(self._descriptor)
            self._ended.set()
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(self._owner.interval_seconds):
            self.still_mine()

    def _open_locked(self) -> int:
        """Return RUN/.lock, open and locked where the file system can. Raises RefusedError if it is locked."""
        for attempt in count(1):
            descriptor = _open(self._path, os.O_RDWR | os.O_CREAT)
            try:
                self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self._path):
                    return descriptor
            except OSError as error:
                if error.errno not in _REFUSED_LOCK:
                    return descriptor  # a file system without locks: the content decides
                if attempt > _RETRIES:
                    os.close(descriptor)
                    raise _held(self._run, _describe(_content(self._path))) from error
            os.close(descriptor)
            time.sleep(_RETRY_SECONDS)
        raise AssertionError

    def _take(self) -> None:
        """Write this process into the file in place of nobody or of a dead owner."""
        while True:
            seen = _content(self._path)
            owner, explanation = Owner.parse(seen), None
            if owner is not None:
                why = owner.sign_of_death(self._place)
                if why is None and self._found_alive(owner, seen):
                    continue
                why = why or f"no sign of life for {seconds_text(owner.watch_seconds)}"
                explanation = f"stale lock of {owner.named()} ({why}) taken over"
            if self._claim(seen):
                if explanation:
                    self._say(explanation)
                return

    def _found_alive(self, owner: Owner, seen: bytes) -> bool:
        """Raise RefusedError if the owner of the record ``seen`` lives; return whether it has given up the lock."""
        if owner.lives_at(self._place):
            raise _held(self._run, str(owner))
        seconds = seconds_text(owner.watch_seconds)
        self._say(f"watching {lock_path(self._run)} for {seconds}: is {owner.named()} still alive?")
        if not _changes(self._path, seen, owner.watch_seconds):
            return False
        now = _content(self._path)
        if now:
            raise _held(self._run, _describe(now))
        return True

    def _claim(self, seen: bytes) -> bool:
        """Replace the content ``seen`` by ours and return True; False if another start was faster.

        Whoever creates RUN/.lock.claim-0 may write. The file is there for moments; where its maker died in between,
        it stays, and the next number decides.
        """
        for number in count():
            claim = self._path.with_name(f"{self._path.name}.claim-{number}")
            try:
                descriptor = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode())
            except FileExistsError:
                if self._claimant_died(claim, seen):
                    continue
                return False
            won = False
            try:
                os.write(descriptor, self._owner.record())
                if _content(self._path) == seen:
                    self._write()
                    won = True
            finally:
                os.close(descriptor)
                for done in range(0 if won else number, number + 1):
                    self._path.with_name(f"{self._path.name}.claim-{done}").unlink(missing_ok=True)
            return won and self._is_mine()
        raise AssertionError

    def _claimant_died(self, claim: Path, seen: bytes) -> bool:
        """Wait until ``claim`` or the lock's content ``seen`` changes; return True if neither does for too long."""
        deadline = time.monotonic() + self._owner.watch_seconds
        while time.monotonic() < deadline:
            if not claim.exists() or _content(self._path) != seen:
                return False
            other = Owner.parse(_content(claim))
            if other is not None and other.sign_of_death(self._place) is not None:
                return True
            time.sleep(_RETRY_SECONDS)
        return True

    def _is_mine(self) -> bool:
        """Return whether the file, as its name finds it now, names this process. Raises OSError."""
        owner = Owner.parse(_content(self._path))
        return owner is not None and owner.token == self._owner.token

    def _restored(self) -> bool:
        """Make RUN/.lock again where somebody deleted it; return whether that was so. Raises OSError."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file_mode())
        except FileExistsError:
            return False
        with contextlib.suppress(OSError):
            self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.dup2(descriptor, self._descriptor, inheritable=False)
        os.close(descriptor)
        return True

    def _write(self) -> None:
        record = self._owner.record()
        if os.pwrite(self._descriptor, record, 0) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        os.fdatasync(self._descriptor)  # to the server of a network file system: other hosts see it from then on


def _holder(path: Path, watch: bool) -> str | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _REFUSED_LOCK:
            return _describe(_content(path))
    finally:
        os.close(descriptor)
    content, place = _content(path), Place.here()
    owner = Owner.parse(content)
    if owner is None or owner.sign_of_death(place) is not None:
        return None
    if owner.lives_at(place) or (watch and _changes(path, content, owner.watch_seconds) and _content(path)):
        return str(owner)
    return None


def _open(path: Path, flags: int) -> int:
    """Open a lock file. Raises RefusedError unless it is a regular file of this user with one name, OSError."""
    try:
        # O_NONBLOCK: a FIFO of that name must not make us wait.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, file_mode())
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _unusable(path, "is not a regular file") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise _unusable(path, "may not be opened by this user") from error
        raise
    facts = os.fstat(descriptor)
    wrong = None
    if not stat.S_ISREG(facts.st_mode):
        wrong = "is not a regular file"
    elif facts.st_uid != os.geteuid():
        wrong = f"belongs to user {facts.st_uid}"
    elif facts.st_nlink > 1:
        wrong = "is another file's second name"
    if wrong is not None:
        os.close(descriptor)
        raise _unusable(path, wrong)
    return descriptor


def _content(path: Path) -> bytes:
    """Return what the file holds now: opened anew, since network file systems look for changes then.

    An unwritten file and one of an older trainer, which held "pid 17 on node3", name nobody: b"". Raises OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        content = os.pread(descriptor, RECORD_BYTES, 0)
    finally:
        os.close(descriptor)
    return content if Owner.parse(content) is not None else b""


def _changes(path: Path, seen: bytes, seconds: float) -> bool:
    """Return whether the content of ``path`` becomes another one than ``seen`` within ``seconds``."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, seconds / 24))
        if _content(path) != seen:
            return True
    return False


def _same_file(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file: it may have been deleted since."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _describe(content: bytes) -> str:
    owner = Owner.parse(content)
    return str(owner) if owner is not None else "unknown"


def _held(run_directory: Path, owner: str) -> RefusedError:
    rule = f"another job is training here ({owner})"
    return RefusedError(
        Problem("run.directory", str(run_directory), rule, "wait for it, stop it, or use another run.directory")
    )


def _unusable(path: Path, wrong: str) -> RefusedError:
    return RefusedError(Problem("run.directory", str(path), f"the lock file {wrong}", "remove it, or use another one"))
