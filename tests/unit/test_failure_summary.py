"""Who is the cause, from what all ranks were doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.resilience.failure_classes import classify, is_echo
from trainer.resilience.failure_summary import Failure, summarise, summarise_alone
from trainer.resilience.rank_report import RankReport, read_reports, report_path, write_report

pytestmark = pytest.mark.fast

CALL: dict[str, Any] = {"collective_name": "all_reduce", "collective_number": 17, "collective_elements": 8}


def report(rank: int, event: Any = "stalled", **changes: Any) -> RankReport:
    values: dict[str, Any] = {
        "rank": rank, "world_size": 4, "node_rank": rank // 2, "host": f"node{1 + rank // 2}", "launch": "one",
        "event": event, "time_unix": 1000.0, "phase": "forward", "step": 12, "stalled_seconds": 60.0,
        "process_state": "S",
    }  # fmt: skip
    return RankReport(**(values | changes))


def waiting(*ranks: int, **changes: Any) -> list[RankReport]:
    return [report(rank, **({"in_collective": True} | CALL | changes)) for rank in ranks]


def cause(*reports: RankReport, hosts: dict[int, str] | None = None) -> Failure:
    found = summarise(reports, hosts)
    assert found is not None
    return found


def raised(rank: int, type_: str, message: str, **changes: Any) -> RankReport:
    given = {"exception_type": type_, "exception_message": message, "exception_unix": 1000.0, "exit_code": 1}
    return report(rank, "raised", **(given | changes))


ECHO = ("RuntimeError", "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711")


def test_nobody_failed() -> None:
    assert summarise([]) is None
    assert summarise([report(0, "snapshot")]) is None


def test_a_killed_rank_counts_before_all_others() -> None:
    found = cause(raised(0, *ECHO), report(2, "died", signal="SIGKILL", micro_batch=1), *waiting(1, 3))
    assert found.cause == "rank 2 on node2 was killed by SIGKILL in forward of step 12, micro-batch 1"
    assert (found.failure_class, found.rank, found.host, found.phase, found.step) == (
        "killed",
        2,
        "node2",
        "forward",
        12,
    )
    assert found.retryable
    found = cause(report(2, "died", signal="SIGKILL", out_of_memory=True))
    assert found.failure_class == "host-out-of-memory"
    assert "ran out of memory" in found.cause


def test_an_abort_because_of_a_lost_connection_is_not_the_cause() -> None:
    echo = report(0, "died", signal="SIGABRT", time_unix=999.0, log_tail="terminate: Connection closed by peer")
    assert cause(echo, report(3, "died", signal="SIGSEGV")).rank == 3


def test_the_first_exception_that_is_no_echo() -> None:
    found = cause(
        raised(0, *ECHO, exception_unix=900.0),
        raised(1, "ValueError", "late", exception_unix=1001.0),
        raised(3, "KeyError", "first", phase="save"),
        report(2, "snapshot"),
    )
    assert found.cause == "rank 3 on node2 failed in save of step 12: KeyError: first"
    assert found.failure_class == "exception"
    assert not cause(raised(0, "DoNotRestartError", "nan", exit_code=93)).retryable


def test_of_ranks_that_raised_the_same_the_lowest_is_named() -> None:
    def at(rank: int, unix: float) -> RankReport:
        return raised(rank, "CheckpointError", "RUN: all 3 checkpoints are damaged", exception_unix=unix)

    some = cause(at(3, 1000.0), at(1, 1000.1), report(0, "snapshot"), report(2, "snapshot"))
    assert (some.rank, some.host, some.same_words) == (1, "node1", (1, 3))
    assert some.cause.startswith("rank 1 on node1 failed in forward of step 12: CheckpointError: RUN: all 3")
    every = cause(*(at(rank, 1000.0 - rank) for rank in range(4)))
    assert (every.rank, every.host, every.same_words) == (None, None, (0, 1, 2, 3))
    assert every.cause.startswith("all ranks failed in forward of step 12: CheckpointError: RUN: all 3")
    # Words of its own stay those of one rank, as do those of the only one.
    assert cause(at(0, 1000.0), raised(1, "ValueError", "odd", exception_unix=999.0)).rank == 1
    assert cause(raised(0, "ValueError", "odd", world_size=1)).rank == 0


def test_what_every_rank_raised_makes_no_host_suspect() -> None:
    words = ("RuntimeError", "No CUDA GPUs are available: no CUDA-capable device is detected")
    assert cause(raised(2, *words)).suspect_hosts == ("node2",)
    every = cause(*(raised(rank, *words) for rank in range(4)))
    assert (every.failure_class, every.host, every.suspect_hosts) == ("node", None, ())
    one_host = cause(*(raised(rank, *words, host="node1") for rank in range(4)))
    assert one_host.cause.startswith("all ranks on node1 failed in")
    assert one_host.suspect_hosts == ("node1",)


def test_a_missing_rank_at_the_meeting() -> None:
    message = "Timed out after 601 seconds waiting for clients. 2/4 clients joined."
    found = cause(raised(0, "DistStoreError", message, phase="start", step=0), report(1, "snapshot", phase="start"))
    assert found.failure_class == "rendezvous"
    assert "no sign of rank 2-3; DistStoreError" in found.cause


def test_a_stopped_rank() -> None:
    found = cause(*waiting(0, 1, 3), report(2, "snapshot", process_state="T", phase="backward"))
    assert found.cause == "rank 2 on node2 is stopped (SIGSTOP), in backward of step 12"
    assert found.failure_class == "stopped"


def test_a_rank_whose_lock_is_held() -> None:
    found = cause(*waiting(0, 1, 3), report(2, lock_held=True))
    assert found.rank == 2
    assert "has run no Python code for 60 s" in found.cause


def test_a_rank_that_waits_for_its_shard() -> None:
    found = cause(*waiting(0, 1, 2), report(3, phase="data", reading="/data/a.bin", collective_number=16))
    assert found.cause == (
        "rank 3 on node2 waits for shard /data/a.bin, in data of step 12; "
        "the others wait in all_reduce (number 17, 8 elements)"
    )
    assert found.failure_class == "data"


def test_a_rank_that_is_elsewhere() -> None:
    found = cause(*waiting(1, 2, 3), report(0, phase="log", detail="RUN/metrics.jsonl", process_state="D"))
    assert found.cause.startswith("rank 0 on node1 waits for a disk, in log of step 12 (RUN/metrics.jsonl); the others")
    assert found.failure_class == "disk"
    assert cause(*waiting(1, 2, 3), report(0, "snapshot", phase="log")).failure_class == "hang"


def test_where_collectives_only_queue_the_one_behind_is_named() -> None:
    """On GPUs nobody is inside: ranks wait for the device."""
    behind = report(1, **(CALL | {"collective_number": 15}))
    assert cause(*(report(rank, **CALL) for rank in (0, 2, 3)), behind).rank == 1


def test_another_collective_than_the_others() -> None:
    found = cause(*waiting(0, 1, 3), *waiting(2, collective_name="broadcast"))
    assert found.failure_class == "collective-mismatch"
    assert found.cause.startswith(
        "rank 2 on node2 is in broadcast (number 17, 8 elements) where others are in all_reduce (number 17, 8 elements)"
    )
    assert cause(*waiting(0, 1, 3), *waiting(2, collective_elements=9)).rank == 2
    assert cause(*waiting(0, 1, 3), *waiting(2, collective_number=18)).rank == 2
    # Ranks of different groups are right to differ.
    assert cause(*waiting(0, 1), *waiting(2, 3, collective_group="5")).failure_class == "hang"


def test_a_host_that_is_gone() -> None:
    found = cause(*waiting(0, 1), hosts={0: "node1", 1: "node1", 2: "node2", 3: "node2"})
    assert found.failure_class == "node"
    assert found.suspect_hosts == ("node2",)
    assert found.cause.startswith("ranks 2-3 on node2 left no sign: the host is gone or cut off; the others wait in")
    echoes = cause(raised(0, *ECHO), raised(1, *ECHO), hosts={2: "node2", 3: "node2"})
    assert echoes.suspect_hosts == ("node2",)
    killed = cause(*waiting(0, 1, 2))
    assert (killed.failure_class, killed.suspect_hosts) == ("killed" if killed.host == "node2" else "node", ())
    assert cause(*waiting(0, 1, 2), hosts={3: "node2"}).failure_class == "killed"
    # Ranks that have ended well leave no report either.
    assert cause(report(0, phase="stop")).failure_class == "hang"


def test_hosts_that_cannot_reach_each_other() -> None:
    reports = [*waiting(1, 3), *waiting(0, unreachable=("node2",)), *waiting(2, unreachable=("node1",))]
    found = cause(*reports)
    assert found.failure_class == "network"
    assert found.cause.startswith("node1 cannot reach node2 (and 1 more): rank 0 on node1 waits in all_reduce")
    assert found.suspect_hosts == ("node1", "node2")
    three = [
        *waiting(0, host="a", unreachable=("c",)),
        *waiting(1, host="b", unreachable=("c",)),
        *waiting(2, 3, host="c"),
    ]
    assert cause(*three).suspect_hosts == ("c",)


def test_all_in_the_same_collective() -> None:
    found = cause(*waiting(0, 1, 2, 3))
    assert (found.failure_class, found.suspect_hosts) == ("hang", ())
    assert "waits like all others in all_reduce (number 17, 8 elements)" in found.cause


@pytest.mark.parametrize(("text", "phase", "expected", "word"), [
    ("torch.OutOfMemoryError: CUDA out of memory", "forward", "gpu-out-of-memory", "micro_size"),
    ("torch.OutOfMemoryError: CUDA out of memory.", "optimizer", "gpu-out-of-memory", "zero3_offload"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when", "backward", "gpu-out-of-memory", "checkpointing"),
    ("torch.OutOfMemoryError: CUDA out of memory.", "load", "gpu-out-of-memory", "loaded"),
    ("DefaultCPUAllocator: can't allocate memory: you", "forward", "host-out-of-memory", ""),
    ("MemoryError: ", "data", "host-out-of-memory", "data.workers"),
    ("OSError: [Errno 28] No space left on device", "save", "disk", "keep_last"),
    ("OSError: [Errno 122] Disk quota exceeded", "save", "disk", "quota"),
    ("OSError: [Errno 5] Input/output error", "data", "disk", "mounted"),
    ("OSError: [Errno 24] Too many open files", "data", "exception", "ulimit"),
    ("DistStoreError: Timed out after 601 seconds waiting for clients", "start", "rendezvous", "port"),
    ("The server socket has failed to listen on any local network address. EADDRINUSE", "start", "rendezvous", "port"),
    ("RuntimeError: Detected mismatch between collectives on ranks.", "forward", "collective-mismatch", "same code"),
    ("DistBackendError: NCCL error in: x.cpp:1, ncclSystemError", "start", "network", "NCCL_DEBUG"),
    ("CUDA error: uncorrectable ECC error encountered", "forward", "node", "exclude"),
    ("DataError: token shards: 1 problem", "data", "data", "verify"),
    ("OSError: [Errno 113] No route to host", "start", "network", "links"),
    # As PyTorch, CUDA, NCCL, gloo and the kernel print them.
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
     "of which 1.5 GiB is free.", "forward", "gpu-out-of-memory", "micro_size"),
    ("ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'", "start",
     "gpu-out-of-memory", "zero3"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)", "load", "host-out-of-memory", "workers"),
    ("CheckpointError: checkpoint of step 10 was not written: rank 1: [Errno 28] No space left on device: "
     "'/run/rank-00001.safetensors'", "save", "disk", "free some space"),
    ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "backward", "node", "exclude"),
    ("CUDA error: uncorrectable NVLink error detected during the execution", "backward", "node", "exclude"),
    ("NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", "forward",
     "node", "exclude"),
    ("NVRM: Xid (PCI:0000:86:00): 31, pid=1234, name=python, Ch 00000008, MMU Fault", "forward", "node", "exclude"),
    ("NVRM: Xid (PCI:0000:86:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 0",
     "forward", "node", "exclude"),
    ("RuntimeError: No CUDA GPUs: no CUDA-capable device is detected", "start", "node", "exclude"),
    ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL "
     "version 2.27.5", "forward", "network", "NCCL_DEBUG"),
    ("NCCL WARN NET/IB : Got completion from peer 10.0.0.2 with status=12 opcode=0 len=0 vendor err 129", "backward",
     "network", "links"),
    ("RuntimeError: [enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 64 vs 32",
     "forward", "collective-mismatch", "same code"),
    ("ValueError: invalid size of output tensor at index 1 (expected length 8, got 16)", "forward",
     "collective-mismatch", "same code"),
    ("DistNetworkError: The client socket has timed out after 600000ms while trying to connect to (node1, 29500).",
     "start", "rendezvous", "port"),
    ("socket.gaierror: [Errno -2] Name or service not known", "start", "rendezvous", "reach the address"),
    ("RendezvousError: node2 can't resolve MASTER_ADDR = node1 (Name or service not known)", "start", "rendezvous", ""),
    ("CheckpointError: RUN: all 3 checkpoints are damaged; nothing was changed", "load", "checkpoint", "repair"),
    ("CheckpointError: /run/rank-00000.safetensors: ends at 512 bytes, it was cut off", "load", "checkpoint", "verify"),
    ("CorruptBlockError: token shards: 1 problem\n  - train.bin = 'block 3': failed its checksum", "data", "data",
     "data verify"),
])  # fmt: skip
def test_words_tell_the_class_and_the_fix(text: str, phase: str, expected: str, word: str) -> None:
    kind = classify(text, phase)
    assert kind is not None
    assert kind.name == expected
    assert word in kind.fix


@pytest.mark.parametrize(("text", "phase"), [
    ("ValueError: something else", "forward"),
    ("KeyError: 'taxid'", "data"),
    ("IndexError: maxIdx 12 is out of range", "forward"),
    ("KeyError: 'xid'", "data"),
    ("ValueError: nvlink_domain must be a number", "start"),
    ("ValueError: invalid sizes: 3 and 4", "forward"),
    ("ValueError: the tokenizer is corrupt", "start"),
    ("ValueError: archive is damaged", "start"),
    ("CheckpointError: another job has taken over /run: this one may not commit any more", "save"),
    ("URLError: <urlopen error [Errno -2] Name or service not known>", "data"),
    ("ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: / (Caused "
     "by NameResolutionError([Errno -2] Name or service not known))", "start"),
])  # fmt: skip
def test_ordinary_words_are_no_sign_of_a_broken_machine(text: str, phase: str) -> None:
    assert classify(text, phase) is None


def test_the_end_of_another_rank_is_no_cause() -> None:
    assert is_echo(": ".join(ECHO))
    assert is_echo("Timed out waiting 600000ms for recv operation to complete")
    assert is_echo("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]: Connection reset by peer")
    assert is_echo("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=17, OpType=ALLREDUCE)")
    assert is_echo("DistBackendError: ncclRemoteError: A call failed possibly due to a network error or a remote exit")
    assert not is_echo("ValueError: something else")


def test_reports_are_read_as_written_and_damage_is_passed_over(tmp_path: Path) -> None:
    given = report(2, "raised", unreachable=("node3",), exit_code=None, **CALL)
    write_report(tmp_path, given)
    write_report(tmp_path, report(3, launch="another"))
    assert read_reports(tmp_path, "one") == [given]
    sound = json.loads(report_path(tmp_path, 2).read_text())
    for rank, content in enumerate([b"", b"[]", b"{", json.dumps(sound | {"rank": "2"}).encode(),
                                    json.dumps(sound | {"event": "odd"}).encode(),
                                    json.dumps(sound | {"version": 9}).encode()]):  # fmt: skip
        report_path(tmp_path, 10 + rank).write_bytes(content)
    del sound["phase"]
    report_path(tmp_path, 20).write_text(json.dumps(sound))
    assert read_reports(tmp_path, "one") == [given]


def test_corruption_is_the_host_that_the_others_outvote() -> None:
    message = "step 8: rank 2 on node2 differs from the others in model.embed (...): start again without that host"
    told = [
        raised(rank, "CorruptionError", message, phase="save", blamed_ranks=("2",), blamed_hosts=("node2",))
        for rank in range(4)
    ]
    found = cause(*told)
    assert (found.failure_class, found.rank, found.host, found.suspect_hosts) == ("corruption", 2, "node2", ("node2",))
    assert found.cause.startswith("in save of step 12: step 8: rank 2 on node2 differs")
    undecided = cause(raised(0, "CorruptionError", message, blamed_ranks=("1", "2")))
    assert (undecided.rank, undecided.suspect_hosts) == (1, ())


def test_one_report_alone_accuses_nobody_else() -> None:
    """What a supervisor says where the file system does not answer."""
    assert summarise_alone(report(3, "snapshot")) is None
    found = {
        "waits in all_reduce (number 17, 8 elements)": summarise_alone(waiting(3)[0]),
        "waits for shard /data/a.bin": summarise_alone(report(3, phase="data", reading="/data/a.bin")),
        "is stopped": summarise_alone(report(3, process_state="T")),
        "has run no Python code": summarise_alone(report(3, lock_held=True)),
        "was killed by SIGKILL": summarise_alone(report(3, "died", signal="SIGKILL")),
        "failed in forward": summarise_alone(raised(3, "ValueError", "odd")),
        "lost a connection": summarise_alone(raised(3, *ECHO)),
    }
    for words, failure in found.items():
        assert failure is not None
        assert failure.cause.startswith(f"rank 3 on node2 {words}"), failure.cause
        assert failure.suspect_hosts == ()
