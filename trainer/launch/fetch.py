"""Bring what a recipe takes from the Hugging Face Hub into the cache, and pin it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.load import read_mapping
from trainer.config.lock import Locked, lock_path, lock_text, read_lock
from trainer.config.schema import build_recipe
from trainer.core.durable import replace_text
from trainer.core.errors import Problem, RecipeError, RefusedError, TrainerError
from trainer.core.units import format_bytes
from trainer.launch.hub_files import Wanted, cache_of_jobs, wanted, wanted_dataset

_TIMEOUT_SECONDS = 30.0


def fetch(
    recipe_path: Path, overrides: Iterable[str], say: Callable[[str], None], *, update: bool = False,
    under: Mapping[str, Any] | None = None, datasets: Sequence[str] = (), files: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Download the recipe's models and tokenizers and write RECIPE.lock.json; return its path.

    What is locked stays at its commit unless the recipe asks for another revision, or ``update``. Files that are there
    are not downloaded again, and an interrupted download continues. ``under`` is what a site profile says: it may name
    the cache that jobs read. ``datasets`` (``owner/name[@revision]``) are fetched too, of them ``files`` (patterns) or
    all; they stay pinned until they are named again. Raises RefusedError where the Hub has not got what the recipe
    names, or refuses it; TrainerError where it can't be reached. The lock is written last.
    """
    mapping, problems = read_mapping(recipe_path, overrides, under, locked=False)
    recipe, more = build_recipe(mapping) if mapping is not None else (None, [])
    path = lock_path(recipe_path)
    before, wrong = read_lock(path)
    if recipe is None or problems or more or wrong:
        raise RecipeError([*problems, *more, *wrong], title=f"recipe {recipe_path} refused")
    repositories = wanted(recipe) + [wanted_dataset(name, files) for name in datasets]
    if not repositories:
        say("the recipe names no Hugging Face id, and no --dataset is given: nothing to fetch")
        return path
    _refuse_two_revisions(repositories)
    cache = cache_of_jobs(recipe, os.environ)
    if cache is not None:
        say(f"into {cache}, by launch.slurm.environment")
    locked = {name: entry for name, entry in before.items() if name.startswith("datasets/")}
    for repository in repositories:
        known = before.get(repository.lock_name)
        keep = known is not None and not update and repository.revision in (known.revision, known.commit)
        commit = _fetch_one(repository, known.commit if keep and known else repository.revision, cache, say)
        locked[repository.lock_name] = Locked(repository.revision, commit)
        if repository.kind == "dataset":
            say(f"  trainer data tokenize --input {repository.repository}@{commit} ... needs no internet now")
    replace_text(path, lock_text(locked))
    say(f"pinned in {path}")
    return path


def _refuse_two_revisions(repositories: list[Wanted]) -> None:
    seen: dict[str, Wanted] = {}
    for repository in repositories:
        other = seen.setdefault(repository.lock_name, repository)
        if other is not repository:
            key = repository.key.replace("path", "revision")
            rule = f"is another revision of {repository.repository} than {other.key} names ({other.revision})"
            raise RecipeError(Problem(key, repository.revision, rule, "give one revision of it"))


def _fetch_one(repository: Wanted, revision: str | None, cache: Path | None, say: Callable[[str], None]) -> str:
    """Download one repository and return its commit."""
    hub: Any = importlib.import_module("huggingface_hub")  # slow to load, and typed in part only

    name = repository.repository
    with _explained(repository):
        info: Any = hub.HfApi().repo_info(
            name, revision=revision, repo_type=repository.kind, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        files = repository.files(sizes)
        if "*.safetensors" in repository.patterns and not any(file.endswith(".safetensors") for file in files):
            rule = "has no safetensors; pickled weights run code when they are loaded"
            raise RefusedError(Problem(repository.key, name, rule, "choose a revision that has them"))
        total = format_bytes(sum(sizes[file] for file in files))
        if not files:
            raise RefusedError(Problem(repository.key, name, "has no files that --files takes"))
        say(f"{name} at {info.sha[:12]}: {len(files)} files, {total}")
        hub.snapshot_download(name, revision=info.sha, repo_type=repository.kind, allow_patterns=files, cache_dir=cache)
    return str(info.sha)


@contextmanager
def _explained(repository: Wanted) -> Generator[None]:
    """Turn the Hub's errors into words for the key that named the repository."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, key = repository.repository, repository.key
    try:
        yield
    except GatedRepoError as error:
        rule = "is gated, and this account has no access to it"
        fix = f"ask for access at {constants.ENDPOINT}/{repository.lock_name}, then run hf auth login"
        raise RefusedError(Problem(key, name, rule, fix)) from error
    except RevisionNotFoundError as error:
        revision = key.replace("path", "revision")
        raise RefusedError(Problem(revision, repository.revision, f"{name} has no such revision")) from error
    except RepositoryNotFoundError as error:
        fix = "check the name; for a private one run hf auth login"
        raise RefusedError(Problem(key, name, f"{constants.ENDPOINT} has no such repository", fix)) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError) as error:
        fix = "run trainer fetch where there is internet, without HF_HUB_OFFLINE"
        raise TrainerError(f"{constants.ENDPOINT} can't be reached for {name} → {fix}") from error
    except HfHubHTTPError as error:
        raise TrainerError(f"{constants.ENDPOINT} refused {name}: {str(error).strip().splitlines()[0]}") from error
    except TrainerError:
        raise
    # Connections fail with errors of the HTTP library, which is another one from release to release.
    except Exception as error:
        fix = "is there internet here? What has arrived is kept: run it again"
        raise TrainerError(f"{name} could not be fetched from {constants.ENDPOINT}: {error} → {fix}") from error
