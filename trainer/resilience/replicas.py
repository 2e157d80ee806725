"""Which ranks' copies differ from the others': pure, from the digests of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Copies of one thing that are not equal."""

    key: int
    """Which one, as the digests name it."""
    ranks: tuple[int, ...]
    """Those that the others outvote; all holders where there is no majority."""
    outvoted: bool
    """Whether there is a majority."""


def differences(digests: Sequence[Mapping[int, int]]) -> list[Difference]:
    """Compare what the ranks hold, key → digest. Return what differs, in the order of the first rank that holds it."""
    held: dict[int, list[tuple[int, int]]] = {}
    for rank, mine in enumerate(digests):
        for key, value in mine.items():
            held.setdefault(key, []).append((rank, value))
    found: list[Difference] = []
    for key, copies in held.items():
        votes = Counter(value for _, value in copies)
        if len(votes) == 1:
            continue
        winner, count = votes.most_common(1)[0]
        outvoted = 2 * count > len(copies)
        ranks = tuple(rank for rank, value in copies if not outvoted or value != winner)
        found.append(Difference(key, ranks, outvoted))
    return found
