"""The feasible set: its extremes, exact uniform samples, and membership.

Dynamic programming over the positions and states of a space. With m(s) the least cost from state s
to the end, an edge s -> t of cost c has the excess c + m(t) - m(s) >= 0, and a network's excesses
add up to its cost above the least reachable one. Excesses rounded down to 1/`RESOLUTION` of the
slack are counted exactly; a sample drawn from the counts is kept if its true cost meets every
limit. What is kept is uniform over the feasible set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hwnas.costs.limits import AdditiveCost, Limit
from hwnas.costs.population import genes_of, totals
from hwnas.spaces.base import Architecture, Level, SearchSpace
from quant.errors import InvalidInput, Unreachable

RESOLUTION = 1000
MAX_TRIES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """The smallest and largest upper bound of a cost in a space, with an architecture at each."""

    smallest: float
    largest: float
    cheapest: Architecture
    dearest: Architecture


def reachable(space: SearchSpace, cost: AdditiveCost) -> Range:
    """The exact range of a cost over the whole space."""
    least, cheapest = _extreme(space, cost.per_op, 1.0)
    most, dearest = _extreme(space, cost.per_op, -1.0)
    return Range(cost.upper(least), cost.upper(most), cheapest, dearest)


class FeasibleSet:
    """The architectures of a space that meet every limit.

    Raises Unreachable at once where a single limit is below the smallest reachable value.
    """

    def __init__(self, space: SearchSpace, limits: Sequence[Limit]) -> None:
        self.space = space
        self.limits = tuple(limits)
        names = [limit.cost.name for limit in limits]
        if len(set(names)) < len(names):
            raise InvalidInput(f"Two limits are on one cost ({', '.join(names)}).")
        self.ranges = {limit.cost.name: reachable(space, limit.cost) for limit in limits}
        for limit in limits:
            found = self.ranges[limit.cost.name]
            if found.smallest > limit.value:
                raise Unreachable(
                    f"No architecture of {space.name} meets {limit.cost.name} <= "
                    f"{limit.value:.6g}: the smallest reachable bound is {found.smallest:.6g}.",
                    smallest={name: r.smallest for name, r in self.ranges.items()},
                    largest={name: r.largest for name, r in self.ranges.items()},
                    next_step=f"ask for at least {found.smallest * 1.02:.4g}",
                )

    def binding(self, limit: Limit) -> bool:
        """Whether any architecture of the space is over the limit."""
        return self.ranges[limit.cost.name].largest > limit.value

    def contains(self, architectures: Sequence[Architecture]) -> npt.NDArray[np.bool_]:
        """Which architectures meet every limit."""
        inside = np.ones(len(architectures), bool)
        if architectures:
            genes = genes_of(architectures)
            for limit in self.limits:
                inside &= totals(self.space, limit.cost.per_op, genes) <= limit.budget
        return inside

    def sample(self, rng: np.random.Generator) -> Architecture | None:
        """One architecture, uniform over the set; None where `MAX_TRIES` draws found none."""
        for _ in range(MAX_TRIES):
            architecture = self._counts.draw(rng)
            if self.contains([architecture])[0]:
                return architecture
        return None

    @cached_property
    def size(self) -> float:
        """About how many architectures meet the tightest limit (from above)."""
        return self._counts.count

    @cached_property
    def _counts(self) -> "_Counts":
        if not self.limits:
            return _Counts(self.space, np.zeros(len(self.space.lattice.ops)), np.inf)
        tables = [_Counts(self.space, limit.cost.per_op, limit.budget) for limit in self.limits]
        return min(tables, key=lambda table: table.count)


class _Counts:
    """How many completions each state has, by how much excess is left to spend."""

    def __init__(self, space: SearchSpace, per_op: Floats, budget: float) -> None:
        self.space = space
        levels = space.lattice.levels
        togo = _least_to_go(space, per_op)
        slack = budget - togo[0][0]
        step = max(min(slack, _most(space, per_op) - togo[0][0]) / RESOLUTION, 1e-12)
        self.excess = []
        for depth, level in enumerate(levels):
            cost = _edge_costs(level, per_op)
            excess = cost + togo[depth + 1][level.target] - togo[depth][level.source]
            rounded = np.floor(np.maximum(excess, 0) / step * (1 - 1e-12))
            self.excess.append(np.minimum(rounded, RESOLUTION + 1).astype(np.int64))
        self.completions: list[Floats] = [np.ones((len(togo[-1]), RESOLUTION + 1))]
        for level, spent in zip(reversed(levels), reversed(self.excess), strict=True):
            following = self.completions[0]
            counts = np.zeros((len(level.states), RESOLUTION + 1))
            for source, target, bins in zip(level.source, level.target, spent, strict=True):
                if bins <= RESOLUTION:
                    counts[source, bins:] += following[target, : RESOLUTION + 1 - bins]
            self.completions.insert(0, counts)

    @property
    def count(self) -> float:
        """Networks within the budget, up to the rounding."""
        return float(self.completions[0][0, RESOLUTION])

    def draw(self, rng: np.random.Generator) -> Architecture:
        """A network, each with the same probability."""
        edges, state, left = [], 0, RESOLUTION
        for level, spent, following in zip(
            self.space.lattice.levels, self.excess, self.completions[1:], strict=True
        ):
            legal = np.flatnonzero((level.source == state) & (spent <= left))
            weights = np.cumsum(following[level.target[legal], left - spent[legal]])
            pick = np.searchsorted(weights, rng.random() * weights[-1], side="right")
            edge = int(legal[min(int(pick), len(legal) - 1)])
            edges.append(edge)
            state = int(level.target[edge])
            left -= int(spent[edge])
        return self.space.from_edges(edges)


def _edge_costs(level: Level, per_op: Floats) -> Floats:
    costs: Floats = np.append(per_op, 0.0)[level.op]
    return costs


def _least_to_go(space: SearchSpace, per_op: Floats) -> list[Floats]:
    """The least cost from each state of each level to the end."""
    levels = space.lattice.levels
    togo = [np.zeros(int(levels[-1].target.max()) + 1)]
    for level in reversed(levels):
        best = np.full(len(level.states), np.inf)
        np.minimum.at(best, level.source, _edge_costs(level, per_op) + togo[0][level.target])
        togo.insert(0, best)
    return togo


def _most(space: SearchSpace, per_op: Floats) -> float:
    return -float(_least_to_go(space, -per_op)[0][0])


def _extreme(space: SearchSpace, per_op: Floats, sign: float) -> tuple[float, Architecture]:
    togo = _least_to_go(space, sign * per_op)
    edges, state = [], 0
    for depth, level in enumerate(space.lattice.levels):
        legal = np.flatnonzero(level.source == state)
        costs = sign * _edge_costs(level, per_op)[legal] + togo[depth + 1][level.target[legal]]
        edge = int(legal[int(np.argmin(costs))])
        edges.append(edge)
        state = int(level.target[edge])
    architecture = space.from_edges(edges)
    return float(totals(space, per_op, genes_of([architecture]))[0]), architecture
