"""Read what ``torch.save`` wrote elsewhere, without running any of it.

``torch.load(weights_only=True)`` makes tensors and plain containers, and of other classes only those of the list below,
for which inert ones stand in: DeepSpeed itself is not imported. Contents are mapped, not read: what is looked at costs
memory, the rest does not.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from trainer.core.errors import Problem, RefusedError

OTHER_LAYOUT = "import it with the DeepSpeed version that wrote it, through Hugging Face safetensors"


class _Inert:
    """Stands in for an object whose contents don't matter, e.g. a loss scaler."""

    def __init__(self, *_: object) -> None:
        pass


class FragmentAddress(_Inert):
    """Stands in for the place of a parameter's piece in a flat partition; ``start`` and ``numel`` as the file says."""

    start: object = None
    numel: object = None


class _Stage(int):
    """Stands in for the number of the ZeRO stage."""


_STAND_INS: tuple[tuple[type, str], ...] = (
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
)


def load_pickle(path: Path) -> Node:
    """Return the contents of a file of ``torch.save``, tensors mapped from it on the CPU.

    Raises RefusedError, naming file and classes, if it holds anything but tensors, containers and what is known of
    DeepSpeed's: nothing of it has been run then.
    """
    with torch.serialization.safe_globals([*_STAND_INS]):
        try:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
            if foreign:
                rule = f"holds objects of {', '.join(foreign)}: loading them would run code that the file names"
                fix = "save it again without them (client_state and lr_scheduler are where they come from)"
                raise RefusedError(Problem(path.name, str(path), rule, fix), title="import refused")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rule = f"can't be read safely as a file of torch.save ({reason})"
            fix = "see that it is whole; files of torch before 1.6 must be saved again"
            raise RefusedError(Problem(path.name, str(path), rule, fix), title="import refused") from error
    return Node(value, path, "")


@dataclass(frozen=True)
class Node:
    """A value of a foreign file, whose parts are asked for as what they must be. Each method raises RefusedError."""

    value: Any  # Any: whatever the file holds
    path: Path
    place: str

    def __getitem__(self, key: object) -> Node:
        found = self.get(key)
        if found is None:
            raise self.unlike(f"lacks {key!r}")
        return found

    def get(self, key: object) -> Node | None:
        """Return a part, None where it is missing or None."""
        if not isinstance(self.value, dict | list | tuple):
            raise self.unlike("has no parts")
        try:
            value = cast("Any", self.value)[key]
        except (KeyError, IndexError, TypeError):
            return None
        return None if value is None else self._part(key, value)

    def items(self) -> list[tuple[Any, Node]]:
        """Return keys and parts of a dictionary, in its order."""
        if not isinstance(self.value, dict):
            raise self.unlike("is no dictionary")
        return [(key, self._part(key, value)) for key, value in self.value.items()]

    def named(self) -> list[tuple[str, Node]]:
        """Return names and parts of a dictionary, in its order."""
        items = self.items()
        if not all(isinstance(key, str) for key, _ in items):
            raise self.unlike("has keys that are no names")
        return items

    def elements(self) -> list[Node]:
        """Return the parts of a list."""
        if not isinstance(self.value, list | tuple):
            raise self.unlike("is no list")
        return [self._part(number, value) for number, value in enumerate(self.value)]

    def integer(self) -> int:
        """Return a whole number, also of a tensor of one element."""
        value = self.value.item() if isinstance(self.value, torch.Tensor) and self.value.numel() == 1 else self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63 or value % 1:
            raise self.unlike("is no number of anything")
        return int(value)

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self.unlike("is no text")
        return self.value

    def shape(self) -> tuple[int, ...]:
        """Return a shape."""
        if not isinstance(self.value, list | tuple) or not all(type(size) is int and size >= 0 for size in self.value):
            raise self.unlike("is no shape")
        return tuple(cast("list[int]", self.value))

    def tensor(self) -> torch.Tensor:
        """Return a dense tensor without its autograd and subclass."""
        tensor = self.value
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise self.unlike("is no dense tensor")
        return tensor.detach()

    def flat(self) -> torch.Tensor:
        """Return a dense tensor of one dimension."""
        tensor = self.tensor()
        if tensor.dim() != 1:
            raise self.unlike("is no flat tensor")
        return tensor

    def unlike(self, rule: str) -> RefusedError:
        """Return the error that says where the file is not as DeepSpeed writes it."""
        where = f"{self.path.name}: {self.place}" if self.place else self.path.name
        return RefusedError(Problem(where, None, rule, OTHER_LAYOUT), title="import refused")

    def _part(self, key: object, value: object) -> Node:
        return Node(value, self.path, f"{self.place}.{key}" if self.place else str(key))
