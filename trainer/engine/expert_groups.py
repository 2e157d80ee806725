"""What DeepSpeed asks of a model with experts: a module it knows, and the groups that their gradients are summed in."""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import distributed, nn


class ExpertGroups(MoE):
    """Stands in a model for DeepSpeed's own experts, which it looks for by this class. Holds no parameters.

    Collective: every rank makes every group.
    """

    def __init__(self, degree: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = degree
        self.name = f"ep_size_{degree}"
        groups._create_expert_and_data_parallel(degree)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing: the groups are there."""

    @property
    def ranks(self) -> distributed.ProcessGroup:
        """The ranks that the experts of a block are spread over."""
        return groups._get_expert_parallel_group(self.name)

    @staticmethod
    def forget() -> None:
        """Let an engine after this one make its own."""
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
