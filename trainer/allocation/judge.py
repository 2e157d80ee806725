"""Rank 0's part: judges what the ranks have said, phase by phase, and decides whether to go on. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.allocation import pairs, reach, shared_directory
from trainer.allocation.compare_nodes import compare_nodes
from trainer.allocation.compare_ranks import compare_ranks
from trainer.allocation.facts import RankFacts
from trainer.allocation.findings import Check, Fault, Finding, blame, exit_code, listed, ranks_text, spans
from trainer.allocation.needs import needs_of
from trainer.config.run import Recipe
from trainer.core.errors import EXIT_OK
from trainer.core.units import format_bytes


class Stop(Exception):
    """Enough is known for a verdict."""


class Judge:
    """Collects checks. Each method takes the values of all ranks, in their order, and returns what they do next."""

    def __init__(self, recipe: Recipe | None, local_world_size: int, host_of_rank: Callable[[int], str | None]) -> None:
        """``host_of_rank``: where a rank was started, if the launcher says so."""
        self.checks: list[Check] = []
        self.hosts: list[str] = []
        """Host of each node; a node is named by its first rank."""
        self._recipe, self._local_world_size, self._host_of_rank = recipe, local_world_size, host_of_rank
        self._host_of: dict[int, str] = {}
        self._leaders: list[int] = []
        self._nodes: dict[str, Any] = {}
        self._ranks_of: list[list[int]] = []
        self._directory: Path | None = None
        self._written: list[Mapping[str, Any]] = []
        self._on_gpus = False

    @property
    def fraction(self) -> float:
        """Return below which share of the median a node is at fault."""
        return self._recipe.launch.preflight.slow_fraction if self._recipe is not None else 0.0

    def facts(self, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Compare what ranks said of themselves; return the leaders of the nodes and where they may write."""
        ranks = [RankFacts.from_json(value) for value in values]
        self._host_of = {facts.rank: facts.host for facts in ranks}
        self._leaders = [facts.rank for facts in ranks if facts.node is not None]
        self.hosts = [self._host_of[rank] for rank in self._leaders]
        self._nodes = {facts.host: facts.node for facts in ranks if facts.node is not None}
        self._on_gpus = any(facts.gpu_count for facts in ranks)
        by_node = [[f.rank for f in ranks if f.node_rank == ranks[leader].node_rank] for leader in self._leaders]
        fewest = min(map(len, by_node))
        self._ranks_of = [found[:fewest] for found in by_node]
        arrived = f"all {len(ranks)} ranks on {len(set(self.hosts))} node{'s' if len(set(self.hosts)) > 1 else ''}"
        self.checks.append(Check("ranks", arrived))
        self.checks += compare_ranks(ranks)
        if self._recipe is not None:
            self.checks += compare_nodes(ranks, needs_of(self._recipe, len(ranks), self._local_world_size))
        self._stop_if_unfit()
        assert self._recipe is not None  # a recipe that rank 0 refuses is a finding
        directory = Path(self._recipe.run.directory)
        try:
            self._directory = directory / shared_directory.begin(directory, self._recipe.run.group_access)
        except OSError as error:
            text = f"{directory} can't be written: {error.strerror}"
            self._fail("run directory", Finding("environment", text, "choose another run.directory"))
        return {"leaders": self._leaders, "directory": str(self._directory)}

    def written(self, values: Sequence[Any]) -> None:
        """Note what the leaders wrote, and rename something for them to see."""
        self._written = self._of_leaders("run directory", values)
        assert self._directory is not None
        shared_directory.rename(self._directory)

    def seen(self, values: Sequence[Any]) -> list[Any]:
        """Judge what each leader saw of the others' files; return the doors to be tried."""
        seen = self._of_leaders("run directory", values)
        assert self._recipe is not None
        run = self._recipe.run.directory
        self.checks.append(shared_directory.judge(run, self.hosts, self._written, seen, self._nodes))
        self._stop_if_unfit()
        return [value["door"] for value in seen]

    def built(self, values: Sequence[Any]) -> None:
        """Judge whether the operations that the run needs could be built on each node."""
        built = self._of_leaders("operations", values)
        names = built[0]["names"]
        self.checks.append(Check("operations", f"{listed(names)} built on every node" if names else "none needed"))

    def reached(self, values: Sequence[Any]) -> list[list[int]]:
        """Judge which node reached which; return the ranks of each node that measure links."""
        failed = {node: value["failed"] for node, value in enumerate(self._of_leaders("connections", values))}
        self.checks.append(reach.judge(self.hosts, failed))
        self._stop_if_unfit()
        return self._ranks_of

    def measured(self, values: Sequence[Mapping[str, Any]]) -> NoReturn:
        """Judge numbers and speeds of collectives, links and ranks. The last phase."""
        self._errors("collectives", values)
        wrong = {rank: value["wrong"] for rank, value in enumerate(values) if value["wrong"]}
        findings: list[Finding] = []
        if wrong:
            names = listed(dict.fromkeys(name for found in wrong.values() for name in found))
            hosts = tuple(dict.fromkeys(self._host_of[rank] for rank in wrong))
            text = f"wrong results of {names} on {ranks_text(wrong, self._host_of)}"
            findings.append(Finding("node", text, "let the site look at these nodes", hosts))
        speed = format_bytes(values[0]["all_reduce"])
        summary = f"right results, all-reduce of {len(values)} ranks {speed}/s (bus bandwidth)"
        self.checks.append(Check("collectives", summary if len(values) > 1 else "one rank", tuple(findings)))
        self.checks.append(pairs.judge_links(self.hosts, self._links(values), self.fraction))
        # On CPU what a rank can do depends on what else runs there: said, not judged.
        fault: Fault = "node" if self._on_gpus else "note"
        for name, unit in (("compute", "GFLOP"), ("memory", "GB")):
            speeds: dict[str, float] = {}
            for rank, value in enumerate(values):
                host = self._host_of[rank]
                speeds[host] = min(speeds.get(host, value[name]), value[name])
            self.checks.append(pairs.judge_speeds(name, unit, speeds, self.fraction, fault))
        raise Stop

    def missing(self, phase: str, ranks: Sequence[int], values: Mapping[int, Mapping[str, Any]]) -> None:
        """Note ``ranks`` that said nothing in time, where others said ``values``."""
        if self._host_of:
            hosts = tuple(dict.fromkeys(self._host_of[rank] for rank in ranks))
            text = f"{ranks_text(ranks, self._host_of)} did not answer in time ({phase})"
            fix = "look at these nodes, and at what the ranks have printed"
            self.checks.append(Check("ranks", "", (Finding("node", text, fix, hosts),)))
            return
        silent = tuple(dict.fromkeys(host for rank in ranks if (host := self._host_of_rank(rank)) is not None))
        arrived = {value["host"] for value in values.values()}
        # Where others of its ranks have arrived the node is not the cause.
        silent = tuple(host for host in silent if host not in arrived)
        which = f"rank{'s' if len(ranks) > 1 else ''} {spans(sorted(ranks))} of {len(ranks) + len(values)}"
        text = f"{which} did not arrive" + (f": no word from {listed(silent)}" if silent else "")
        fix = "see what srun says of starting them there, and look at the network between these nodes and rank 0's"
        self.checks.append(Check("ranks", "", (Finding("node", text, fix, silent, "rendezvous"),)))

    def clean(self) -> None:
        """Delete what was written."""
        if self._directory is not None:
            shared_directory.clean(self._directory)

    def _links(self, values: Sequence[Mapping[str, Any]]) -> dict[pairs.Link, float]:
        """Add up what the ranks of a node received at a time: each may have a network card of its own."""
        links: dict[pairs.Link, float] = {}
        for value in values:
            for sender, receiver, speed in value["links"]:
                links[sender, receiver] = links.get((sender, receiver), 0.0) + speed
        return links

    def _of_leaders(self, name: str, values: Sequence[Any]) -> list[Mapping[str, Any]]:
        self._errors(name, values)
        return [values[rank] for rank in self._leaders]

    def _errors(self, name: str, values: Sequence[Any]) -> None:
        """Stop where a rank could not do its part."""
        failed = {rank: value["failed_with"] for rank, value in enumerate(values) if value and "failed_with" in value}
        if not failed:
            return
        findings = [
            _error(text, [rank for rank in failed if failed[rank] == text], self._host_of, values)
            for text in dict.fromkeys(failed.values())
        ]
        self._fail(name, *findings[:4])

    def _fail(self, name: str, *findings: Finding) -> NoReturn:
        self.checks.append(Check(name, "", findings))
        raise Stop

    def _stop_if_unfit(self) -> None:
        if exit_code(self.checks) != EXIT_OK:
            raise Stop


def _error(text: str, ranks: Sequence[int], host_of: Mapping[int, str], values: Sequence[Any]) -> Finding:
    hosts = tuple(dict.fromkeys(host_of[rank] for rank in ranks))
    few = blame(hosts, host_of.values()) == "node"
    fault: Fault = "environment" if all(values[rank]["refused"] for rank in ranks) and not few else "node"
    # Where all report the same, e.g. that time ran out, nobody knows whose fault it is.
    return Finding(fault, f"{ranks_text(ranks, host_of)}: {text}", "", hosts if few else ())
