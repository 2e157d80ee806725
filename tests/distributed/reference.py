"""Plain PyTorch + transformers in one process: what every layout must reproduce. Imports nothing of the trainer.

usage: reference.py SPEC.json  →  one JSON line of [loss, gradient norm] a step

With "gradients" (a prefix) in the specification the optimizer is SGD without clipping and decay, and what its momentum
must be after each step is written to PREFIX-STEP.safetensors.
"""

import json
import sys

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

spec = json.load(open(sys.argv[1]))
config = AutoConfig.for_model(**spec["config"])
with no_init_weights(), init_empty_weights(include_buffers=False):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
for module in model.modules():
    for name, parameter in list(module.named_parameters(recurse=False)):
        module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape))
model.tie_weights()
torch.manual_seed(spec["seed"])
model.initialize_weights()
if spec.get("broken"):  # a reference that must not be matched: the first two blocks change places
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
decayed = [p for p in model.parameters() if p.ndim >= 2]
others = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], betas=(0.9, 0.95), eps=1e-8)
if spec.get("gradients"):
    optimizer = torch.optim.SGD(model.parameters(), lr=spec["learning_rate"], momentum=spec["momentum"])
result = []
for number, batch in enumerate(map(torch.tensor, spec["tokens"])):  # [sequences, sequence + 1]
    targets = batch[:, 1:].clone()
    targets[batch[:, 1:] == spec["ignored"]] = -100
    outputs = model(input_ids=batch[:, :-1])
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())
    # a mixture of experts also balances its load, where its config says so
    balance = config.router_aux_loss_coef * outputs.aux_loss if getattr(outputs, "aux_loss", None) is not None else 0
    (loss + balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if spec.get("gradients") else 1.0)
    optimizer.step()
    if spec.get("gradients"):
        momentum = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
        save_file(momentum, f"{spec['gradients']}-{number}.safetensors")
    optimizer.zero_grad()
    result.append([loss.item(), norm.item()])
print(json.dumps(result))
