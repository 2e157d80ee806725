"""Slurm's short forms: expected values were printed by `scontrol show hostnames` 22.05."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.hostlist import expand_hostlist, expand_tasks_per_node

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("gpu[1-2]-ib.cluster,login", ["gpu1-ib.cluster", "gpu2-ib.cluster", "login"]),
        ("a,b,a", ["a", "b", "a"]),
    ],
)
def test_hostlist(text, hosts):
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    "text",
    ["", ",", "a,", "n[1-3", "n1-3]", "n[[1]]", "n[]", "n[a-b]", "n[3-1]", "n[1-99999999999]", "n[0-9999]x[0-9999]",
     "a b", "n[1-2,]"],
)  # fmt: skip
def test_malformed_hostlist(text):
    with pytest.raises(ValueError, match=r"."):
        expand_hostlist(text)


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True),
            st.integers(0, 500),
            st.integers(0, 20),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_ranges_expand_to_the_names_they_were_made_from(groups):
    text, names = [], []
    for prefix, first, more, width in groups:
        text.append(f"{prefix}[{first:0{width}d}-{first + more}]")
        names += [f"{prefix}{number:0{width}d}" for number in range(first, first + more + 1)]
    assert expand_hostlist(",".join(text)) == names


@given(st.lists(st.tuples(st.integers(0, 128), st.integers(1, 50)), min_size=1, max_size=8))
def test_tasks_per_node(groups):
    text = ",".join(f"{count}(x{nodes})" if nodes > 1 else str(count) for count, nodes in groups)
    assert expand_tasks_per_node(text) == [count for count, nodes in groups for _ in range(nodes)]


@pytest.mark.parametrize("text", ["", "2(x", "x2", "2(x2),", "-1", "2(x99999999)"])
def test_malformed_tasks_per_node(text):
    with pytest.raises(ValueError, match=r"."):
        expand_tasks_per_node(text)
