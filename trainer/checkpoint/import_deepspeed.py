"""Read a checkpoint of DeepSpeed's ``engine.save_checkpoint`` by its files alone; DeepSpeed is not imported.

Every file is mapped, and one parameter at a time is put together when it is written: memory is a few times that of the
largest parameter, whatever the number of ranks. No script of the checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.checkpoint.import_optimizer import common_step, moments_of, settings_of, step_of
from trainer.checkpoint.import_pickle import OTHER_LAYOUT, Node, load_pickle
from trainer.checkpoint.import_plain import read_plain
from trainer.checkpoint.import_source import ForeignTensor, Source
from trainer.checkpoint.import_zero import (
    joined,
    partitioned,
    piece_length,
    places_of,
    refuse_other_addresses,
    sharded,
)
from trainer.core.errors import Problem, RefusedError

SUPPORTED = "stage 0 and ZeRO-1, 2 and 3 over data-parallel ranks, as engine.save_checkpoint of DeepSpeed 0.19 writes"
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_PIPELINE = re.compile(r"layer_[0-9]+-.*model_states\.pt")
_EXPERTS = re.compile(r"(?:layer_[0-9]+_)?expert_[0-9]+_.*|expp_rank_.*")


def find_deepspeed(source: Path, tag: str | None) -> Path | None:
    """Return the directory of a checkpoint below ``source``, or that it is; None if there is no trace of one.

    Raises RefusedError if ``tag`` or what ``latest`` says is not there.
    """
    if tag is None and (source / "latest").is_file():
        tag = (source / "latest").read_bytes()[:4096].decode("utf-8", "replace").strip()
    if tag is None:
        return source if any(_is_state(path) for path in source.iterdir()) else None
    directory = source / tag
    if Path(tag).name != tag or tag in (".", "..") or not directory.is_dir():
        tags = sorted(path.name for path in source.iterdir() if path.is_dir())
        fix = f"give one of them with --tag: {', '.join(tags)}" if tags else "give the directory that was saved to"
        raise RefusedError(Problem("--tag", tag, f"{source} has no checkpoint of that name", fix), "import refused")
    return directory


def read_deepspeed(directory: Path, *, weights_only: bool = False) -> Source:
    """Return the contents of one tag's directory. Raises RefusedError for anything that is not as DeepSpeed writes it.

    ``weights_only``: leave out the moments.
    """
    names = sorted(path.name for path in directory.iterdir())
    _refuse_unsupported(directory, names)
    optimizer_files = _by_rank(directory, [(name, match) for name in names if (match := _OPTIMIZER.fullmatch(name))])
    matches = [(name, match) for name in names if (match := _MODEL.fullmatch(name))]
    of_ranks = [(name, match) for name, match in matches if match.group(1) is not None]
    if of_ranks and len(of_ranks) != len(matches):
        raise _refused(directory, "holds model states of ZeRO-3 and of another stage", "remove what is not of it")
    models = [load_pickle(path) for path in (_by_rank(directory, of_ranks) or [directory / matches[0][0]])]
    if not optimizer_files:
        found = read_plain(models[0], weights_only=weights_only)
    else:
        states = [load_pickle(path)["optimizer_state_dict"] for path in optimizer_files]
        stage = states[0].get("zero_stage")
        _refuse_missing_ranks(states)
        if stage is not None and stage.integer() == 3:
            found = _read_sharded(models, states, weights_only)
        else:
            found = _read_flat(models[0], states, weights_only)
    found.path, found.directory = str(directory), directory
    found.kind += f", tag {directory.name}"
    _add_facts(found, models[0])
    return found


def _is_state(path: Path) -> bool:
    return any(pattern.fullmatch(path.name) for pattern in (_OPTIMIZER, _MODEL, _PIPELINE, _EXPERTS))


def _refuse_unsupported(directory: Path, names: Sequence[str]) -> None:
    fix = f"supported are {SUPPORTED}; write Hugging Face safetensors of it and import those"
    if any(_PIPELINE.fullmatch(name) for name in names):
        raise _refused(directory, "is of pipeline stages, whose layers have no Hugging Face names", fix)
    if any(_EXPERTS.fullmatch(name) for name in names):
        raise _refused(directory, "is of experts spread over ranks", fix)
    if (directory / "zero").is_dir():
        raise _refused(directory, "is a universal checkpoint", "import the one that it was converted from")
    states = [match for name in names if (match := _MODEL.fullmatch(name) or _OPTIMIZER.fullmatch(name))]
    if not any(name.endswith("_model_states.pt") for name in names):
        raise _refused(directory, "holds no *_model_states.pt", "give the directory that was saved to, and --tag")
    if any(int(match.group(2)) for match in states):
        raise _refused(directory, "is of tensor-parallel or pipeline ranks (mp_rank above 00)", fix)


def _by_rank(directory: Path, found: Sequence[tuple[str, re.Match[str]]]) -> list[Path]:
    """Return the files of all ranks, in rank order. Raises RefusedError if one is missing or there twice."""
    ranked = sorted((int(match.group(1)), name) for name, match in found)
    if [rank for rank, _ in ranked] != list(range(len(ranked))):
        held = ", ".join(str(rank) for rank, _ in ranked)
        raise _refused(directory, f"holds files of ranks {held}: some are missing or there twice", "complete it")
    return [directory / name for _, name in ranked]


def _refuse_missing_ranks(states: Sequence[Node]) -> None:
    for state in states:
        count = state["partition_count"]
        counts = {n.integer() for n in count.elements()} if isinstance(count.value, list | tuple) else {count.integer()}
        if counts != {len(states)}:
            parts = " or ".join(map(str, sorted(counts)))
            raise count.unlike(f"says that state is divided over {parts} ranks, there are files of {len(states)}")


def _read_flat(model: Node, states: Sequence[Node], weights_only: bool) -> Source:
    """Read ZeRO-1 or 2, or BF16_Optimizer."""
    shapes = model["param_shapes"].elements()
    stage = states[0].get("zero_stage")
    named = f"ZeRO-{stage.integer()}" if stage else "BF16_Optimizer"
    found = Source("", f"DeepSpeed {named} of {len(states)} ranks", {})
    paddings = states[0].get("param_alignment_paddings")
    steps: list[int] = []
    for group, group_shapes in enumerate(shapes):
        padding = [node.integer() for node in paddings[group].elements()] if paddings else None
        places = places_of(group_shapes, lambda count: count, padding)
        masters = [state["single_partition_of_fp32_groups"][group] for state in states]
        found.weights.update(partitioned(places, masters))
        if not _round_robin(model):  # DeepSpeed's addresses are wrong then, its shapes are right
            addresses = [state["param_slice_mappings"][group] for state in states]
            refuse_other_addresses(places, masters, addresses)
        if weights_only:
            continue
        entries = [_entry(state["base_optimizer_state"], group) for state in states]
        held = [moments_of(entry) for entry, _ in entries]
        steps += [
            step_of(entry, settings, state.get("base_optimizer_state_step"))
            for (entry, settings), state in zip(entries, states, strict=True)
        ]
        for key in held[0]:
            for name, tensor in partitioned(places, [moments[key] for moments in held]):
                found.moments.setdefault(name, {})[key] = tensor
    if not weights_only:
        found.optimizer_steps = common_step(steps, states[0])
        base = states[0]["base_optimizer_state"]
        _note_settings(found, base["param_groups"].elements() if isinstance(base.value, dict) else [])
    _add_module(found, model)
    return found


def _entry(base: Node, group: int) -> tuple[Node, Node | None]:
    """Return state and settings of a group's partition: torch's state_dict, or a list of groups."""
    if isinstance(base.value, list):
        return base[group], None
    settings = base["param_groups"][group]
    index = settings["params"].elements()
    if len(index) != 1:
        raise settings.unlike(f"has {len(index)} partitions")
    return base["state"][index[0].integer()], settings


def _round_robin(model: Node) -> bool:
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if config and isinstance(config.value, dict) else None
    return bool(zero and isinstance(zero.value, dict) and zero.value.get("round_robin_gradients"))


def _add_module(found: Source, model: Node) -> None:
    """Take over what the flat groups lack, and keep the compute weights of the rest to be compared."""
    shared = {name: node.text() for name, node in model["shared_params"].named()}
    buffers = {node.text() for node in model["buffer_names"].elements()}
    for name, node in model["module"].named():
        tensor = ForeignTensor.of(node.tensor())
        if name in buffers:
            found.buffers[name] = tensor
        elif name in found.weights:
            found.rounded[name] = tensor
        elif name not in shared:
            found.weights[name] = tensor
            found.frozen.add(name)
    found.shared = shared


def _read_sharded(models: Sequence[Node], states: Sequence[Node], weights_only: bool) -> Source:
    """Read ZeRO-3."""
    if len(models) != len(states):
        raise states[0].unlike(f"there are optimizer states of {len(states)} ranks, model states of {len(models)}")
    world_size = len(states)
    found = Source("", f"DeepSpeed ZeRO-3 of {world_size} ranks", {})
    inner = [state["optimizer_state_dict"] for state in states]
    settings = inner[0]["param_groups"].elements()
    order = [index.integer() for group in settings for index in group["params"].elements()]
    shapes = models[0]["param_shapes"].elements()
    steps: list[int] = []
    for number, group_shapes in enumerate(shapes):
        places = places_of(group_shapes, lambda count: piece_length(count, world_size))
        found.weights.update(sharded(places, [state["fp32_flat_groups"][number] for state in states]))
        if weights_only:
            continue
        if len(order) != len(shapes):
            raise inner[0].unlike(f"has {len(order)} sub-groups, param_shapes {len(shapes)}")
        entries = [state["state"][order[number]] for state in inner]
        held = [moments_of(entry) for entry in entries]
        steps += [step_of(entry, settings[0]) for entry in entries]
        for key in held[0]:
            for name, tensor in sharded(places, [moments[key] for moments in held]):
                found.moments.setdefault(name, {})[key] = tensor
    if not weights_only:
        found.optimizer_steps = common_step(steps, states[0])
        _note_settings(found, settings)
    _add_frozen(found, models)
    return found


def _add_frozen(found: Source, models: Sequence[Node]) -> None:
    """Take over frozen parameters, cut as trained ones are, and buffers, which every rank has whole."""
    shapes = models[0].get("frozen_param_shapes")
    for name, node in shapes.named() if shapes else []:
        pieces = [model["frozen_param_fragments"][name].flat() for model in models]
        shape = node.shape()
        whole = joined(pieces, shape)
        found.weights[name] = ForeignTensor.of(whole)
        found.frozen.add(name)
    buffers = {node.text() for node in models[0]["buffer_names"].elements()}
    module = models[0]["module"]
    found.buffers = {name: ForeignTensor.of(module[name].tensor()) for name in sorted(buffers)}
    found.shared = {name: node.text() for name, node in models[0]["shared_params"].named()}


def _add_facts(found: Source, model: Node) -> None:
    found.step = model["global_steps"].integer()
    dtypes = {node.tensor().dtype for _, node in model["module"].named() if node.tensor().is_floating_point()}
    found.dtype = "bfloat16" if torch.bfloat16 in dtypes else "float32"
    if torch.float16 in dtypes:
        found.notes.append("it computed in float16, which is none of model.dtype: float32 stands in the checkpoint")
    experts = model.get("ds_autoep_layers")
    if experts is not None:
        raise experts.unlike("experts were spread over ranks")


def _note_settings(found: Source, groups: Sequence[Node]) -> None:
    if said := settings_of(groups):
        found.notes.append(f"its optimizer: {said}")


def _refused(directory: Path, rule: str, fix: str = OTHER_LAYOUT) -> RefusedError:
    return RefusedError(Problem("SOURCE", str(directory), rule, fix), title="import refused")
