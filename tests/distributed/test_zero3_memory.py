"""Under ZeRO-3 no rank holds a whole model while it is built; of a pretrained one only rank 0 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import TESTS, run_workers
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
LARGE = TINY | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}


def test_peak_memory_while_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # glibc keeps freed blocks in its heap; given back at once, they show what is really held
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LARGE), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    del model
    spec = {"config": LARGE, "tiny": TINY, "path": str(tmp_path / "model")}
    ranks = run_workers(TESTS / "distributed" / "memory_worker.py", spec, 2, tmp_path / "workers")
    assert min(rank["whole"] for rank in ranks) > 0.9 * whole  # the measure does see a whole copy
    for rank in ranks:
        assert rank["scratch"] < 0.7 * whole, ranks
    assert ranks[1]["loaded"] < 0.7 * whole, ranks


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}], ids=["tensor", "expert"])
def test_a_rank_that_a_checkpoint_fills_builds_its_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: dict[str, int]
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    more = experts | {"intermediate_size": 1024, "num_hidden_layers": 4} if "expert" in parallel else {}
    config = LARGE | more
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).num_parameters() * 4
    spec = {"config": config, "tiny": TINY | (experts if more else {}), "parallel": parallel}
    ranks = run_workers(TESTS / "distributed" / "memory_tensor_worker.py", spec, 2, tmp_path / "workers")
    assert min(rank["whole"] for rank in ranks) > 0.9 * whole  # the measure does see a whole copy
    for rank in ranks:  # attention is not divided over expert ranks, and one module is whole for a moment
        assert rank["part"] < 0.8 * rank["whole"], ranks
