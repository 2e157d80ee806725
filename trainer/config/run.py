"""The whole recipe: one field a section, each section in the file of its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from trainer.config.adapter import AdapterConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.data import DataConfig, TokenizerConfig
from trainer.config.deepspeed import DeepSpeedConfig
from trainer.config.evaluation import EvaluationConfig
from trainer.config.launch import LaunchConfig
from trainer.config.model import KernelsConfig, ModelConfig
from trainer.config.optimizer import OptimizerConfig, ScheduleConfig
from trainer.config.parallel import BatchConfig, MemoryConfig, ParallelConfig
from trainer.config.resilience import ResilienceConfig
from trainer.config.section import Section, broken_rule
from trainer.config.telemetry import TaskConfig, TelemetryConfig


def length_rule(run: Mapping[str, Any]) -> PydanticCustomError | None:
    """Return the error of a ``run`` section that gives not exactly one of ``steps`` and ``tokens``."""
    given = [name for name in ("steps", "tokens") if run.get(name) is not None]
    if len(given) == 1:
        return None
    found = "both" if given else "neither"
    return broken_rule(f"give exactly one of run.steps and run.tokens, not {found}", "set one of them")


class RunSection(Section):
    """What this run is called, where it lives and how long it lasts."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Shown in the console, TensorBoard and the SLURM queue."""
    directory: str
    """The run directory. Everything the run writes is below it."""
    group_access: Literal["none", "read"] = "none"
    """Who else may read it: nobody, or ``read``: members of the directory's group. Others never."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """One seed for initial weights, dropout and the order of the data."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps to train for. Give this or ``tokens``."""
    tokens: float | None = Field(default=None, gt=0)
    """Tokens to train for (5e9 is fine); rounded up to whole steps."""

    @model_validator(mode="after")
    def _check(self) -> RunSection:
        problem = length_rule(self.model_dump())
        if problem is not None:
            raise problem
        return self


class Recipe(Section):
    """A training run, described. Precedence: defaults < ``extends`` < recipe < command line."""

    run: RunSection
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    batch: BatchConfig
    memory: MemoryConfig = MemoryConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    task: TaskConfig = TaskConfig()
    adapter: AdapterConfig | None = None
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    launch: LaunchConfig = LaunchConfig()
