"""How many networks are within a budget, uniform draws from them, and their list.

Dynamic programming over positions and states. With m(s) the least sum from state s to the end, an
edge s -> t of cost c has the excess c + m(t) - m(s) >= 0, and a path's excesses add up to its sum
above the least one. Excesses rounded down to a `resolution`-th of the slack are counted exactly:
none within the budget is lost, and few beyond it are let in.
"""

import numpy as np
import numpy.typing as npt

from hwnas.costs.paths import Knapsack, Paths
from hwnas.spaces.base import Ints

RESOLUTION = 1000

Floats = npt.NDArray[np.float64]


class Counts:
    """How many completions each state has, by how much excess is left to spend.

    Every path of `paths` within the budget is counted, drawn and listed, and few others: who needs
    exactly those within it drops the rest. `paths` may not be empty.
    """

    def __init__(self, paths: Paths, knapsack: Knapsack, resolution: int = RESOLUTION) -> None:
        self.paths = paths
        self.resolution = resolution
        costs = paths.costs(knapsack.per_op)
        least, most = (paths.to_go(costs, np.add, better) for better in (np.minimum, np.maximum))
        slack = max(min(knapsack.budget, float(most[0][0])) - float(least[0][0]), 0.0)
        slack += max(paths.rounding(knapsack), np.finfo(float).tiny)
        step = slack / max(resolution, 1)
        after = [*least[1:], np.zeros(paths.levels[-1].states_after)]
        self.spent: list[Ints] = []
        for level, values, now, then in zip(paths.levels, costs, least, after, strict=True):
            excess = values + then[level.target] - now[level.source]
            bins = np.minimum(np.maximum(excess, 0) / step, resolution + 1)
            self.spent.append(np.floor(bins).astype(np.int64))
        self.completions: list[Floats] = [np.ones((len(after[-1]), resolution + 1))]
        for level, spent in zip(reversed(paths.levels), reversed(self.spent), strict=True):
            following = self.completions[0]
            counts = np.zeros((len(level.first), resolution + 1))
            for source, target, bins in zip(level.source, level.target, spent, strict=True):
                if bins <= resolution:
                    counts[source, bins:] += following[target, : resolution + 1 - bins]
            self.completions.insert(0, counts)

    @property
    def count(self) -> float:
        """The networks within the budget, up to the rounding."""
        return float(self.completions[0][0, self.resolution])

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """The genes (count, genes) of networks drawn independently, each with the same chance."""
        state, left = np.zeros(count, np.int64), np.full(count, self.resolution)
        rows, places = np.arange(count), []
        for level, spent, following in zip(
            self.paths.levels, self.spent, self.completions[1:], strict=True
        ):
            most = int((level.last - level.first).max())
            place = level.first[state][:, None] + np.arange(most)
            own = place < level.last[state][:, None]
            place = np.minimum(place, len(level.source) - 1)
            after = left[:, None] - spent[place]
            weights = following[level.target[place], np.maximum(after, 0)]
            ends = np.cumsum(np.where(own & (after >= 0), weights, 0.0), axis=1)
            aim = rng.random(count) * ends[:, -1]
            last = (ends < ends[:, -1:]).sum(axis=1)
            pick = np.minimum((ends <= aim[:, None]).sum(axis=1), last)
            places.append(place[rows, pick])
            state, left = level.target[places[-1]], after[rows, pick]
        return self.paths.genes(np.stack(places, axis=1))

    def every(self) -> Ints:
        """The genes (count, genes) of all of them; for counts small enough to list."""
        state, left = np.zeros(1, np.int64), np.full(1, self.resolution)
        places = np.empty((1, 0), np.int64)
        for level, spent, following in zip(
            self.paths.levels, self.spent, self.completions[1:], strict=True
        ):
            ways = level.last[state] - level.first[state]
            row = np.repeat(np.arange(len(state)), ways)
            place = level.first[state][row] + np.arange(len(row)) - (np.cumsum(ways) - ways)[row]
            after = left[row] - spent[place]
            kept = after >= 0
            kept[kept] = following[level.target[place[kept]], after[kept]] > 0
            row, place, left = row[kept], place[kept], after[kept]
            places = np.column_stack([places[row], place])
            state = level.target[place]
        return self.paths.genes(places)
