"""Every workaround in trainer/engine/upstream is still needed: a test here fails when upstream has fixed its part.

Then delete the workaround. Each check runs in a process of its own, since it shows unpatched DeepSpeed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranks import rank_environment

from trainer.launch.ports import free_port

pytestmark = pytest.mark.sweep  # what upstream does changes with its releases


def run(code: str, timeout: float = 120) -> str:
    environment = rank_environment(0, 1, free_port("127.0.0.1"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_shared_memory_build_is_still_started_upstream_and_not_by_us() -> None:
    code = """
import importlib
import deepspeed
backend = importlib.import_module("deepspeed.comm.torch")
called = []
original = backend.build_shm_op
backend.build_shm_op = lambda: called.append("upstream")
{setup}
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
print("built:", called, backend.build_shm_op is not original)
"""
    assert "built: ['upstream']" in run(code.format(setup=""))
    ours = "from trainer.engine.upstream import no_shared_memory_build as n; n.disable()"
    assert "built: []" in run(code.format(setup=ours))


def test_muon_still_loads_the_compiler_upstream_and_not_with_us() -> None:
    code = """
import sys
import deepspeed
{setup}
from deepspeed.runtime.zero.muon.original_muon import *
print("inductor:", "torch._inductor.compile_fx" in sys.modules)
"""
    assert "inductor: True" in run(code.format(setup=""))
    assert "inductor: False" in run(
        code.format(setup="from trainer.engine.upstream import lazy_muon as m; m.install()")
    )


def test_muon_is_compiled_when_it_is_used() -> None:
    code = """
import torch
made = []
def recorder(function, **options):
    made.append(options)
    return function
torch.compile = recorder
from trainer.engine.upstream import lazy_muon
lazy_muon.install()
assert torch.compile is recorder and not made
import deepspeed.runtime.zero.muon.original_muon as muon
for _ in range(2):
    out = muon.zeropower_via_newtonschulz5(torch.randn(8, 8), 5)
print("compiled:", len(made), (torch.linalg.svdvals(out.float()) < 2).all().item())
"""
    assert "compiled: 1 True" in run(code)


def test_stage_0_in_bfloat16_is_still_refused_upstream() -> None:
    code = """
import deepspeed, torch
model = torch.nn.Linear(4, 4)
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
try:
    deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
except NotImplementedError as error:
    print("refused:", error)
"""
    assert "refused: unsupported mix" in run(code)


def test_zero_init_around_transformers_still_loses_the_initialisation() -> None:
    code = """
import deepspeed, torch
from transformers import AutoConfig, AutoModelForCausalLM
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2)
torch.manual_seed(0)
plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
    sharded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
parameter = sharded.model.layers[0].mlp.up_proj.weight
with deepspeed.zero.GatheredParameters([parameter]):
    print("std:", parameter.std().item() / plain.model.layers[0].mlp.up_proj.weight.std().item())
"""
    ratio = float(run(code).split("std:")[1])
    assert abs(ratio - 1) > 0.5  # torch's default, not transformers' 0.02


def test_adagrad_is_still_replaced_upstream_and_ours_is_not() -> None:
    code = """
import deepspeed, torch
from trainer.engine.upstream.adagrad import Adagrad
model = torch.nn.Linear(4, 4)
config = {{"train_batch_size": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {{"stage": 1}}}}
made = {kind}([{{"params": [model.weight], "weight_decay": 0.1}}, {{"params": [model.bias]}}], lr=1.0)
engine = deepspeed.initialize(model=model, optimizer=made, config=config)[0]
print("kept:", engine.optimizer.optimizer is made, [g["weight_decay"] for g in engine.optimizer.optimizer.param_groups])
"""
    assert "kept: False [0]" in run(code.format(kind="torch.optim.Adagrad"))
    assert "kept: True [0.1, 0.0]" in run(code.format(kind="Adagrad"))


def test_a_changed_accumulation_still_ends_the_next_step_early_upstream_and_not_with_us() -> None:
    code = """
import deepspeed, torch
from trainer.engine.upstream import no_shared_memory_build
from trainer.engine.upstream.changed_accumulation import set_accumulation
no_shared_memory_build.disable()
model = torch.nn.Linear(4, 4)
config = {"train_batch_size": 1}
engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)[0]
engine.backward(engine(torch.ones(1, 4)).sum())
engine.step()
{setup}
print("ends with the first of", engine.gradient_accumulation_steps(), engine.is_gradient_accumulation_boundary())
"""
    assert "ends with the first of 2 True" in run(code.replace("{setup}", "engine.set_train_batch_size(2)"))
    assert "ends with the first of 2 False" in run(code.replace("{setup}", "set_accumulation(engine, 2)"))


def test_modules_that_recomputation_leaves_pile_up_upstream_and_not_with_us() -> None:
    code = """
import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from torch.utils.checkpoint import checkpoint
from trainer.engine.upstream import modules_left_early, no_shared_memory_build
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
    def forward(self, inputs):
        return checkpoint(self.inner, inputs, use_reentrant=False)
no_shared_memory_build.disable()
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
model = Model()
config = {{"train_batch_size": 1, "zero_optimization": {{"stage": 3}}, "zero_allow_untested_optimizer": True}}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
for _ in range(3):
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    {setup}
print("on the list:", len(parameter_offload.FWD_MODULE_STACK))
"""
    assert "on the list: 4" in run(code.format(setup=""))
    assert "on the list: 1" in run(code.format(setup="modules_left_early.forget()"))
