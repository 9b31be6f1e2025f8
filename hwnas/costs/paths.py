"""The networks of a space as paths through its lattice, with some edges barred."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hwnas.spaces.base import Architecture, Ints, SearchSpace

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ROUNDING = 1e-13
"""Two orders of summation over a network differ by less than this share of the magnitude."""


@dataclass(frozen=True)
class Knapsack:
    """The networks whose sum of `per_op` is at most `budget`.

    `per_op[i]` belongs to `space.lattice.ops[i]`; `sizes[i]` is the size of the terms that it was
    computed from, which its rounding error is relative to.
    """

    per_op: Floats
    budget: float
    sizes: Floats


@dataclass(frozen=True)
class Edges:
    """The edges that are left at one position: arrays over them, in order of their source.

    `number` is the edge in `Level`; a state's edges are the places `first[state]` up to
    `last[state]` in these arrays; `states_after` says how many states there are after them.
    """

    number: Ints
    source: Ints
    target: Ints
    op: Ints
    first: Ints
    last: Ints
    states_after: int


class Paths:
    """The paths from the input of a space to its end that take no barred edge.

    `keep` has a mask for each level, over its edges. An edge on no complete path is left out too,
    so the end can be reached from wherever a path leads. Where `empty`, nothing else may be asked.
    """

    def __init__(self, space: SearchSpace, keep: Sequence[Bools] | None = None) -> None:
        self.space = space
        levels = space.lattice.levels
        masks = [np.ones(len(level.op), bool) for level in levels] if keep is None else list(keep)
        alive = np.ones(int(levels[-1].target.max()) + 1, bool)
        for depth in reversed(range(len(levels))):
            masks[depth] = masks[depth] & alive[levels[depth].target]
            alive = np.zeros(len(levels[depth].states), bool)
            alive[levels[depth].source[masks[depth]]] = True
        self.levels: list[Edges] = []
        reached = np.ones(1, bool)
        for level, mask in zip(levels, masks, strict=True):
            number = np.flatnonzero(mask & reached[level.source])
            source, target = level.source[number], level.target[number]
            states = np.arange(len(level.states))
            first, last = (np.searchsorted(source, states, side) for side in ("left", "right"))
            after = int(level.target.max()) + 1
            self.levels.append(Edges(number, source, target, level.op[number], first, last, after))
            reached = np.zeros(after, bool)
            reached[target] = True

    @property
    def empty(self) -> bool:
        """Whether no path is left."""
        return not len(self.levels[0].number)

    def costs(self, per_op: Floats) -> list[Floats]:
        """The cost of each edge, level by level; a skip costs 0."""
        padded = np.append(per_op, 0.0)
        return [padded[level.op] for level in self.levels]

    def rounding(self, knapsack: Knapsack) -> float:
        """By how much the sum of a path may differ from the same sum in another order."""
        magnitude = sum(float(sizes.max()) for sizes in self.costs(knapsack.sizes))
        if np.isfinite(knapsack.budget):
            magnitude += abs(knapsack.budget)
        return ROUNDING * magnitude

    def to_go(self, costs: Sequence[Floats], join: np.ufunc, better: np.ufunc) -> list[Floats]:
        """The best cost from each state of each level to the end; NaN where no path comes by.

        `costs` is as `self.costs` gives them. `join` puts an edge's cost to those after it (np.add
        or np.maximum), `better` is np.minimum or np.maximum.
        """
        result: list[Floats] = []
        for level, values in zip(reversed(self.levels), reversed(costs), strict=True):
            onward = join(values, result[0][level.target]) if result else values
            starts = np.flatnonzero(np.diff(level.source, prepend=-1))
            best = np.full(len(level.first), np.nan)
            best[level.source[starts]] = better.reduceat(onward, starts)
            result.insert(0, best)
        return result

    def best(self, per_op: Floats, join: np.ufunc, better: np.ufunc) -> Architecture:
        """A network whose cost, joined over its ops, is best; the earliest edge wins ties."""
        costs = self.costs(per_op)
        after = [*self.to_go(costs, join, better)[1:], None]
        pick = np.argmin if better is np.minimum else np.argmax
        edges, state = [], 0
        for level, values, best_after in zip(self.levels, costs, after, strict=True):
            own = slice(level.first[state], level.last[state])
            onward = values[own]
            if best_after is not None:
                onward = join(onward, best_after[level.target[own]])
            place = int(level.first[state]) + int(pick(onward))
            edges.append(int(level.number[place]))
            state = int(level.target[place])
        return self.space.from_edges(edges)

    def avoiding(self, barred: Bools) -> "Paths":
        """The paths without the barred ops; `barred[i]` belongs to `space.lattice.ops[i]`."""
        free = np.append(~barred, True)
        return self._only([free[level.op] for level in self.levels])

    def within(self, knapsack: Knapsack) -> "Paths":
        """The paths over edges that some path within the budget takes; rounding loses none."""
        if self.empty:
            return self
        costs = self.costs(knapsack.per_op)
        end = np.zeros(self.levels[-1].states_after)
        after = [*self.to_go(costs, np.add, np.minimum)[1:], end]
        most = knapsack.budget + self.rounding(knapsack)
        before = np.zeros(1)
        keep = []
        for level, values, least in zip(self.levels, costs, after, strict=True):
            so_far = before[level.source] + values
            keep.append(so_far + least[level.target] <= most)
            before = np.full(level.states_after, np.inf)
            np.minimum.at(before, level.target, so_far)
        return self._only(keep)

    def genes(self, places: Ints) -> Ints:
        """The genes (n, genes) of n paths, each told as its places in `levels`, (n, levels)."""
        columns = zip(self._genes, places.T, strict=True)
        return np.concatenate([genes[column] for genes, column in columns], axis=1)

    @cached_property
    def _genes(self) -> list[Ints]:
        """The genes of every edge that is left, level by level: (edges, genes of the position)."""
        return [
            np.array([level.steps[edge].genes for edge in edges.number], np.int64)
            for level, edges in zip(self.space.lattice.levels, self.levels, strict=True)
        ]

    def _only(self, keep: Sequence[Bools]) -> "Paths":
        masks = [np.zeros(len(level.op), bool) for level in self.space.lattice.levels]
        for mask, level, kept in zip(masks, self.levels, keep, strict=True):
            mask[level.number[kept]] = True
        return Paths(self.space, masks)
