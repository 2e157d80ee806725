"""Is it the same program, recipe and data on all ranks? Pure: facts in, checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainer.allocation.facts import RankFacts
from trainer.allocation.findings import Check, Finding, blame, listed, ranks_text

_SHOWN = ("python", "torch", "deepspeed", "transformers", "CUDA", "NCCL", "driver")


def compare_ranks(ranks: Sequence[RankFacts]) -> list[Check]:
    """Return the checks that compare ranks with each other."""
    return [_versions(ranks), _recipe(ranks), _cores(ranks)]


def odd_ones(values: Mapping[int, str]) -> tuple[str, dict[str, list[int]]]:
    """Return the value of most ranks (of equals, that of the lowest rank) and who has which other one."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(values):
        groups.setdefault(values[rank], []).append(rank)
    common = max(groups, key=lambda value: len(groups[value]))
    return common, {value: found for value, found in groups.items() if value != common}


def _versions(ranks: Sequence[RankFacts]) -> Check:
    hosts = {facts.rank: facts.host for facts in ranks}
    findings: list[Finding] = []
    common_of: dict[str, str] = {}
    for name in dict.fromkeys(name for facts in ranks for name in facts.versions):
        # The driver's is told by one rank of each node.
        common, others = odd_ones({facts.rank: facts.versions[name] for facts in ranks if name in facts.versions})
        common_of[name] = common
        for value, found in others.items():
            text = f"{name} {value} on {ranks_text(found, hosts)}, {common} on the others"
            findings.append(Finding("environment", text, "use one environment on all nodes: launch.slurm.setup"))
    codes = {facts.rank: facts.node.code for facts in ranks if facts.node is not None}
    if codes:
        for found in odd_ones(codes)[1].values():
            text = f"the trainer's own source differs on {listed(hosts[rank] for rank in found)}"
            findings.append(Finding("environment", text, "install the same commit everywhere"))
    summary = ", ".join(f"{name} {common_of[name]}" for name in _SHOWN if name in common_of)
    return Check("versions", summary, tuple(findings))


def _recipe(ranks: Sequence[RankFacts]) -> Check:
    """The same resolved recipe: files that differ from node to node, and environments, change it."""
    hosts = {facts.rank: facts.host for facts in ranks}
    findings: list[Finding] = list(_refusals(ranks, hosts))
    told = [facts for facts in ranks if not facts.refused]
    summary = ""
    for name in dict.fromkeys(name for facts in told for name in facts.digests):
        common, others = odd_ones({facts.rank: facts.digests[name] for facts in told})
        summary = summary or f"digest {common} on all ranks"
        for value, found in others.items():
            text = f"the {name} of {ranks_text(found, hosts)} differs (digest {value}, the others' {common})"
            fix = "start all ranks with the same arguments, from files that all nodes share"
            findings.append(Finding("environment", text, fix))
    return Check("recipe and data", summary, tuple(findings))


def _refusals(ranks: Sequence[RankFacts], hosts: Mapping[int, str]) -> Iterator[Finding]:
    refused = [facts for facts in ranks if facts.refused]
    for text in dict.fromkeys(facts.refused for facts in refused):
        found = [facts.rank for facts in refused if facts.refused == text]
        lacking = tuple(dict.fromkeys(hosts[rank] for rank in found))
        everywhere = len(found) == len(ranks)
        # A whole node that refuses what others take: something is missing there.
        whole = all(facts.refused for facts in ranks if facts.host in lacking)
        fault = blame(lacking, hosts.values()) if whole else "environment"
        where = "" if everywhere else f"on {ranks_text(found, hosts)} only: "
        yield Finding(fault, f"{where}{text}", hosts=lacking if fault == "node" else ())


def _cores(ranks: Sequence[RankFacts]) -> Check:
    """Ranks of a node that share too few cores wait for each other."""
    findings: list[Finding] = []
    fewest = 0
    for found in _by_host(ranks).values():
        cores = set[int]().union(*(facts.cores for facts in found))
        if not cores:
            continue
        fewest = min(fewest or len(cores), len(cores))
        if len(cores) < len(found):
            text = f"{len(found)} ranks of {found[0].host} share {len(cores)} core{'s' if len(cores) > 1 else ''}"
            findings.append(Finding("note", text, "set launch.slurm.cpus_per_task"))
    numa = max((facts.node.numa_nodes for facts in ranks if facts.node is not None), default=1)
    summary = f"{fewest} of a node's ranks" if fewest else "not known"
    return Check("cores", summary + (f", {numa} NUMA nodes" if numa > 1 else ""), tuple(findings))


def _by_host(ranks: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    groups: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        groups.setdefault(facts.host, []).append(facts)
    return groups
