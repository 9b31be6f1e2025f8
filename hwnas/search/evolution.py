"""SPOS's evolutionary search under hard limits (Guo et al. 2019, algorithm 1)."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.population import canonical, genes_of
from hwnas.search.base import Score, check_scores
from hwnas.search.random import fresh_samples
from hwnas.spaces.base import Architecture, Ints

TRIES = 10
"""At most so many children are bred for each that is wanted."""

FIRST = 3
"""So many of those are bred at first; the others only where that was not enough."""


class Evolution:
    """Mutations and crossovers of the best architectures seen so far.

    The first `population` proposals are uniform feasible samples. The first generation is the one
    that `RandomSearch` draws with the same seed, so that the two start as a pair. After that, of
    every `population` proposals `mutations` are mutated elites (each gene redrawn to another value
    with `mutation_probability`, and at least one), `crossovers` take each gene from either of two
    elites, and the rest are samples. The elites are the best `parents` ever told. A child is made
    canonical; one that is infeasible or was proposed before is dropped. After `TRIES` a child,
    samples take its place, and mutated elites that of samples which the feasible set is too thin to
    give.

    Children are bred in batches, a few more than are wanted, and taken in order. `rejected` counts
    every one that is over a limit.
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
        self.elites: list[Architecture] = []
        """The best architectures told so far, best first; earlier ones win ties."""
        self.rejected = 0
        self._told: set[tuple[int, ...]] = set()

    def ask(self, count: int) -> list[Architecture]:
        """At most `count` new feasible architectures; none where the feasible set is used up."""
        rng = np.random.default_rng([self.seed, len(self.scores)])
        proposals: dict[Architecture, None] = {}
        self.rejected = 0
        if len(self.scores) >= self.population:
            ends = np.floor(np.cumsum([0.0, *self.shares]) * count + rng.random()).astype(int)
            for wanted, breed in zip(np.diff(ends), (self._mutated, self._crossed), strict=True):
                self._breed(int(wanted), breed, proposals, rng)
        if len(proposals) < count:
            missing = count - len(proposals)
            samples = fresh_samples(self.feasible, self.scores, missing, rng, proposals)
            proposals |= dict.fromkeys(samples)
            if self.scores and self.feasible.listed is None:
                self._breed(count - len(proposals), self._mutated, proposals, rng)
        return list(proposals)

    def tell(self, architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """Note the scores of what was proposed (or of a history)."""
        check_scores(architectures, scores)
        genes = {architecture.genes for architecture in architectures}
        told_again = not self._told.isdisjoint(genes)
        self._told |= genes
        self.scores |= dict(zip(architectures, scores, strict=True))
        ranked = self.scores if told_again else dict.fromkeys([*self.elites, *architectures])
        self.elites = sorted(ranked, key=self.scores.__getitem__, reverse=True)[: self.parents]

    def _breed(
        self,
        count: int,
        breed: Callable[[Ints, int, np.random.Generator], Ints],
        proposals: dict[Architecture, None],
        rng: np.random.Generator,
    ) -> None:
        """Add at most `count` children of the elites that are feasible and new."""
        elites = genes_of(self.elites)
        aim = len(proposals) + count
        for tries in (FIRST * count, (TRIES - FIRST) * count):
            if len(proposals) >= aim:
                return
            children = canonical(self.space, breed(elites, tries, rng))
            inside = self.feasible.inside(children)
            self.rejected += tries - int(inside.sum())
            new = dict.fromkeys(map(tuple, children[inside].tolist()))
            for genes in itertools.filterfalse(self._told.__contains__, new):
                if len(proposals) == aim:
                    break
                proposals[Architecture(genes)] = None

    def _mutated(self, elites: Ints, count: int, rng: np.random.Generator) -> Ints:
        """`count` mutations of elites (elites, genes), not yet canonical: (count, genes)."""
        children = elites[rng.integers(len(elites), size=count)]
        redrawn = rng.random(children.shape) < self.mutation_probability
        redrawn[np.arange(count), rng.integers(children.shape[1], size=count)] = True
        child, gene = np.nonzero(redrawn)
        sizes = self.space.gene_sizes[gene]
        children[child, gene] = (children[child, gene] + rng.integers(1, sizes)) % sizes
        return children

    def _crossed(self, elites: Ints, count: int, rng: np.random.Generator) -> Ints:
        """`count` crossovers of elites (elites, genes), not yet canonical: (count, genes)."""
        mothers, fathers = elites[rng.integers(len(elites), size=(2, count))]
        from_mother = rng.integers(2, size=mothers.shape, dtype=np.bool_)
        children: Ints = np.where(from_mother, mothers, fathers)
        return children
