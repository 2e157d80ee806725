"""Which CPUs a rank gets: its share of its node's, whole cores, near its GPU. Pure but for reading Linux's /sys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """What a rank knows of its place on its node."""

    allowed: frozenset[int]
    """CPUs it may run on now: those of the job, or fewer where the launcher has bound it already."""
    numa_node: int | None = None
    """NUMA node of its GPU; None: no GPU, or the machine doesn't say."""


@dataclass(frozen=True)
class NodeCpus:
    """How the CPUs of a node hang together."""

    cores: tuple[frozenset[int], ...]
    """The CPUs (hyperthreads) of each core, in order."""
    numa: Mapping[int, frozenset[int]]
    """The CPUs of each NUMA node."""


def shares(claims: Sequence[Claim], node: NodeCpus) -> list[frozenset[int]] | None:
    """Return the CPUs of each rank of a node, by local rank; None where ranks had better stay as they are.

    That is where the launcher has bound them (they may run on different CPUs), where there are fewer CPUs than ranks,
    and where a rank is alone with all CPUs. Ranks whose GPUs are on one NUMA node divide its CPUs evenly.
    """
    allowed = claims[0].allowed
    if any(claim.allowed != allowed for claim in claims):
        return None
    homes = [_home(claim, allowed, node) for claim in claims]
    if None in homes:
        homes = [None] * len(claims)
    found = [allowed] * len(claims)
    for home in set(homes):
        ranks = [rank for rank, other in enumerate(homes) if other == home]
        cpus = allowed if home is None else allowed & node.numa[home]
        parts = _split(cpus, len(ranks), node.cores)
        if parts is None and home is None:
            return None
        for rank, part in zip(ranks, parts or [cpus] * len(ranks), strict=True):
            found[rank] = part
    return None if all(share == allowed for share in found) else found


def _home(claim: Claim, allowed: frozenset[int], node: NodeCpus) -> int | None:
    if claim.numa_node is None or not node.numa.get(claim.numa_node, frozenset()) & allowed:
        return None
    return claim.numa_node


def _split(cpus: frozenset[int], parts: int, cores: Iterable[frozenset[int]]) -> list[frozenset[int]] | None:
    """Return ``parts`` equal shares of whole cores, of single CPUs where there are fewer cores, None if too few."""
    whole = [core & cpus for core in cores if core & cpus]
    units = whole if len(whole) >= parts else [frozenset([cpu]) for cpu in sorted(cpus)]
    if len(units) < parts:
        return None
    bounds = [len(units) * part // parts for part in range(parts + 1)]
    return [frozenset[int]().union(*units[first:last]) for first, last in pairwise(bounds)]


def num_cores(cpus: frozenset[int], node: NodeCpus) -> int:
    """Return how many cores ``cpus`` are of: hyperthreads of one core compute no faster together than one."""
    return max(1, sum(1 for core in node.cores if core & cpus))


def read_node(cpus: Iterable[int], system: Path = Path("/sys")) -> NodeCpus:
    """Return how ``cpus`` hang together; what /sys doesn't tell is taken as a core each and no NUMA nodes."""
    cores: dict[frozenset[int], None] = {}
    for cpu in sorted(cpus):
        text = _read(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(parse_cpus(text) if text else frozenset([cpu]), None)
    numa = {
        int(path.name[4:]): parse_cpus(_read(path / "cpulist") or "")
        for path in system.glob("devices/system/node/node[0-9]*")
        if path.name[4:].isdecimal()
    }
    order = {cpu: home for home, members in numa.items() for cpu in members}
    return NodeCpus(tuple(sorted(cores, key=lambda core: (order.get(min(core), 0), min(core)))), numa)


def numa_node_of(pci_address: str, system: Path = Path("/sys")) -> int | None:
    """Return the NUMA node of a device such as ``0000:3b:00.0``; None where /sys doesn't tell (-1: one node only)."""
    text = _read(system / "bus/pci/devices" / pci_address.lower() / "numa_node") or ""
    return int(text) if text.isdecimal() else None


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list as the kernel writes it: ``0-3,8``. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        if part.strip():
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def cpus_text(cpus: frozenset[int]) -> str:
    """Return ``0-3,8``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
