"""`install()` adds the fault points ``micro.PHASE``: reached at the third micro-batch of that phase."""

from __future__ import annotations

from typing import Any

from trainer.core import faults, phases


def install() -> None:
    mark = phases.mark

    def counted(phase: phases.Phase, **arguments: Any) -> None:
        mark(phase, **arguments)
        if arguments.get("micro_batch") == 2:
            faults.reach(f"micro.{phase}", rank=phases.board._rank, step=phases.board._step)

    phases.mark = counted
