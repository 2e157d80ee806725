"""What every measured process of ``benchmark_data.py`` shares: its specification, its clock and its last line.

Standard library only: peers run it in an environment of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Spec = Mapping[str, Any]
Result = dict[str, Any]
"""Keys: tokens; optional deliver_seconds, steady_seconds, growth_bytes, parts (rows of their own)."""


def memory_bytes(field: str) -> int:
    """Return ``VmRSS`` (resident now) or ``VmHWM`` (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(subjects: Mapping[str, tuple[Callable[[Spec], Result], Sequence[str]]]) -> None:
    """Run the subject named on the command line and print its result, or what it can't import, as JSON."""
    name, spec = sys.argv[1], json.loads(sys.argv[2])
    run, packages = subjects[name]
    try:
        result = run(spec)
        result["versions"] = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    except ImportError as error:
        result = {"missing": str(error)}
    print(json.dumps(result), flush=True)
