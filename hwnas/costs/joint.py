"""Several limits together: whether any network meets them, and a superset of those that do."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hwnas.costs.counts import RESOLUTION, Counts
from hwnas.costs.limits import Limit, PeakCost
from hwnas.costs.paths import Paths
from hwnas.costs.population import architectures_of, genes_of, op_indices
from hwnas.costs.surrogates import Dual, Sums, dual, tilted
from hwnas.spaces.base import Architecture, Ints, SearchSpace

LISTED = 10_000
"""A superset of at most so many networks is listed, not drawn from."""

POLISHES = 3
"""How often `nearest` looks below the best that it found, in a list or in `DRAWS` draws."""

DRAWS = 2000

Floats = npt.NDArray[np.float64]


class Superset:
    """The networks of a space that may meet all limits, and few others.

    Without the ops that are over a peak, and without the edges of which every path is over a sum or
    over the sums weighted by their dual; then within the weighted sum that the fewest meet. Where
    `empty`, that is a proof that no network meets all limits, and nothing else may be asked.
    """

    def __init__(self, space: SearchSpace, limits: Sequence[Limit]) -> None:
        self.space = space
        self.sums = Sums(space, limits)
        self.paths = Paths(space)
        for limit in (*limits, *limits):  # what one limit takes away, another may build on
            self.paths = limit.cost.narrowed(self.paths, limit.budget)
        self.dual = Dual(np.zeros(len(self.sums)), math.inf, ())
        if not self.paths.empty:
            self.dual = dual(self.paths, self.sums)
            self.paths = self.paths.within(self.sums.weighted(self.dual.weights))

    @property
    def empty(self) -> bool:
        """Whether it is proven that no network meets all limits."""
        return self.paths.empty

    @cached_property
    def counts(self) -> Counts:
        """The smallest of the supersets that a few good weights give."""
        equal = np.ones(len(self.sums))
        weights = [self.dual.weights]
        if len(self.sums) > 1:
            weights += [equal, *np.diag(equal), tilted(self.paths, self.sums)]
        resolution = RESOLUTION if len(self.sums) else 0
        found = [Counts(self.paths, self.sums.weighted(w), resolution) for w in weights]
        return min(found, key=lambda counts: counts.count)

    @cached_property
    def listed(self) -> Ints | None:
        """The genes (n, genes) of every network of the superset; None above `LISTED`."""
        return self.counts.every() if self.counts.count <= LISTED else None


def ratios(space: SearchSpace, limits: Sequence[Limit], genes: Ints) -> Floats:
    """The largest ratio of upper bound to limit of each architecture, (n,), for (n, genes)."""
    ops = op_indices(space, genes)
    found = [
        [limit.cost.upper(raw) / limit.value for raw in limit.cost.over_ops(ops).tolist()]
        for limit in limits
    ]
    result: Floats = np.max(found, axis=0)
    return result


def nearest(space: SearchSpace, limits: Sequence[Limit]) -> Architecture:
    """The network found whose largest ratio of upper bound to limit is smallest.

    The least ratio over peaks that the sums allow is found by bisection; the paths met on the way
    are then improved among those that the dual leaves below the best.
    """
    sums = Sums(space, limits)
    peaks = np.zeros(len(space.lattice.ops))
    for limit in limits:
        if isinstance(limit.cost, PeakCost):
            peaks = np.maximum(peaks, limit.cost.per_op / limit.value)
    caps = np.unique(np.maximum(peaks, 1.0))
    best, weights, genes = math.inf, np.zeros(0), np.zeros(0, np.int64)
    low, high = 0, len(caps) - 1
    while low <= high:
        middle = (low + high) // 2
        paths = Paths(space).avoiding(peaks > caps[middle])
        ratio = math.inf
        if not paths.empty:
            solved = dual(paths, sums)
            met = genes_of(solved.met)
            found = ratios(space, limits, met)
            ratio = float(found.min())
            if ratio < best:
                best, weights, genes = ratio, solved.weights, met[int(found.argmin())]
        low, high = (low, middle - 1) if ratio <= caps[middle] else (middle + 1, high)
    rng = np.random.default_rng(0)
    for _ in range(POLISHES):
        paths = Paths(space).avoiding(peaks > best)
        below = Counts(paths, sums.weighted(weights, max(best - 1, 0.0)))
        others = below.every() if below.count <= LISTED else below.draw(rng, DRAWS)
        found = ratios(space, limits, others)
        if found.min() >= best:
            break
        best, genes = float(found.min()), others[int(found.argmin())]
    return architectures_of(genes[None])[0]
