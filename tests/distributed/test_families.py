"""Families and layouts against plain transformers in another process: the quick part of tools/compatibility.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compatibility_cases import Bench, Case
from compatibility_configs import attention_of, tiny_config
from compatibility_layouts import DAMAGED, EXPERT_LAYOUTS, LAYOUTS, ROUTER_LOSS, TILES, layout_cases

DIVERSE = {
    "llama": "grouped queries, untied head",
    "qwen2": "biased projections",
    "gpt2": "tied head, learned positions",
    "opt": "learned positions with an offset, norm defined before the blocks",
    "bloom": "ALiBi, norm behind the embedding",
    "falcon": "parallel blocks, one key for all queries",
    "gpt_neox": "parallel blocks, partial rotary",
    "phi": "parallel blocks, biased head",
    "gemma2": "soft-capped logits, sliding window, scaled embeddings",
    "gemma3_text": "a rotary table for each type of layer",
    "mixtral": "mixture of experts, stored one by one",
    "qwen3_moe": "mixture of experts",
    "deepseek_v3": "latent attention, shared experts, dense first layer",
    "granite": "scaled embeddings, residuals and logits",
    "cohere": "parallel blocks, scaled logits, tied head",
    "gpt_oss": "attention sinks",
    "qwen3_next": "linear attention in some layers",
    "mamba": "state space",
    "deepseek_v4": "several streams a token",
    "apertus": "parameters that only its constructor fills",
    "smollm3": "layers without positions",
}
TWO_STAGES = {"parallel": {"pipeline": 2}}
# Each axis, stage and way to save memory once or in its hardest company; all others run in tests/sweep.sh.
QUICK = {
    "gemma3_text": [
        "1 rank", "DP 2, ZeRO-2", "DP 2, ZeRO-3", "DP 2, ZeRO-3, all on the CPU", "DP 4, ZeRO-3, hpZ 2",
        "PP 2, ZeRO-1", "PP 4, ZeRO-1", "PP 2 x DP 2, ZeRO-1", "PP 2, recomputed", "Lion, PP 2, ZeRO-1",
        "Muon, DP 2, ZeRO-2", "Muon, DP 2, ZeRO-3", "Muon, PP 2 x DP 2, ZeRO-1", "SP 2, ZeRO-3", "SP 2 x TP 2, ZeRO-1",
        "SP 2 x DP 2, ZeRO-1", "TP 2 x DP 2, ZeRO-2", "PP 2 x TP 2 x DP 2, ZeRO-1",
        "TP 2, recomputed, packed documents", "SP 2, recomputed, packed documents", "SP 2, ZeRO-3, packed documents",
        "DP 2, ZeRO-3, packed documents", "PP 2 x DP 2, ZeRO-1, packed documents",
        "DP 2, ZeRO-3, loss and MLP in tiles", "PP 2 x TP 2, ZeRO-1, loss and MLP in tiles",
    ],
    "gpt2": [
        "PP 2 x TP 2, ZeRO-1", "TP 2 x DP 2, ZeRO-2", "PP 2 x DP 2, ZeRO-1, packed documents", "Muon, PP 2, ZeRO-1",
    ],
    "mixtral": [
        "EP 2, ZeRO-0", "EP 2 x DP 2, ZeRO-2", "EP 2, recomputed, packed documents", "TP 2, ZeRO-1, packed documents",
        "PP 2 x TP 2, ZeRO-1, loss in tiles", "PP 2 x DP 2, ZeRO-1, router loss",
        "PP 2, two sequences at a time, packed documents, router loss",
    ],
    "qwen3_moe": ["PP 2 x TP 2, ZeRO-1, router loss"],
}  # fmt: skip
QUICK_NAMES = [f"{family}, {layout}" for family, layouts in QUICK.items() for layout in layouts]
QUICK_LAYOUTS = [case for case in layout_cases() if case.name in QUICK_NAMES]
assert len(QUICK_LAYOUTS) == len(QUICK_NAMES)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


@pytest.mark.parametrize("family", DIVERSE)
def test_two_stages_equal_the_whole_model(bench: Bench, family: str) -> None:
    config = tiny_config(family)
    outcome = bench.run(Case(family, config, recipe=TWO_STAGES, attention=attention_of(config)))
    assert outcome.passed, outcome


@pytest.mark.parametrize("case", QUICK_LAYOUTS, ids=lambda case: case.name)
def test_layouts_equal_the_whole_model(bench: Bench, case: Case) -> None:
    outcome = bench.run(case)
    assert outcome.passed, outcome


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_a_broken_model_is_noticed(bench: Bench, case: Case) -> None:
    outcome = bench.run(case)
    assert outcome.error is None
    assert not outcome.passed, outcome


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "layout",
    [
        "1 rank",
        "DP 2, ZeRO-2",
        "DP 2, ZeRO-3",
        "PP 2, ZeRO-1",
        "PP 2 x DP 2, ZeRO-1",
        "SP 2, ZeRO-1",
        "SP 2, ZeRO-3",
        "TP 2, ZeRO-1",
        "PP 2 x TP 2, ZeRO-1",
        "SP 2 x TP 2, ZeRO-1",
        "SP 2 x DP 2, ZeRO-1",
    ],
)
def test_a_document_does_not_see_the_one_before_it(bench: Bench, family: str, layout: str) -> None:
    world_size, recipe = LAYOUTS[layout]
    losses = bench.second_document_losses(Case(f"{family}, {layout}", tiny_config(family), world_size, recipe))
    assert len(losses) == 3
    assert max(losses) - min(losses) < 1e-6, losses


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_nor_does_it_where_experts_are_spread(bench: Bench, family: str) -> None:
    world_size, recipe = EXPERT_LAYOUTS["EP 2, ZeRO-2"]
    losses = bench.second_document_losses(Case(f"{family}, EP 2", tiny_config(family), world_size, recipe))
    assert max(losses) - min(losses) < 1e-6, losses


@pytest.mark.parametrize("layout", ["DP 2, ZeRO-3", "SP 2, ZeRO-3", "PP 2, ZeRO-1"])
def test_nor_does_it_in_tiles(bench: Bench, layout: str) -> None:
    world_size, recipe = LAYOUTS[layout]
    recipe = recipe | {"memory": recipe.get("memory", {}) | TILES}
    losses = bench.second_document_losses(Case(f"{layout}, tiles", tiny_config("llama"), world_size, recipe))
    assert max(losses) - min(losses) < 1e-6, losses


def test_evaluation_does_not_count_the_router_loss(bench: Bench) -> None:
    world_size, recipe = LAYOUTS["PP 2, ZeRO-1"]
    config = tiny_config("mixtral")
    with_it, without = (
        bench.second_document_losses(Case(f"evaluated, {len(fields)}", config | fields, world_size, recipe))
        for fields in (ROUTER_LOSS, {})
    )
    assert with_it == without


def test_a_leak_would_be_noticed(bench: Bench) -> None:
    world_size, recipe = LAYOUTS["SP 2, ZeRO-1"]
    case = Case("leaking", tiny_config("llama"), world_size, recipe, damage="forgotten documents")
    losses = bench.second_document_losses(case)
    assert max(losses) - min(losses) > 1e-4, losses


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n_text", "has an embedding for every layer"),
        ("hy_v4", "fails without what runs before"),
        ("inkling2_text", "uses its embeddings"),
        ("zaya", "a parameter outside of its modules"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(bench: Bench, family: str, reason: str) -> None:
    config = tiny_config(family)
    outcome = bench.run(Case(family, config, recipe=TWO_STAGES, attention=attention_of(config)))
    assert outcome.error is not None
    assert "parallel.pipeline" in outcome.error
    assert reason in outcome.error
