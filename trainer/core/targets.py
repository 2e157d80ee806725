"""What a training target may be beside a token."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Target of a position that doesn't count: what torch's cross_entropy ignores by default, and transformers uses."""
