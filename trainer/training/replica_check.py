"""Compare what ranks hold copies of, and end the run where a copy differs, before it is saved."""

from __future__ import annotations

import json
import socket
from typing import Any

import xxhash

from trainer.checkpoint.agreement import Ranks
from trainer.core.errors import CorruptionError
from trainer.engine.base import TrainEngine
from trainer.resilience.replicas import differences
from trainer.training.state import TrainState

_SHOWN = 3


class ReplicaCheck:
    """Called by all ranks together, at most once a step."""

    def __init__(self, engine: TrainEngine, state: TrainState, every_steps: int | None) -> None:
        self._engine = engine
        self._state = state
        self._every_steps = every_steps
        self._checked_step = -1

    def if_due(self) -> None:
        """Check every so many steps. Raises CorruptionError, on every rank alike."""
        if self._every_steps is not None and self._state.step % self._every_steps == 0:
            self.now()

    def now(self) -> None:
        """Check, before a save say, unless checks are switched off. Raises CorruptionError, on every rank alike."""
        if self._every_steps is None or self._checked_step == self._state.step:
            return
        self._checked_step = self._state.step
        ranks = Ranks()  # not those of the thread that may be saving
        names = {_key(name): (name, value) for name, value in self._digests().items()}
        # Numbers first, names only where something differs: a thousand ranks have a million of them.
        held = ranks.to_first({key: value for key, (_, value) in names.items()})
        found = ranks.from_first(differences(held) if held else [])
        if not found:
            return
        told = ranks.gather((socket.gethostname(), {f.key: names[f.key][0] for f in found if f.key in names}))
        hosts = [host for host, _ in told]
        known = {key: name for _, mine in reversed(told) for key, name in mine.items()}
        suspects = sorted({rank for difference in found for rank in difference.ranks})
        outvoted = all(difference.outvoted for difference in found)
        shown = ", ".join(known.get(difference.key, "?") for difference in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        who = _who(suspects, hosts)
        verb = "differs" if len(suspects) == 1 else "differ"
        which = f"{who} {verb} from the others" if outvoted else f"one of {who} is wrong: they differ"
        raise CorruptionError(
            f"step {self._state.step}: {which} in {shown}{more} (resilience.guard.replica_check_every_steps); memory, "
            "a device or a connection corrupts data there: start again without that host",
            suspects,
            sorted({hosts[rank] for rank in suspects}) if outvoted else [],
        )

    def _digests(self) -> dict[str, int]:
        counters: dict[str, Any] = self._state.to_json()
        guard = counters.pop("guard")
        counters |= {"rewinds": guard["rewinds"], "spikes": guard["spikes"]}
        best = counters.pop("best")  # means of losses
        text = json.dumps({**counters, "best_step": best["step"]}, sort_keys=True)
        return {**self._engine.replica_digests(), "the counters of the run": xxhash.xxh64_intdigest(text.encode())}


def _key(name: str) -> int:
    return xxhash.xxh64_intdigest(name.encode())


def _who(suspects: list[int], hosts: list[str]) -> str:
    named = [f"rank {rank} on {hosts[rank]}" for rank in suspects[:_SHOWN]]
    return ", ".join(named) + (f" and {len(suspects) - _SHOWN} more ranks" if len(suspects) > _SHOWN else "")
