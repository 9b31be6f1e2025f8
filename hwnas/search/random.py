"""Random search: the baseline that every strategy must beat."""

from collections.abc import Sequence

import numpy as np

from hwnas.costs.feasible import FeasibleSet
from hwnas.search.base import Score, check_scores
from hwnas.spaces.base import Architecture


class RandomSearch:
    """Uniform samples of the feasible set, each architecture once."""

    def __init__(self, feasible: FeasibleSet, *, seed: int) -> None:
        self.feasible = feasible
        self.seed = seed
        self.seen: set[Architecture] = set()
        self.rejected = 0

    def ask(self, count: int) -> list[Architecture]:
        """At most `count` new feasible architectures; fewer where 20 tries each find no more."""
        rng = np.random.default_rng([self.seed, len(self.seen)])
        return fresh_samples(self.feasible, self.seen, count, rng)

    def tell(self, architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """Note what was scored."""
        check_scores(scores)
        self.seen.update(architectures)


def fresh_samples(
    feasible: FeasibleSet, seen: set[Architecture], count: int, rng: np.random.Generator
) -> list[Architecture]:
    """Uniform feasible architectures that are not in `seen`, from at most 20 draws each."""
    found: dict[Architecture, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        architecture = feasible.sample(rng)
        if architecture is None:
            break
        if architecture not in seen:
            found[architecture] = None
    return list(found)
