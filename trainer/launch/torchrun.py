"""Start torchrun's agent of this node, as a task of srun: ``python -m trainer.launch.torchrun RANKS -- COMMAND...``.

COMMAND is ``PYTHON -m MODULE ARGUMENTS...`` or ``PYTHON SCRIPT ARGUMENTS...``. SLURM's variables tell the agent the
other nodes.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from trainer.core.environ import RankEnvironment, derive_threads, detect
from trainer.core.errors import RefusedError, TrainerError


def agent_command(node: RankEnvironment, ranks: int, command: list[str]) -> list[str]:
    """Return torchrun's argv for ``ranks`` ranks of ``command`` on this node; ``node`` is the agent's place.

    The static rendezvous, not c10d: nodes keep SLURM's order, where c10d sorts them by host name, and rank 0 is on the
    node whose address all know. c10d's other gift, new members, is of no use to a job of fixed size.
    """
    python, *program = command
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={node.world_size}", f"--node-rank={node.rank}",
        f"--nproc-per-node={ranks}", "--rdzv-backend=static", f"--master-addr={node.master_address}",
        f"--master-port={node.master_port}", "--max-restarts=0", *program,
    ]  # fmt: skip


def main(arguments: list[str]) -> NoReturn:
    """Become the agent."""
    if len(arguments) < 3 or not arguments[0].isdecimal() or arguments[1] != "--":
        raise RefusedError("usage: python -m trainer.launch.torchrun RANKS -- PYTHON PROGRAM...")
    node = detect(os.environ)
    if node is None or node.launcher != "slurm":
        raise RefusedError(
            "this is no task of srun → start it with srun --ntasks-per-node=1, or call torchrun yourself"
        )
    # SLURM signals every process of the step. torchrun's agent would die of USR1 and USR2, or with
    # TORCHELASTIC_SIGNALS_TO_HANDLE kill its ranks 30 s later; ranks install handlers of their own.
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    ranks = int(arguments[0])
    argv = agent_command(node, ranks, arguments[2:])
    variables = dict(os.environ)
    derive_threads(variables, ranks)  # torchrun's own number is 1, whatever the cores
    os.execve(argv[0], argv, variables)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
