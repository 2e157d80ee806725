"""One rank that builds a ZeRO-3 model and reports how much its memory peaked meanwhile.

usage: memory_worker.py SPEC.json RESULT.json
"""

import ctypes
import gc
import json
import os
import re
import sys

import torch
from torch import distributed

from trainer.config.model import ModelConfig
from trainer.core import environ
from trainer.engine.build import join_group, leave_group
from trainer.engine.upstream.zero3_sharding import Zero3Sharding
from trainer.models.build import build_model
from trainer.models.config import hugging_face_config


def resident(field: str) -> int:
    text = open("/proc/self/status").read()
    return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024


def peak_of(model: ModelConfig, sharded: bool) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be used again, unseen
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident("VmRSS")
    sharding = Zero3Sharding({"train_batch_size": 2, "zero_optimization": {"stage": 3}}) if sharded else None
    network = build_model(
        model, hugging_face_config(model), seed=0, device=torch.device("cpu"), rank=ranks.rank, sharding=sharding
    )
    peak = resident("VmHWM") - before
    del network
    return peak


spec = json.load(open(sys.argv[1]))
ranks = environ.detect(os.environ)
environ.export(ranks, os.environ)
join_group(ranks)
scratch = ModelConfig(config=spec["config"], dtype="float32")
peak_of(ModelConfig(config=spec["tiny"], dtype="float32"), True)  # imports and buffers of the first use
loaded = ModelConfig(path=spec["path"], dtype="float32")
mine = {"scratch": peak_of(scratch, True), "loaded": peak_of(loaded, True), "whole": peak_of(scratch, False)}
everyone: list = [None] * ranks.world_size
distributed.all_gather_object(everyone, mine)
if ranks.rank == 0:
    json.dump(everyone, open(sys.argv[2], "w"))
leave_group()
os._exit(0)
