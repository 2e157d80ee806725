"""`install()` spoils how a rank meets the others, as MEET says: late, other-port, unknown-name, other-address."""

from __future__ import annotations

import os
import time


def install() -> None:
    kind = os.environ["MEET"]
    if kind == "late" and os.environ["RANK"] == "1":
        time.sleep(5)
    if kind == "taken":
        os.environ["MASTER_PORT"] = os.environ["TAKEN_PORT"]
    if kind == "unknown-name":
        os.environ["MASTER_ADDR"] = "no-such-host.invalid"
    if kind == "other-address":
        os.environ["MASTER_ADDR"] = "192.0.2.1"  # reserved for documentation: no host has it
