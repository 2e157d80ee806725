"""Is the Hugging Face Hub there? Asked once: its libraries retry every file for half a minute before they give up."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_TIMEOUT_SECONDS = 10.0


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
