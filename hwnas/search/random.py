"""Random search: the baseline that every strategy must beat."""

from collections.abc import Sequence

import numpy as np

from hwnas.costs.feasible import FeasibleSet
from hwnas.search.base import Score, check_scores
from hwnas.spaces.base import Architecture

FEW = 2000


class RandomSearch:
    """Uniform samples of the feasible set, each architecture once."""

    def __init__(self, feasible: FeasibleSet, *, seed: int) -> None:
        self.feasible = feasible
        self.seed = seed
        self.seen: set[Architecture] = set()
        self.rejected = 0

    def ask(self, count: int) -> list[Architecture]:
        """At most `count` new feasible architectures; fewer where `fresh_samples` finds no more."""
        rng = np.random.default_rng([self.seed, len(self.seen)])
        return fresh_samples(self.feasible, self.seen, count, rng)

    def tell(self, architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """Note what was scored."""
        check_scores(architectures, scores)
        self.seen.update(architectures)


def fresh_samples(
    feasible: FeasibleSet, seen: set[Architecture], count: int, rng: np.random.Generator
) -> list[Architecture]:
    """Uniform feasible architectures that are not in `seen`.

    From at most 20 draws for each one asked for, or for each there is where they are few: a set of
    up to `FEW` is used up before fewer come back than were asked for (but for a chance of 1e-6).
    """
    found: dict[Architecture, None] = {}
    if count < 1:
        return []
    few = int(feasible.size) if feasible.size <= FEW else 0
    for _ in range(20 * max(count, few)):
        if len(found) == count:
            break
        architecture = feasible.sample(rng)
        if architecture is None:
            break
        if architecture not in seen:
            found[architecture] = None
    return list(found)
