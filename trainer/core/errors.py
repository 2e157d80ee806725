"""The errors a user may meet, each with the exit code of the command that raised it.

Exit codes are a contract (README, "Exit codes"): 2 = the input was refused and nothing was written,
75 = checkpointed, please requeue, 93 = do not restart, 1 = anything else (may be retried).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_REFUSED = 2
EXIT_REQUEUE = 75
EXIT_DO_NOT_RESTART = 93


class TrainerError(Exception):
    """Base of every error whose text is meant for the user. Shown without a traceback."""

    exit_code = EXIT_FAILURE


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: which key, its value, the rule it breaks and how to mend it."""

    key: str
    """Dotted path, e.g. ``batch.global_size`` or ``deepspeed.json: zero_optimization.stage``."""
    value: Any
    rule: str
    """What is wrong, as a statement of the rule that is broken."""
    fix: str = ""
    """What to do about it, as an imperative."""

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self.value!r}"
        return f"{self.key}{shown}: {self.rule}" + (f" → {self.fix}" if self.fix else "")


class RefusedError(TrainerError):
    """A recipe, command line or data set was refused; carries every problem at once."""

    exit_code = EXIT_REFUSED

    def __init__(self, problems: list[Problem] | Problem | str, title: str = "refused") -> None:
        if isinstance(problems, str):
            self.problems: list[Problem] = []
            super().__init__(problems)
            return
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        count = len(self.problems)
        head = f"{title}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class RecipeError(RefusedError):
    """The recipe (or the user's DeepSpeed JSON) breaks one or more rules."""


class DataError(RefusedError):
    """Token shards, tokenizer or corpus can't be used."""


class RendezvousError(TrainerError):
    """The ranks did not find each other at the start."""


class CheckpointError(TrainerError):
    """A checkpoint can't be written, read or matched to this run."""


class DoNotRestartError(TrainerError):
    """A deterministic failure: the same start would fail the same way again."""

    exit_code = EXIT_DO_NOT_RESTART


class CorruptionError(TrainerError):
    """What ranks hold copies of differs: memory, a device or a connection of one of them is not to be trusted.

    ``ranks`` and ``hosts`` are those that the others outvote; all that hold a copy where there is no majority.
    """

    def __init__(self, text: str, ranks: list[int], hosts: list[str]) -> None:
        super().__init__(text)
        self.ranks, self.hosts = ranks, hosts
