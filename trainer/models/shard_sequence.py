"""Sequence parallelism for any Hugging Face model whose attention goes through transformers' interface.

Each rank of a group holds a part of every sequence. Only attention needs the others: queries, keys and values are
exchanged so that each rank has whole sequences of some heads, and back (DeepSpeed-Ulysses, Jacobs et al. 2023,
https://arxiv.org/abs/2309.14509). The core is torch's SDPA with a mask made here, of what the whole row holds: causal,
inside documents, inside the layer's window. DeepSpeed's own ``UlyssesSPAttentionHF`` sets masks to None, so that packed
documents see each other, and fixes the batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.nn.functional import all_to_all_single
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig

from trainer.core.errors import Problem, RecipeError

ATTENTION = "trainer_sequence_parallel"
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What attention layers hand over that changes nothing here: positions have been applied, there is no cache.
_HARMLESS = {
    *("position_ids", "use_cache", "cache_position", "past_key_values", "output_attentions", "is_causal"),
    *("logits_to_keep", "return_dict", "position_embeddings", "output_router_logits", "output_hidden_states"),
}


class SequenceAttention:
    """Attention that joins the parts of sequences on the ranks of a group. One a process: it registers itself."""

    def __init__(self, group: distributed.ProcessGroup, config: PretrainedConfig) -> None:
        self._group = group
        self._size = distributed.get_world_size(group)
        self._num_layers = config.get_text_config().num_hidden_layers
        self._documents: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor] = {}
        self._calls = 0
        self._proven = False
        AttentionInterface.register(ATTENTION, self.attend)

    def enter(self, documents: torch.Tensor | None) -> None:
        """Prepare for a forward pass. ``documents``: number of each token's document, int64 [batch, sequence]."""
        self._documents = documents
        self._masks.clear()
        self._calls = 0

    def leave(self, model_type: str) -> None:
        """Check, once, that every block has attended through here: a model that has not would see only its part."""
        if not self._proven and self._calls != self._num_layers:
            rule = f"{self._calls} of {model_type}'s {self._num_layers} blocks attend through transformers' interface"
            raise RecipeError(Problem("parallel.sequence", self._size, rule, "set it to 1"), title="recipe refused")
        self._proven = True

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend over whole sequences.

        ``query`` is [batch, heads, part, head size], ``key`` and ``value`` have their own number of heads. Returns
        [batch, part, heads, head size]. Raises RecipeError for attention that is more than this.
        """
        unknown = [name for name, given in others.items() if name not in _HARMLESS and given is not None]
        if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
            what = ", ".join(unknown) or "a mask of its own"
            rule = f"{type(module).__name__} attends with {what}, which sequence parallelism has no core for"
            raise RecipeError(Problem("parallel.sequence", self._size, rule, "set it to 1"), title="recipe refused")
        self._calls += 1
        heads = query.shape[1]
        if key.shape[1] % self._size:  # fewer keys than ranks: each rank gets those its queries need
            key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
        query, key, value = (self._to_heads(x) for x in (query, key, value))
        mask = self._mask(query.shape[2], sliding_window, query.device)
        found = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self._to_parts(found).transpose(1, 2).contiguous(), None

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, part, size] of all heads → [batch, heads / ranks, sequence, size] of this rank's heads."""
        batch, heads, part, size = x.shape
        sent = x.view(batch, self._size, heads // self._size, part, size).transpose(0, 1).contiguous()
        received = all_to_all_single(torch.empty_like(sent), sent, group=self._group)
        # [ranks, batch, heads, part, size]: parts in the order of ranks are the sequence
        return received.permute(1, 2, 0, 3, 4).reshape(batch, heads // self._size, self._size * part, size)

    def _to_parts(self, x: torch.Tensor) -> torch.Tensor:
        """The way back."""
        batch, heads, length, size = x.shape
        sent = x.view(batch, heads, self._size, length // self._size, size).permute(2, 0, 1, 3, 4).contiguous()
        received = all_to_all_single(torch.empty_like(sent), sent, group=self._group)
        return received.transpose(0, 1).reshape(batch, self._size * heads, length // self._size, size)

    def _mask(self, length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Return what each token may see, bool [batch, 1, length, length]; None: everything before it."""
        window = window if window is not None and window < length else None
        if self._documents is None and window is None:
            return None
        if window not in self._masks:
            place = torch.arange(length, device=device)
            behind = place[:, None] - place[None, :]
            seen = (behind >= 0)[None]
            if window is not None:
                seen = seen & (behind < window)[None]
            if self._documents is not None:
                seen = seen & (self._documents[:, :, None] == self._documents[:, None, :])
            self._masks[window] = seen[:, None]
        return self._masks[window]
