"""What a rank and its node say of themselves before training. Standard library and metadata only: nothing is measured.

Gathered on every rank, sent to rank 0 as JSON, judged there (`compare_ranks`, `compare_nodes`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.allocation.gpus import Gpu, read_gpus
from trainer.config.run import Recipe
from trainer.core.environ import RankEnvironment, usable_cores
from trainer.core.errors import DataError
from trainer.core.mounts import existing, mount_of
from trainer.data.shard_paths import locate

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "trainer")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What the first rank of each node adds."""

    code: str = ""
    """Digest of the trainer's own source there."""
    limits: Mapping[str, int] = field(default_factory=dict[str, int])
    """Soft limits of the process; -1: none."""
    free_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """``run``, ``shared_memory``, ``temporary``: room on that file system."""
    free_inodes: int = -1
    """Of the run's file system; -1: it doesn't tell."""
    mount: str = ""
    """Type and mount point of the run's file system: "nfs4 /scratch"."""
    temporary_error: str = ""
    """Why no file can be made in the directory for temporary files."""
    data: Mapping[str, int] = field(default_factory=dict[str, int])
    """Size of every file of token shards; -1: it can't be opened."""
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    """``here``, ``cached`` or ``missing``: of each model and tokenizer the recipe names."""
    offline: bool = False
    gpus: tuple[Gpu, ...] = ()
    infiniband: bool = False
    numa_nodes: int = 1
    cores: int = 0
    """Cores that the ranks of this node may use, together with others or not."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What every rank says."""

    rank: int
    host: str
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    refused: str = ""
    """Why the recipe is refused there."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    cores: tuple[int, ...] = ()
    gpu_count: int = 0
    """GPUs this process sees."""
    gpu_free_bytes: int = 0
    gpu_total_bytes: int = 0
    node: NodeFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RankFacts:
        """Return the facts that a rank has sent."""
        node: dict[str, Any] | None = fields["node"]
        if node is not None:
            node = {**node, "gpus": tuple(Gpu(**gpu) for gpu in node["gpus"])}
        own: dict[str, Any] = {**fields, "cores": tuple(fields["cores"])}
        own["node"] = None if node is None else NodeFacts(**node)
        return cls(**own)


def rank_facts(
    environment: RankEnvironment, host: str, recipe: Recipe | None, deepspeed: Mapping[str, Any], refused: str,
    torch_facts: Mapping[str, Any],
) -> RankFacts:  # fmt: skip
    """Return what this rank says. ``torch_facts``: ``versions`` and the ``gpu_*`` fields, as torch knows them."""
    more = dict(torch_facts)
    node = node_facts(recipe) if environment.local_rank == 0 else None
    versions = _versions() | cast("dict[str, str]", more.pop("versions", {}))
    return RankFacts(
        rank=environment.rank,
        host=host,
        local_rank=environment.local_rank,
        local_world_size=environment.local_world_size,
        node_rank=environment.node_rank,
        refused=refused,
        versions=versions | ({"driver": node.gpus[0].driver} if node is not None and node.gpus else {}),
        digests=_digests(recipe, deepspeed) if recipe is not None else {},
        cores=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        node=node,
        **more,
    )


def node_facts(recipe: Recipe | None) -> NodeFacts:
    """Return what this node says."""
    free_bytes, free_inodes = _room(recipe)
    return NodeFacts(
        code=_code_digest(Path(__file__).resolve().parents[1]),
        limits=_limits(),
        free_bytes=free_bytes,
        free_inodes=free_inodes,
        mount=mount_of(Path(recipe.run.directory)) if recipe is not None else "",
        temporary_error=_temporary_error(),
        data=_data_files(recipe) if recipe is not None else {},
        models=_models(recipe) if recipe is not None else {},
        offline=os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON"),
        gpus=read_gpus(),
        infiniband=any(_entries(Path("/sys/class/infiniband"))),
        numa_nodes=max(1, sum(path.name[4:].isdigit() for path in _entries(Path("/sys/devices/system/node")))),
        cores=usable_cores(),
    )


def data_paths(recipe: Recipe) -> list[str]:
    """Return the files of all sources; one that can't be found is named as the recipe does."""
    paths: list[str] = []
    for source in (*recipe.data.train, *recipe.data.validation):
        try:
            members = locate(source.path).members
        except (DataError, OSError):
            paths.append(source.path)
            continue
        for member in members:
            paths += [member.path] if member.kind == "datatrove" else [f"{member.path}.bin", f"{member.path}.idx"]
    return list(dict.fromkeys(paths))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _digests(recipe: Recipe, deepspeed: Mapping[str, Any]) -> dict[str, str]:
    """Digest what all ranks must have resolved to the same."""
    sidecars = [_sidecar(f"{source.path}.json") for source in (*recipe.data.train, *recipe.data.validation)]
    contents: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"), "DeepSpeed JSON": deepspeed, "data": sidecars,
    }  # fmt: skip
    return {name: _digest(json.dumps(value, sort_keys=True).encode()) for name, value in contents.items()}


def _sidecar(path: str) -> Any:
    """Return what stands beside a source; its fingerprint is part of it. None: the size of its files must do."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _code_digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _limits() -> dict[str, int]:
    wanted = {"open files": resource.RLIMIT_NOFILE}
    for name, attribute in (("locked memory", "RLIMIT_MEMLOCK"), ("processes", "RLIMIT_NPROC")):
        if hasattr(resource, attribute):
            wanted[name] = getattr(resource, attribute)
    soft = {name: resource.getrlimit(number)[0] for name, number in wanted.items()}
    return {name: -1 if limit == resource.RLIM_INFINITY else limit for name, limit in soft.items()}


def _room(recipe: Recipe | None) -> tuple[dict[str, int], int]:
    """Return the free bytes of the file systems that a run writes to, and the free inodes of its directory's."""
    places: dict[str, Path] = {"shared_memory": _SHARED_MEMORY, "temporary": Path(tempfile.gettempdir())}
    if recipe is not None:
        places["run"] = existing(Path(recipe.run.directory))
    free, inodes = dict[str, int](), -1
    for name, path in places.items():
        try:
            found = os.statvfs(path)
        except OSError:
            continue
        free[name] = found.f_bavail * found.f_frsize
        if name == "run" and found.f_files:
            inodes = found.f_favail
    return free, inodes


def _temporary_error() -> str:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return f"{tempfile.gettempdir()}: {error.strerror or error}"
    return ""


def _data_files(recipe: Recipe) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in data_paths(recipe):
        try:
            # Opened, not only looked at: a mount may list what it can't read.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            sizes[path] = -1
            continue
        try:
            found = os.fstat(descriptor)
            os.read(descriptor, 1)
            sizes[path] = found.st_size if stat.S_ISREG(found.st_mode) else -1
        except OSError:
            sizes[path] = -1
        finally:
            os.close(descriptor)
    return sizes


def _models(recipe: Recipe) -> dict[str, str]:
    wanted = {recipe.model.path: (recipe.model.revision, "config.json")} if recipe.model.path is not None else {}
    found = {path: _where(path, *asked) for path, asked in wanted.items()}
    tokenizer = recipe.tokenizer.path
    if tokenizer is not None and tokenizer not in found:
        found[tokenizer] = _where(tokenizer, recipe.tokenizer.revision, "tokenizer_config.json")
    return found


def _where(path: str, revision: str | None, file: str) -> str:
    """Return where a model or tokenizer is: ``here`` as a directory, ``cached`` from the Hub, or ``missing``."""
    if Path(path).exists():
        return "here"
    from huggingface_hub import try_to_load_from_cache

    try:
        return "cached" if isinstance(try_to_load_from_cache(path, file, revision=revision), str) else "missing"
    except ValueError:  # a path that is no id of the Hub
        return "missing"


def _entries(directory: Path) -> Iterator[Path]:
    try:
        yield from directory.iterdir()
    except OSError:
        return
