"""One limit in place of several: a weighted sum of limits, with telling weights.

What meets every limit meets any sum of them with weights >= 0. So a weighted sum that nothing meets
proves that nothing meets all limits, and one that few networks meet is a superset to draw from.
Peaks have no part in this: their limits bar ops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from hwnas.costs.limits import AdditiveCost, Limit
from hwnas.costs.paths import Knapsack, Paths
from hwnas.costs.population import genes_of, op_indices, over_ops
from hwnas.spaces.base import Architecture, Ints, SearchSpace

ROUNDS = 50
"""Cutting planes at most; the dual is done where another promises less than `GAP`."""

GAP = 1e-6

TILTS = 60
"""Evaluations of the exponential bound at most; no weight of it is above `STEEPEST`."""

STEEPEST = 1e4

Floats = npt.NDArray[np.float64]


class Sums:
    """The limits on sums among some limits, scaled: an excess of 1 stands for twice the limit.

    `costs` is (k, ops) and `budgets` (k,). For a cost that is linear in its sum, the excess is the
    upper bound relative to the limit, less 1.
    """

    def __init__(self, space: SearchSpace, limits: Sequence[Limit]) -> None:
        self.space = space
        sums = [limit for limit in limits if isinstance(limit.cost, AdditiveCost)]
        scales = np.array([limit.cost.budget(2 * limit.value) - limit.budget for limit in sums])
        rows = np.array([limit.cost.per_op for limit in sums])
        self.costs = rows.reshape(len(sums), len(space.lattice.ops)) / scales[:, None]
        self.budgets = np.array([limit.budget for limit in sums]) / scales

    def __len__(self) -> int:
        return len(self.budgets)

    def excesses(self, genes: Ints) -> Floats:
        """By how much each architecture is over each limit, (n, k), for genes (n, genes)."""
        ops = op_indices(self.space, genes)
        sums = [over_ops(row, ops, np.add) for row in self.costs]
        result: Floats = np.reshape(sums, (len(self), len(genes))).T - self.budgets
        return result

    def weighted(self, weights: Floats, allowed: float = 0.0) -> Knapsack:
        """The sum of the limits with weights (k,), when each may be exceeded by `allowed`."""
        budget = float(weights @ (self.budgets + allowed))
        return Knapsack(weights @ self.costs, budget, weights @ np.abs(self.costs))


@dataclass(frozen=True)
class Dual:
    """The weights (k,), summing to 1, whose least weighted excess is largest, and that excess.

    Every network has a largest excess of at least `excess`: above 0, none meets all limits. `met`
    are the networks that were best for some weights on the way.
    """

    weights: Floats
    excess: float
    met: tuple[Architecture, ...]


def dual(paths: Paths, sums: Sums) -> Dual:
    """Kelley's cutting planes (1960) on the Lagrangian dual of meeting all limits on sums.

    For fixed weights the least weighted excess is a shortest path, whose excesses are a cut: no
    weights can do better on that path. Each round solves a linear programme over the cuts for the
    next weights, until it promises less than `GAP` over the best so far, `ROUNDS` at most.
    """
    count = len(sums)
    if not count:
        free = np.zeros(len(paths.space.lattice.ops))
        return Dual(np.zeros(0), -np.inf, (paths.best(free, np.add, np.minimum),))
    starts = [*np.eye(count), np.full(count, 1 / count)]
    weights, best, excess = starts[-1], starts[-1], -np.inf
    met: dict[Architecture, None] = {}
    cuts: list[Floats] = []
    for number in range(ROUNDS):
        if number < len(starts):
            weights = starts[number]
        architecture = paths.best(sums.weighted(weights).per_op, np.add, np.minimum)
        met[architecture] = None
        cuts.append(sums.excesses(genes_of([architecture]))[0])
        if float(weights @ cuts[-1]) > excess:
            best, excess = weights, float(weights @ cuts[-1])
        if number + 1 < len(starts):
            continue
        found = optimize.linprog(
            np.append(np.zeros(count), -1.0),
            A_ub=np.column_stack([-np.array(cuts), np.ones(len(cuts))]),
            b_ub=np.zeros(len(cuts)),
            A_eq=np.append(np.ones(count), 0.0)[None],
            b_eq=[1.0],
            bounds=[*[(0, None)] * count, (None, None)],
        )
        if not found.success or -found.fun - excess <= GAP * max(1.0, abs(found.fun)):
            break
        weights = np.maximum(found.x[:count], 0) / np.maximum(found.x[:count], 0).sum()
    return Dual(best, excess, tuple(met))


def tilted(paths: Paths, sums: Sums) -> Floats:
    """The weights (k,) with the least exponential bound on how many networks meet all limits.

    A network that meets all limits adds at least 1 to the sum over all networks of
    exp(-weights . excesses), so that sum bounds their number (Chernoff 1952). Its logarithm is
    convex in the weights, and dynamic programming gives it and its gradient.
    """
    spread = np.array([sum(float(c.var()) for c in paths.costs(row)) for row in sums.costs]) ** 0.5
    spread = np.where(spread > 0, spread, 1.0)
    rows = [paths.costs(row) for row in sums.costs / spread[:, None]]
    budgets = sums.budgets / spread

    def bound(weights: Floats) -> tuple[float, Floats]:
        """The logarithm of the bound, and its gradient."""
        logs = [
            -np.sum([w * c for w, c in zip(weights, costs, strict=True)], axis=0)
            for costs in zip(*rows, strict=True)
        ]
        to_go = paths.to_go(logs, np.add, np.logaddexp)
        after = [*to_go[1:], np.zeros(paths.levels[-1].states_after)]
        mean = np.zeros(len(sums))
        reached: Floats = np.ones(1)
        for depth, level in enumerate(paths.levels):
            share = np.exp(logs[depth] + after[depth][level.target] - to_go[depth][level.source])
            taken = reached[level.source] * share
            mean += [float(taken @ costs[depth]) for costs in rows]
            reached = np.bincount(level.target, taken, level.states_after).astype(np.float64)
        return float(to_go[0][0] + weights @ budgets), budgets - mean

    found = optimize.minimize(
        bound,
        np.zeros(len(sums)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, STEEPEST)] * len(sums),
        options={"maxfun": TILTS},
    )
    weights: Floats = np.maximum(found.x, 0) / spread
    return weights
