"""Meet at rank 0 before torch.distributed starts, so that whoever is missing is named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import (
    DistError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] - documented at this place
)

from trainer.core.environ import RankEnvironment, host_of_rank, uses_agent_store
from trainer.core.errors import RendezvousError

_NAME_SECONDS = 30.0
"""A name server may be slow at the start of a job; a name that it does not know after this long is wrong."""
_GRACE_SECONDS = 30.0
"""The others wait this much longer than rank 0 does, for its word on who is missing."""


def roll_call(ranks: RankEnvironment, timeout_seconds: float) -> TCPStore:
    """Return a store of all ranks once every rank has said its number; keep it until the process group is there.

    Raises RendezvousError: the address does not resolve or nobody answers there, the port is taken, or ranks are
    missing, which rank 0 then names for all.
    """
    deadline = time.monotonic() + timeout_seconds
    _resolve(ranks, min(timeout_seconds, _NAME_SECONDS))
    store = _connect(ranks, max(1.0, deadline - time.monotonic()))
    try:
        store.set(f"roll/{ranks.rank}", socket.gethostname())
        if ranks.rank == 0:
            missing = _missing(store, ranks.world_size, max(1.0, deadline - time.monotonic()))
            store.set("roll/verdict", _sentence(ranks, missing, timeout_seconds) if missing else "")
        store.wait(["roll/verdict"], timedelta(seconds=timeout_seconds + _GRACE_SECONDS))
        verdict = store.get("roll/verdict").decode()
    except DistError as error:
        rule = f"rank 0 at {_place(ranks)} did not answer within {timeout_seconds:.0f} s: it ended or hangs"
        raise RendezvousError(f"rank {ranks.rank} on {socket.gethostname()}: {rule}") from error
    if verdict:
        raise RendezvousError(verdict)
    return store


def _resolve(ranks: RankEnvironment, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(ranks.master_address, ranks.master_port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                rule = f"{socket.gethostname()} can't resolve MASTER_ADDR = {ranks.master_address} ({error.strerror})"
                raise RendezvousError(f"{rule} → set MASTER_ADDR to the IP address of rank 0's host") from error
        time.sleep(0.5)


def _connect(ranks: RankEnvironment, seconds: float) -> TCPStore:
    first = ranks.rank == 0 and not uses_agent_store(os.environ)
    try:
        # Several tenants: torch's own store of rank 0 shares the server. Not waiting: who is missing is asked below.
        return TCPStore(
            ranks.master_address, ranks.master_port, ranks.world_size, first, timedelta(seconds=seconds),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except DistError as error:
        if first and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            rule = f"MASTER_PORT = {ranks.master_port} is in use on {socket.gethostname()}, where rank 0 runs"
            raise RendezvousError(f"{rule} → start again, or set another MASTER_PORT for all ranks") from error
        where = f"rank {ranks.rank} on {socket.gethostname()} reached nobody at {_place(ranks)} within {seconds:.0f} s"
        hint = "is it an address of rank 0's host, and does a firewall let the port through?"
        if first:
            hint = f"rank 0 listens there itself: MASTER_ADDR is no address of {socket.gethostname()}"
        raise RendezvousError(f"{where} → {hint}") from error


def _missing(store: TCPStore, world_size: int, seconds: float) -> list[int]:
    names = [f"roll/{rank}" for rank in range(world_size)]
    try:
        store.wait(names, timedelta(seconds=seconds))
    except DistError:
        return [rank for rank, name in enumerate(names) if not store.check([name])]
    return []


def _sentence(ranks: RankEnvironment, missing: Sequence[int], seconds: float) -> str:
    shown = ", ".join(_named(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {ranks.world_size} ranks did not come to {_place(ranks)} within {seconds:.0f} s: {shown} → "
        "see their logs and hosts; launch.rendezvous_timeout_seconds waits longer"
    )


def _named(rank: int) -> str:
    host = host_of_rank(os.environ, rank)
    return f"rank {rank}" + (f" ({host})" if host else "")


def _place(ranks: RankEnvironment) -> str:
    return f"{ranks.master_address}:{ranks.master_port}"
