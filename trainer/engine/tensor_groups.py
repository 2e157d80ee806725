"""What DeepSpeed asks of Megatron's ``mpu``: the groups of a mesh with tensor ranks."""

from __future__ import annotations

from torch import distributed

from trainer.parallel.topology import Topology


class TensorGroups:
    """Tensor ranks share a model; all the others (data, sequence) share its gradients.

    Collective: every rank makes every group.
    """

    def __init__(self, mesh: Topology, tensor: distributed.ProcessGroup) -> None:
        self._tensor = tensor
        self._rank = mesh.place(distributed.get_rank()).tensor
        for number in range(mesh.tensor):
            group = distributed.new_group(list(range(number, mesh.world_size, mesh.tensor)))
            if number == self._rank:
                self._data: distributed.ProcessGroup = group  # type: ignore[assignment]

    def get_model_parallel_rank(self) -> int:
        """Return the tensor rank."""
        return self._rank

    def get_model_parallel_world_size(self) -> int:
        """Return the tensor degree."""
        return self._tensor.size()

    def get_model_parallel_group(self) -> distributed.ProcessGroup:
        """Return the ranks that share a layer."""
        return self._tensor

    def get_data_parallel_rank(self) -> int:
        """Return the rank among those with the same part of the model."""
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        """Return how many have the same part of the model."""
        return self._data.size()

    def get_data_parallel_group(self) -> distributed.ProcessGroup:
        """Return the ranks with the same part of the model."""
        return self._data
