"""How ranks tell rank 0 what they found before any collective is trusted: a key-value store on rank 0's host."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented there

from trainer.core.environ import RankEnvironment, uses_agent_store

_POLL_SECONDS = 0.05
_MOST_EXCHANGES = 32
_FAREWELL_SECONDS = 5.0


class Concluded(Exception):
    """Rank 0 has given its verdict: this rank ends with ``code``."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class MissingRanks(Exception):
    """Ranks that said nothing in time."""

    def __init__(self, phase: str, ranks: list[int], values: dict[int, Any]) -> None:
        """``values``: what the others have said."""
        super().__init__(phase)
        self.phase, self.ranks, self.values = phase, ranks, values


class Board:
    """One rank's connection. Raises OSError or RuntimeError where rank 0 can't be reached."""

    def __init__(self, place: RankEnvironment, arrival_seconds: float, total_seconds: float) -> None:
        self._place = place
        self._arrival_seconds = arrival_seconds
        self._deadline = time.monotonic() + total_seconds
        self._number = 0
        serves = place.rank == 0 and not uses_agent_store(os.environ)
        if not serves:
            # Longer than rank 0 waits: it must say who is missing before a launcher ends it because of us.
            _knock(place.master_address, place.master_port, total_seconds)
        self._store = self._connect(serves)

    def _connect(self, serves: bool = False) -> TCPStore:
        return TCPStore(
            self._place.master_address, self._place.master_port, None, serves,
            timeout=timedelta(seconds=self._arrival_seconds), wait_for_workers=False,
        )  # fmt: skip

    def connect_again(self) -> TCPStore:
        """Return another connection to the same store: one that waits keeps its other users waiting."""
        return self._connect()

    @property
    def seconds_left(self) -> float:
        """Return the seconds until everything must be over."""
        return max(0.1, self._deadline - time.monotonic())

    def exchange(self, phase: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Hand ``value`` (JSON) to rank 0 and return what ``decide`` makes of the values of all ranks there.

        Raises MissingRanks on rank 0, Concluded on the others.
        """
        self._number += 1
        key = self._key(self._number)
        self._store.set(f"{key}/{self._place.rank}", json.dumps(value))
        if self._place.rank == 0:
            reply = decide(self._gather(key, phase))
            self._store.set(f"{key}/reply", json.dumps({"value": reply}))
            return reply
        self._store.wait([f"{key}/reply"], timedelta(seconds=self.seconds_left + _FAREWELL_SECONDS))
        answer = json.loads(self._store.get(f"{key}/reply"))
        if "code" in answer:
            self._store.set(self._key(f"bye/{self._place.rank}"), "")
            raise Concluded(int(answer["code"]))
        return answer["value"]

    def conclude(self, code: int, present: list[int]) -> None:
        """Tell the ranks that are still there how it ends, and stay until they have heard it."""
        answer = json.dumps({"code": code})
        for number in range(max(1, self._number), self._number + _MOST_EXCHANGES):
            self._store.set(f"{self._key(number)}/reply", answer)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        keys = [self._key(f"bye/{rank}") for rank in present if rank != self._place.rank]
        with contextlib.suppress(RuntimeError):
            while keys and not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)

    def _gather(self, key: str, phase: str) -> list[Any]:
        patience = self._arrival_seconds if self._number == 1 else self.seconds_left
        deadline = time.monotonic() + min(patience, self.seconds_left)
        values: dict[int, Any] = {}
        while len(values) < self._place.world_size:
            for rank in range(self._place.world_size):
                # Not wait(): a handler of a signal would run only after it.
                if rank not in values and self._store.check([f"{key}/{rank}"]):
                    values[rank] = json.loads(self._store.get(f"{key}/{rank}"))
            if len(values) < self._place.world_size:
                if time.monotonic() > deadline:
                    missing = [rank for rank in range(self._place.world_size) if rank not in values]
                    raise MissingRanks(phase, missing, values)
                time.sleep(_POLL_SECONDS)
        return [values[rank] for rank in range(self._place.world_size)]

    def present(self) -> list[int]:
        """Return the ranks that have arrived at all."""
        key = self._key(1)
        return [rank for rank in range(self._place.world_size) if self._store.check([f"{key}/{rank}"])]

    @staticmethod
    def _key(name: int | str) -> str:
        return f"trainer-preflight/{name}"


def _knock(host: str, port: int, seconds: float) -> None:
    """Return when the port opens. Raises OSError; torch would print a page a try."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError:
            if time.monotonic() > deadline - 0.5:
                raise
        time.sleep(0.2)
