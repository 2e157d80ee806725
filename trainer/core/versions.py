"""Which versions of what the trainer stands on were tested together."""

from __future__ import annotations

from importlib import metadata

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
"""What the tests run with; launch/constraints.txt installs the same."""


def untested() -> str | None:
    """Return one sentence that names what is installed in another version than tested, None if nothing is."""
    installed = {name: metadata.version(name).partition("+")[0] for name in TESTED}
    different = [
        f"{name} {installed[name]} (tested: {TESTED[name]})" for name in TESTED if installed[name] != TESTED[name]
    ]
    return f"warning: untested version of {', '.join(different)}" if different else None
