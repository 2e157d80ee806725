"""Adam's state in a foreign checkpoint: moments, step counts and settings, wherever the optimizer keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.checkpoint.import_pickle import Node
from trainer.core.errors import Problem, RefusedError

KEYS = ("exp_avg", "exp_avg_sq")
WEIGHTS_ONLY = "import the weights alone: --weights-only"


def moments_of(state: Node) -> dict[str, Node]:
    """Return the tensors of one entry of an optimizer's state by key. Raises RefusedError if it isn't Adam's."""
    found = {key: node for key, node in state.items() if hasattr(node.value, "dim") and node.value.dim() > 0}
    if set(found) != set(KEYS):
        held = ", ".join(sorted(map(str, found))) or "nothing"
        rule = f"holds {held}; only the moments of Adam ({', '.join(KEYS)}) can be taken over"
        raise RefusedError(Problem(f"{state.path.name}: {state.place}", None, rule, WEIGHTS_ONLY), "import refused")
    return found


def step_of(state: Node, group: Node | None, common: Node | None = None) -> int:
    """Return Adam's step count: of the entry, its group or the whole optimizer. Raises RefusedError without one."""
    for node in (state.get("step"), group.get("step") if group else None, common):
        if node is not None:
            return node.integer()
    raise state.unlike("has no step count")


def common_step(steps: Iterable[int], where: Node) -> int:
    """Return the one step count of all parameters. Raises RefusedError if they differ: ours are one."""
    found = sorted(set(steps))
    if len(found) != 1:
        rule = f"parameters have taken {found} steps; a run here has one count for all of them"
        raise RefusedError(Problem(where.path.name, None, rule, WEIGHTS_ONLY), "import refused")
    return found[0]


def settings_of(groups: Sequence[Node]) -> str:
    """Return what the source trained with, in the words of torch, for the recipe that goes on."""
    said: list[str] = []
    for key in ("lr", "betas", "eps", "weight_decay"):
        values = [node.value for group in groups if (node := group.get(key)) is not None]
        plain = dict.fromkeys(str(value) for value in values if isinstance(value, int | float | tuple | list))
        if plain:
            said.append(f"{key} {' and '.join(plain)}")
    return ", ".join(said)
