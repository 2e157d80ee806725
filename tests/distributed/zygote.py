"""Run ``trainer train`` many times without paying its imports each time: one process imports, each run forks ranks.

Reads one JSON object a line from stdin: {"argv": [...], "world": N, "env": {...}, "output": PATH, "before": MODULE};
``install()`` of the module, if one is named, is called in each rank first. Answers with the ranks' exit codes
(negative: killed by that signal). When one rank is killed the others are killed too, as their launcher's death would
kill them.
"""

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


def run(job: dict) -> list[int]:
    port = free_port("127.0.0.1")
    pids = []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job.get("timeout", 120)
    while len(codes) < len(pids):
        for pid in [p for p in pids if p not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(code < 0 for code in codes.values()) or time.monotonic() > deadline:
            for pid in [p for p in pids if p not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), file=answers, flush=True)
