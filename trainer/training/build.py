"""Put a run together: the only place that knows every part."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trainer.checkpoint import layout, random_state
from trainer.checkpoint.agreement import Ranks
from trainer.checkpoint.hook import Hook
from trainer.checkpoint.identity import data_identity
from trainer.checkpoint.provenance import provenance, topology_facts
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resized import ResizedReader
from trainer.checkpoint.select import choose, choose_source
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.batch_schedule import warmup_text
from trainer.config.derive import Derived
from trainer.config.run import Recipe
from trainer.core import phases
from trainer.core.environ import RankEnvironment
from trainer.core.errors import CheckpointError
from trainer.core.units import format_count
from trainer.core.versions import untested
from trainer.data.ledger import Ledger
from trainer.data.loader import TrainLoader
from trainer.engine.base import TrainEngine
from trainer.engine.build import build_engine
from trainer.evaluation.validation import Validation
from trainer.models.config import (
    config_to_dictionary,
    hugging_face_config,
    unpadded_vocabulary_size,
    with_vocabulary_size,
)
from trainer.models.flops import training_flops_per_token
from trainer.parallel.topology import mesh_of, mesh_table
from trainer.resilience.requests import RequestSources
from trainer.tasks.pretrain import loss_spec
from trainer.telemetry.sinks.base import Fanout
from trainer.telemetry.throughput import Stopwatch, device_name, model_flops_utilization, peak_flops_per_second
from trainer.training.guard_log import GuardLog
from trainer.training.guarding import Guard
from trainer.training.isolation import refuse_leak
from trainer.training.loop import Parts
from trainer.training.replica_check import ReplicaCheck
from trainer.training.resume import Resumption, load_checkpoint, refuse_beyond_budget
from trainer.training.saving import Saver, newest_good_step
from trainer.training.state import TrainState
from trainer.training.stragglers import Stragglers
from trainer.training.tokenizer import keep, load_on_first_rank, refuse_other_tokenizer


def build_parts(
    recipe: Recipe,
    derived: Derived,
    deepspeed_json: dict[str, Any],
    environment: RankEnvironment,
    *,
    attempt: int,
    open_sinks: Callable[[int, float], Fanout],
    say: Callable[[str], None],
    requests: RequestSources,
    may_commit: Callable[[], None] = lambda: None,
) -> Parts:
    """Assemble a fresh or resumed run; the process group is joined already.

    ``open_sinks(resume_step, restore_seconds)`` is called once the run stands where it starts. ``may_commit`` raises
    CheckpointError where this run has lost its directory to another. Raises TrainerError.
    """
    ranks = Ranks.apart()  # on the CPU: nothing that is told here needs a device, and files may take long to hash
    run_directory = Path(recipe.run.directory)
    phases.mark("start", detail=f"looking for a checkpoint in {run_directory}")
    restore = Stopwatch()
    with restore:
        found = choose(run_directory, recipe.checkpoint.resume, ranks, say)
    reader = CheckpointReader(found) if found else None
    tokenizer = load_on_first_rank(recipe, ranks)
    source = _run_as_source(recipe, ranks, say, fresh=reader is None)
    section = _model_section(recipe, source)
    config, unpadded = hugging_face_config(section), unpadded_vocabulary_size(section)
    vocabulary = unpadded or config.get_text_config().vocab_size
    state = TrainState.from_json(reader.state["train"]) if reader else TrainState()
    mesh = mesh_of(recipe.parallel, environment.world_size)
    place = mesh.place(environment.rank)  # ranks of one replica read the same sequences
    phases.mark("start", detail="opening the data")
    loader = TrainLoader(
        recipe.data, recipe.run.seed, recipe.batch.global_size, recipe.batch.micro_size,
        place.data, mesh.data, state.consumed_samples, vocabulary,
        recipe.batch.warmup, state.step,
    )  # fmt: skip
    refuse_beyond_budget(recipe, derived, loader.sampler)
    refuse_other_tokenizer(tokenizer, loader, vocabulary, ranks, pretrained=recipe.model.path is not None)
    _exclude_corrupt(loader, ranks, say)
    validation = Validation(recipe, place.data, mesh.data, vocabulary)
    phases.mark("start", detail="building the model")
    engine = build_engine(
        recipe,
        config,
        deepspeed_json,
        loss_spec(unpadded),
        environment,
        from_scratch=reader is not None or source is not None,
    )  # fmt: skip
    stage = deepspeed_json["zero_optimization"]["stage"]
    phases.mark("load", detail=f"reading {found}" if found else "starting afresh")
    if reader is not None:
        identity = data_identity(recipe, loader.sampler.fingerprint(state.consumed_samples))
        topology = topology_facts(mesh, recipe.parallel.expert, stage)
        here = Resumption(recipe, reader, ranks, state, say)
        with restore:
            load_checkpoint(here, engine, config_to_dictionary(config), identity, topology)
    else:
        _start_afresh(engine, recipe, ranks, source)
    if recipe.data.mask_documents:
        refuse_leak(engine, config.model_type, vocabulary)
    keep(tokenizer, recipe)
    phases.mark("start", detail="allocating buffers for checkpoints")
    writer = CheckpointWriter(
        run_directory,
        attempt=f"{ranks.from_first(attempt):04d}",
        settings=recipe.checkpoint,
        may_commit=may_commit,
        ranks=ranks,
    )
    said = writer.prepare(engine.iterate_state())
    model = {
        "config": config_to_dictionary(config),
        "dtype": recipe.model.dtype,
        "tokenizer": recipe.tokenizer.path,
        "tokenizer_revision": recipe.tokenizer.revision,
        "commit": getattr(config, "_commit_hash", None),
        "unpadded_vocabulary_size": unpadded,
    }
    hosts = ranks.gather(socket.gethostname())
    sinks = open_sinks(state.step, restore.seconds if reader else 0.0)

    def facts() -> dict[str, Any]:
        identity = data_identity(recipe, loader.sampler.fingerprint(state.consumed_samples))
        fixed = {"state": {"train": state.to_json(), "identity": identity}, "model": model}
        return fixed | provenance(recipe, mesh, stage, len(set(hosts)), engine.logical_shapes())

    hook = None
    if recipe.checkpoint.hook and environment.rank == 0:
        hook = Hook(recipe.checkpoint.hook, recipe.checkpoint.hook_timeout_seconds, run_directory)
    replicas = ReplicaCheck(engine, state, recipe.resilience.guard.replica_check_every_steps)
    saved_step = state.step if reader else -1
    good_step = newest_good_step(run_directory, saved_step, state.guard.bad_since)
    saver = Saver(writer, engine, state, facts, recipe.checkpoint, sinks, hook, saved_step, good_step, replicas.now)
    guard_log = None
    if environment.rank == 0:
        guard_log = GuardLog(run_directory, Ledger(loader.sources, loader.sampler, recipe.data.sequence_length))
    guard = Guard(recipe.resilience, state, guard_log)
    parts = Parts(
        recipe, derived, engine, loader, validation, state, sinks, saver, guard, replicas, ranks, open_sinks,
        requests,
        _utilization(engine, config, recipe, derived),
        Stragglers(recipe.resilience.watchdog, engine.device, hosts, sinks.message), rank=environment.rank,
    )  # fmt: skip
    if (warning := untested()) is not None:
        sinks.message(warning)
    sinks.message(_summary(parts, deepspeed_json, reader))
    for sentence in said:
        sinks.message(sentence)
    if _degrees(parts):
        for line in engine.division + mesh_table(mesh, hosts, recipe.parallel.expert):
            sinks.message(line)
    return parts


def _exclude_corrupt(loader: TrainLoader, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Look for corrupt blocks, each rank its share; all ranks then leave out the same ones, or all refuse."""
    found = [block for blocks in ranks.gather(loader.check_blocks(ranks.rank, ranks.world_size)) for block in blocks]
    loader.exclude(found)
    for *_, message in found:
        say(f"warning: {message}: sequences that touch it are left out (data.on_corrupt: skip)")


def _run_as_source(recipe: Recipe, ranks: Ranks, say: Callable[[str], None], *, fresh: bool) -> CheckpointReader | None:
    """Return the newest checkpoint of ``model.path`` where that is a run directory: its weights are the start.

    A run that resumes takes no weights from there, only the model's config: damage of others does not stop it.
    """
    path = recipe.model.path
    if path is None or not layout.checkpoints_directory(Path(path)).is_dir():
        return None
    if fresh:
        return CheckpointReader(choose_source(Path(path), ranks, say))
    newest = layout.newest(Path(path))
    if newest is None:
        raise CheckpointError(f"model.path = {path!r} is a run directory without a complete checkpoint")
    return CheckpointReader(newest[1])


def _model_section(recipe: Recipe, source: CheckpointReader | None):
    if source is None:
        return recipe.model
    fields, unpadded = source.model["config"], source.model.get("unpadded_vocabulary_size")
    if unpadded is not None:
        fields = with_vocabulary_size(fields, unpadded)
    fields = fields | (recipe.model.config or {})
    return recipe.model.model_copy(update={"path": None, "config": fields})


def _start_afresh(engine: TrainEngine, recipe: Recipe, ranks: Ranks, source: CheckpointReader | None) -> None:
    """Load the weights of another run, if there is one, and seed the generators."""
    if source is not None:
        section = _model_section(recipe, source)
        engine.load_state(ResizedReader(source, section, engine.logical_shapes()), None)
    random_state.seed_everything(recipe.run.seed, ranks.rank // recipe.parallel.tensor)


def _utilization(
    engine: TrainEngine, config: PretrainedConfig, recipe: Recipe, derived: Derived
) -> Callable[[float], float | None]:
    text = config.get_text_config()
    vocabulary, hidden = text.vocab_size, text.hidden_size
    embeddings = vocabulary * hidden * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    heads = text.num_attention_heads
    flops = training_flops_per_token(
        num_non_embedding_parameters=max(0, engine.num_parameters - embeddings),
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        sequence_length=recipe.data.sequence_length,
    )
    peak = peak_flops_per_second(device_name())
    return lambda speed: model_flops_utilization(speed, flops, derived.world_size, peak)


def _summary(parts: Parts, deepspeed_json: dict[str, Any], reader: CheckpointReader | None) -> str:
    """Return the sentence that says what is about to run."""
    derived, batch = parts.derived, parts.recipe.batch
    replicas = "ranks" if derived.data_parallel == derived.world_size else "replicas"
    start = f"resuming at step {parts.state.step}" if reader else "starting"
    return (
        f"{start}: {format_count(parts.engine.num_parameters)} parameters, {parts.recipe.model.dtype}, "
        f"ZeRO-{deepspeed_json['zero_optimization']['stage']} on {derived.world_size} ranks{_degrees(parts)}, "
        f"batch {batch.global_size} = {batch.micro_size} micro x {derived.accumulation} accumulation "
        f"x {derived.data_parallel} {replicas}{warmup_text(batch)}, {derived.total_steps} steps, "
        f"{format_count(derived.total_tokens)} tokens"
    )


def _degrees(parts: Parts) -> str:
    """Return the degrees above 1, e.g. " (pipeline 2 x data 2)"."""
    given = parts.recipe.parallel.model_dump(include={"pipeline", "tensor", "sequence", "expert"})
    above = [f"{axis} {degree}" for axis, degree in given.items() if degree > 1]
    return f" ({' x '.join([*above, f'data {parts.derived.data_parallel}'])})" if above else ""
