"""Debian packages that tests need beside those of pip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

import pytest


def require(packages: Sequence[str], present: Callable[[], bool]) -> None:
    """Install what is missing. Where that can't be done: a failure in CI, a skip with its reason elsewhere."""
    if present():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        give_up(f"needs {' '.join(packages)}, and this is not root on Debian")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", *arguments], capture_output=True, text=True, env=environment, timeout=280, check=False
        )
        if done.returncode != 0:
            give_up(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-500:]}")


def give_up(reason: str) -> None:
    """End the test: it can't run here."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (never skipped in CI)")
    pytest.skip(reason)
