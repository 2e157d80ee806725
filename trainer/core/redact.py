"""Keep tokens, keys and passwords out of what a run writes down about itself.

It knows names (``HF_TOKEN``, ``api_key``), credentials in URLs and the shapes of common keys. It can't know a secret
that has neither: nothing secret belongs into a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

REDACTED = "<redacted>"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_ANYWHERE = re.compile(r"secret|password|passwd|passphrase|credential")
_SECRET_LAST = re.compile(r"(?:^|_)(?:token|api_?key|access_?key(?:_id)?|private_?key|pwd|authorization|bearer)$")
_SPECIAL_TOKEN = re.compile(r"[<\[].*[>\]]|")
"""``eos_token: </s>`` is no secret, and neither is what has been taken out already."""
_PATTERNS = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)(?!<redacted>)[^/\s@'\"]+@"), rf"\1{REDACTED}@"),
    (re.compile(r"(?i)\b(bearer|authorization\s*[:=]\s*\w+)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {REDACTED}"),
    (re.compile(r"(?i)([?&](?:sig|signature|x-amz-signature|x-goog-signature)=)[^&\s'\"]+"), rf"\1{REDACTED}"),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
            r"|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16})\b"
        ),
        REDACTED,
    ),
)
_ASSIGNMENT = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)(=|:[ ]+)(\"[^\"]*\"|'[^']*'|[^\s&;\"']+)")


def redacted(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON-like mapping with every secret in it, at any depth, replaced by ``<redacted>``."""
    return {key: REDACTED if _is_secret(key, child) else _clean(key, child) for key, child in value.items()}


def redacted_text(text: str) -> str:
    """Return ``text`` without credentials in URLs, ``NAME=value`` of secret names, and keys of known shapes."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _ASSIGNMENT.sub(_assignment, text)


def redacted_words(words: Iterable[str]) -> list[str]:
    """Return a command line without its secrets; ``--token X`` gives X in a word of its own."""
    kept: list[str] = []
    secret_follows = False
    for word in words:
        kept.append(REDACTED if secret_follows else redacted_text(word))
        secret_follows = word.startswith("-") and "=" not in word and _is_secret(word, "x")
    return kept


def _clean(key: str, value: Any) -> Any:
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, Mapping):
        return redacted(cast("Mapping[str, Any]", value))
    if isinstance(value, list | tuple):
        items = list(cast("list[Any]", value))
        if all(isinstance(item, str) for item in items):
            return redacted_words(items)
        return [REDACTED if _is_secret(key, item) else _clean(key, item) for item in items]
    return value


def _is_secret(key: object, value: object) -> bool:
    """Return whether the name says that ``value`` is a secret. Ids of tokens are numbers, passwords may be."""
    if value is None or isinstance(value, bool):
        return False
    name = "_".join(_WORDS.findall(str(key).rpartition(".")[2])).lower()
    if _SECRET_ANYWHERE.search(name):
        return True
    return isinstance(value, str) and bool(_SECRET_LAST.search(name)) and not _SPECIAL_TOKEN.fullmatch(value)


def _assignment(match: re.Match[str]) -> str:
    name, sign, value = match.groups()
    return f"{name}{sign}{REDACTED}" if _is_secret(name, value.strip("\"'")) else match.group()
