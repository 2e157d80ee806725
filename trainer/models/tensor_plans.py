"""How layers of a family are divided over tensor ranks, where transformers publishes no plan.

The styles are transformers' own (``base_model_tp_plan``). ``HEADS`` are attributes of modules that count what is
divided.
"""

from __future__ import annotations

PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "packed_colwise:3",  # query, key and value in one matrix
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
}
COUNTS: dict[str, dict[str, str]] = {"gpt2": {"h.*.attn": "split_size"}}
