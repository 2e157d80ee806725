"""Tell paths from Hugging Face ids."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def is_path_like(text: str) -> bool:
    """Return whether ``text`` can only be meant as a path: rooted, relative, or more than two parts deep."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")


def looks_like_hub_id(text: str) -> bool:
    """Return whether ``text`` has the shape ``name`` or ``owner/name``."""
    return HUB_ID.fullmatch(text) is not None and ".." not in text
