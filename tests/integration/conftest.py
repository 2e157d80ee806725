"""The fixture `slurm_cluster`: a real SLURM cluster of network namespaces on this machine (tests/slurm_cluster/)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import packages
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "slurm_cluster" / "cluster.sh"
PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "iproute2"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class SlurmCluster:
    """A running cluster. Commands run on the node ``ctl`` (controller and login node) unless another is named."""

    def __init__(self, directory: Path, prefix: str, nodes: int) -> None:
        self.directory = directory
        self.prefix = prefix
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]

    def start(self) -> None:
        done = self._script("up", self.prefix, str(len(self.nodes)))
        assert done.returncode == 0, f"the SLURM cluster did not start:\n{done.stdout}{done.stderr}"

    def stop(self) -> None:
        self._script("down", self.prefix)
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(
        self,
        argv: list[str],
        node: str = "ctl",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node; ``env`` is added to this process's environment."""
        # A rank's variables of the test runner would be inherited by the jobs.
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(
            [str(SCRIPT), "in", str(self.directory), node, *argv],
            capture_output=True,
            text=True,
            env=variables,
            cwd=cwd or self.directory,
            timeout=timeout,
            check=False,
        )

    def state(self, job_id: str) -> str:
        """The job's state as squeue says it, e.g. RUNNING; empty when the controller has forgotten the job."""
        return self.run(["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"]).stdout.strip()

    def fields(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run(["scontrol", "show", "job", job_id, "-o"]).stdout))

    def wait(self, job_id: str, timeout: float = 60) -> str:
        """Wait until the job has ended for good and return its state. The delay of a requeued job is cut to 3 s."""
        return self._wait(job_id, timeout, lambda state: state in ENDED or not state)

    def wait_for_start(self, job_id: str, restart: int, timeout: float = 60) -> None:
        """Wait until SLURM has started the job for the ``restart``-th time again. The delay is cut as in `wait`."""
        started = lambda state: state == "RUNNING" and self.fields(job_id)["Restarts"] == str(restart)  # noqa: E731
        state = self._wait(job_id, timeout, lambda state: state in ENDED or started(state))
        assert state == "RUNNING", self.fields(job_id)

    def _wait(self, job_id: str, timeout: float, until: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + timeout
        hastened: set[str] = set()
        while time.monotonic() < deadline:
            state = self.state(job_id)
            if until(state):
                return state
            fields = self.fields(job_id) if state == "PENDING" else {}
            if fields.get("Reason") == "BeginTime" and fields["Restarts"] not in hastened:
                # Not "now": slurmd refuses a credential issued in the second in which it revoked the last one
                # ("already killed, do not launch batch job"), and the job FAILED. SLURM's own delay is longer.
                self.run(["scontrol", "update", f"jobid={job_id}", "StartTime=now+3"])
                hastened.add(fields["Restarts"])
            time.sleep(0.2)
        raise AssertionError(f"job {job_id} is not so far after {timeout} s: {self.fields(job_id)}")

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Wait until no node holds anything of the jobs before."""
        deadline = time.monotonic() + timeout
        while set(states := self.run(["sinfo", "-h", "-N", "-o", "%N=%T"]).stdout.split()) != {
            f"{node}=idle" for node in self.nodes
        }:
            assert time.monotonic() < deadline, f"nodes are still not idle after {timeout} s: {states}"
            time.sleep(0.2)

    def wait_for(self, path: Path, timeout: float = 30) -> None:
        """Wait until a job has made ``path``, with something in it."""
        deadline = time.monotonic() + timeout
        while not (path.exists() and path.stat().st_size > 0):
            assert time.monotonic() < deadline, f"{path} did not appear within {timeout} s"
            time.sleep(0.05)

    def cut(self, node: str) -> None:
        """Pull the network cable of a node."""
        self._script("cut", node)

    def heal(self, node: str) -> None:
        """Plug it in again."""
        self._script("heal", node)

    def crash(self, node: str) -> None:
        """Kill every process of a node at once."""
        self._script("crash", node)

    def boot(self, node: str) -> None:
        """Start slurmd of a crashed node."""
        self._script("boot", node)

    def part(self, node: str, other: str) -> None:
        """Let two nodes lose each other, while the controller reaches both."""
        self._script("part", node, other)

    def join(self, node: str, other: str) -> None:
        """Let them meet again."""
        self._script("join", node, other)

    def _script(self, action: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), action, str(self.directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of 4 nodes (8 CPUs and 4 pretended GPUs each), made once and torn down always."""
    if os.geteuid() != 0:
        packages.give_up("a SLURM cluster of network namespaces needs root")
    packages.require(PACKAGES, lambda: all(shutil.which(program) for program in PROGRAMS))
    _remove_abandoned()
    directory = Path(tempfile.mkdtemp(prefix=f"trainer-slurm-{os.getpid()}-", dir="/tmp"))  # short: a socket lies in it
    directory.chmod(0o755)
    cluster = SlurmCluster(directory, _prefix(os.getpid()), nodes=4)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def nodes_at_rest(request: pytest.FixtureRequest) -> None:
    """Start a test with every node free: SLURM then takes the first ones, and tests name them."""
    if "slurm_cluster" in request.fixturenames:
        request.getfixturevalue("slurm_cluster").wait_until_idle()


def _prefix(pid: int) -> str:
    return f"trainer-slurm-{pid}"


def _remove_abandoned() -> None:
    """Take down clusters whose test run was killed: their names carry its process id."""
    for directory in Path("/tmp").glob("trainer-slurm-*"):
        match = re.fullmatch(r"trainer-slurm-(\d+)-\w+", directory.name)
        if match is not None and not Path(f"/proc/{match[1]}").exists():
            SlurmCluster(directory, _prefix(int(match[1])), nodes=0).stop()
