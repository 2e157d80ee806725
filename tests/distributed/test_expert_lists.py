"""A model whose experts are a list of modules, of which each rank runs others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked_runs import Trainer

CODE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ListConfig(PretrainedConfig):
    model_type = "expert_list"

    def __init__(self, **fields):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 512, 32, 2
        self.num_attention_heads, self.num_experts = 2, 4
        super().__init__(**fields)


class Block(nn.Module):
    """Each token goes to the expert that its first feature names: which experts run depends on the tokens alone."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(config.num_experts))

    def forward(self, states, choice):
        output = states.clone()
        for number in choice.unique().tolist():
            output[choice == number] += torch.tanh(self.experts[number](states[choice == number]))
        return output


class ListModel(PreTrainedModel):
    config_class = ListConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "weight") and module.weight is not None:
            module.weight.data.normal_(0, 0.02)

    def forward(self, input_ids, use_cache=False, **rest):
        states = self.embed_tokens(input_ids)
        # Sequences differ: a whole row goes to one expert.
        choice = (input_ids.sum(dim=1, keepdim=True) % self.config.num_experts).expand_as(input_ids)
        for layer in self.layers:
            states = layer(states, choice)
        return CausalLMOutputWithPast(logits=self.lm_head(states))
'''


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    with Trainer(tmp_path_factory.mktemp("list")) as made:
        yield made


def write_model(path: Path) -> None:
    path.mkdir()
    (path / "modeling_list.py").write_text(CODE)
    sys.path.insert(0, str(path))
    try:
        from modeling_list import ListConfig, ListModel  # type: ignore[import-not-found]

        torch.manual_seed(0)
        ListModel(ListConfig()).save_pretrained(path)
    finally:
        sys.path.remove(str(path))
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_list.ListConfig",
        "AutoModelForCausalLM": "modeling_list.ListModel",
    }
    (path / "config.json").write_text(json.dumps(config))


def test_ranks_that_run_different_experts_wait_for_nobody(trainer: Trainer) -> None:
    write_model(trainer.directory / "model")
    model = {"path": str(trainer.directory / "model"), "config": None, "trust_remote_code": True}
    batch = {"global_size": 4, "micro_size": 1}
    for base in ("zero0", "zero1", "zero2", "zero3"):
        override = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if base == "zero3" else {}
        recipe = trainer.recipe(base, model=model, batch=batch, deepspeed={"base": base, "override": override})
        trainer.check(trainer.train(recipe, "run.steps=8"), recipe)
    alone = trainer.recipe("alone", model=model, batch=batch, deepspeed={"base": "zero0"})
    trainer.check(trainer.train(alone, "run.steps=8", world=1), alone)
    expected = trainer.metrics("alone")
    for base in ("zero0", "zero1", "zero2", "zero3"):
        found = trainer.metrics(base)
        assert found.keys() == expected.keys()
        assert max(abs(found[key] - expected[key]) for key in expected) < 1e-5, base
