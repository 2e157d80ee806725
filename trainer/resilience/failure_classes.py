"""From the words of an exception or a log to what kind of failure it is and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

FailureClass = Literal[
    "exception", "killed", "host-out-of-memory", "gpu-out-of-memory", "stopped", "hang", "collective-mismatch",
    "rendezvous", "disk", "network", "node", "data", "checkpoint", "corruption",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A class of failure, its remedy, and whether starting again may help without a change."""

    name: FailureClass
    fix: str
    retryable: bool = True


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    kind: Kind


def _rule(pattern: str, name: FailureClass, fix: str, *, retryable: bool = True) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), Kind(name, fix, retryable))


_GPU_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|torch\.(cuda\.)?OutOfMemoryError"
    r"|(CUBLAS_STATUS|CUDNN_STATUS|ncclUnhandledCudaError).{0,40}ALLOC_FAILED|Cuda failure 2 'out of memory'",
    re.IGNORECASE,
)
_PARTS = {
    "start": "the model does not fit while it is built: deepspeed.base: zero3, which divides it over the ranks",
    "load": "the state does not fit while it is loaded: deepspeed.base: zero2 or zero3, or more ranks",
    "forward": "activations do not fit: memory.activation_checkpointing: full, a smaller batch.micro_size (the result "
    "stays the same), memory.tiled_loss for a large vocabulary",
    "backward": "activations and gradients do not fit: memory.activation_checkpointing: full, a smaller "
    "batch.micro_size (the result stays the same), deepspeed.base: zero2",
    "optimizer": "optimizer state does not fit: deepspeed.base: zero2, zero3 or zero3_offload, or more ranks",
    "evaluate": "an evaluation does not fit: a smaller batch.micro_size, memory.tiled_loss for a large vocabulary",
    "save": "a save does not fit: checkpoint.asynchronous: false",
}

_MEETING_FIX = (
    "ranks did not meet: every rank must reach the address and port of the message; is a rank missing, another job "
    "on that port, or the wrong interface chosen (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)?"
)
_UNKNOWN_HOST = _rule(
    r"Name or service not known|Temporary failure in name resolution|getaddrinfo", "rendezvous", _MEETING_FIX
)
_DOWNLOAD = re.compile(r"https?://|HTTPS?Connection", re.IGNORECASE)

_RULES: tuple[_Rule, ...] = (
    _rule(
        r"MemoryError|can't allocate memory|cannot allocate memory|\[Errno 12\]|std::bad_alloc|oom-kill|oom_kill",
        "host-out-of-memory",
        "memory of the machine, not of the GPU: ask for more (launch.slurm), fewer ranks a node, fewer data.workers, "
        "no offload to the CPU; checkpoint.asynchronous: false saves a copy of the state",
    ),
    _rule(
        r"No space left on device|\[Errno 28\]|ENOSPC",
        "disk",
        "the file system is full: free some space, or lower checkpoint.keep_last",
        retryable=False,
    ),
    _rule(
        r"Disk quota exceeded|\[Errno 122\]|EDQUOT",
        "disk",
        "your quota is used up: delete files of yours, or lower checkpoint.keep_last",
        retryable=False,
    ),
    _rule(
        r"Input/output error|\[Errno 5\]|Stale file handle|\[Errno 116\]|Read-only file system|\[Errno 30\]",
        "disk",
        "the file system failed: look whether it is mounted and well on this host, then start again",
    ),
    _rule(
        r"Too many open files|\[Errno 24\]",
        "exception",
        "raise the limit before the ranks start: ulimit -n 65536 (in launch.slurm.setup), or use fewer data.workers",
        retryable=False,
    ),
    _rule(
        r"uncorrectable ECC|fallen off the bus|CUDA-capable device\(s\) is/are busy|no CUDA-capable device"
        # A name in the user's code may hold these letters: taxid, maxIdx.
        r"|\bNVLink\b.*error|(?-i:\bXid\b)|GPU is lost|CUDA error: unknown error|hardware error",
        "node",
        "a GPU of this host is broken or taken: leave the host out (sbatch --exclude), and tell its operators",
    ),
    _rule(
        r"waiting for clients|clients joined|DistStoreError|failed to (listen|bind)|Address already in use"
        r"|EADDRINUSE|client socket has (failed|timed out)|server socket|rendezvous",
        "rendezvous",
        _MEETING_FIX,
    ),
    _rule(
        r"Detected mismatch between collectives|collective.{0,40}mismatch|ran different collectives"
        r"|op\.preamble\.length|invalid size of output tensor|invalid tensor (size|type) at index",
        "collective-mismatch",
        "ranks did different things: the same code, recipe and data must be on every host",
        retryable=False,
    ),
    _rule(
        r"NCCL error|ncclInternalError|ncclSystemError|ncclUnhandled|NET/IB|ibv_|NCCL WARN",
        "network",
        "NCCL failed: start once with NCCL_DEBUG=INFO, check NCCL_SOCKET_IFNAME and the links of the hosts named",
    ),
    _rule(
        r"\bCheckpointError: .*(\b(is|are) damaged|no complete checkpoint|\bmanifest\b|are missing|lacks"
        r"|holds no |was cut off|no safetensors file|no flat tensor|checksum)",
        "checkpoint",
        "a checkpoint can't be used: trainer checkpoint verify RUN_DIR names what is wrong, trainer checkpoint repair "
        "RUN_DIR moves it aside; restore a good one from a copy, or choose another run.directory",
        retryable=False,
    ),
    _rule(
        r"checksum|token shards|DataError",
        "data",
        "the data can't be used: trainer data verify --full names what is wrong; restore the file",
        retryable=False,
    ),
    _rule(
        r"No route to host|Network is unreachable|Host is down|\[Errno 113\]|\[Errno 101\]",
        "network",
        "hosts can't reach each other: check the links and firewalls of the hosts named",
    ),
)

_ECHO = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|Socket closed"
    r"|Timed out waiting \d+ms for (recv|send)|remote process (exited|has terminated)|ncclRemoteError"
    r"|communicator (was|has been) aborted|NCCL communicator.{0,20}abort|Watchdog caught collective"
    r"|Software caused connection abort|recvValue failed|failed to recv|Application timeout caused pair closure",
    re.IGNORECASE,
)


def is_echo(text: str) -> bool:
    """Return whether the words of an exception are those of a rank that lost another: not a cause."""
    return _ECHO.search(text) is not None


def classify(text: str, phase: str) -> Kind | None:
    """Return what kind of failure ``text`` speaks of, None where nothing is known of it."""
    if _GPU_MEMORY.search(text):
        part = _PARTS.get(phase, _PARTS["forward"])
        return Kind("gpu-out-of-memory", f"memory of the GPU: {part}", retryable=False)
    return next((rule.kind for rule in _rules(text, phase) if rule.pattern.search(text)), None)


def _rules(text: str, phase: str) -> tuple[_Rule, ...]:
    """Return those that apply: the host that is not known may be that of a download."""
    meeting = phase == "start" and not _DOWNLOAD.search(text)
    return (*_RULES, _UNKNOWN_HOST) if meeting else _RULES
