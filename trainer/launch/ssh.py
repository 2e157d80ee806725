"""Start ranks on the hosts of a hostfile: one connection of ssh a host, and an agent at its other end.

The launcher here runs one process of this module a host (`run_local`), each of which owns a connection. What the ranks
are to do goes through the connection's stdin, so that nothing of it is in an argument list, and stop signals follow as
lines. When the connection ends, the agent there (`trainer.launch.ssh_agent`) ends with its ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.config.hostfile import Host
from trainer.core.environ import die_with_parent, threads_are_derived
from trainer.core.errors import EXIT_FAILURE, RefusedError
from trainer.core.redact import REDACTED, redacted
from trainer.launch.local import FORWARDED, run_local
from trainer.launch.ports import free_port

_PASSED = re.compile(
    r"(?:NCCL|GLOO|UCX|FI|OMP|MKL|CUDA|TORCH|HF|TRANSFORMERS|TOKENIZERS|PYTHON|TRITON|DS|DEEPSPEED|TRAINER)_\w+"
    r"|PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|LANG|LC_ALL|TMPDIR"
)
_NOT_PASSED = {"CUDA_VISIBLE_DEVICES", "TRAINER_LAUNCHER", "TRAINER_LAUNCHER_PID", "TRAINER_THREADS", "TRAINER_SSH_JOB"}
_JOB_VARIABLE = "TRAINER_SSH_JOB"
_SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30",
    "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4",
)  # fmt: skip
_SSH_FAILED = 255


def run_hosts(hosts: Sequence[Host], command: list[str]) -> int:
    """Run ``command`` once a slot of ``hosts`` and return the exit code of the whole, as `run_local` does.

    The same paths must be there on every host: interpreter, working directory, recipe. Raises RefusedError without ssh.
    """
    if shutil.which("ssh") is None:
        raise RefusedError("ssh is not installed here → install it, or use another launch.launcher")
    job = {"hosts": [asdict(host) for host in hosts], "command": command, "directory": os.getcwd(), "port": free_port()}
    environment = {**os.environ, _JOB_VARIABLE: json.dumps(job)}
    return run_local([sys.executable, "-m", "trainer.launch.ssh"], len(hosts), environment=environment)


def plan_tasks(
    hosts: Sequence[Host], command: list[str], environment: Mapping[str, str], directory: str, port: int
) -> list[dict[str, Any]]:
    """Return what each host is told: its ranks, where rank 0 is, command, directory and environment.

    Of the environment only what libraries of training read is passed on, and nothing whose name is that of a secret.
    """
    allowed = {name: value for name, value in environment.items() if _PASSED.fullmatch(name)}
    secret = {name for name, value in redacted(allowed).items() if value == REDACTED}
    dropped = secret | _NOT_PASSED
    if threads_are_derived(environment):
        dropped.add("OMP_NUM_THREADS")
    passed = {name: value for name, value in allowed.items() if name not in dropped}
    tasks: list[dict[str, Any]] = []
    first = 0
    for number, host in enumerate(hosts):
        # All GPUs need no words; ranks then use those that the host itself shows.
        visible = {} if host.whole else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}
        tasks.append(
            {
                "host": host.name, "first_rank": first, "ranks": len(host.slots), "node_rank": number,
                "world_size": sum(len(other.slots) for other in hosts), "address": hosts[0].address, "port": port,
                "command": command, "directory": directory, "environment": passed | visible,
            }
        )  # fmt: skip
        first += len(host.slots)
    return tasks


def main() -> int:
    """Hold the connection of one host; return the exit code of its ranks."""
    die_with_parent(os.environ)  # ssh then meets the end of its stdin, and so does the agent
    job: dict[str, Any] = json.loads(os.environ.pop(_JOB_VARIABLE))
    hosts = [Host(host["name"], tuple(host["slots"]), host["whole"]) for host in job["hosts"]]
    tasks = plan_tasks(hosts, job["command"], os.environ, job["directory"], job["port"])
    task = tasks[int(os.environ["RANK"])]  # run_local numbers its processes so
    path = os.environ.get("PYTHONPATH")
    words = ["exec", *(["env", f"PYTHONPATH={path}"] if path else []), sys.executable, "-m", "trainer.launch.ssh_agent"]
    # The signals first: until ssh runs they wait in `waiting`.
    waiting: list[str] = []
    process: subprocess.Popen[bytes] | None = None

    def send(signum: int, _frame: object) -> None:
        name = signal.Signals(signum).name
        if process is None or process.stdin is None:
            waiting.append(name)
        else:
            _write(process, name)

    for signum in FORWARDED:
        signal.signal(signum, send)
    process = subprocess.Popen([*_SSH, "--", task["host"], shlex.join(words)], stdin=subprocess.PIPE)
    _write(process, json.dumps(task))
    for name in waiting:
        _write(process, name)
    code = process.wait()
    if code in (0, 2, 75, 93):
        return code
    why = "ssh failed: see its words above" if code == _SSH_FAILED else f"its ranks ended with exit code {code}"
    print(f"trainer: host {task['host']}: {why}", file=sys.stderr, flush=True)
    return code if 0 < code < 128 else EXIT_FAILURE


def _write(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    # ssh may have ended: its exit code says more. Unbuffered: a handler may run in the middle of a buffered write.
    with contextlib.suppress(OSError):
        os.write(process.stdin.fileno(), line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
