"""Complete what mpirun's environment leaves open: the address of rank 0. The only place that needs an MPI library."""

from __future__ import annotations

import dataclasses
import importlib
import socket
from typing import Any

from trainer.core.environ import RankEnvironment
from trainer.core.errors import RefusedError
from trainer.launch.ports import free_port


def discover(ranks: RankEnvironment) -> RankEnvironment:
    """Return ``ranks`` with address, port, local rank and node rank agreed over MPI. Collective over all ranks.

    MPI is started and finished again here: a rank that fails later must not hang in MPI_Finalize, and MPI must not
    watch over a process that forks data workers. Raises RefusedError when mpi4py or an MPI library is missing, or when
    it was not the MPI library of this mpirun (each rank then finds itself alone).
    """
    mpi = _load_mpi()
    mpi.Init()
    try:
        world = mpi.COMM_WORLD
        if (world.Get_rank(), world.Get_size()) != (ranks.rank, ranks.world_size):
            raise RefusedError(
                f"mpirun started rank {ranks.rank} of {ranks.world_size}, but the MPI library of mpi4py "
                f"({mpi.Get_library_version().splitlines()[0].strip()}) sees rank {world.Get_rank()} of "
                f"{world.Get_size()}: mpirun and mpi4py use different MPI libraries → use the mpirun of that library, "
                "or start with srun or torchrun, which need no MPI"
            )
        return _agree(mpi, world, ranks)
    finally:
        mpi.Finalize()


def _load_mpi() -> Any:
    try:
        mpi4py: Any = importlib.import_module("mpi4py")
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py 4.1 without libmpi
        raise RefusedError(
            f"mpirun started this process, but mpi4py or its MPI library can't be loaded ({error}) → install "
            "mpi4py and MPI, set MASTER_ADDR and MASTER_PORT for all ranks, or start with srun or torchrun"
        ) from error


def _agree(mpi: Any, world: Any, ranks: RankEnvironment) -> RankEnvironment:
    node = world.Split_type(mpi.COMM_TYPE_SHARED, ranks.rank)
    local_rank, local_world_size = int(node.Get_rank()), int(node.Get_size())
    # Nodes are numbered by their first rank, so the numbers are the same whatever the mapping of ranks to nodes.
    first_on_node: int = node.bcast(ranks.rank, root=0)
    firsts = sorted(set(world.allgather(first_on_node)))
    address, port = world.bcast((_address_of_rank_0(len(firsts)), free_port()) if ranks.rank == 0 else None, root=0)
    if ranks.master_address:
        address, port = ranks.master_address, ranks.master_port
    node.Free()
    return dataclasses.replace(
        ranks,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=firsts.index(first_on_node),
        master_address=address,
        master_port=port,
    )


def _address_of_rank_0(nodes: int) -> str:
    """Loopback on one node; else the IP address of the interface that leads outside, else this host's name."""
    if nodes == 1:
        return "127.0.0.1"
    host = socket.gethostname()
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return host
    # Debian maps a host's own name to 127.0.1.1: of no use to the other nodes.
    return next((address for address in sorted(addresses) if not address.startswith("127.")), host)
