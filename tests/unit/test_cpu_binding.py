"""Which CPUs ranks get, on trees of /sys as machines have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.parallel.cpu_binding import Claim, cpus_text, num_cores, numa_node_of, parse_cpus, read_node, shares

pytestmark = pytest.mark.fast
GPUS = [f"0000:{bus:02x}:00.0" for bus in (0x17, 0x2A, 0x3D, 0x60, 0x97, 0xAB, 0xBD, 0xE0)]


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """2 sockets of 8 cores with 2 hyperthreads (core c: CPUs c and c + 16), 4 GPUs each."""
    for cpu in range(32):
        topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 16},{cpu % 16 + 16}\n")
    for node, cpus in ((0, "0-7,16-23"), (1, "8-15,24-31")):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(cpus + "\n")
    for number, address in enumerate(GPUS):
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(f"{number // 4}\n")
    return tmp_path


def texts(found: list[frozenset[int]] | None) -> list[str] | None:
    return None if found is None else [cpus_text(cpus) for cpus in found]


def test_gpus_on_two_sockets(two_sockets):
    """Each rank gets whole cores of the socket of its GPU."""
    node = read_node(range(32), two_sockets)
    homes = [numa_node_of(address, two_sockets) for address in GPUS]
    assert homes == [0, 0, 0, 0, 1, 1, 1, 1]
    found = shares([Claim(frozenset(range(32)), home) for home in homes], node)
    assert texts(found) == ["0-1,16-17", "2-3,18-19", "4-5,20-21", "6-7,22-23",
                            "8-9,24-25", "10-11,26-27", "12-13,28-29", "14-15,30-31"]  # fmt: skip
    assert found is not None
    assert num_cores(found[0], node) == 2


def test_part_of_a_node(two_sockets):
    """A job with the GPUs and CPUs of one socket, ranks in an order of their own, one of them alone on its socket."""
    node = read_node(range(32), two_sockets)
    ours = parse_cpus("4-11,20-27")
    assert texts(shares([Claim(ours, home) for home in (1, 0, 1)], node)) == ["8-9,24-25", "4-7,20-23", "10-11,26-27"]
    # The CPUs of the job are all far from the GPUs: shared evenly all the same.
    assert texts(shares([Claim(parse_cpus("0-3"), 1)] * 2, node)) == ["0-1", "2-3"]
    # Fewer CPUs on a socket than ranks there: they share it.
    assert texts(shares([Claim(parse_cpus("0,8-15"), home) for home in (0, 0, 1)], node)) == ["0", "0", "8-15"]


def test_without_gpus(two_sockets):
    node = read_node(range(32), two_sockets)
    everything = frozenset(range(32))
    assert texts(shares([Claim(everything)] * 2, node)) == ["0-7,16-23", "8-15,24-31"]
    assert texts(shares([Claim(frozenset({0, 16, 1}))] * 3, node)) == ["0", "1", "16"], "more ranks than cores"
    assert texts(shares([Claim(everything)] * 3, node)) == ["0-4,16-20", "5-9,21-25", "10-15,26-31"]


def test_what_is_left_alone(two_sockets):
    node = read_node(range(32), two_sockets)
    assert shares([Claim(frozenset(range(32)))], node) is None, "alone on the node"
    assert shares([Claim(frozenset({0, 1}))] * 3, node) is None, "fewer CPUs than ranks"
    bound = [Claim(frozenset(range(16)), 0), Claim(frozenset(range(16, 32)), 1)]
    assert shares(bound, node) is None, "bound by the launcher"


def test_a_machine_that_tells_nothing(tmp_path):
    node = read_node([0, 1, 2, 3], tmp_path)
    assert (len(node.cores), dict(node.numa), numa_node_of(GPUS[0], tmp_path)) == (4, {}, None)
    assert texts(shares([Claim(frozenset(range(4)), None)] * 2, node)) == ["0-1", "2-3"]
    (tmp_path / "bus/pci/devices" / GPUS[0]).mkdir(parents=True)
    (tmp_path / "bus/pci/devices" / GPUS[0] / "numa_node").write_text("-1\n")
    assert numa_node_of(GPUS[0].upper(), tmp_path) is None


@given(st.frozensets(st.integers(0, 300)))
def test_lists_of_cpus(cpus):
    assert parse_cpus(cpus_text(cpus)) == cpus


@given(allowed=st.frozensets(st.integers(0, 31), min_size=1), homes=st.lists(st.sampled_from([None, 0, 1]), min_size=2))
def test_shares_are_fair(tmp_path_factory, allowed, homes):
    """Nobody gets a CPU that is not the job's, nobody none, and ranks of one home never share where they need not."""
    node = read_node(range(32), Path("/nonexistent"))
    node = type(node)(node.cores, {0: frozenset(range(16)), 1: frozenset(range(16, 32))})
    found = shares([Claim(allowed, home) for home in homes], node)
    if found is None:
        return
    assert all(share and share <= allowed for share in found)
    if None in homes:
        assert sum(map(len, found)) == len(frozenset().union(*found))
