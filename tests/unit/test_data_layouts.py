"""The same global batches at every layout, step after step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.config.data import DataConfig
from trainer.data.loader import TrainLoader
from trainer.data.shards import ShardWriter

LAYOUTS = [(d, m, w) for d in (1, 2, 4, 8) for m in (1, 2, 4, 8, 16) for w in (0, 2) if 32 % (d * m) == 0]
"""Data-parallel ranks, micro-batch size, data.workers."""


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_two_hundred_global_batches_at_any_layout(tmp_path: Path, packing: str) -> None:
    """One digest a step stands for its rows and their sample numbers; best_fit takes the layouts that differ most."""
    random = np.random.default_rng(0)
    sources = []
    for name, documents in (("a", 600), ("b", 200)):
        with ShardWriter(tmp_path / name, 1000) as writer:
            for _ in range(documents):
                writer.add(random.integers(0, 1000, int(random.integers(1, 30))))
        sources.append({"path": str(tmp_path / name), "weight": 1.0 + documents})

    def digests(data_size: int, micro: int, workers: int) -> list[int]:
        section = {"train": sources, "sequence_length": 8, "workers": workers, "packing": packing}
        data = DataConfig.model_validate(section)
        loaders = [TrainLoader(data, 5, 32, micro, rank, data_size) for rank in range(data_size)]
        steps = [sum(batch.digest for loader in loaders for batch in loader.next_step()) for _ in range(201)]
        for loader in loaders:
            loader.close()
        return [step % 2**48 for step in steps]

    expected = digests(1, 32, 0)
    assert len(set(expected)) == 201
    for layout in LAYOUTS if packing == "documents" else [(1, 1, 2), (8, 4, 0)]:
        assert digests(*layout) == expected, layout
