"""Where rank 0 is, when its host's name means nothing here."""

from __future__ import annotations

import dataclasses
import socket

from trainer.core.environ import RankEnvironment
from trainer.launch.slurm_commands import SlurmCommandError, node_address


def reachable(ranks: RankEnvironment) -> RankEnvironment:
    """Return ``ranks`` with the address that SLURM itself uses where the name of rank 0's host does not resolve."""
    if ranks.launcher != "slurm" or _resolves(ranks.master_address):
        return ranks
    try:
        address = node_address(ranks.master_address)
    except SlurmCommandError:
        return ranks  # the rendezvous says what can't be resolved
    return dataclasses.replace(ranks, master_address=address) if address and _resolves(address) else ranks


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False
