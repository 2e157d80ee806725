"""What a person reads after the check of an allocation. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.allocation.findings import Check, Finding, exit_code, suspect_hosts
from trainer.core.errors import EXIT_FAILURE, EXIT_OK

_VERDICTS = {EXIT_OK: "ok", EXIT_FAILURE: "a node is at fault"}
_WORDS = {"environment": "WRONG", "node": "FAULT", "note": "note"}


def report(title: str, checks: Sequence[Check], seconds: float) -> str:
    """Return a line per check: ok and what was found, or what is wrong, where, and the fix."""
    verdict = _VERDICTS.get(exit_code(checks), "the recipe or the environment is at fault")
    width = max((len(check.name) for check in checks), default=0)
    lines = [f"{title}: {verdict} ({seconds:.0f} s)"]
    for check in checks:
        wrong = any(finding.fault != "note" for finding in check.findings)
        if not wrong and check.summary:
            lines.append(_line(check.name, width, "ok", check.summary))
        for finding in check.findings:
            lines.append(_line(check.name, width, _WORDS[finding.fault], str(finding)))
    return "\n".join(lines)


def _line(name: str, width: int, word: str, text: str) -> str:
    indented = text.replace("\n", "\n" + " " * (width + 11))
    return f"  {name:<{width}}  {word:<5}  {indented}".rstrip()


def failure_fields(checks: Sequence[Check], launch: str, host: str, now_unix: float) -> dict[str, Any]:
    """Return RUN/failure.json for nodes at fault: who starts the job again reads which nodes to leave out."""
    faults = [finding for check in checks for finding in check.findings if finding.fault == "node"]
    first: Finding = faults[0]
    return {
        "version": 1,
        "time_unix": now_unix,
        "launch": launch,
        "class": first.failure,
        "retryable": True,
        "rank": None,
        "host": first.hosts[0] if first.hosts else host,
        "phase": "preflight",
        "step": None,
        "cause": "; ".join(finding.text for finding in faults[:3]),
        "fix": first.fix,
        "suspect_hosts": suspect_hosts(checks),
        "ranks": [],
    }
