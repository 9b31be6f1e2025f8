"""SPOS's evolutionary search under hard limits (Guo et al. 2019, algorithm 1)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hwnas.costs.feasible import FeasibleSet
from hwnas.search.base import Score, check_scores
from hwnas.search.random import fresh_samples
from hwnas.spaces.base import Architecture


class Evolution:
    """Mutations and crossovers of the best architectures seen so far.

    The first `population` proposals are uniform feasible samples. After that, of every
    `population` proposals `mutations` are mutated elites (each gene redrawn with
    `mutation_probability`, at least one changed), `crossovers` take each gene from one of two
    elites, and the rest are samples. The elites are the best `parents` ever told. A child that is
    infeasible or was proposed before is dropped; after ten tries a child, samples take its place,
    and mutated elites that of samples which the feasible set is too thin to give.
    """

    def __init__(
        self,
        feasible: FeasibleSet,
        *,
        seed: int,
        population: int = 50,
        parents: int = 10,
        mutations: int = 25,
        crossovers: int = 25,
        mutation_probability: float = 0.1,
    ) -> None:
        counts_fit = min(mutations, crossovers) >= 0 and mutations + crossovers <= population
        if not (0 < mutation_probability <= 1 and min(population, parents) >= 1 and counts_fit):
            raise ValueError(
                "evolution needs 0 < mutation_probability <= 1, at least one parent, and no more "
                f"mutations and crossovers than the population; got {mutation_probability}, "
                f"{parents}, {mutations} + {crossovers} of {population}"
            )
        self.feasible = feasible
        self.space = feasible.space
        self.seed = seed
        self.population = population
        self.parents = parents
        self.shares = (mutations / population, crossovers / population)
        self.mutation_probability = mutation_probability
        self.scores: dict[Architecture, Score] = {}
        self.rejected = 0

    @property
    def elites(self) -> list[Architecture]:
        """The best architectures told so far, best first; earlier ones win ties."""
        ranked = sorted(self.scores, key=lambda a: self.scores[a], reverse=True)
        return ranked[: self.parents]

    def ask(self, count: int) -> list[Architecture]:
        """At most `count` new feasible architectures; none where the feasible set is used up."""
        rng = np.random.default_rng([self.seed, len(self.scores)])
        proposals: dict[Architecture, None] = {}
        self.rejected = 0
        if len(self.scores) >= self.population:
            elites = self.elites
            ends = np.floor(np.cumsum([0.0, *self.shares]) * count + rng.random()).astype(int)
            for wanted, child in zip(np.diff(ends), (self._mutate, self._cross), strict=True):
                self._breed(int(wanted), child, elites, proposals, rng)
        seen = set(self.scores) | set(proposals)
        proposals |= dict.fromkeys(fresh_samples(self.feasible, seen, count - len(proposals), rng))
        if self.scores and self.feasible.listed is None:
            self._breed(count - len(proposals), self._mutate, self.elites, proposals, rng)
        return list(proposals)

    def tell(self, architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """Note the scores of what was proposed (or of a history)."""
        check_scores(architectures, scores)
        self.scores |= dict(zip(architectures, scores, strict=True))

    def _breed(
        self,
        count: int,
        child: "_Breeder",
        elites: list[Architecture],
        proposals: dict[Architecture, None],
        rng: np.random.Generator,
    ) -> None:
        aim = len(proposals) + count
        for _ in range(10 * count):
            if len(proposals) >= aim:
                return
            architecture = child(elites, rng)
            if architecture in self.scores or architecture in proposals:
                continue
            if self.feasible.contains([architecture])[0]:
                proposals[architecture] = None
            else:
                self.rejected += 1

    def _mutate(self, elites: list[Architecture], rng: np.random.Generator) -> Architecture:
        parent = np.array(elites[rng.integers(len(elites))].genes)
        sizes = np.array([len(gene.choices) for gene in self.space.genes])
        redrawn = rng.random(len(sizes)) < self.mutation_probability
        redrawn[rng.integers(len(sizes))] = True
        shifted = (parent + rng.integers(1, sizes)) % sizes
        return self.space.architecture(np.where(redrawn, shifted, parent).tolist())

    def _cross(self, elites: list[Architecture], rng: np.random.Generator) -> Architecture:
        mother, father = (elites[rng.integers(len(elites))].genes for _ in range(2))
        from_mother = rng.random(len(mother)) < 0.5
        return self.space.architecture(np.where(from_mother, mother, father).tolist())


class _Breeder(Protocol):
    """The type of `_mutate` and `_cross`."""

    def __call__(self, elites: list[Architecture], rng: np.random.Generator) -> Architecture: ...
