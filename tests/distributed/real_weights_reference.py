"""Evaluate a directory with plain transformers. Imports nothing of the trainer.

usage: real_weights_reference.py MODEL BATCHES.safetensors  →  the mean loss in nats
"""

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
batches = load_file(sys.argv[2])
loss, count = 0.0, 0
with torch.inference_mode():
    for inputs, targets in zip(batches["inputs"], batches["targets"], strict=True):
        logits = model(input_ids=inputs[None]).logits[0]
        kept = targets >= 0
        loss += torch.nn.functional.cross_entropy(logits[kept].double(), targets[kept], reduction="sum").item()
        count += int(kept.sum())
print(loss / count)
