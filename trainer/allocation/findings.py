"""What a check of the allocation says, and what follows for the job. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.core.errors import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED

Fault = Literal["environment", "node", "note"]
"""``environment``: the recipe or what is installed, the same start would fail on other nodes too. ``node``: another
node may do. ``note``: worth saying."""
FailureClass = Literal["node", "network", "disk", "rendezvous"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what and where, whose fault it is and how to mend it."""

    fault: Fault
    text: str
    fix: str = ""
    hosts: tuple[str, ...] = ()
    """Nodes that are suspect; only with ``fault="node"``."""
    failure: FailureClass = "node"
    """The class of RUN/failure.json."""

    def __str__(self) -> str:
        return self.text + (f" → {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    summary: str
    """What was found where nothing is wrong."""
    findings: tuple[Finding, ...] = ()


def exit_code(checks: Iterable[Check]) -> int:
    """Return 2 where a person must mend something, 1 where other nodes may do, 0 where training may start."""
    faults = {finding.fault for check in checks for finding in check.findings}
    if "environment" in faults:
        return EXIT_REFUSED
    return EXIT_FAILURE if "node" in faults else EXIT_OK


def suspect_hosts(checks: Iterable[Check]) -> list[str]:
    """Return the nodes at fault, each once, in the order they were found."""
    found = [
        host for check in checks for finding in check.findings if finding.fault == "node" for host in finding.hosts
    ]
    return list(dict.fromkeys(found))


def blame(bad: Iterable[str], hosts: Iterable[str]) -> Fault:
    """Return whose fault it is if ``bad`` of all ``hosts`` lack something: what most nodes lack, others lack too."""
    lacking = set(bad)
    return "node" if 2 * len(lacking) <= len(set(hosts)) and len(set(hosts)) > 1 else "environment"


def ranks_text(ranks: Iterable[int], host_of: Mapping[int, str]) -> str:
    """Return "rank 3 (node2)" or "ranks 2-3,7 (node2, node5)"."""
    numbers = sorted(ranks)
    hosts = listed(dict.fromkeys(host_of[rank] for rank in numbers if rank in host_of))
    return f"rank{'s' if len(numbers) > 1 else ''} {spans(numbers)}" + (f" ({hosts})" if hosts else "")


def spans(numbers: Sequence[int]) -> str:
    """Return sorted ``numbers`` as "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def listed(words: Iterable[str], most: int = 8) -> str:
    """Return "a, b, c", cut with a count: a thousand names would hide the message."""
    found = list(words)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
