"""One rank that loads its pipeline stage, then the whole model, and reports how much its memory peaked meanwhile.

usage: memory_stage_worker.py SPEC.json RESULT.json
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
from trainer.models.balance import balance
from trainer.models.build import build_model, skeleton
from trainer.models.config import hugging_face_config
from trainer.models.costs import parameter_costs
from trainer.models.stages import StagePart, anatomy_of


def resident(field: str) -> int:
    text = open("/proc/self/status").read()
    return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024


def part_of(model: ModelConfig) -> StagePart:
    whole = skeleton(model, hugging_face_config(model))
    anatomy = anatomy_of(whole)
    bounds = balance(parameter_costs(whole, anatomy), ranks.world_size)
    return StagePart(anatomy, *bounds[ranks.rank : ranks.rank + 2])


def peak_of(model: ModelConfig, part: StagePart | None) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be used again, unseen
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident("VmRSS")
    network = build_model(model, hugging_face_config(model), seed=0, device=torch.device("cpu"), part=part)
    peak = resident("VmHWM") - before
    del network
    return peak


spec = json.load(open(sys.argv[1]))
ranks = environ.detect(os.environ)
environ.export(ranks, os.environ)
join_group(ranks)
model = ModelConfig(path=spec["path"], dtype="float32")
part = part_of(model)
peak_of(model, None)  # imports and buffers of the first use
mine = {"stage": peak_of(model, part), "whole": peak_of(model, None)}
everyone: list = [None] * ranks.world_size
distributed.all_gather_object(everyone, mine)
if ranks.rank == 0:
    json.dump(everyone, open(sys.argv[2], "w"))
leave_group()
os._exit(0)
