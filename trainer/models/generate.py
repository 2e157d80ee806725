"""Sample text from a Hugging Face directory."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.core.errors import Problem, RefusedError


def generate_text(model: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> str:
    """Return ``prompt`` and its continuation. Raises RefusedError if the directory can't be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        # cast: the type transformers declares here lacks generate()
        network = cast(
            "Any",
            AutoModelForCausalLM.from_pretrained(model, dtype="auto", use_safetensors=True, trust_remote_code=False),
        ).eval()
    except (OSError, ValueError) as error:
        raise RefusedError(
            Problem(
                "MODEL_DIR", model, f"can't be loaded ({error})", "give what `trainer export` wrote, with a tokenizer"
            )
        ) from error
    encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise RefusedError(Problem("--prompt", prompt, "holds no token", "give some text"))
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_p": top_p}
    )
    with torch.inference_mode():
        output = network.generate(
            input_ids=encoded["input_ids"],
            attention_mask=torch.ones_like(encoded["input_ids"]),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
