"""Where a row of blocks is cut into pipeline stages: pure arithmetic over what each block costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Costs:
    """What the parts of a model cost, in any one unit."""

    blocks: tuple[float, ...]
    """Each block, in order."""
    front: float
    """Embeddings: paid by the first stage."""
    back: float
    """Final norm, head and loss: paid by the last."""

    def of(self, first: int, last: int) -> float:
        """Return the cost of a stage of blocks ``first`` .. ``last`` - 1 with the front or back that belongs to it."""
        ends = (self.front if first == 0 else 0.0) + (self.back if last == len(self.blocks) else 0.0)
        return sum(self.blocks[first:last]) + ends


def balance(costs: Costs, num_stages: int) -> tuple[int, ...]:
    """Return the boundaries of the stages, ``num_stages`` + 1 numbers from 0 to the number of blocks.

    Every stage has a block. The dearest stage is as cheap as can be; among such splits, the sum of squares of the
    stages' costs is least, so that the others are even too. O(stages x blocks^2).
    Raises ValueError for more stages than blocks.
    """
    total = len(costs.blocks)
    if not 1 <= num_stages <= total:
        raise ValueError(f"{num_stages} stages for {total} blocks")
    sums = [0.0, *accumulate(costs.blocks)]

    def cost(first: int, last: int) -> float:
        ends = (costs.front if first == 0 else 0.0) + (costs.back if last == total else 0.0)
        return sums[last] - sums[first] + ends

    # best[n] = (dearest stage, sum of squares, boundaries) of the first n blocks in the stages so far
    best = {last: (cost(0, last), cost(0, last) ** 2, (0, last)) for last in range(1, total + 1)}
    for _ in range(num_stages - 1):
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for last in range(1, total + 1):
            found = [
                (max(dearest, cost(cut, last)), squares + cost(cut, last) ** 2, (*bounds, last))
                for cut, (dearest, squares, bounds) in best.items()
                if cut < last
            ]
            if found:
                longer[last] = min(found)
        best = longer
    return best[total][2]
