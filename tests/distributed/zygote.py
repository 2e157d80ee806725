"""Run ``trainer train`` many times without paying its imports each time: one process imports, each run forks ranks.

Reads one JSON object a line from stdin: {"argv": [...], "world": N, "env": {...}, "output": PATH, "before": MODULE};
``install()`` of the module, if one is named, is called in each rank first. Answers with the ranks' exit codes
(negative: killed by that signal). When one rank is killed the others are killed too, as their launcher's death would
kill them, "grace_seconds" later. "kill" (forked_runs.Kill) signals ranks after progress was seen. Without "privileged"
the ranks heed the modes of files even as root.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # imports print there

import deepspeed  # noqa: F401 - imported for the children
import torch
import transformers  # noqa: F401

import trainer.training.build  # noqa: F401
from trainer.core.environ import RankEnvironment, export
from trainer.launch.ports import free_port

torch.set_num_threads(1)


def child(job: dict, rank: int, port: int) -> None:
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job["env"])
    if not job.get("privileged", True):
        heed_modes()
    export(RankEnvironment(rank, job["world"], rank, job["world"], 0, "127.0.0.1", port, "environment"), os.environ)
    os.environ.pop("TRAINER_LAUNCHER", None)
    sys.argv = ["trainer", *job["argv"]]
    from trainer.cli.main import main

    try:
        if job.get("before"):
            importlib.import_module(job["before"]).install()
        main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(0)


def heed_modes() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root may write where modes forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, held) == 0
    held[0] &= ~0b110
    assert libc.capset(header, held) == 0


def newest_step(run: str) -> int:
    """Return the newest step directory's step: one that has its name was committed."""
    try:
        names = os.listdir(os.path.join(run, "checkpoints"))
    except FileNotFoundError:
        return 0
    return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)


def run(job: dict) -> list[int]:
    port = free_port("127.0.0.1")
    pids = []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    kill, kill_at, first_death = job.get("kill"), None, None
    deadline = time.monotonic() + job.get("timeout", 120)
    while len(codes) < len(pids):
        for pid in [p for p in pids if p not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if kill and kill_at is None and newest_step(kill["run"]) > kill["newer_than"]:
            kill_at = now + kill["delay_seconds"]
        if kill_at is not None and now >= kill_at:
            for pid in [pids[rank] for rank in kill["victims"] if pids[rank] not in codes]:
                os.kill(pid, kill["signal"])
            kill = kill_at = None
        if first_death is None and any(code < 0 for code in codes.values()):
            first_death = now
        if (first_death is not None and now >= first_death + job.get("grace_seconds", 0)) or now > deadline:
            for pid in [p for p in pids if p not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002 if kill else 0.01)
    return [codes[pid] for pid in pids]


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), file=answers, flush=True)
