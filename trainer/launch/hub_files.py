"""What a recipe takes from the Hugging Face Hub, and whether it lies in the cache."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from trainer.config.lock import is_hub_id
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RefusedError
from trainer.core.hub import DatasetName

_MODEL = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json")
_TOKENIZER = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
_CACHES = (
    ("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
)  # fmt: skip
"""Variables by which huggingface_hub finds its cache, the first that is set wins, and where it is below them."""


@dataclass(frozen=True)
class Wanted:
    """One repository and the files of it that a run reads."""

    repository: str
    revision: str | None
    key: str
    """The first key of the recipe, or the option, that names it."""
    patterns: tuple[str, ...]
    kind: Literal["model", "dataset"] = "model"

    @property
    def lock_name(self) -> str:
        """Its name in RECIPE.lock.json, where a model and a data set may share theirs."""
        return self.repository if self.kind == "model" else f"datasets/{self.repository}"

    def files(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that are read.

        Of a model never what is in folders: other formats lie there. Of a data set never code.
        """
        fitting = [name for name in names if any(fnmatch(name, pattern) for pattern in self.patterns)]
        if self.kind == "dataset":
            return [name for name in fitting if not name.endswith(".py") and not name.startswith(".")]
        return [name for name in fitting if "/" not in name]


def wanted(recipe: Recipe) -> list[Wanted]:
    """Return what a recipe takes from the Hub, a repository of one revision once."""
    found: dict[tuple[str, str | None], Wanted] = {}
    # Python of the repository only where the recipe lets it run.
    model = _MODEL + (("*.py",) if recipe.model.trust_remote_code else ())
    for key, path, revision, patterns in (
        ("model.path", recipe.model.path, recipe.model.revision, model),
        ("tokenizer.path", recipe.tokenizer.path, recipe.tokenizer.revision, _TOKENIZER),
    ):
        if path is not None and is_hub_id(path):
            known = found.get((path, revision))
            before = known.patterns if known else ()
            found[path, revision] = Wanted(path, revision, known.key if known else key, (*before, *patterns))
    return list(found.values())


def wanted_dataset(text: str, patterns: Sequence[str]) -> Wanted:
    """Return what ``--dataset`` names: ``owner/name[@revision]``, of it the files of ``patterns``, or all.

    Raises RefusedError for another name.
    """
    name = DatasetName.parse(text)
    if name is None or name.configuration is not None:
        fix = "--files 'CONFIGURATION/*' takes a part of it" if name else ""
        raise RefusedError(Problem("--dataset", text, "must be owner/name or owner/name@revision", fix))
    # The card says which files are which split.
    some = ("README.md", *patterns) if patterns else ("*",)
    return Wanted(name.identifier, name.revision, "--dataset", some, "dataset")


def cache_of_jobs(recipe: Recipe, environment: Mapping[str, str]) -> Path | None:
    """Return the cache of Hugging Face files that jobs of ``recipe`` read, as a path outside of their container.

    None where launch.slurm.environment names none: the cache is that of ``environment``, which jobs inherit.
    """
    slurm = recipe.launch.slurm
    own = {name: str(value) for name, value in slurm.environment.items()}
    if not own.keys() & {name for name, _ in _CACHES}:
        return None
    seen = {**environment, **own}
    name, below = next(((name, below) for name, below in _CACHES if seen.get(name)), ("", ""))
    if not name:  # an empty value counts as none
        return None
    path = Path(os.path.expandvars(os.path.expanduser(seen[name]))) / below
    for mount in slurm.container.mounts if slurm.container is not None else ():
        source, _, rest = mount.partition(":")
        target = rest.partition(":")[0]
        if target.startswith("/") and path.is_relative_to(target):
            return Path(source) / path.relative_to(target)
    return path


def not_cached(recipe: Recipe) -> list[Problem]:
    """Return a problem for each id of the recipe that a job without internet would not find in the cache."""
    return list(_not_cached(wanted(recipe), cache_of_jobs(recipe, os.environ)))


def _not_cached(repositories: Sequence[Wanted], cache: Path | None) -> Iterator[Problem]:
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub: Any = importlib.import_module("huggingface_hub")  # slow to load, and typed in part only
    fix = "run trainer fetch RECIPE where there is internet, or set launch.slurm.online: true"
    for repository in repositories:
        try:
            # Newer releases know the list of all files, and refuse a snapshot that lacks some of what is asked for.
            found = hub.snapshot_download(
                repository.repository, revision=repository.revision, local_files_only=True,
                cache_dir=cache, allow_patterns=list(repository.patterns), ignore_patterns=["*/*"],
            )  # fmt: skip
            folder = Path(found)
        except (LocalEntryNotFoundError, OSError):
            where = f" ({cache}, by launch.slurm.environment)" if cache is not None else ""
            rule = f"is not in the cache of Hugging Face files{where}, and jobs run offline"
            yield Problem(repository.key, repository.repository, rule, fix)
            continue
        missing = _missing_files(folder, repository)
        if missing:
            rule = f"is in the cache without {missing}, and jobs run offline"
            yield Problem(repository.key, repository.repository, rule, fix)


def _missing_files(folder: Path, repository: Wanted) -> str | None:
    if not (folder / "config.json").exists() and "*.safetensors" in repository.patterns:
        return "config.json"
    if "*.safetensors" in repository.patterns:
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            return None if (folder / "model.safetensors").exists() else "model.safetensors"
        shards = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        return next((name for name in sorted(shards) if not (folder / name).exists()), None)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return None if any((folder / name).exists() for name in names) else "a tokenizer"
