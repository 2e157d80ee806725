"""Train tiny Hugging Face models with plain DeepSpeed and save them as it does. Imports nothing of ours.

usage: plain_deepspeed_worker.py SPEC.json RESULT.json, as ranks over gloo

Of each case of the specification: CASE/checkpoint (DeepSpeed's), CASE/config.json (the model's), CASE/state.safetensors
(masters and moments as DeepSpeed tells them, NAME::KEY) and the losses of the steps after the save.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

spec = json.load(open(sys.argv[1]))
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# gloo needs no shared-memory operation: building it takes a compiler, and waits for ever for a build that was killed
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def initialized(case: dict) -> tuple:
    torch.manual_seed(5)
    config = AutoConfig.for_model(**case["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in buffers_of(model):
        model.get_buffer(name).uniform_(0, 1e-3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in case.get("frozen", []))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], betas=(0.9, 0.95), eps=1e-8)
    settings = {
        "train_batch_size": spec["rows"],
        "train_micro_batch_size_per_gpu": spec["rows"] // world,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "bf16": {"enabled": case["dtype"] == "bfloat16"},
        **case.get("settings", {}),
    }
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def buffers_of(model) -> list[str]:
    """Return the names of the buffers that belong to the model's state."""
    return sorted(model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys())


def step(engine, batch: list) -> float:
    rows = torch.tensor(batch)[rank::world]  # [rows, length + 1]
    logits = engine(input_ids=rows[:, :-1]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / world


def state_of(model, engine, case: dict) -> dict:
    """Return masters and moments by NAME::KEY; gathered by DeepSpeed, so all ranks call it."""
    found = {f"{name}::weight": model.get_buffer(name) for name in buffers_of(model)}
    if case["stage"] in (1, 2):  # DeepSpeed 0.19.8 links them after the first group's first step: others have none yet
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    if case["stage"] == 0 and case["dtype"] == "bfloat16":
        wrapper = engine.optimizer
        computed = {id(p): name for name, p in model.named_parameters()}
        for low, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(low, masters, strict=True):
                name, held = computed[id(parameter)], wrapper.optimizer.state[master]
                found |= {f"{name}::weight": master, **{f"{name}::{k}": held[k] for k in ("exp_avg", "exp_avg_sq")}}
    for name, parameter in model.named_parameters():
        if f"{name}::weight" in found:
            continue
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=case["stage"] == 3):
                found[f"{name}::weight"] = parameter.detach().clone()
        elif case["stage"] == 0:
            held = engine.optimizer.state[parameter]
            found |= {f"{name}::weight": parameter, **{f"{name}::{k}": held[k] for k in ("exp_avg", "exp_avg_sq")}}
        else:
            found[f"{name}::weight"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}::{key}"] = safe_get_full_optimizer_state(parameter, key)
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}


losses = {}
for name, case in spec["cases"].items():
    directory = Path(spec["directory"]) / name
    model, engine = initialized(case)
    for batch in spec["before"]:
        step(engine, batch)
    engine.save_checkpoint(str(directory / "checkpoint"))
    state = state_of(model, engine, case)
    if rank == 0:
        save_file(state, directory / "state.safetensors")
        model.config.save_pretrained(directory)
    losses[name] = [step(engine, batch) for batch in spec["after"]]
    engine.destroy()
if rank == 0:
    json.dump(losses, open(sys.argv[2], "w"))
torch.distributed.barrier()
os._exit(0)
