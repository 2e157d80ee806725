"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Collection


def to_delete(
    steps: Collection[int], keep_last: int, keep_every_steps: int | None, protected: Collection[int] = ()
) -> list[int]:
    """Return the steps of the committed checkpoints ``steps`` that may be deleted, oldest first.

    Kept: the newest ``keep_last`` (the newest one always), multiples of ``keep_every_steps``, and ``protected``.
    """
    ordered = sorted(set(steps))
    kept = {*ordered[-max(1, keep_last) :], *protected}
    if keep_every_steps:
        kept.update(step for step in ordered if step % keep_every_steps == 0)
    return [step for step in ordered if step not in kept]
