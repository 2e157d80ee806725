"""The weights of another run, for a model of more tokens, or with other padding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from trainer.checkpoint.reader import CheckpointReader
from trainer.config.model import ModelConfig
from trainer.models.build import skeleton
from trainer.models.config import hugging_face_config, own_vocabulary_size
from trainer.models.vocabulary import config_of_files, with_rows
from trainer.parallel.cut import Cut


class ResizedReader:
    """Implements trainer.engine.base.StateReader: leaves out the checkpoint's padding, adds rows as a model needs."""

    def __init__(self, reader: CheckpointReader, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """``model`` starts from the checkpoint's config without padding; ``shapes`` are those to read, by name."""
        self._reader = reader
        self._shapes = shapes
        own_size = own_vocabulary_size(model)
        self._num_new = (model.vocabulary_size or own_size) - own_size
        self._own_shapes: dict[str, tuple[int, ...]] = {}
        if model.vocabulary_size or model.vocabulary_multiple or reader.model.get("unpadded_vocabulary_size"):
            config = config_of_files(hugging_face_config(model), own_size)
            named = skeleton(model, config).named_parameters(remove_duplicate=False)
            self._own_shapes = {name: tuple(parameter.shape) for name, parameter in named}

    def read(self, name: str, key: str, start: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Return ``count`` elements from ``start`` of the flattened tensor, or of its part ``cut``, on the CPU."""
        held, wanted = self._reader.shape(name), self._shapes.get(name)
        own = self._own_shapes.get(name, held)
        if own == held and own == (wanted or held):
            return self._reader.read(name, key, start, count, cut)
        first = _first_of_rows(wanted or own, start, cut)
        if first is not None and first + count <= math.prod(own):  # no row of these is padding or new
            return self._reader.read(name, key, first, count)
        rows = self._reader.read(name, key, 0, math.prod(own)).view(own)
        whole = with_rows(rows, wanted or own, self._num_new)
        return (cut.take(whole) if cut else whole).flatten()[start : start + count]


def _first_of_rows(shape: tuple[int, ...], start: int, cut: Cut | None) -> int | None:
    """Return where a range of a part begins in the whole tensor, None if the part is not rows in one piece."""
    if cut is None:
        return start
    whole_rows = cut.dim == 0 and cut.chunks == 1
    return cut.part * math.prod(cut.part_shape(shape)) + start if whole_rows else None
