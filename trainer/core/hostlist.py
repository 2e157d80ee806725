"""Slurm's short forms, expanded: ``node[1-3,7]`` and ``2(x3),1``.

Pure Python, because `scontrol` may be missing inside a container.
"""

from __future__ import annotations

import itertools
import re

_MAXIMUM_NAMES = 1_000_000
"""More than any cluster has: a corrupt range must not fill the memory."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\],\s]+)")


def expand_hostlist(text: str) -> list[str]:
    """Return the hosts of a Slurm host list, in order, e.g. ``n[08-10],login`` → n08, n09, n10, login.

    Several brackets in a name multiply, the last one fastest, as ``scontrol show hostnames`` does.
    Raises ValueError saying what is malformed.
    """
    hosts: list[str] = []
    for name in _split(text):
        hosts.extend(_expand_name(name))
        if len(hosts) > _MAXIMUM_NAMES:
            raise ValueError(f"names more than {_MAXIMUM_NAMES} hosts")
    return hosts


def expand_tasks_per_node(text: str) -> list[int]:
    """Return the tasks on each node, e.g. ``2(x3),1`` → 2, 2, 2, 1. Raises ValueError when malformed."""
    counts: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not COUNT or COUNT(xNODES)")
        nodes = int(match[2] or 1)
        if len(counts) + nodes > _MAXIMUM_NAMES:
            raise ValueError(f"names more than {_MAXIMUM_NAMES} nodes")
        counts.extend([int(match[1])] * nodes)
    return counts


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    names: list[str] = []
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise ValueError("has unbalanced brackets")
        if character == "," and depth == 0:
            names.append(text[start:position])
            start = position + 1
    if depth != 0:
        raise ValueError("has unbalanced brackets")
    names.append(text[start:])
    return names


def fills_hosts(distribution: str | None) -> bool:
    """Return whether ranks fill one host after the other, as srun does by default: SLURM_DISTRIBUTION."""
    return (distribution or "block").partition(":")[0] == "block"


def _expand_name(name: str) -> list[str]:
    pieces: list[list[str]] = []
    end, count = 0, 1
    for match in _PIECE.finditer(name):
        if match.start() != end:
            break
        end = match.end()
        piece = [match[2]] if match[1] is None else _expand_ranges(match[1])
        count *= len(piece)
        if count > _MAXIMUM_NAMES:
            raise ValueError(f"names more than {_MAXIMUM_NAMES} hosts")
        pieces.append(piece)
    if not name or end != len(name):
        raise ValueError(f"{name!r} is not a host name")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _expand_ranges(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"[{text}] is not a list of numbers and ranges")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= _MAXIMUM_NAMES:
            raise ValueError(f"the range {part} does not count up")
        numbers.extend(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return numbers
