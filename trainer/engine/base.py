"""The seam between the loop and DeepSpeed: six methods, and nothing above them knows how ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.data.batches import MicroBatch
from trainer.parallel.cut import Cut


@dataclass(frozen=True)
class StepPreview:
    """What is known at the optimizer boundary, before any weight changes. The same on every rank."""

    loss: float
    """Mean over the target tokens of the global batch."""
    grad_norm: float
    """Global L2 norm before clipping; inf or nan where any gradient is."""


@dataclass(frozen=True)
class Requests:
    """What one rank asks of all of them when a step begins. Summed with the target counts: no collective of its own."""

    stop: bool = False
    """End the run after this step."""
    by_person: bool = False
    """The stop is a person's: the scheduler is not to start the run again."""
    save: bool = False
    """Save after this step."""
    log_level: int = 0
    """Log from this step on at this level of Python's logging; 0: as before. Rank 0 alone may ask for it."""


@dataclass(frozen=True)
class StepResult:
    """What a step did. The same on every rank, but for the two durations."""

    loss: float
    grad_norm: float
    target_tokens: int
    """Target tokens of the global batch."""
    applied: bool
    """False: the step was vetoed, weights and optimizer state are as before."""
    stop_requests: int
    """How many ranks asked to stop when the step began."""
    person_requests: int
    """How many of them were asked by a person."""
    save_requests: int
    """How many ranks asked for a checkpoint when the step began."""
    log_level: int
    """The level that rank 0 asked for when the step began; 0: none."""
    source_losses: tuple[float, ...]
    """Summed loss over the target tokens of each source, in nats."""
    source_targets: tuple[int, ...]
    """Target tokens of each source."""
    corrupt_samples: int
    """Rows of the global batch that were left out because their data is corrupt."""
    batch_digest: int
    """Digest of the tokens of the global batch, whatever ranks and micro-batches shared them."""
    forward_backward_seconds: float
    optimizer_seconds: float


Accept = Callable[[StepPreview], bool]


class Swapped(Protocol):
    """Elements that are brought into memory when they are asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Their dtype."""
        ...

    def numel(self) -> int:
        """Return how many they are."""
        ...

    def fetch(self) -> torch.Tensor:
        """Return them, [count]; good until the next piece of state is fetched."""
        ...

    def fill(self, values: torch.Tensor) -> None:
        """Put others in their place."""
        ...


@dataclass(frozen=True)
class StateSlice:
    """A contiguous piece of a logical tensor that this rank owns or needs.

    Read ``tensor`` to save, ``fill`` to load.
    """

    name: str
    """Hugging Face parameter name."""
    key: str
    """``weight``, ``exp_avg``, ``exp_avg_sq`` or ``momentum``."""
    shape: tuple[int, ...]
    """Global shape of the logical tensor."""
    start: int
    """First element, in the flattened logical tensor."""
    held: torch.Tensor | Swapped
    """[count], this rank's elements: a flat view into live memory, or on another medium."""
    primary: bool
    """True on exactly one rank per element: who writes it. Other ranks hold replicas."""
    cut: Cut | None = None
    """The part of the logical tensor that ``start`` counts in, where tensors are divided over tensor ranks."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.held.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.held.dtype

    @property
    def tensor(self) -> torch.Tensor:
        """The elements, good until the next slice's are asked for."""
        return self.held if isinstance(self.held, torch.Tensor) else self.held.fetch()

    def fill(self, values: torch.Tensor) -> None:
        """Load ``values``, [count]."""
        if isinstance(self.held, torch.Tensor):
            self.held.copy_(values)
        else:
            self.held.fill(values)


class StateReader(Protocol):
    """Where ``load_state`` gets its slices from."""

    def read(self, name: str, key: str, start: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Return ``count`` elements from ``start`` of the flattened logical tensor, or of a part, on the CPU."""
        ...


class TrainEngine(Protocol):
    """Carries out optimizer steps of one model on one rank of the group."""

    @property
    def device(self) -> torch.device:
        """Where batches are wanted."""
        ...

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        ...

    @property
    def division(self) -> list[str]:
        """How the model is divided into pipeline stages, one line a stage; empty if it is not."""
        ...

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter and persistent buffer of the whole model, by Hugging Face name."""
        ...

    def train_batch(
        self, batches: Sequence[MicroBatch], accept: Accept, learning_rate: float, requests: Requests
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches; ``accept`` may veto it before the update.

        Their number is the same on all ranks and may differ from step to step.
        """
        ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Return this rank's summed loss and number of target tokens, without gradients.

        The micro-batches have one shape. All ranks call it together, with as many.
        """
        ...

    def iterate_state(self) -> Iterator[StateSlice]:
        """Yield every slice this rank holds of weights and optimizer state."""
        ...

    def load_state(self, reader: StateReader, optimizer_steps: int | None) -> None:
        """Fill every slice from ``reader``; ``optimizer_steps`` None loads weights only."""
        ...

    def replica_digests(self) -> dict[str, int]:
        """Return a digest of all that other ranks may hold copies of, by what it is; equal names, equal bits."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
