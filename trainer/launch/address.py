"""Where rank 0 is and by which interface to get there, when host names don't say it."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import MutableMapping

import psutil

from trainer.core.environ import RankEnvironment
from trainer.launch.slurm_commands import SlurmCommandError, node_address

_ANYWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): the route there is the default one. Nothing is sent."""


def reachable(ranks: RankEnvironment) -> RankEnvironment:
    """Return ``ranks`` with the address that SLURM itself uses where the name of rank 0's host does not resolve."""
    if ranks.launcher != "slurm" or _addresses(ranks.master_address):
        return ranks
    try:
        address = node_address(ranks.master_address)
    except SlurmCommandError:
        return ranks  # the rendezvous says what can't be resolved
    return dataclasses.replace(ranks, master_address=address) if address and _addresses(address) else ranks


def choose_interface(ranks: RankEnvironment, environment: MutableMapping[str, str]) -> None:
    """Tell gloo the interface that leads to rank 0, where it would choose one that does not leave this host.

    gloo takes the address of the host's own name. Debian maps that to 127.0.1.1, and some sites to nothing.
    """
    if ranks.world_size == ranks.local_world_size or environment.get("GLOO_SOCKET_IFNAME"):
        return
    if any(not address.startswith("127.") for address in _addresses(socket.gethostname())):
        return
    own = next((own for own in map(_own_address, (ranks.master_address, _ANYWHERE)) if own), None)
    interface = _interface_of(own)
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface


def _interface_of(own: str | None) -> str | None:
    """Return the interface with the address ``own``; where no route told one, the first that is up and no loopback."""
    states = psutil.net_if_stats()
    for name, entries in psutil.net_if_addrs().items():
        addresses = {entry.address for entry in entries if entry.family == socket.AF_INET}
        outward = addresses and states[name].isup and not any(address.startswith("127.") for address in addresses)
        if own in addresses or (own is None and outward):
            return name
    return None


def _own_address(target: str) -> str | None:
    """Return this host's address on the way to ``target``, None where that is the loopback or no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # of a datagram socket: looks up the route only
            own = str(probe.getsockname()[0])
        except OSError:
            return None
    return None if own.startswith("127.") else own


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
