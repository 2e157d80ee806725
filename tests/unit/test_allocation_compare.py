"""What is made of the facts of four ranks on two nodes: nothing where all are alike, the odd one named where not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.allocation import reach, shared_directory
from trainer.allocation.compare_nodes import compare_nodes
from trainer.allocation.compare_ranks import compare_ranks
from trainer.allocation.facts import NodeFacts, RankFacts
from trainer.allocation.findings import Check, Finding, exit_code, suspect_hosts
from trainer.allocation.gpus import Gpu, parse_gpus
from trainer.allocation.needs import Needs, estimated_parameters
from trainer.allocation.report import failure_fields, report
from trainer.config.model import ModelConfig
from trainer.config.model_fields import model_fields
from trainer.core.mounts import mount_of

pytestmark = pytest.mark.fast
GIB = 2**30
NODE = NodeFacts(
    code="c", limits={"open files": 65536, "locked memory": -1, "processes": -1},
    free_bytes={"run": 900 * GIB, "shared_memory": 8 * GIB, "temporary": 9 * GIB}, free_inodes=10**6,
    mount="nfs4 /scratch", data={"a.bin": 100, "a.idx": 10}, models={"org/model": "cached"},
    gpus=(Gpu(index=0, name="H100", driver="570"), Gpu(index=1, name="H100", driver="570")),
)  # fmt: skip
NEEDS = Needs(checkpoint_bytes=10 * GIB, checkpoints=4, checkpoint_files=8, open_files=600, gpus_per_node=2)


def ranks(
    node: dict[str, Any] | None = None, everywhere: dict[str, Any] | None = None, **changes: Any
) -> list[RankFacts]:
    """Four ranks on two nodes; ``changes`` are rank 3's, ``node`` those of the facts of its node."""
    made: list[RankFacts] = []
    for rank in range(4):
        host = f"node{1 + rank // 2}"
        facts = dataclasses.replace(NODE, **(everywhere or {}))
        if host == "node2":
            facts = dataclasses.replace(facts, **(node or {}))
        made.append(
            RankFacts(
                rank=rank, host=host, local_rank=rank % 2, local_world_size=2, node_rank=rank // 2,
                versions={"python": "3.11", "torch": "2.13.0"}, digests={"recipe": "r", "data": "d"},
                cores=(0, 1, 2, 3), gpu_count=2, gpu_free_bytes=79 * GIB, gpu_total_bytes=80 * GIB,
                node=facts if rank % 2 == 0 else None,
            )
        )  # fmt: skip
    made[3] = dataclasses.replace(made[3], **changes)
    return [RankFacts.from_json(json.loads(json.dumps(facts.to_json()))) for facts in made]


def judged(found: list[RankFacts], needs: Needs = NEEDS) -> tuple[int, list[str], str]:
    checks = compare_ranks(found) + compare_nodes(found, needs)
    return exit_code(checks), suspect_hosts(checks), "\n".join(str(f) for check in checks for f in check.findings)


def test_nothing_is_said_of_four_ranks_that_are_alike() -> None:
    assert judged(ranks()) == (0, [], "")


@pytest.mark.parametrize(("changes", "words"), [
    ({"versions": {"python": "3.11", "torch": "2.12.1"}}, "torch 2.12.1 on rank 3 (node2), 2.13.0 on the others"),
    ({"digests": {"recipe": "x", "data": "d"}}, "the recipe of rank 3 (node2) differs (digest x, the others' r)"),
    ({"digests": {"recipe": "r", "data": "x"}}, "the data of rank 3 (node2) differs"),
    ({"refused": "no such key"}, "on rank 3 (node2) only: no such key"),
    ({"node": {"code": "other"}}, "the trainer's own source differs on node2"),
    ({"everywhere": {"free_bytes": {"run": GIB, "shared_memory": 8 * GIB, "temporary": 9 * GIB}}},
     "1.00 GiB free in run.directory, a checkpoint takes about 10.0 GiB"),
    ({"everywhere": {"free_inodes": 3}}, "3 inodes free"),
    ({"everywhere": {"limits": {"open files": 256}}}, "limit of open files is 256, less than 600, on node1, node2"),
    ({"everywhere": {"models": {"org/model": "missing"}, "offline": True}}, "org/model is neither"),
])  # fmt: skip
def test_recipe_and_environment_are_at_fault(changes: dict[str, Any], words: str) -> None:
    code, suspects, text = judged(ranks(**changes))
    assert code == 2
    assert suspects == []
    assert words in text


@pytest.mark.parametrize(("changes", "words"), [
    ({"node": {"limits": {"open files": 256}}}, "limit of open files is 256, less than 600, on node2"),
    ({"node": {"temporary_error": "/tmp: No space left on device"}}, "No space left on device) on node2"),
    ({"node": {"free_bytes": {"run": 900 * GIB, "shared_memory": 2**20, "temporary": 9 * GIB}}},
     "/dev/shm has 1.00 MiB"),
    ({"node": {"data": {"a.bin": -1, "a.idx": 10}}}, "a.bin can't be read on node2"),
    ({"node": {"data": {"a.bin": 90, "a.idx": 10}}}, "a.bin has 90 bytes, 100 elsewhere, on node2"),
    ({"node": {"models": {"org/model": "missing"}}},
     "org/model is neither a directory nor in the Hub's cache on node2"),
    ({"gpu_count": 1}, "fewer GPUs are seen (1) than ranks were started on node2"),
    ({"gpu_free_bytes": 60 * GIB}, "GPU 1 of node2 has 60.0 GiB of 80.0 GiB free"),
    ({"node": {"gpus": (Gpu(index=5, name="H100", driver="570", uncorrected_errors=2),)}},
     "GPU 5 of node2 had uncorrected"),
    ({"node": {"gpus": (Gpu(index=5, name="H100", driver="570", slowed=True),)}}, "GPU 5 of node2 is slowed down"),
])  # fmt: skip
def test_a_node_is_at_fault(changes: dict[str, Any], words: str) -> None:
    code, suspects, text = judged(ranks(**changes))
    assert (code, suspects) == (1, ["node2"]), text
    assert words in text


def test_what_a_whole_node_refuses_is_the_nodes_fault() -> None:
    found = [dataclasses.replace(f, refused="shard: is missing" if f.host == "node2" else "") for f in ranks()]
    checks = compare_ranks(found)
    assert (exit_code(checks), suspect_hosts(checks)) == (1, ["node2"])
    everywhere = [dataclasses.replace(f, refused="shard: is missing") for f in ranks()]
    assert exit_code(compare_ranks(everywhere)) == 2


def test_notes_stop_nothing() -> None:
    found = [dataclasses.replace(f, cores=(0,)) for f in ranks()]
    code, _, text = judged(found, dataclasses.replace(NEEDS, checkpoints=200))
    assert code == 0
    assert "2 ranks of node1 share 1 core" in text
    assert "200 checkpoints take 10.0 GiB each" in text


WROTE = {"error": "", "missing": False, "skew_seconds": 0.01}
SAW = {"unseen": [], "renamed": True}
BLIND = {"error": "No such file or directory", "missing": True}


def test_a_directory_that_one_node_lacks_is_told_from_one_that_none_shares() -> None:
    hosts = ["node1", "node2"]
    seen = [{"unseen": [1], "renamed": True}, {"unseen": [0, 1], "renamed": False}]
    lost = {"node1": NODE, "node2": dataclasses.replace(NODE, mount="ext4 /")}
    check = shared_directory.judge("/scratch/run", hosts, [WROTE, BLIND], seen, lost)
    assert (exit_code([check]), suspect_hosts([check])) == (1, ["node2"])
    assert "/scratch/run is not shared: node2 does not see what node1 wrote (ext4 / on node2)" in str(check.findings[0])
    check = shared_directory.judge("/tmp/run", hosts, [WROTE, BLIND], seen, dict.fromkeys(hosts, NODE))
    assert exit_code([check]) == 2
    assert len(check.findings) == 1, "one cause, said once"
    assert exit_code([shared_directory.judge("/scratch/run", hosts, [WROTE, WROTE], [SAW, SAW], lost)]) == 0


def test_a_rename_that_a_node_does_not_see_and_a_clock_that_is_off() -> None:
    wrote = [WROTE, WROTE | {"skew_seconds": -90.0}]
    nodes = dict.fromkeys(["node1", "node2"], NODE)
    check = shared_directory.judge("/run", list(nodes), wrote, [SAW, SAW | {"renamed": False}], nodes)
    assert suspect_hosts([check]) == ["node2"]
    assert "the clock of node2 is -90 s from that of the file server" in str(check.findings[1])


def test_real_files_are_written_read_renamed_and_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "run" / shared_directory.begin(tmp_path / "run", "none")
    assert not shared_directory.write(directory, 0)["error"]
    shared_directory.rename(directory)
    assert shared_directory.read(directory, 0, 1) == SAW
    shared_directory.clean(directory)
    assert list((tmp_path / "run").iterdir()) == []


def test_unreachable_pairs_name_the_node_they_share() -> None:
    hosts = ["node1", "node2", "node3"]
    check = reach.judge(hosts, {0: [], 1: [2], 2: [0, 1]})
    assert suspect_hosts([check]) == ["node3"]
    assert suspect_hosts([reach.judge(hosts[:2], {0: [1], 1: [0]})]) == ["node2"], "rank 0's node stays"
    assert reach.judge(hosts, {0: [], 1: [], 2: []}).findings == ()


def test_report_says_what_is_wrong_and_the_failure_file_which_node() -> None:
    fault = Finding("node", "node2 is slow", "look at it", ("node2",), "network")
    checks = [Check("versions", "torch 2.13.0"), Check("network", "", (fault,))]
    text = report("allocation of 4 ranks", checks, 12.3)
    assert text.splitlines() == [
        "allocation of 4 ranks: a node is at fault (12 s)",
        "  versions  ok     torch 2.13.0",
        "  network   FAULT  node2 is slow → look at it",
    ]
    fields = failure_fields(checks, "slurm-7-0-1", "node1", 1.0)
    assert (fields["class"], fields["retryable"], fields["suspect_hosts"]) == ("network", True, ["node2"])
    assert fields["cause"] == "node2 is slow"


def test_nvidia_smi_is_understood() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 570.86.15, 0, No, No, Not Active\n"
        "1, NVIDIA H100 80GB HBM3, 570.86.15, 3, Yes, No, Active\n"
        "2, NVIDIA GeForce, 570.86.15, [N/A], [N/A], [N/A], Not Active\nnonsense\n"
    )
    first, second, third = parse_gpus(text)
    assert (first.uncorrected_errors, first.rows_to_remap, first.slowed) == (0, False, False)
    assert (second.uncorrected_errors, second.rows_to_remap, second.slowed) == (3, True, True)
    assert third == Gpu(index=2, name="NVIDIA GeForce", driver="570.86.15")


def test_the_mount_of_a_path(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / /scratch rw shared:1 - nfs4 server:/s rw\n"
        "3 1 0:9 / /with\\040space rw - tmpfs none rw\n"
    )
    assert mount_of(Path("/scratch/a/b"), table) == "nfs4 /scratch"
    assert mount_of(Path("/scratched"), table) == "ext4 /"
    assert mount_of(Path("/with space/x"), table) == "tmpfs /with space"


def test_parameters_of_llama_7b() -> None:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    count = estimated_parameters(model_fields(ModelConfig(config=config)))
    assert count == pytest.approx(6_738_415_616, rel=1e-3)
