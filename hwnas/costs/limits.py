"""Limits, and the costs that they bound: sums and peaks over a network's ops."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hwnas.costs.paths import Knapsack, Paths
from hwnas.costs.population import op_indices, over_ops
from hwnas.spaces.base import Ints, SearchSpace
from latency_tables.model import LatencyModel, largest_within
from latency_tables.ops import COUNTS
from latency_tables.table import LatencyTable
from quant.errors import InvalidInput, TableError

Floats = npt.NDArray[np.float64]

MEGA = 1e6
"""1 MB is 10^6 bytes."""

COUNTED = ("params", "macs", "bitops", "activation_mb")
"""The costs that can be limited without a measurement."""


@dataclass(frozen=True)
class AdditiveCost:
    """A cost that is a strictly increasing function of a sum over a network's ops.

    `per_op[i]` belongs to `space.lattice.ops[i]`. `predict` and `upper` turn a sum into the cost as
    told and into the bound that is held against a limit, `upper_ratio` times as much; `budget` is
    the largest sum whose bound meets a limit.
    """

    join: ClassVar[np.ufunc] = np.add

    name: str
    per_op: Floats
    predict: Callable[[float], float]
    upper: Callable[[float], float]
    budget: Callable[[float], float]
    upper_ratio: float = 1.0

    def over_ops(self, ops: Ints) -> Floats:
        """The sum for each row of op indices (n, positions), where -1 is a skip and costs 0."""
        return over_ops(self.per_op, ops, self.join)

    def totals(self, space: SearchSpace, genes: Ints) -> Floats:
        """The sum over each architecture's ops, (n,), for genes (n, genes)."""
        return self.over_ops(op_indices(space, genes))

    def narrowed(self, paths: Paths, budget: float) -> Paths:
        """The paths over edges that some network within the budget takes."""
        return paths.within(Knapsack(self.per_op, budget, np.abs(self.per_op)))


@dataclass(frozen=True)
class PeakCost:
    """A cost that is the largest value over a network's ops, such as peak activation memory.

    `per_op[i]` belongs to `space.lattice.ops[i]`, in the cost's unit: a peak is its own prediction,
    bound and budget.
    """

    join: ClassVar[np.ufunc] = np.maximum

    name: str
    per_op: Floats

    def over_ops(self, ops: Ints) -> Floats:
        """The peak for each row of op indices (n, positions), where -1 is a skip and counts 0."""
        return over_ops(self.per_op, ops, self.join)

    def totals(self, space: SearchSpace, genes: Ints) -> Floats:
        """The peak over each architecture's ops, (n,), for genes (n, genes)."""
        return self.over_ops(op_indices(space, genes))

    def narrowed(self, paths: Paths, budget: float) -> Paths:
        """The paths without an op over the budget."""
        return paths.avoiding(self.per_op > budget)

    def predict(self, raw: float) -> float:
        """The peak itself."""
        return raw

    def upper(self, raw: float) -> float:
        """The peak itself."""
        return raw

    def budget(self, limit: float) -> float:
        """The limit itself."""
        return limit


Cost = AdditiveCost | PeakCost


@dataclass(frozen=True)
class Limit:
    """An upper bound on a cost, in the cost's unit; infinity bounds nothing.

    Raises InvalidInput unless the value is positive.
    """

    cost: Cost
    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise InvalidInput(
                f"The limit on {self.cost.name} is {self.value}.", accepted="a positive number"
            )

    @property
    def budget(self) -> float:
        """The largest raw value (sum or peak over ops) that meets the limit."""
        return self.cost.budget(self.value)


def latency_cost(space: SearchSpace, table: LatencyTable, model: LatencyModel) -> AdditiveCost:
    """The cost `latency_ms` from a table's rows; raises TableError where a row is missing."""
    if missing := table.missing(space.lattice.ops):
        raise TableError(
            f"The table lacks {len(missing)} of {len(space.lattice.ops)} rows of {space.name}, "
            f"the first {missing[0].key!r}.",
            next_step="run hwnas profile for this space",
        )
    inside = zip(space.lattice.ops, table.in_network_us(space.lattice.ops), strict=True)
    per_op = np.array([model.op_cost_us(op.executed.precision.name, us) for op, us in inside])
    return AdditiveCost(
        "latency_ms", per_op, model.predict_ms, model.upper_ms, model.budget_us, model.upper_ratio
    )


def counted_cost(space: SearchSpace, name: str) -> Cost:
    """A cost that is counted, not measured: of `COUNTED` or of `latency_tables.ops.COUNTS`.

    `activation_mb` is the most megabytes (10^6 bytes) of activations alive at once, for one image.
    Raises InvalidInput for another name.
    """
    if name == "activation_mb":
        peaks = [op.peak_activation_bytes / MEGA for op in space.lattice.ops]
        return PeakCost(name, np.array(peaks, np.float64))
    if name not in COUNTS:
        raise InvalidInput(f"{name!r} is not a counted cost.", accepted=", ".join(COUNTED))
    per_op = np.array([COUNTS[name](op) for op in space.lattice.ops], np.float64)
    return AdditiveCost(name, per_op, float, float, float)


def size_cost(space: SearchSpace, op_bytes: Sequence[float], base_bytes: float) -> AdditiveCost:
    """The cost `size_mb`: megabytes (10^6 bytes) of the shipped file.

    `op_bytes[i]` are the bytes that `space.lattice.ops[i]` adds to a file, `base_bytes` those of a
    file without ops. Raises ValueError where the lengths differ or a value is not finite.
    """
    per_op = np.array(op_bytes, np.float64)
    if per_op.shape != (len(space.lattice.ops),):
        raise ValueError(f"{per_op.shape} sizes for {len(space.lattice.ops)} ops")
    if not (np.isfinite(per_op).all() and math.isfinite(base_bytes)):
        raise ValueError("the bytes of an op or of the base are not finite")

    def megabytes(total: float) -> float:
        return (total + base_bytes) / MEGA

    def budget(limit: float) -> float:
        if math.isinf(limit):
            return limit
        guess = limit * MEGA - base_bytes
        return largest_within(megabytes, limit, guess, max(abs(base_bytes), limit * MEGA))

    return AdditiveCost("size_mb", per_op, megabytes, megabytes, budget)


def violation(limits: Sequence[Limit], totals: Sequence[Floats]) -> Floats:
    """How far each architecture is over its limits, as the sum of the relative excesses.

    `totals[j]` holds the raw values of limit j's cost, one an architecture. Zero means feasible.
    """
    result = np.zeros(len(totals[0])) if totals else np.zeros(0)
    for limit, raw in zip(limits, totals, strict=True):
        upper = np.array([limit.cost.upper(value) for value in raw])
        result += np.maximum(0.0, upper / limit.value - 1)
    return result
