"""Whether hosts can connect to each other: asked when ranks hang, since a lost route shows nowhere else."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_CONNECT_SECONDS = 2.0
MOST_ASKED = 32
"""Other hosts that one asks: all where there are few, else those at distances 1, 2, 4... in the order of nodes."""


class Listener:
    """Accepts connections on a free port until closed, and says nothing."""

    def __init__(self) -> None:
        """Raises OSError; RuntimeError where no thread can be started."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind(("", 0))
        self._socket.listen(128)
        try:
            threading.Thread(target=self._accept, name="reachability", daemon=True).start()
        except RuntimeError:
            self._socket.close()
            raise

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._socket.getsockname()[1]

    def close(self) -> None:
        """Stop."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()


def own_address(environment: Mapping[str, str], master_address: str) -> str:
    """Return the IPv4 address that other nodes know this one by: of the interface that ranks use, as far as is known.

    The one that NCCL or gloo was told to use, else that on the way to rank 0's host, else the host's name.
    """
    named = environment.get("GLOO_SOCKET_IFNAME") or environment.get("NCCL_SOCKET_IFNAME", "")
    for name in (part.strip("=") for part in named.split(",") if part and not part.startswith("^")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((master_address, 9))  # sends nothing, but chooses the interface
        address = str(asked.getsockname()[0])
        if not address.startswith("127."):
            return address
    return socket.gethostname()


def whom_to_ask(node: int, nodes: Sequence[int]) -> list[int]:
    """Return the nodes that ``node`` tries to reach."""
    others = [other for other in nodes if other != node]
    if len(others) <= MOST_ASKED:
        return others
    order = sorted(nodes)
    place, chosen, distance = order.index(node), list[int](), 1
    while distance < len(order) and len(chosen) < MOST_ASKED - 1:
        chosen += [order[(place + distance) % len(order)], order[(place - distance) % len(order)]]
        distance *= 2
    return sorted(set(chosen) - {node})


def unreachable(addresses: Mapping[str, str], until: float, pause: Callable[[float], None] = time.sleep) -> list[str]:
    """Return the hosts of which ``addresses`` (host → "address:port") can't be connected to by ``until`` (monotonic).

    A host counts as reached once it was; all are tried at the same time, and again until the end. ``pause`` is how to
    wait for so many seconds.
    """
    reached: set[str] = set()

    def attempt(host: str, address: str, port: int) -> None:
        while host not in reached and time.monotonic() < until:
            try:
                seconds = max(0.1, min(_CONNECT_SECONDS, until - time.monotonic()))
                socket.create_connection((address, port), timeout=seconds).close()
                reached.add(host)
            except OSError:
                time.sleep(0.2)

    threads: dict[str, threading.Thread] = {}
    for host, place in addresses.items():
        address, _, port = place.rpartition(":")
        if port.isdecimal():
            thread = threading.Thread(target=attempt, args=(host, address, int(port)), daemon=True)
            with contextlib.suppress(RuntimeError):  # no more threads: nothing can be said of this host
                thread.start()
                threads[host] = thread
    # One end for all: a name that can't be resolved keeps its thread for as long as the resolver likes.
    latest = until + _CONNECT_SECONDS
    while any(thread.is_alive() for thread in threads.values()) and time.monotonic() < latest:
        pause(0.05)
    return [host for host in threads if host not in reached]
