"""DeepSpeed JSON: everything auto is filled, everything else agrees or is refused."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config.deepspeed_file import base_names, key_table
from trainer.config.deepspeed_json import deepspeed_problems, resolve_deepspeed, stage_of
from trainer.config.deepspeed_rules import REFUSED
from trainer.config.derive import derive
from trainer.config.run import Recipe
from trainer.core.errors import Problem, RecipeError
from trainer.core.resources import resource_directory

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[2]

# The example of transformers' documentation, as users bring it.
FROM_TRANSFORMERS: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def recipe(base: str = "zero1", override: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "runs/a", "steps": 10},
            "model": {"config": {"model_type": "gpt2", "n_embd": 4096}},
            "data": {"train": [{"path": "a"}], "sequence_length": 8},
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"clip_norm": 0.5},
            "deepspeed": {"base": base, "override": override or {}},
            **sections,
        }
    )


def problems_of(candidate: Recipe, world_size: int = 2) -> list[Problem]:
    return deepspeed_problems(candidate, derive(candidate, world_size))


def autos(value: Any) -> bool:
    if isinstance(value, dict):
        return any(autos(below) for below in value.values())
    return value == "auto"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("base", base_names())
def test_bases_resolve(base: str, dtype: str) -> None:
    candidate = recipe(base, model={"config": {"model_type": "gpt2", "n_embd": 4096}, "dtype": dtype})
    resolved = resolve_deepspeed(candidate, derive(candidate, 2))
    assert not autos(resolved)
    assert resolved["train_batch_size"] == 8
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"] == {"enabled": dtype == "bfloat16"}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["communication_data_type"] == "fp32"
    assert stage_of(resolved) == int(base[4])
    zero = resolved["zero_optimization"]
    assert ("offload_optimizer" in zero) == ("_offload" in base)
    if stage_of(resolved) == 3:
        assert zero["stage3_param_persistence_threshold"] == 40960
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)
    if stage_of(resolved):
        assert zero["reduce_bucket_size"] == 4096**2


def test_bases_are_those_we_name() -> None:
    assert base_names() == [
        "zero0",
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
        "zero3_offload_nvme",
        "zero3_offload_param",
    ]


def test_bases_are_accepted_by_deepspeed() -> None:
    """DeepSpeed's own parser takes every resolved base at world size 1, and reads from it what was meant."""
    candidates = [recipe(base, batch={"global_size": 8, "micro_size": 2}) for base in base_names()]
    resolved = [resolve_deepspeed(candidate, derive(candidate, 1)) for candidate in candidates]
    script = (
        "import json, sys\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "for values in json.load(sys.stdin):\n"
        "    c = DeepSpeedConfig(values)\n"
        "    o = c.zero_config.offload_optimizer\n"
        "    print('RESULT', json.dumps([c.train_batch_size, c.gradient_accumulation_steps, int(c.zero_config.stage),\n"
        "        c.gradient_clipping, c.bfloat16_config.enabled, c.grad_accum_dtype, str(c.communication_data_type),\n"
        "        c.zero_config.overlap_comm, bool(o and o.device in ('cpu', 'nvme'))]))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=json.dumps(resolved), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    read = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert read == [
        [8, 4, int(base[4]), 0.5, True, "fp32", "torch.float32", False, "_offload" in base] for base in base_names()
    ]


def test_users_json_from_transformers(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FROM_TRANSFORMERS), encoding="utf-8")
    candidate = recipe(str(path))
    resolved = resolve_deepspeed(candidate, derive(candidate, 2))
    assert not {"fp16", "optimizer", "scheduler"} & set(resolved)
    assert not autos(resolved)
    assert resolved["steps_per_print"] == 2000
    assert resolved["zero_force_ds_cpu_optimizer"] is False


def test_an_explicit_optimizer_that_agrees_is_taken_out() -> None:
    params = {
        "lr": 3e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    candidate = recipe(override={"optimizer": {"type": "Adam", "params": params}})
    assert "optimizer" not in resolve_deepspeed(candidate, derive(candidate, 2))


def test_the_old_name_of_bf16() -> None:
    candidate = recipe(override={"bfloat16": {"enabled": True}})
    assert [p.key for p in problems_of(candidate)] == ["deepspeed.override.bfloat16"]


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ({"train_batch_size": 16}, ["train_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype"]),
        ({"data_types": {"param_dtype": "fp16"}}, ["data_types.param_dtype"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr"]),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ["optimizer.params.betas"]),
        ({"optimizer": {"params": {"betas": [0.9]}}}, ["optimizer.params.betas"]),
        ({"optimizer": {"params": {"eps": 1e-6}}}, ["optimizer.params.eps"]),
        ({"optimizer": {"params": {"weight_decay": 0}}}, ["optimizer.params.weight_decay"]),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, ["optimizer.params.adam_w_mode"]),
        ({"optimizer": {"params": {"amsgrad": True}}}, ["optimizer.params.amsgrad"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, ["scheduler"]),
        ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage"]),
        ({"zero_optimization": True}, ["zero_optimization"]),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["zero_optimization.offload_optimizer.device"],
        ),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size"]),
        ({"amp": {"enabled": False}}, ["amp"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["zero_optimization.mics_shard_size"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["activation_checkpointing"]),
        ({"tensor_parallel": {"autotp_size": "auto"}}, ["tensor_parallel.autotp_size"]),
        ({"wall_clock_breakdown": "yes"}, ["wall_clock_breakdown"]),
        ({"zero_optimization": {"sub_group_size": 1.5}}, ["zero_optimization.sub_group_size"]),
        ({"zero_optimization": {"offload_optimizer": 3}}, ["zero_optimization.offload_optimizer"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 3}}},
            ["zero_optimization.offload_param.nvme_path"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            ["zero_optimization.offload_optimizer.device"],
        ),
    ],
)
def test_refusals(override: dict[str, Any], keys: list[str]) -> None:
    problems = problems_of(recipe(override=override))
    assert [problem.key for problem in problems] == [f"deepspeed.override.{key}" for key in keys]
    assert all(problem.fix for problem in problems)


BAD_VALUES: dict[str, Any] = {
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.compute_grad_norm": False,
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "tensor_parallel.autotp_size": 2,
    "weight_quantization": {"enabled": True},
    "datastates_ckpt": {"a": 1},
}


@pytest.mark.parametrize("path", [rule.path for rule in REFUSED])
def test_features_that_fight_us(path: str) -> None:
    override: Any = BAD_VALUES.get(path, True)
    for part in reversed(path.split(".")):
        override = {part: override}
    problems = problems_of(recipe(override=override))
    assert f"deepspeed.override.{path}" in [problem.key for problem in problems]


def test_all_mismatches_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    mess = {"train_batch_size": 1, "gradient_clipping": 9, "fp16": {"enabled": True}, "bf16": {"enabled": False}}
    path.write_text(json.dumps({**mess, "optimizer": {"params": {"lr": 1}}, "zero_optimisation": {}}), encoding="utf-8")
    candidate = recipe(str(path))
    with pytest.raises(RecipeError) as caught:
        resolve_deepspeed(candidate, derive(candidate, 2))
    assert {problem.key.removeprefix(f"{path}: ") for problem in caught.value.problems} == {
        *("train_batch_size", "gradient_clipping", "fp16.enabled", "bf16.enabled", "optimizer.params.lr"),
        "zero_optimisation",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"bf16": {}, "bf16": {}}', "given twice"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "given twice"),
        ("{", "not valid JSON"),
        ('{"a": 1} // comment', "not valid JSON"),
        ('{"gradient_clipping": NaN}', "NaN"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_unreadable_json(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert any(words in str(problem) for problem in problems_of(recipe(str(path))))


def test_unknown_bases() -> None:
    assert "did you mean zero3?" in str(problems_of(recipe("zero33"))[0])
    assert "no such file" in str(problems_of(recipe("conf/none.json"))[0])


def nested_keys(known: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, below in known.items():
        found.append((*prefix, name))
        if isinstance(below, dict):
            found += nested_keys(below["keys"], (*prefix, name))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_typos_name_the_right_key(seed: int) -> None:
    rng = random.Random(seed)
    nested = bool(seed % 2)
    path = rng.choice(
        [key for key in nested_keys(key_table()["keys"]) if len(key[-1]) >= 5 and (len(key) > 1) == nested]
    )
    word, place = path[-1], rng.randrange(1, len(path[-1]) - 1)
    kinds = [
        word[:place] + word[place + 1 :],
        word[:place] + word[place] + word[place:],
        word[:place] + "q" + word[place + 1 :],
    ]
    wrong = rng.choice([kind for kind in kinds if kind != word])
    override: Any = {wrong: "auto"}
    for part in reversed(path[:-1]):
        override = {part: override}
    problems = {problem.key: problem for problem in problems_of(recipe(override=override))}
    key = ".".join(["deepspeed.override", *path[:-1], wrong])
    assert f"did you mean {word}?" in problems[key].fix


def test_unknown_keys_found_elsewhere() -> None:
    (problem,) = problems_of(recipe(override={"overlap_comm": True}))
    assert "belongs to zero_optimization.overlap_comm" in problem.fix


def test_key_table_is_that_of_the_installed_deepspeed(tmp_path: Path) -> None:
    output = tmp_path / "keys.json"
    subprocess.run(
        [sys.executable, str(ROOT / "tools/generate_deepspeed_keys.py"), str(output)], check=True, timeout=120
    )
    assert json.loads(output.read_text(encoding="utf-8")) == key_table()


def test_no_key_that_deepspeed_reads_is_missing() -> None:
    """Independent of the generator: every name that the source of DeepSpeed's config looks up at the top level."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    runtime = Path(spec.origin).parent / "runtime"
    source = (runtime / "config.py").read_text(encoding="utf-8")
    constants = dict(
        re.findall(r"""^([A-Z0-9_]+) = ['"](\w+)['"]""", (runtime / "constants.py").read_text(encoding="utf-8"), re.M)
    )
    names = set(re.findall(r"get_scalar_param\(\s*param_dict,\s*([A-Z_]+),", source)) & set(constants)
    literal = set(re.findall(r"""param_dict(?:\.get\(|\[)['"](\w+)['"]""", source))
    assert len(names) > 15
    assert len(literal) >= 4
    known = set(key_table()["keys"])
    assert {constants[name] for name in names} | (literal - set(key_table()["removed"])) <= known


def test_resources_are_found() -> None:
    assert (resource_directory("ds_configs") / "zero1.json").is_file()
    assert resource_directory("slurm").is_dir()
    with pytest.raises(KeyError):
        resource_directory("nothing")


def test_runs_have_files_of_their_own_on_nvme() -> None:
    def paths(**override: Any) -> list[str]:
        zero = {"zero_optimization": {"offload_optimizer": override}} if override else {}
        candidate = recipe("zero3_offload_nvme", override=zero, model={"config": {"model_type": "gpt2"}})
        resolved = resolve_deepspeed(candidate, derive(candidate, 2))["zero_optimization"]
        return [resolved[name]["nvme_path"] for name in ("offload_optimizer", "offload_param")]

    beside = paths()
    assert beside[0] == beside[1]
    assert beside[0].endswith("/offload")
    elsewhere = paths(nvme_path="/local/disk")[0]
    assert elsewhere.startswith("/local/disk/")
    assert elsewhere != "/local/disk/"
