"""Our side of ``benchmark_data.py``, one process each; tokenizing is measured through the command line instead.

usage: benchmark_data_ours.py SUBJECT JSON
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from benchmark_data_subject import Result, Spec, main, memory_bytes

from trainer.config.data import DataConfig
from trainer.data.loader import TrainLoader


def _loader(spec: Spec, path: str, masked: bool, workers: int) -> TrainLoader:
    section: dict[str, Any] = {
        "train": [{"path": path}],
        "sequence_length": spec["sequence_length"],
        "mask_documents": masked,
        "workers": workers,
    }
    batch, micro = spec["step_samples"], spec["micro_samples"]
    return TrainLoader(DataConfig.model_validate(section), 0, batch, micro, 0, 1, 0, spec["vocab_size"])


def read(spec: Spec, *, masked: bool, workers: int) -> Result:
    """Deliver the samples as the micro-batches of one rank."""
    started = time.perf_counter()
    loader = _loader(spec, spec["prefix"], masked, workers)
    steady = time.perf_counter()
    batches = loader.next_step()
    for _ in range(1, spec["samples"] // spec["step_samples"]):
        batches = loader.next_step()
    now = time.perf_counter()
    assert (batches[-1].position_ids is not None) == (batches[-1].document_ids is not None) == masked
    loader.close()
    tokens = spec["samples"] // spec["step_samples"] * spec["step_samples"] * spec["sequence_length"]
    return {"tokens": tokens, "deliver_seconds": now - started, "steady_seconds": now - steady}


def open_many(spec: Spec, *, path: str, checked: bool) -> Result:
    """Open all shards, plan the order of all samples and say which ones the first step reads."""
    before, started = memory_bytes("VmRSS"), time.perf_counter()
    loader = _loader(spec, spec[path], masked=True, workers=0)
    sources, samples, _ = loader.sampler.locate_many(loader.sample_numbers().ravel())
    if checked:
        assert not loader.check_blocks(0, 1)
    seconds = time.perf_counter() - started
    total = sum(loader.sampler.samples_per_epoch)
    assert total >= spec["expected_samples"], total
    assert len(sources) == len(set(samples.tolist())) == spec["step_samples"]
    growth = memory_bytes("VmHWM") - before
    return {"tokens": total * spec["sequence_length"], "deliver_seconds": seconds, "growth_bytes": growth}


def epochs(spec: Spec) -> Result:
    """Read several epochs in shuffled order and note the resident memory at the end of each."""
    loader = _loader(spec, spec["prefix"], masked=True, workers=2)
    steps = sum(loader.sampler.samples_per_epoch) // spec["step_samples"]
    parts: list[dict[str, Any]] = []
    for epoch in range(spec["epochs"]):
        started = time.perf_counter()
        for _ in range(steps):
            loader.next_step()
        tokens = steps * spec["step_samples"] * spec["sequence_length"]
        seconds = time.perf_counter() - started
        part = {"name": f"epoch {epoch + 1}", "tokens": tokens, "steady_seconds": seconds}
        parts.append({**part, "max_rss_bytes": memory_bytes("VmHWM")})
    loader.close()
    return {"tokens": sum(part["tokens"] for part in parts), "parts": parts}


PACKAGES = ["trainer", "numpy", "torch"]
SUBJECTS = {
    "same": (partial(read, masked=True, workers=0), PACKAGES),
    "same_ahead": (partial(read, masked=True, workers=2), PACKAGES),
    "plain": (partial(read, masked=False, workers=0), PACKAGES),
    "plain_ahead": (partial(read, masked=False, workers=2), PACKAGES),
    "open_set": (partial(open_many, path="set", checked=False), PACKAGES),
    "open_folder": (partial(open_many, path="folder", checked=False), PACKAGES),
    "open_checked": (partial(open_many, path="set", checked=True), PACKAGES),
    "epochs": (epochs, PACKAGES),
}

if __name__ == "__main__":
    main(SUBJECTS)
