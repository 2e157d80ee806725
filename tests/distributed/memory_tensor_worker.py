"""One tensor rank that builds its engine, from scratch and for a checkpoint, and reports how much its memory peaked.

usage: memory_tensor_worker.py SPEC.json RESULT.json
"""

import ctypes
import gc
import json
import os
import re
import sys

from torch import distributed

from trainer.config.deepspeed_json import resolve_deepspeed
from trainer.config.derive import derive
from trainer.config.run import Recipe
from trainer.core import environ
from trainer.engine.build import build_engine, join_group, leave_group
from trainer.models.config import hugging_face_config
from trainer.tasks.pretrain import loss_spec


def resident(field: str) -> int:
    text = open("/proc/self/status").read()
    return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024


def peak_of(config: dict, from_scratch: bool) -> int:
    recipe = Recipe.model_validate(
        {
            "run": {"directory": "unused", "steps": 1},
            "model": {"config": config, "dtype": "float32"},
            "data": {"train": [{"path": "unused"}], "sequence_length": 32},
            "batch": {"global_size": 2},
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0},  # nothing beside the weights
            "parallel": spec["parallel"],
            "deepspeed": {"base": "zero0"},
        }
    )
    resolved = resolve_deepspeed(recipe, derive(recipe, ranks.world_size))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be used again, unseen
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident("VmRSS")
    engine = build_engine(
        recipe, hugging_face_config(recipe.model), resolved, loss_spec(), ranks, from_scratch=from_scratch
    )
    peak = resident("VmHWM") - before
    engine.close()
    return peak


spec = json.load(open(sys.argv[1]))
ranks = environ.detect(os.environ)
environ.export(ranks, os.environ)
join_group(ranks)
peak_of(spec["tiny"], False)  # imports and buffers of the first use
mine = {"whole": peak_of(spec["config"], False), "part": peak_of(spec["config"], True)}
everyone: list = [None] * ranks.world_size
distributed.all_gather_object(everyone, mine)
if ranks.rank == 0:
    json.dump(everyone, open(sys.argv[2], "w"))
leave_group()
os._exit(0)
