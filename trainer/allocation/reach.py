"""Can every node open a connection to every other? Asked with plain sockets, before a library waits for minutes."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from trainer.allocation.findings import Check, Finding, listed

_MOST_PEERS = 128
"""Neighbours that a node tries; with more nodes each is still tried by so many others."""


class Door:
    """A listening port of this node. Nothing is read from it: that a connection opens is the answer."""

    def __init__(self, towards: tuple[str, int]) -> None:
        """``towards``: a host and port of rank 0; the address that leads there is the one to be tried."""
        self._socket = socket.create_server(("", 0), backlog=_MOST_PEERS + 8)
        self.address = (_own_address(towards), int(self._socket.getsockname()[1]))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def unreachable(node: int, doors: Sequence[tuple[str, int]], seconds: float) -> list[int]:
    """Return the numbers of the nodes whose door does not open within ``seconds``."""
    peers = [(node + distance) % len(doors) for distance in range(1, min(len(doors), _MOST_PEERS + 1))]
    waiting: dict[int, socket.socket] = {}
    failed: list[int] = []
    selector = selectors.DefaultSelector()
    try:
        for peer in peers:
            waiting[peer] = socket.socket()
            waiting[peer].setblocking(False)
            if waiting[peer].connect_ex(tuple(doors[peer])) not in (0, errno.EINPROGRESS):
                failed.append(peer)
                continue
            selector.register(waiting[peer], selectors.EVENT_WRITE, peer)
        deadline = time.monotonic() + seconds
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                selector.unregister(key.fileobj)
                if waiting[key.data].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    failed.append(key.data)
        return sorted({*failed, *(key.data for key in selector.get_map().values())})
    finally:
        selector.close()
        for connection in waiting.values():
            connection.close()


def judge(hosts: Sequence[str], failed: Mapping[int, Sequence[int]]) -> Check:
    """Return the check of which node (by number) could not reach which; the first host is that of rank 0."""
    pairs = sorted({(min(a, b), max(a, b)) for a, others in failed.items() for b in others})
    name = "connections"
    if not pairs:
        return Check(name, f"every one of {len(hosts)} nodes reaches the others" if len(hosts) > 1 else "one node")
    counts = Counter(node for pair in pairs for node in pair)
    most = max(counts.values())
    # Of equals the last: rank 0's node, which all others reach to, stays.
    worst = max(node for node, count in counts.items() if count == most)
    shown = listed(f"{hosts[a]} and {hosts[b]}" for a, b in pairs)
    fix = "look at the network of these nodes: routes, firewall, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    finding = Finding("node", f"no connection between {shown}", fix, (hosts[worst],), "network")
    return Check(name, "", (finding,))


def _own_address(towards: tuple[str, int]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(towards)  # sends nothing: the kernel chooses the interface
        return str(probe.getsockname()[0])
