"""Limits, and the additive costs that they bound."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwnas.spaces.base import SearchSpace
from latency_tables.model import LatencyModel
from latency_tables.ops import COUNTS
from latency_tables.table import LatencyTable
from quant.errors import InvalidInput, TableError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AdditiveCost:
    """A cost that is a strictly increasing function of a sum over a network's ops.

    `per_op[i]` belongs to `space.lattice.ops[i]`. `predict` and `upper` turn a sum into the cost as
    told and into the bound that is held against a limit; `budget` is the largest sum whose bound
    meets a limit.
    """

    name: str
    per_op: Floats
    predict: Callable[[float], float]
    upper: Callable[[float], float]
    budget: Callable[[float], float]


@dataclass(frozen=True)
class Limit:
    """An upper bound on a cost, in the cost's unit."""

    cost: AdditiveCost
    value: float

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise InvalidInput(f"The limit on {self.cost.name} is NaN.", accepted="a number")

    @property
    def budget(self) -> float:
        """The largest sum over ops that meets the limit."""
        return self.cost.budget(self.value)


def latency_cost(space: SearchSpace, table: LatencyTable, model: LatencyModel) -> AdditiveCost:
    """The cost `latency_ms` from a table's rows; raises TableError where a row is missing."""
    if missing := table.missing(space.lattice.ops):
        raise TableError(
            f"The table lacks {len(missing)} of {len(space.lattice.ops)} rows of {space.name}, "
            f"the first {missing[0].key!r}.",
            next_step="run hwnas profile for this space",
        )
    rows = [table.rows[op.key] for op in space.lattice.ops]
    per_op = np.array([model.op_cost_us(row.precision, row.median_us) for row in rows])
    return AdditiveCost("latency_ms", per_op, model.predict_ms, model.upper_ms, model.budget_us)


def counted_cost(space: SearchSpace, name: str) -> AdditiveCost:
    """A cost that is counted, not measured: one of `latency_tables.ops.COUNTS`."""
    per_op = np.array([COUNTS[name](op) for op in space.lattice.ops], np.float64)
    return AdditiveCost(name, per_op, float, float, float)


def violation(limits: Sequence[Limit], totals: Sequence[Floats]) -> Floats:
    """How far each architecture is over its limits, as the sum of the relative excesses.

    `totals[j]` holds the sums of limit j's cost, one an architecture. Zero means feasible.
    """
    result = np.zeros(len(totals[0])) if totals else np.zeros(0)
    for limit, sums in zip(limits, totals, strict=True):
        upper = np.array([limit.cost.upper(total) for total in sums])
        result += np.maximum(0.0, upper / limit.value - 1)
    return result
