"""How a stream of tokens is cut into samples.

``documents``: documents lie end to end, and a sample is every S tokens of that stream plus the one that follows
(S inputs, S targets, one token shared with the next sample). What is left at the end, fewer than S targets, is unused.
"""

from __future__ import annotations


def samples_in(num_tokens: int, sequence_length: int) -> int:
    """Return how many samples of ``sequence_length`` targets fit into ``num_tokens``; may be 0."""
    return max(0, (num_tokens - 1) // sequence_length)


def sample_span(sample: int, sequence_length: int) -> tuple[int, int]:
    """Return (first token, number of tokens) of a sample: S inputs and the last target."""
    return sample * sequence_length, sequence_length + 1
