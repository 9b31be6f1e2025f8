"""Which architecture each training step of a supernet trains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwnas.costs.limits import Cost
from hwnas.costs.population import genes_of
from hwnas.spaces.base import Architecture, SearchSpace

Floats = npt.NDArray[np.float64]

MOST_TRIES = 500
"""So many paths are drawn for a bin of costs before the last one is taken as it is."""

BIN_DRAWS = 1000
"""So many paths tell where the bins of a cost lie."""

BIN_SPREAD = 3.0
"""Bins reach so many standard deviations to either side of the mean cost."""


@dataclass(frozen=True)
class Opening:
    """Which values of an option can be drawn, by the share of training that is done.

    Before `start` that is the value at index `first` alone (negative from the end). From `start` on
    the others join one at a time, at equal intervals, those nearest to `first` before those further
    off; at `end` all are open.

    >>> widths = Opening(first=-1, start=0.5, end=0.8)
    >>> [widths.open(4, progress) for progress in (0.4, 0.5, 0.6, 0.7, 0.8)]
    [1, 2, 3, 4, 4]
    """

    first: int
    start: float
    end: float

    def open(self, size: int, progress: float) -> int:
        """How many of an option's `size` values are open."""
        if progress < self.start:
            return 1
        if progress >= self.end:
            return size
        # a hair more, or 0.1 + 2 * 0.1 would join a step late
        joined = (progress - self.start) / (self.end - self.start) * (size - 1) + 1e-9
        return min(size, 2 + int(joined))

    def rank(self, size: int) -> npt.NDArray[np.int64]:
        """The place of each index in the order in which values join, (size,)."""
        order = np.argsort(np.abs(np.arange(size) - self.first % size), kind="stable")
        return np.argsort(order)


class UniformSampler:
    """SPOS's uniform path sampling (Guo et al. 2019, section 3.3).

    Each gene is uniform among the values that are legal after the genes before it and open in the
    `schedule` of its option; where no legal value is open, it takes the one that would be next. An
    option without a schedule is open from the first step on.
    """

    def __init__(self, space: SearchSpace, schedule: Mapping[str, Opening] | None = None) -> None:
        self.space = space
        self.schedule = dict(schedule or {})
        self._options = [
            [(gene.name.rpartition(".")[2], len(gene.choices)) for gene in position.genes]
            for position in space.positions
        ]
        self._legal = [
            [np.flatnonzero(level.source == state) for state in range(len(level.states))]
            for level in space.lattice.levels
        ]
        self._genes = [np.array([s.genes for s in level.steps]) for level in space.lattice.levels]

    def sample(self, rng: np.random.Generator, progress: float = 1.0) -> Architecture:
        """One architecture; `progress` is the share of training that is done."""
        edges, state = [], 0
        for level, options, legal, genes in zip(
            self.space.lattice.levels, self._options, self._legal, self._genes, strict=True
        ):
            left = legal[state]
            for column, (option, size) in enumerate(options):
                values = np.unique(genes[left, column])
                if opening := self.schedule.get(option):
                    ranks = opening.rank(size)[values]
                    values = values[ranks < max(opening.open(size, progress), ranks.min() + 1)]
                left = left[genes[left, column] == rng.choice(values)]
            edges.append(int(left[0]))
            state = int(level.target[left[0]])
        return self.space.from_edges(edges)

    def stage(self, progress: float) -> tuple[int, ...]:
        """How many values are open, gene by gene: equal numbers draw from equal distributions."""
        return tuple(
            self.schedule[option].open(size, progress) if option in self.schedule else size
            for options in self._options
            for option, size in options
        )


class CostBinned:
    """Paths whose cost is uniform over `bins` of equal width, as SPOS's published code draws them.

    A bin is drawn, then paths until one falls into it; after `MOST_TRIES` the last one is taken.
    The bins reach `BIN_SPREAD` standard deviations to either side of the mean cost of the paths
    that are open at the time: theirs are seven of 10 M MACs from 290 to 360 M, around a mean of 327
    with a deviation of 12. The paper says uniform paths: bins change what each op's share is, which
    `marginals` tells.
    """

    def __init__(self, uniform: UniformSampler, cost: Cost, bins: int) -> None:
        if bins < 1:
            raise ValueError(f"{bins} bins; at least one is needed")
        self.uniform = uniform
        self.cost = cost
        self.bins = bins
        self._edges: dict[tuple[int, ...], Floats] = {}

    def sample(self, rng: np.random.Generator, progress: float = 1.0) -> Architecture:
        """One architecture; `progress` is the share of training that is done."""
        edges = self.edges(progress)
        low, high = edges[(number := int(rng.integers(self.bins))) : number + 2]
        for _ in range(MOST_TRIES):
            architecture = self.uniform.sample(rng, progress)
            if low <= self._totals([architecture])[0] <= high:
                break
        return architecture

    def edges(self, progress: float = 1.0) -> Floats:
        """Where the bins begin and end, (bins + 1,), in the unit of the cost's sums."""
        stage = self.uniform.stage(progress)
        if stage not in self._edges:
            rng = np.random.default_rng(0)
            totals = self._totals([self.uniform.sample(rng, progress) for _ in range(BIN_DRAWS)])
            reach = BIN_SPREAD * totals.std()
            self._edges[stage] = np.linspace(
                totals.mean() - reach, totals.mean() + reach, self.bins + 1
            )
        return self._edges[stage]

    def _totals(self, architectures: list[Architecture]) -> Floats:
        return self.cost.totals(self.uniform.space, genes_of(architectures))


def marginals(
    space: SearchSpace, architectures: Iterable[Architecture]
) -> dict[str, dict[str, float]]:
    """The share of architectures in which each gene takes each of its values, by their names."""
    genes = genes_of(list(architectures))
    return {
        gene.name: {
            choice: float(np.mean(genes[:, column] == value))
            for value, choice in enumerate(gene.choices)
        }
        for column, gene in enumerate(space.genes)
    }
