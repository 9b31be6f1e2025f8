"""Random search: the baseline that every strategy must beat."""

from collections.abc import Container, Sequence

import numpy as np

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.population import architectures_of
from hwnas.search.base import Score, check_scores
from hwnas.spaces.base import Architecture

SURPLUS = 2
"""So many samples are drawn at once for each that is missing: some were seen before."""


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
    feasible: FeasibleSet,
    seen: Container[Architecture],
    count: int,
    rng: np.random.Generator,
    proposed: Container[Architecture] = (),
) -> list[Architecture]:
    """Uniform feasible architectures that are neither in `seen` nor in `proposed`.

    A feasible set small enough to be listed is used up before fewer come back than were asked for.
    Another is sampled at most 20 times for each one asked for; where no sample comes back, its
    witness stands in, so that a set with an architecture in it never looks empty.
    """
    if count < 1:
        return []

    def is_new(architecture: Architecture) -> bool:
        return architecture not in seen and architecture not in proposed

    if feasible.listed is not None:
        left = [architecture for architecture in feasible.listed if is_new(architecture)]
        return [left[number] for number in rng.permutation(len(left))[:count]]
    found: dict[Architecture, None] = {}
    for _ in range(20 * count):
        samples = architectures_of(feasible.samples(rng, SURPLUS * (count - len(found))))
        found |= dict.fromkeys(filter(is_new, samples or [feasible.witness]))
        if not samples or len(found) >= count:
            break
    return list(found)[:count]
