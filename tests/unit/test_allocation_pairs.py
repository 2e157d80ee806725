"""Rounds of links between nodes, and which node slow links accuse."""

from __future__ import annotations

import pytest

from trainer.allocation.findings import suspect_hosts
from trainer.allocation.pairs import MOST_SHIFTS, judge_links, judge_speeds, rounds

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6, 7, 16, 99])
def test_a_node_has_one_link_a_round_and_all_links_come_once(nodes: int) -> None:
    plan = rounds(nodes)
    assert len(plan) <= 3 * MOST_SHIFTS
    for links in plan:
        ends = [end for link in links for end in link]
        assert len(ends) == len(set(ends))
    found = [link for links in plan for link in links]
    shifts = range(1, min(MOST_SHIFTS, nodes - 1) + 1)
    assert sorted(found) == sorted((i, (i + shift) % nodes) for shift in shifts for i in range(nodes))


def test_one_node_has_no_links() -> None:
    assert rounds(1) == []
    assert judge_links(["node1"], {}, 0.5).findings == ()


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_node_that_sends_slowly_is_named_alone(nodes: int) -> None:
    hosts = [f"node{number}" for number in range(nodes)]
    speeds = {link: (2e6 if link[0] == 1 else 1e9) for links in rounds(nodes) for link in links}
    check = judge_links(hosts, speeds, 0.5)
    assert suspect_hosts([check]) == ["node1"]
    assert "node1 sends only 1.91 MiB/s" in check.findings[0].text
    assert "slowest: node1 sends" in check.summary


def test_a_node_that_receives_slowly_is_named_alone() -> None:
    hosts = [f"node{number}" for number in range(4)]
    speeds = {link: (2e6 if link[1] == 2 else 1e9) for links in rounds(4) for link in links}
    assert suspect_hosts([judge_links(hosts, speeds, 0.5)]) == ["node2"]


def test_one_slow_link_accuses_nobody() -> None:
    hosts = [f"node{number}" for number in range(4)]
    speeds = {link: (2e6 if link == (0, 1) else 1e9) for links in rounds(4) for link in links}
    assert judge_links(hosts, speeds, 0.5).findings == ()


def test_the_slowest_node_is_named_and_below_the_fraction_at_fault() -> None:
    speeds = {"node1": 100e9, "node2": 98e9, "node3": 40e9}
    check = judge_speeds("compute", "GFLOP", speeds, 0.5, "node")
    assert suspect_hosts([check]) == ["node3"]
    assert "node3 does 40 GFLOP/s, 0.41 of the median of 98 GFLOP/s" in check.findings[0].text
    fine = judge_speeds("compute", "GFLOP", speeds, 0.3, "node")
    assert fine.findings == ()
    assert "slowest: node3, 0.41 of the median" in fine.summary
