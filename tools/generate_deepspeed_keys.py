"""Write trainer/config/deepspeed_keys.json: every key the installed DeepSpeed reads from its JSON.

Run it after an upgrade of DeepSpeed: ``python tools/generate_deepspeed_keys.py [OUTPUT]``. A test compares the result
with the committed file. A leaf is the name of its type (bool, int, number, string, list, mapping, any), a section is
``{"keys": {...}}``; ``{"keys": ..., "open": true}`` also takes keys of the user's own.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

OUTPUT = Path(__file__).resolve().parents[1] / "trainer" / "config" / "deepspeed_keys.json"
Tree = dict[str, Any]


def deepspeed_keys() -> Tree:
    """Return ``{"deepspeed": version, "keys": {...}, "removed": [...], "removed_zero": [...]}``."""
    import deepspeed
    from deepspeed.runtime import config

    keys = _top_level() | _model_sections() | _constant_sections() | _optimizer_and_scheduler()
    return {
        "deepspeed": deepspeed.__version__,
        "keys": keys,
        "removed": sorted(config._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        "removed_zero": sorted(config._REMOVED_ZERO_CONFIG_KEYS),
    }


def _top_level() -> Tree:
    """Plain values: the constants that runtime/config.py looks up with get_scalar_param on the whole JSON."""
    from deepspeed.runtime import config, constants

    source = inspect.getsource(config)
    names = [
        name
        for name in dir(constants)
        if f"{name}_DEFAULT" in dir(constants) and f"get_scalar_param(param_dict, {name}," in source.replace("\n", "")
    ]
    # Looked up through a variable, over several lines, or outside runtime/config.py.
    names += ["COMMUNICATION_DATA_TYPE", "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE", "VOCABULARY_SIZE"]
    names += ["TRAIN_MICRO_BATCH_SIZE_PER_GPU", "USE_DATA_BEFORE_EXPERT_PARALLEL"]
    keys = {getattr(constants, name): _type_of(getattr(constants, f"{name}_DEFAULT")) for name in sorted(set(names))}
    # deepspeed/__init__.py builds its device mesh from these two; allgather_size is read beside a boolean
    # zero_optimization; datastates_ckpt is handed on as it is.
    return (
        keys
        | {"sequence_parallel_size": "int", "data_parallel_size": "int", "allgather_size": "number"}
        | {"datastates_ckpt": "any"}
    )


def _model_sections() -> Tree:
    """Sections that DeepSpeed checks with pydantic."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import EXPERT_PARALLEL, HybridEngineConfig
    from deepspeed.runtime.precision_config import (
        BFLOAT16,
        BFLOAT16_OLD,
        FP16,
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
    )
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig
    from deepspeed.utils.config import TIMERS, TIMERS_THROUGHPUT, DeepSpeedThroughputTimerConfig

    experts = {field.name: "any" for field in dataclasses.fields(AutoEPConfig) if not field.name.startswith("_")}
    return {
        ZERO_OPTIMIZATION: _model(DeepSpeedZeroConfig),
        BFLOAT16: _model(DeepSpeedBF16Config),
        BFLOAT16_OLD: _model(DeepSpeedBF16Config),
        FP16: _model(DeepSpeedFP16Config),
        "comms_logger": _model(CommsLoggerConfig),
        "compile": _model(CompileConfig),
        "hybrid_engine": _model(HybridEngineConfig),
        "tensor_parallel": _model(TPTrainingConfig),
        "weight_quantization": _model(WeightQuantConfig),
        EXPERT_PARALLEL: {"keys": experts},
        TIMERS: {"keys": {TIMERS_THROUGHPUT: _model(DeepSpeedThroughputTimerConfig)}},
        **_model(DeepSpeedMonitorConfig)["keys"],
    }


def _constant_sections() -> Tree:
    """Sections that DeepSpeed reads key by key, and so never checks."""
    from deepspeed.autotuning import constants as autotuning
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT, ACT_CHKPT_DEFAULT
    from deepspeed.runtime.data_pipeline import constants as data
    from deepspeed.runtime.model_checkpointing import constants as checkpointing
    from deepspeed.runtime.swap_tensor.aio_config import AIO, AIO_DEFAULT_DICT

    writer = [
        *("WRITER_TYPE", "IO_BUFFER_SIZE", "IO_BUFFER_DOUBLE", "IO_STATISTICS", "DATA_PARALLEL"),
        *("WRITER_DECOUPLED", "IO_MULTIPLIER"),
    ]
    checkpoint: Tree = {
        constants.CHECKPOINT_TAG_VALIDATION: "string",
        constants.LOAD_UNIVERSAL_CHECKPOINT: "bool",
        constants.USE_NODE_LOCAL_STORAGE_CHECKPOINT: "bool",
        constants.CHECKPOINT_PARALLEL_WRITE: {"keys": {constants.CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE: "bool"}},
        checkpointing.CHECKPOINT_SERIALIZATION: "bool",
        checkpointing.CHECKPOINT_WRITER: {
            "keys": {getattr(checkpointing, f"CHECKPOINT_{name}"): "any" for name in writer}
        },
    }
    autocast = [constants.TORCH_AUTOCAST_ENABLED, constants.TORCH_AUTOCAST_DTYPE]
    autocast += [constants.TORCH_AUTOCAST_LOWER_PRECISION_SAFE_MODULES]
    types_ = [constants.GRAD_ACCUM_DTYPE, constants.PARAM_DTYPE, constants.BUFFER_DTYPE]
    data_types = dict.fromkeys(types_, "string") | {constants.KEEP_IN_FP32_MODULES: "any"}
    tuner = _with_default(autotuning, "AUTOTUNING_") | {
        autotuning.MODEL_INFO: {"keys": _any(autotuning.MODEL_INFO_KEY_DEFAULT_DICT)}
    }
    pipeline = _any(config.get_pipeline_config({})) | {"use_reentrant": "bool"}
    return {
        ACT_CHKPT: {"keys": {key: _type_of(value) for key, value in ACT_CHKPT_DEFAULT.items()}},
        AIO: {"keys": {key: _type_of(value) for key, value in AIO_DEFAULT_DICT.items()}},
        profiling.FLOPS_PROFILER: {"keys": _with_default(profiling, "FLOPS_PROFILER_")},
        autotuning.AUTOTUNING: {"keys": tuner},
        constants.CHECKPOINT: {"keys": checkpoint},
        constants.DATA_TYPES: {"keys": data_types},
        constants.TORCH_AUTOCAST: {"keys": _any(autocast)},
        # Refused as a whole by the trainer when enabled; what is below is the user's own.
        data.DATA_EFFICIENCY: {
            "keys": {"enabled": "bool", "seed": "int", data.DATA_SAMPLING: "mapping", data.DATA_ROUTING: "mapping"}
        },
        "pipeline": {"keys": pipeline},
    }


def _optimizer_and_scheduler() -> Tree:
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import constants, lr_schedules
    from deepspeed.runtime.engine import DeepSpeedEngine

    optimizers = [FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, FusedLamb, DeepSpeedCPULion, FusedLion]
    optimizers += [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD]
    params = _parameters(optimizers, {"params", "model_params"})
    # Taken out by the engine before the optimizer is built.
    params |= dict.fromkeys(("torch_adam", "adam_w_mode", "max_grad_norm", "fp32_optimizer_states"), "any")
    params |= dict.fromkeys(
        (*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"), "any"
    )
    schedules = _parameters([getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES], {"optimizer"})
    head: Tree = {constants.TYPE: "string"}
    optimizer = head | {constants.OPTIMIZER_PARAMS: {"keys": params}, constants.LEGACY_FUSION: "bool"}
    return {
        constants.OPTIMIZER: {"keys": optimizer},
        constants.SCHEDULER: {"keys": head | {constants.SCHEDULER_PARAMS: {"keys": schedules}}},
    }


def _model(model: Any) -> Tree:
    keys: Tree = {}
    for name, field in model.model_fields.items():
        leaf = _annotation(field.annotation)
        keys[name] = leaf
        if field.alias:
            keys[field.alias] = leaf
    return {"keys": keys}


def _annotation(annotation: Any) -> Any:
    options = [option for option in get_args(annotation) if option is not types.NoneType]
    union = get_origin(annotation) in (Union, types.UnionType)
    if union and len(options) == 1:
        return _annotation(options[0])
    if inspect.isclass(annotation) and hasattr(annotation, "model_fields"):
        return _model(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return "int" if issubclass(annotation, int) else "string"
    if get_origin(annotation) is Literal:
        return "string"
    if get_origin(annotation) in (list, tuple):
        return "any"  # DeepSpeed takes a single text for some lists
    names: dict[Any, str] = {bool: "bool", int: "int", float: "number", str: "string", Path: "string"}
    return names.get(annotation, "any")


def _type_of(default: Any) -> str:
    """Return the type of a key from its default; int and float defaults are used for one another."""
    if isinstance(default, bool):
        return "bool"
    return "number" if isinstance(default, int | float) else "string" if isinstance(default, str) else "any"


def _with_default(module: Any, prefix: str) -> Tree:
    names = [name for name in dir(module) if name.startswith(prefix) and f"{name}_DEFAULT" in dir(module)]
    return {getattr(module, name): "any" for name in names}


def _any(names: Any) -> Tree:
    return dict.fromkeys(names, "any")


def _parameters(classes: list[Any], skip: set[str]) -> Tree:
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return dict.fromkeys(sorted(names - skip - {"self", "args", "kwargs"}), "any")


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    output.write_text(json.dumps(deepspeed_keys(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
