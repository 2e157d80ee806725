"""A free TCP port for the rendezvous of ranks that share this host with rank 0."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 29_999
"""Below Linux's ephemeral range (from 32768): an outgoing connection can't take the port between look and use."""


def free_port(host: str = "") -> int:
    """Return a TCP port of ``host`` ("" = every interface) that nothing listens on. Raises OSError when none is found.

    Random, so that two launchers starting together look at different ports.
    """
    for _ in range(100):
        port = random.SystemRandom().randint(_FIRST, _LAST)
        with socket.socket() as probe:
            # No SO_REUSEADDR: a port in TIME_WAIT would look free here and then refuse the rendezvous.
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port between {_FIRST} and {_LAST}")
