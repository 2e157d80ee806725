"""One job of four ranks on two real SLURM nodes, started in every way there is: equal losses, and every way saves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import packages
import pytest
import tiny
from test_slurm_cluster import make_plan, notes, output, submit

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
STARTS = {
    "srun": [],
    "torchrun": ["launch.slurm.starter=torchrun"],
    "mpirun": ["launch.slurm.starter=mpirun"],
    "mpiexec": ["launch.slurm.starter=mpiexec"],
    "srun-pmix": ["launch.slurm.mpi=pmix"],
    "srun-pmi2": ["launch.slurm.mpi=pmi2"],
    "ssh": ["launch.launcher=ssh", "launch.hostfile=hosts"],
}
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module", autouse=True)
def mpi() -> None:
    """Open MPI, and the library that SLURM's pmix plugin opens."""
    present = lambda: bool(shutil.which("orted")) and any(Path("/usr/lib").glob("*/libpmix.so"))  # noqa: E731
    packages.require(["openmpi-bin", "libopenmpi-dev", "libpmix-dev"], present)


@pytest.fixture(scope="module")
def ssh(slurm_cluster, tmp_path_factory) -> dict[str, str]:
    """Start sshd on both nodes; return the environment in which the real ssh gets there by key."""
    packages.require(["openssh-server", "openssh-client"], lambda: Path("/usr/sbin/sshd").exists())
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPidFile none\n"
    )
    options = f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    wrapper = folder / "bin" / "ssh"  # stands for ~/.ssh/config, which ssh finds by the password file, not by HOME
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for node in slurm_cluster.nodes:
        done = slurm_cluster.run(["/usr/sbin/sshd", "-f", str(folder / "sshd_config")], node=node)
        assert done.returncode == 0, done.stderr
    return {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def mpich(tmp_path_factory) -> dict[str, str]:
    """Install MPICH beside Open MPI, with an mpi4py that speaks it; return the environment that finds both."""
    folder = tmp_path_factory.mktemp("mpich")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--prefix", folder, "mpich", "mpi4py"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        packages.give_up(f"MPICH can't be installed by pip: {done.stderr[-500:]}")
    site = next(folder.glob("lib/python*/site-packages"))
    return {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{ROOT}",
        "MPI4PY_LIBMPI": str(folder / "lib" / "libmpi.so.12"),
    }


@pytest.fixture(scope="module")
def losses(slurm_cluster, ssh, mpich, tmp_path_factory) -> dict[str, list[tuple[float, float]]]:
    """Train one recipe in every way and return each one's losses and gradient norms."""
    folder = tiny.write_world(tmp_path_factory.mktemp("launchers"))
    tiny.write_recipe(
        folder, run={"steps": STEPS}, checkpoint={"every_steps": STEPS}, evaluation={"every_steps": 10},
        launch={"slurm": {"nodes": 2, "gpus_per_node": 0, "time": "00:10:00"}},
    )  # fmt: skip
    found = {}
    (folder / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    for name, overrides in STARTS.items():
        run = folder / "runs" / name
        if name == "ssh":
            command = tiny.command("train", "tiny.yaml", f"run.directory=runs/{name}", *overrides)
            done = slurm_cluster.run(command, cwd=folder, env=ssh, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            command = tiny.command("submit", "tiny.yaml", f"run.directory=runs/{name}", *overrides)
            done = slurm_cluster.run(command, cwd=folder, env=mpich if name in ("mpiexec", "srun-pmi2") else ROOT_MAY)
            assert done.returncode == 0, done.stderr
            state = slurm_cluster.wait(done.stdout.split()[0], timeout=240)
            log = "\n".join(path.read_text()[-3000:] for path in (run / "logs").glob("slurm-*.out"))
            assert state == "COMPLETED", f"{name}: {log}"
        launchers = dict.fromkeys(("srun", "srun-pmix", "srun-pmi2"), "slurm")
        launchers |= {"mpirun": "openmpi", "mpiexec": "mpich"}
        recorded = json.loads((run / "environment.json").read_text())
        assert (recorded["world_size"], recorded["variables"]["TRAINER_LAUNCHER"]) == (4, launchers.get(name, name))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(line["loss"], line["grad_norm"]) for line in lines if "kind" not in line]
        hosts = [path.read_text().split(" host ")[1].split()[0] for path in sorted((run / "logs").glob("rank-*.log"))]
        assert hosts == ["node1", "node1", "node2", "node2"], name
    return found


@pytest.mark.timeout(900)  # seven starts of four ranks that import torch, one after the other
def test_every_start_computes_the_same_bits(losses):
    assert set(losses) == set(STARTS)
    assert len(losses["srun"]) == STEPS
    for name in STARTS:
        assert losses[name] == losses["srun"], name


@pytest.mark.parametrize(
    ("starter", "scancel"),
    [("torchrun", ["-s", "USR1"]), ("mpirun", ["-b", "-s", "USR1"])],
    ids=["torchrun-steps", "mpirun-batch"],
)
def test_every_start_lets_ranks_save_and_go_on(slurm_cluster, tmp_path, starter, scancel):
    """The signals of a time limit reach the ranks behind torchrun's agents and mpirun, which live through them."""
    plan = make_plan(tmp_path, "wait", starter=starter)
    job = submit(slurm_cluster, plan, env=ROOT_MAY)
    for rank in range(4):
        slurm_cluster.wait_for(tmp_path / f"attempt-0-rank-{rank}.json")
    assert slurm_cluster.run(["scancel", *scancel, job]).returncode == 0
    assert slurm_cluster.wait(job, timeout=120) == "COMPLETED", output(plan, job)
    assert [note["received"] for note in notes(tmp_path, 0)] == ["SIGUSR1"] * 4
    assert len(notes(tmp_path, 1)) == 4
    assert f"job {job} requeued" in output(plan, job)


SLEEPER = """
import os, sys, time
from pathlib import Path
from trainer.core.environ import detect, die_with_parent
die_with_parent(os.environ)
Path(sys.argv[1], f"rank-{detect(os.environ).rank}").write_text(str(os.getpid()))
time.sleep(60)
"""
RUN_HOSTS = """
import json, sys
from trainer.config.hostfile import Host
from trainer.launch.ssh import run_hosts
sys.exit(run_hosts([Host(name, (0, 1)) for name in sys.argv[1].split(",")], json.loads(sys.argv[2])))
"""


def test_ranks_of_ssh_end_with_their_launcher(slurm_cluster, ssh, tmp_path):
    command = json.dumps([sys.executable, "-c", SLEEPER, str(tmp_path)])
    code = f"{RUN_HOSTS.strip()}".replace("import json, sys", f"import json, os, sys\nos.chdir({str(tmp_path)!r})")
    with ThreadPoolExecutor(1) as pool:
        head = pool.submit(
            slurm_cluster.run, [sys.executable, "-c", code, "node1,node2", command], env=ssh, cwd=tmp_path
        )
        for rank in range(4):
            slurm_cluster.wait_for(tmp_path / f"rank-{rank}")
        pids = [int((tmp_path / f"rank-{rank}").read_text()) for rank in range(4)]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path}.*node1,node2"], check=True)
        head.result(timeout=30)
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_host_that_can_not_be_reached_is_named(slurm_cluster, ssh, tmp_path):
    command = json.dumps([sys.executable, "-c", "pass"])
    done = slurm_cluster.run([sys.executable, "-c", RUN_HOSTS, "node1,node9", command], env=ssh, cwd=tmp_path)
    assert done.returncode == 1
    assert "trainer: host node9: ssh failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_environment_is_staged_on_every_node(slurm_cluster, tmp_path):
    """Unpacked once a node, used by all ranks, and gone afterwards."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nSTAGED=$0 exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    archive = tmp_path / "my environment.tar"
    subprocess.run([ROOT / "launch" / "stage.sh", archive, environment], check=True)
    code = "import os, sys; open(sys.argv[1] + os.environ['SLURM_PROCID'], 'w').write(os.environ['STAGED'])"
    command = (sys.executable, "-c", code, f"{tmp_path}/saw-")
    # The nodes of this cluster share /tmp, but not /dev/shm.
    plan = make_plan(tmp_path, "stop", stage=str(archive), stage_directory="/dev/shm", command=command)
    job = submit(slurm_cluster, plan)
    slurm_cluster.wait(job)
    staged = {(tmp_path / f"saw-{rank}").read_text() for rank in range(4)}
    assert len(staged) == 1, output(plan, job)
    assert staged.pop().startswith("/dev/shm/trainer-")
    for node in slurm_cluster.nodes:
        left = slurm_cluster.run(["ls", "/dev/shm"], node=node).stdout
        assert "trainer-" not in left


MEET = """
import os, sys, torch, torch.distributed as dist
from trainer.core.environ import detect, export
from trainer.engine.rendezvous import roll_call
from trainer.launch.address import choose_interface, reachable
ranks = reachable(detect(os.environ))
choose_interface(ranks, os.environ)
export(ranks, os.environ)
store = roll_call(ranks, 60)
dist.init_process_group("gloo", init_method="env://")
total = torch.tensor([2.0 ** ranks.rank])
dist.all_reduce(total)
dist.barrier()
sys.stdout.write(f"{ranks.rank} {ranks.master_address} {os.environ['GLOO_SOCKET_IFNAME']} {total.item():.0f}\\n")
dist.destroy_process_group()
"""
DEBIAN_NAMES = (
    'printf "127.0.0.1 localhost\\n127.0.1.1 $(hostname)\\n" > "$0-$(hostname)"'
    ' && mount --bind "$0-$(hostname)" /etc/hosts && exec "$@"'
)


def test_hosts_that_know_only_their_own_name_and_as_loopback(slurm_cluster, tmp_path):
    """As Debian writes /etc/hosts: gloo would listen on 127.0.1.1, and node2 can't resolve node1."""
    spoil = ["unshare", "-m", "sh", "-c", DEBIAN_NAMES, str(tmp_path / "hosts")]
    done = slurm_cluster.run(["srun", "-N2", "-n2", *spoil, sys.executable, "-c", MEET], timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 node1 eth0 3", "1 10.77.0.1 eth0 3"]
