"""Rules about the Python environment. Nothing is imported: versions come from the packages' metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.core.errors import Problem
from trainer.preflight.facts import Facts, Failing, Rule

Version = tuple[int, ...]
# At least, below: the same bounds as pyproject.toml, compared by a test.
SUPPORTED: dict[str, tuple[Version, Version]] = {
    "torch": ((2, 10), (2, 14)),
    "deepspeed": ((0, 19, 8), (0, 20)),
    "transformers": ((5, 0), (6,)),
}
# First, last, what is wrong (upstream issue).
KNOWN_BAD: dict[str, tuple[tuple[Version, Version, str], ...]] = {
    "deepspeed": (
        ((0, 17, 6), (0, 18, 2), "computes wrong gradients with ZeRO-2 (deepspeedai/DeepSpeed#7718)"),
        ((0, 18, 3), (0, 19, 3), "computes wrong gradients with ZeRO-2 in bf16 (deepspeedai/DeepSpeed#8224)"),
    ),
}


def release(text: str) -> Version:
    """Return the numbers a version starts with: ``2.13.0+cpu`` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _versions(facts: Facts) -> Iterator[Problem]:
    for name, (least, below) in SUPPORTED.items():
        found = facts.versions.get(name)
        if found is None:
            continue  # nothing is trained where it is not installed
        version = release(found)
        if least <= version < below:
            continue
        bad = [reason for first, last, reason in KNOWN_BAD.get(name, ()) if first <= version[:3] <= last]
        wanted = f">={_text(least)},<{_text(below)}"
        yield Problem(name, found, bad[0] if bad else f"is not supported ({wanted})", f"pip install '{name}{wanted}'")


def _optimize(facts: Facts) -> Iterator[Problem]:
    if facts.python_optimizes:
        rule = "removes the assertions that DeepSpeed checks its input with"
        yield Problem("PYTHONOPTIMIZE", "python -O", rule, "unset PYTHONOPTIMIZE and run python without -O")


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)


RULES = (
    Rule("torch supported", _versions, Failing(facts={"versions": {"torch": "2.9.1"}})),
    Rule("deepspeed supported", _versions, Failing(facts={"versions": {"deepspeed": "0.20.0"}})),
    Rule("deepspeed computes right", _versions, Failing(facts={"versions": {"deepspeed": "0.18.1"}})),
    Rule("transformers supported", _versions, Failing(facts={"versions": {"transformers": "4.57.0"}})),
    Rule("assertions are on", _optimize, Failing(facts={"python_optimizes": True})),
)
