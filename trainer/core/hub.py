"""Is the Hugging Face Hub there? Asked once: its libraries retry every file for half a minute before they give up.

And what a data set of it is called, and where a copy lies that was fetched before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_TIMEOUT_SECONDS = 10.0
_DATASET = re.compile(
    r"(?P<identifier>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<configuration>[\w.-]+))?",
    re.ASCII,
)


@dataclass(frozen=True)
class DatasetName:
    """A data set of the Hub as users write it: ``owner/name[@revision][:configuration]``."""

    identifier: str
    revision: str | None
    configuration: str | None

    @staticmethod
    def parse(text: str) -> DatasetName | None:
        """Return its parts, None where ``text`` is no such name."""
        match = _DATASET.fullmatch(text)
        return DatasetName(**match.groupdict()) if match else None


def cached_snapshots(identifier: str) -> dict[str, Path]:
    """Return the copies of a data set in the cache of Hugging Face files, by commit."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{identifier.replace('/', '--')}"
    return {path.name: path for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()}


def hub_answers(repository: str, kind: Literal["model", "dataset"]) -> bool:
    """Return whether the Hub answers for this repository, if only to say that there is none of that name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=_TIMEOUT_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # noqa: BLE001 (offline mode, no network, no name server, not an id: no answer)
        return False
    return True


def unreachable(path: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Return whether ``path`` is a Hugging Face id of a Hub that does not answer: then only the cache can have it."""
    return not Path(path).exists() and not hub_answers(path, kind)
