"""Sample text from a Hugging Face directory."""

from __future__ import annotations

import torch

from trainer.core.errors import Problem, RefusedError
from trainer.models.load import load_model
from trainer.models.tokenizer import load_tokenizer


def generate_text(model: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> str:
    """Return ``prompt`` and its continuation. Raises RefusedError if the directory can't be loaded."""
    network = load_model(model, "MODEL_DIR")
    tokenizer = load_tokenizer(model, key="MODEL_DIR")
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
