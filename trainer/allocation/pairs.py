"""Which node sends to which, and what the measured speeds say. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from trainer.allocation.findings import Check, Fault, Finding
from trainer.core.units import format_bytes

Link = tuple[int, int]
"""Sending and receiving node."""
MOST_SHIFTS = 3


def rounds(nodes: int, shifts: int = MOST_SHIFTS) -> list[list[Link]]:
    """Return rounds of links such that a node is at one end of one link at a time.

    Node i sends to i + 1, then i + 2, ... up to ``shifts``; each shift takes 2 rounds, 3 where its circles are odd: the
    number of rounds does not grow with that of the nodes.
    """
    plan: list[list[Link]] = []
    for shift in range(1, min(shifts, nodes - 1) + 1):
        circles = math.gcd(nodes, shift)
        length = nodes // circles
        parts: list[list[Link]] = [[], [], []]
        for start in range(circles):
            for place in range(length):
                last_of_odd = length % 2 == 1 and place == length - 1
                sender = (start + place * shift) % nodes
                parts[2 if last_of_odd else place % 2].append((sender, (sender + shift) % nodes))
        plan += [part for part in parts if part]
    return plan


def judge_links(hosts: Sequence[str], speeds: Mapping[Link, float], fraction: float) -> Check:
    """Return the check of ``speeds`` (bytes/s) between nodes: the slowest is named, below ``fraction`` it is at fault.

    A node is slow if even its best link is: the slow links of the others lead to it.
    """
    if not speeds:
        return Check("network", "one node")
    median = statistics.median(speeds.values())
    nodes = range(len(hosts))
    sends = {node: max((v for link, v in speeds.items() if link[0] == node), default=math.inf) for node in nodes}
    receives = {node: max((v for link, v in speeds.items() if link[1] == node), default=math.inf) for node in nodes}
    slow = [node for node in nodes if sends[node] < fraction * median]
    for node in nodes:
        from_sound = [v for (sender, receiver), v in speeds.items() if receiver == node and sender not in slow]
        if node not in slow and from_sound and max(from_sound) < fraction * median:
            slow.append(node)
    worst = min(nodes, key=lambda node: min(sends[node], receives[node] * (1 + 1e-9)))
    speed = min(sends[worst], receives[worst])
    verb = "sends" if sends[worst] <= receives[worst] else "receives"
    summary = (
        f"{format_bytes(median)}/s between nodes (median), slowest: {hosts[worst]} {verb} {format_bytes(speed)}/s, "
        f"{speed / median:.2f} of it"
    )
    findings = [
        Finding(
            "node",
            f"{hosts[node]} {'sends' if sends[node] < fraction * median else 'receives'} only "
            f"{format_bytes(min(sends[node], receives[node]))}/s, {min(sends[node], receives[node]) / median:.2f} of "
            f"the median of {format_bytes(median)}/s",
            "let the site look at its network, or lower launch.preflight.slow_fraction",
            (hosts[node],),
            "network",
        )
        for node in slow
    ]
    return Check("network", summary, tuple(findings))


def judge_speeds(name: str, unit: str, speeds: Mapping[str, float], fraction: float, fault: Fault) -> Check:
    """Return the check of one speed of each node (its slowest rank's), in ``unit`` (giga something) per second."""
    median = statistics.median(speeds.values())
    worst = min(speeds, key=lambda host: speeds[host])
    shown = {host: f"{value / 1e9:.3g} {unit}/s" for host, value in speeds.items()}
    where = f", slowest: {worst}, {speeds[worst] / median:.2f} of the median" if len(speeds) > 1 else ""
    findings = [
        Finding(
            fault,
            f"{host} does {shown[host]}, {value / median:.2f} of the median of {median / 1e9:.3g} {unit}/s",
            "let the site look at it, or lower launch.preflight.slow_fraction" if fault == "node" else "",
            (host,) if fault == "node" else (),
        )
        for host, value in speeds.items()
        if value < fraction * median
    ]
    return Check(name, f"{median / 1e9:.3g} {unit}/s per rank{where}", tuple(findings))
