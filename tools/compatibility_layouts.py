"""The matrix of layouts that five families go through, and the ways to break one on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compatibility_cases import Case
from compatibility_configs import tiny_config

MATRIX_FAMILIES = ("llama", "gpt2", "qwen3", "gemma3_text", "mixtral")
HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2}}
MUON: dict[str, Any] = {"betas": [0.9, 0.95], "epsilon": 1e-3, "momentum": 0.95, "weight_decay": 0.0}
ZERO: dict[int, dict[str, Any]] = {stage: {"base": f"zero{stage}"} for stage in (0, 1, 2, 3)}


def _stages(pipeline: int, zero: int, world_size: int, **sections: Any) -> tuple[int, dict[str, Any]]:
    return world_size, {"parallel": {"pipeline": pipeline}, "deepspeed": ZERO[zero], **sections}


def _sequences(sequence: int, zero: int, world_size: int, **sections: Any) -> tuple[int, dict[str, Any]]:
    return world_size, {"parallel": {"sequence": sequence}, "deepspeed": ZERO[zero], **sections}


def _tensors(tensor: int, zero: int, world_size: int, **sections: Any) -> tuple[int, dict[str, Any]]:
    return world_size, {"parallel": {"tensor": tensor}, "deepspeed": ZERO[zero], **sections}


def _optimizer(name: str, pipeline: int, zero: int = 1, **settings: Any) -> tuple[int, dict[str, Any]]:
    # Steps of the gradient's sign, or nearly so: a smaller rate, so that one flipped sign stays within the bound.
    return _stages(pipeline, zero, 2, optimizer={"name": name, "learning_rate": 1e-4, **settings})


# name -> (ranks, sections of the recipe)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": _stages(1, 0, 1),
    "DP 2, ZeRO-2": _stages(1, 2, 2),
    "DP 2, ZeRO-3": _stages(1, 3, 2),
    "DP 2, ZeRO-3, all on the CPU": (2, {"deepspeed": {"base": "zero3_offload_param"}}),
    "DP 4, ZeRO-3, hpZ 2": (4, {"deepspeed": ZERO[3] | {"override": HPZ}}),
    "PP 2, ZeRO-0": _stages(2, 0, 2),
    "PP 2, ZeRO-1": _stages(2, 1, 2),
    "PP 4, ZeRO-1": _stages(4, 1, 4),
    "PP 2 x DP 2, ZeRO-0": _stages(2, 0, 4),
    "PP 2 x DP 2, ZeRO-1": _stages(2, 1, 4),
    "PP 2, one micro-batch": _stages(2, 1, 2, batch={"global_size": 4, "micro_size": 4}),
    "PP 2, recomputed": _stages(2, 1, 2, memory={"activation_checkpointing": "full"}),
    "PP 2, balanced by time": _stages(2, 1, 2, parallel={"pipeline": 2, "balance": "time"}),
    "PP 2, balanced by parameters": _stages(2, 1, 2, parallel={"pipeline": 2, "balance": "parameters"}),
    "Lion, DP 2, ZeRO-1": _optimizer("lion", 1, betas=[0.9, 0.99], weight_decay=0.0),
    "Lion, PP 2, ZeRO-1": _optimizer("lion", 2, betas=[0.9, 0.99], weight_decay=0.0),
    **{f"Muon, DP 2, ZeRO-{zero}": _optimizer("muon", 1, zero, **MUON) for zero in (0, 1, 2, 3)},
    "Muon, DP 4, ZeRO-1": (4, _optimizer("muon", 1, 1, **MUON)[1]),
    "Muon, PP 2, ZeRO-1": _optimizer("muon", 2, **MUON),
    "Muon, PP 2 x DP 2, ZeRO-1": (4, _optimizer("muon", 2, **MUON)[1]),
    "Adagrad, DP 2, ZeRO-1": _optimizer("adagrad", 1, epsilon=1e-3, weight_decay=0.0),
    **{f"SP 2, ZeRO-{zero}": _sequences(2, zero, 2) for zero in (1, 2, 3)},
    **{f"TP 2, ZeRO-{zero}": _tensors(2, zero, 2) for zero in (0, 1, 2)},
    "TP 2 x DP 2, ZeRO-1": _tensors(2, 1, 4),
    "TP 2 x DP 2, ZeRO-2": _tensors(2, 2, 4),
    "TP 2, recomputed": _tensors(2, 1, 2, memory={"activation_checkpointing": "full"}),
    "TP 2, four sequences at a time": _tensors(2, 1, 2, batch={"global_size": 4, "micro_size": 4}),
    "PP 2 x TP 2, ZeRO-0": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "deepspeed": ZERO[0]}),
    "PP 2 x TP 2, ZeRO-1": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "deepspeed": ZERO[1]}),
    "PP 2 x TP 2 x DP 2, ZeRO-1": (8, {"parallel": {"pipeline": 2, "tensor": 2}, "deepspeed": ZERO[1]}),
    "SP 2 x TP 2, ZeRO-1": (4, {"parallel": {"sequence": 2, "tensor": 2}, "deepspeed": ZERO[1]}),
    "SP 2 x DP 2, ZeRO-1": _sequences(2, 1, 4),
    "SP 2, recomputed": _sequences(2, 3, 2, memory={"activation_checkpointing": "full"}),
    "SP 2, four sequences at a time": _sequences(2, 1, 2, batch={"global_size": 4, "micro_size": 4}),
}
# Files of less than a megabyte stay in memory: with these many tokens the embedding's two halves are larger.
NVME_TOKENS = 20_000
NVME: dict[str, tuple[int, dict[str, Any]]] = {
    f"DP 2, ZeRO-3, {name} on NVMe": (2, {"deepspeed": {"base": base, "override": {"zero_optimization": zero}}})
    for name, base, zero in (
        ("optimizer", "zero3", {"offload_optimizer": {"device": "nvme"}}),
        ("all", "zero3_offload_nvme", {"sub_group_size": 200_000}),
    )
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"EP 2, ZeRO-{zero}": (2, {"parallel": {"expert": 2}, "deepspeed": ZERO[zero]}) for zero in (0, 1, 2)},
    "EP 2 x DP 2, ZeRO-0": (4, {"parallel": {"expert": 2}, "deepspeed": ZERO[0]}),
    "EP 2 x DP 2, ZeRO-2": (4, {"parallel": {"expert": 2}, "deepspeed": ZERO[2]}),
    "EP 2, ZeRO-2, loss in tiles": (
        2,
        {"parallel": {"expert": 2}, "deepspeed": ZERO[2], "memory": {"tiled_loss": 5}},
    ),
    "EP 2, recomputed": (
        2,
        {"parallel": {"expert": 2}, "deepspeed": ZERO[1], "memory": {"activation_checkpointing": "full"}},
    ),
}
TILES = {"tiled_loss": 5, "tiled_mlp": 3}
"""Neither divides a sequence or a half of one."""
TILED_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": _stages(1, 0, 1),
    **{f"DP 2, ZeRO-{zero}": _stages(1, zero, 2) for zero in (1, 2, 3)},
    "SP 2, ZeRO-3": _sequences(2, 3, 2),
    "SP 2, recomputed": _sequences(2, 3, 2, memory={"activation_checkpointing": "full"}),
    "TP 2, ZeRO-1": _tensors(2, 1, 2),
    "TP 2, four sequences at a time": _tensors(2, 1, 2, batch={"global_size": 4, "micro_size": 4}),
    "PP 2, ZeRO-1": _stages(2, 1, 2),
    "DP 2, ZeRO-3, all on the CPU": (2, {"deepspeed": {"base": "zero3_offload_param"}}),
    "PP 2 x TP 2, ZeRO-1": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "deepspeed": ZERO[1]}),
    "SP 2, ZeRO-3, packed documents": _sequences(2, 3, 2),
}
ROUTER_LOSS: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 2.0}
"""A coefficient that shows."""
ROUTER_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": _stages(1, 0, 1),
    **{f"DP 2, ZeRO-{zero}": _stages(1, zero, 2) for zero in (1, 3)},
    "TP 2, ZeRO-1": _tensors(2, 1, 2),
    "PP 2, ZeRO-0": _stages(2, 0, 2),
    "PP 2, ZeRO-1": _stages(2, 1, 2),
    "PP 4, ZeRO-1": _stages(4, 1, 4),
    "PP 2 x DP 2, ZeRO-1": _stages(2, 1, 4),
    "PP 2 x TP 2, ZeRO-1": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "deepspeed": ZERO[1]}),
    "PP 2, recomputed": _stages(2, 1, 2, memory={"activation_checkpointing": "full"}),
    "PP 2, loss in tiles": _stages(2, 1, 2, memory={"tiled_loss": 5}),
    "PP 2, two sequences at a time": _stages(2, 1, 2, batch={"global_size": 4, "micro_size": 2}),
    "PP 2, two sequences at a time, packed documents": _stages(2, 1, 2, batch={"global_size": 4, "micro_size": 2}),
    "1 rank, packed documents": _stages(1, 0, 1),
    "PP 2 x DP 2, packed documents": _stages(2, 1, 4),
}
PACKED = (
    "TP 2, ZeRO-1",
    "TP 2, recomputed",
    "SP 2, ZeRO-1",
    "SP 2, ZeRO-3",
    "SP 2, recomputed",
    "1 rank",
    "DP 2, ZeRO-3",
    "PP 2, ZeRO-1",
    "PP 2 x DP 2, ZeRO-1",
    "PP 2, recomputed",
)

DAMAGED = tuple(
    Case(f"{kind}, {damage}", tiny_config(kind), recipe=LAYOUTS["PP 2, ZeRO-1"][1], damage=damage)
    for kind, damage in (("llama", "swapped blocks"), ("llama", "dropped rotary"), ("gpt2", "untied head"))
) + tuple(
    Case(f"mixtral, {damage}", tiny_config("mixtral") | ROUTER_LOSS, recipe=LAYOUTS["PP 2, ZeRO-1"][1], damage=damage)
    for damage in ("router loss without a way back", "router loss of the last stage", "no router loss")
)


def layout_cases() -> Iterator[Case]:
    """Yield every family in every layout, then those with several documents a sequence, then those in tiles."""
    for kind in ("mixtral", "qwen3_moe"):
        for name, (world_size, recipe) in EXPERT_LAYOUTS.items():
            yield Case(f"{kind}, {name}", tiny_config(kind), world_size, recipe)
        for name in ("EP 2, ZeRO-2", "EP 2, recomputed"):
            world_size, recipe = EXPERT_LAYOUTS[name]
            yield Case(f"{kind}, {name}, packed documents", tiny_config(kind), world_size, recipe, packed=True)
        for name, (world_size, recipe) in ROUTER_LAYOUTS.items():
            title, config = f"{kind}, {name}, router loss", tiny_config(kind) | ROUTER_LOSS
            yield Case(title, config, world_size, recipe, packed="packed" in name)
    for kind in MATRIX_FAMILIES:
        config = tiny_config(kind)
        for name, (world_size, recipe) in LAYOUTS.items():
            yield Case(f"{kind}, {name}", config, world_size, recipe)
        for name, (world_size, recipe) in NVME.items():
            yield Case(f"{kind}, {name}", config | {"vocab_size": NVME_TOKENS}, world_size, recipe)
        for name in PACKED:
            world_size, recipe = LAYOUTS[name]
            yield Case(f"{kind}, {name}, packed documents", config, world_size, recipe, packed=True)
        for name, (world_size, recipe) in TILED_LAYOUTS.items():
            tiles = {"tiled_loss": 5} if kind == "mixtral" else TILES  # which has no MLP but its experts
            memory = recipe.get("memory", {}) | tiles
            title = f"{kind}, {name}, {'loss' if kind == 'mixtral' else 'loss and MLP'} in tiles"
            yield Case(title, config, world_size, recipe | {"memory": memory}, packed="packed" in name)
