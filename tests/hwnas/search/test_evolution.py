import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Cost, Limit, counted_cost
from hwnas.costs.population import genes_of, totals
from hwnas.search.base import Score
from hwnas.search.evolution import Evolution
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, Ints, SearchSpace

CostNamed = Callable[[SearchSpace, str], Cost]


class Watched(FeasibleSet):
    """Counts how often a strategy itself asks whether a child is feasible, and the answers."""

    def __init__(self, space: SearchSpace, limits: Sequence[Limit]) -> None:
        self.sampling = False
        self.answers: list[bool] = []
        super().__init__(space, limits)
        assert self.listed is None or self.listed
        self.answers.clear()

    def samples(self, rng: np.random.Generator, count: int) -> Ints:
        self.sampling = True
        found = super().samples(rng, count)
        self.sampling = False
        return found

    def inside(self, genes: Ints) -> npt.NDArray[np.bool_]:
        inside = super().inside(genes)
        if not self.sampling:
            self.answers += inside.tolist()
        return inside


def seeded(feasible: FeasibleSet, parents: Sequence[Architecture], **options: Any) -> Evolution:
    """An evolution whose elites are exactly `parents`, best first."""
    strategy = Evolution(
        feasible, **{"seed": 0, "population": len(parents), "parents": len(parents), **options}
    )
    strategy.tell(parents, [(float(-rank),) for rank in range(len(parents))])
    return strategy


def samples(space: SearchSpace, count: int, seed: int = 0) -> list[Architecture]:
    return RandomSearch(FeasibleSet(space, []), seed=seed).ask(count)


# ---- the operators, against the listed set of all children


def neighbours(space: SearchSpace, parent: Architecture) -> set[Architecture]:
    """Every architecture that one redrawn gene can lead to, but the parent itself."""
    found = set()
    for place, gene in enumerate(space.genes):
        for value in range(len(gene.choices)):
            if value != parent.genes[place]:
                genes = list(parent.genes)
                genes[place] = value
                found.add(space.architecture(genes))
    return found - {parent}


@pytest.mark.parametrize("seed", range(3))
def test_a_mutation_changes_exactly_one_gene_where_the_others_never_mutate(
    tiny: SearchSpace, seed: int
) -> None:
    (parent,) = samples(tiny, 1, seed)
    strategy = seeded(
        FeasibleSet(tiny, []), [parent], mutations=1, crossovers=0, mutation_probability=1e-12
    )
    expected = neighbours(tiny, parent)
    children = strategy.ask(len(expected) // 3)
    assert len(children) == len(expected) // 3
    assert set(children) <= expected


def test_every_single_gene_change_can_be_proposed(small: SearchSpace) -> None:
    parent = small.architecture([0] * len(small.genes))
    found: set[Architecture] = set()
    for seed in range(60):
        strategy = seeded(
            FeasibleSet(small, []),
            [parent],
            seed=seed,
            mutations=1,
            crossovers=0,
            mutation_probability=1e-12,
        )
        found.update(strategy.ask(2))
    assert found == neighbours(small, parent)


def test_where_every_gene_mutates_none_that_always_has_an_effect_stays(tiny: SearchSpace) -> None:
    (parent,) = samples(tiny, 1)
    strategy = seeded(
        FeasibleSet(tiny, []), [parent], mutations=1, crossovers=0, mutation_probability=1.0
    )
    place = {gene.name: i for i, gene in enumerate(tiny.genes)}
    children = strategy.ask(200)
    assert len(children) == 200
    for name in ("head.precision", "block0.block", "block1.block", "block1.width"):
        stayed = sum(child.genes[place[name]] == parent.genes[place[name]] for child in children)
        assert stayed == 0, name


def test_a_crossover_takes_each_gene_from_one_of_two_parents(tiny: SearchSpace) -> None:
    mother, father = (Architecture((value,) * len(tiny.genes)) for value in (0, 1))
    assert all(tiny.architecture(p.genes) == p for p in (mother, father)), "no skip in either"
    strategy = seeded(
        FeasibleSet(tiny, []),
        [mother, father],
        mutations=0,
        crossovers=2,
    )
    children = genes_of(strategy.ask(150))
    assert len(children) == 150
    assert set(np.unique(children)) == {0, 1}
    share = children.mean(axis=0)
    assert ((share > 0.3) & (share < 0.7)).all(), "each gene comes from either parent"


def observed(children: Ints, sizes: Ints) -> npt.NDArray[np.int64]:
    """How often each combination of genes is there, by its flat index."""
    flat = np.ravel_multi_index(tuple(children.T), tuple(sizes))
    return np.bincount(flat, minlength=int(sizes.prod()))


def of_few_genes(random_space: Callable[[int], SearchSpace]) -> SearchSpace:
    """The first random space with 7 genes at most."""
    spaces = map(random_space, itertools.count())
    return next(space for space in spaces if len(space.genes) <= 7)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_mutations_are_as_likely_as_the_docstring_says(
    random_space: Callable[[int], SearchSpace], probability: float
) -> None:
    """Against the sum over every gene that must change and every set of those that do."""
    space = of_few_genes(random_space)
    sizes, count = space.gene_sizes, 40_000
    assert len(sizes) >= 3
    assert len(set(sizes.tolist())) > 1
    parent = np.zeros(len(sizes), np.int64)
    chances = np.zeros(sizes.prod())
    for index, child in enumerate(np.ndindex(*sizes)):
        changed = np.array(child) != parent
        for forced in np.flatnonzero(changed):
            others = np.delete(changed, forced)
            redrawn = np.where(others, probability, 1 - probability).prod()
            chances[index] += redrawn / len(sizes) / (sizes[changed] - 1).prod()
    assert chances.sum() == pytest.approx(1)
    strategy = Evolution(FeasibleSet(space, []), seed=0, mutation_probability=probability)
    children = strategy._mutated(parent[None], count, np.random.default_rng(0))
    found, likely = observed(children, sizes), chances * count >= 5
    assert not found[chances == 0].any()
    rare = [found[~likely].sum() + 1], [(chances[~likely].sum() * count) + 1]
    shown = np.append(found[likely], rare[0]), np.append(chances[likely] * count, rare[1])
    assert stats.chisquare(*shown).pvalue > 0.001


def test_crossovers_are_as_likely_as_the_docstring_says(
    random_space: Callable[[int], SearchSpace],
) -> None:
    """Either parent whole where it is drawn twice, else every mixture alike."""
    space = of_few_genes(random_space)
    sizes, count = space.gene_sizes, 40_000
    elites = np.array([np.zeros(len(sizes)), sizes - 1], np.int64)
    found = observed(
        Evolution(FeasibleSet(space, []), seed=0)._crossed(elites, count, np.random.default_rng(0)),
        sizes,
    )
    mixtures = list(itertools.product(*[(0, size - 1) for size in sizes]))
    chances = np.full(len(mixtures), 0.5 / len(mixtures))
    chances[[0, -1]] += 0.25
    counted = found[np.ravel_multi_index(tuple(np.transpose(mixtures)), tuple(sizes))]
    assert counted.sum() == count
    assert stats.chisquare(counted, chances * count).pvalue > 0.001


def test_parents_that_cannot_cross_to_anything_new_leave_room_for_samples(
    tiny: SearchSpace,
) -> None:
    (parent,) = samples(tiny, 1)
    strategy = seeded(FeasibleSet(tiny, []), [parent], mutations=0, crossovers=1)
    assert len(strategy.ask(20)) == 20


def test_the_first_population_is_what_random_search_draws(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    cost = cost_named(tiny, "latency_ms")
    feasible = FeasibleSet(tiny, [Limit(cost, reachable(tiny, cost).smallest * 2)])
    assert Evolution(feasible, seed=3).ask(50) == RandomSearch(feasible, seed=3).ask(50)


def test_the_shares_of_a_generation_are_kept(tiny: SearchSpace) -> None:
    """With one elite a crossover gives nothing new, so what is no neighbour is a sample."""
    (parent,) = samples(tiny, 1)
    strategy = Evolution(
        FeasibleSet(tiny, []),
        seed=0,
        population=10,
        parents=1,
        mutations=4,
        crossovers=3,
        mutation_probability=1e-12,
    )
    others = samples(tiny, 9, seed=1)
    strategy.tell([parent, *others], [(1.0,), *[(0.0,)] * 9])
    near = neighbours(tiny, parent)
    for count in (10, 20, 50):
        children = strategy.ask(count)
        assert len(children) == count
        assert sum(child in near for child in children) == 4 * count // 10


# ---- elites


def test_elites_are_the_best_told_accuracy_first_then_the_next_number(tiny: SearchSpace) -> None:
    architectures = samples(tiny, 6)
    scores: list[Score] = [(0.5, 9.0), (0.9, -2.0), (0.9, -1.0), (0.1, 99.0), (0.7, 0.0), (0.9, -3)]
    strategy = Evolution(FeasibleSet(tiny, []), seed=0, parents=4)
    strategy.tell(architectures, scores)
    assert strategy.elites == [architectures[i] for i in (2, 1, 5, 4)]


def test_the_earlier_of_equal_scores_is_the_better(tiny: SearchSpace) -> None:
    architectures = samples(tiny, 8)
    strategy = Evolution(FeasibleSet(tiny, []), seed=0, parents=3)
    for architecture in architectures:
        strategy.tell([architecture], [(0.5,)])
    assert strategy.elites == architectures[:3]


def test_elites_of_any_scores_are_those_of_a_plain_sort(tiny: SearchSpace) -> None:
    rng = np.random.default_rng(4)
    architectures = samples(tiny, 60)
    scores = [(float(a), float(b)) for a, b in rng.integers(0, 4, (60, 2))]
    strategy = Evolution(FeasibleSet(tiny, []), seed=0, parents=25)
    strategy.tell(architectures, scores)
    order = sorted(range(60), key=lambda i: (-scores[i][0], -scores[i][1], i))
    assert strategy.elites == [architectures[i] for i in order[:25]]


def test_elites_told_again_are_ranked_by_what_was_told_last(tiny: SearchSpace) -> None:
    architectures = samples(tiny, 6)
    strategy = Evolution(FeasibleSet(tiny, []), seed=0, parents=3)
    strategy.tell(architectures, [(float(-rank),) for rank in range(6)])
    strategy.tell([architectures[0], architectures[5]], [(-9.0,), (1.0,)])
    assert strategy.elites == [architectures[i] for i in (5, 1, 2)]


def test_infinite_scores_are_ranked_and_not_refused(tiny: SearchSpace) -> None:
    architectures = samples(tiny, 3)
    strategy = Evolution(FeasibleSet(tiny, []), seed=0, parents=3)
    strategy.tell(architectures, [(-math.inf,), (math.inf,), (0.0,)])
    assert strategy.elites == [architectures[i] for i in (1, 2, 0)]


# ---- construction


@pytest.mark.parametrize(
    "options",
    [
        {"mutation_probability": 0.0},
        {"mutation_probability": -0.1},
        {"mutation_probability": 1.01},
        {"mutation_probability": math.nan},
        {"parents": 0},
        {"population": 49},
        {"mutations": 26},
        {"crossovers": 60, "mutations": 0},
        {"mutations": -1},
        {"crossovers": -1},
        {"population": 0, "mutations": 0, "crossovers": 0},
    ],
    ids=str,
)
def test_a_construction_that_makes_no_sense_is_refused(
    small: SearchSpace, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="evolution needs"):
        Evolution(FeasibleSet(small, []), seed=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mutation_probability": 1.0},
        {"mutations": 50, "crossovers": 0},
        {"mutations": 0, "crossovers": 0},
        {"population": 1, "parents": 1, "mutations": 1, "crossovers": 0},
    ],
    ids=str,
)
def test_the_ends_of_what_makes_sense_are_accepted(
    small: SearchSpace, options: dict[str, Any]
) -> None:
    strategy = Evolution(FeasibleSet(small, []), seed=0, **options)
    for _ in range(3):
        proposals = strategy.ask(4)
        assert len(proposals) == 4
        strategy.tell(proposals, [(1.0,)] * 4)


# ---- rejected


def test_rejected_counts_the_children_over_a_limit_in_the_last_ask(tiny: SearchSpace) -> None:
    cost = counted_cost(tiny, "macs")
    feasible = Watched(tiny, [Limit(cost, reachable(tiny, cost).smallest * 1.6)])
    strategy = Evolution(feasible, seed=0, population=20, parents=5, mutations=10, crossovers=10)
    counts = []
    for _ in range(8):
        feasible.answers.clear()
        proposals = strategy.ask(20)
        assert strategy.rejected == feasible.answers.count(False)
        counts.append(strategy.rejected)
        strategy.tell(proposals, [(float(sum(a.genes)),) for a in proposals])
    assert counts[0] == 0, "samples are never rejected"
    assert min(counts[1:]) > 0
    assert len(set(counts)) > 2, "counted afresh each time"


def test_tries_are_bounded_by_ten_a_child(tiny: SearchSpace) -> None:
    """At the smallest reachable value almost every child is over the limit."""
    cost = counted_cost(tiny, "bitops")
    feasible = Watched(tiny, [Limit(cost, reachable(tiny, cost).smallest)])
    strategy = Evolution(feasible, seed=0, population=1, parents=1, mutations=1, crossovers=0)
    found = strategy.ask(10)
    assert 1 <= len(found) <= 2
    strategy.tell(found, [(1.0,)] * len(found))
    feasible.answers.clear()
    strategy.ask(10)
    assert 0 < len(feasible.answers) <= 100
    assert strategy.rejected <= 100


# ---- what it is for


def test_evolution_beats_random_search_at_equal_evaluations(tiny: SearchSpace) -> None:
    """An additive score under a MAC limit at the 60th percentile; at least four of five seeds."""
    rng = np.random.default_rng(0)
    worth = rng.normal(size=len(tiny.lattice.ops))
    macs = counted_cost(tiny, "macs")
    drawn = totals(tiny, macs.per_op, genes_of(samples(tiny, 1000)))
    feasible = FeasibleSet(tiny, [Limit(macs, float(np.quantile(drawn, 0.6)))])

    def best(strategy: Evolution | RandomSearch) -> tuple[float, int]:
        found, evaluations = -math.inf, 0
        for _ in range(8):
            proposals = strategy.ask(50)
            scores = totals(tiny, worth, genes_of(proposals))
            strategy.tell(proposals, [(float(s),) for s in scores])
            found = max(found, float(scores.max()))
            evaluations += len(proposals)
        return found, evaluations

    wins = 0
    for seed in range(5):
        evolved, drawn_best = (
            best(Evolution(feasible, seed=seed)),
            best(RandomSearch(feasible, seed=seed)),
        )
        assert evolved[1] == drawn_best[1] == 400
        wins += evolved[0] > drawn_best[0]
    assert wins >= 4


def test_evolution_finds_the_best_of_a_space_that_can_be_listed(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    worth = np.random.default_rng(1).normal(size=len(small.lattice.ops))
    values = dict(zip(small_list, totals(small, worth, genes_of(small_list)), strict=True))
    macs = counted_cost(small, "macs")
    limit = Limit(macs, reachable(small, macs).smallest * 1.5)
    feasible = FeasibleSet(small, [limit])
    inside = list(itertools.compress(small_list, feasible.contains(small_list)))
    strategy = Evolution(feasible, seed=0, population=6, parents=2, mutations=3, crossovers=3)
    for _ in range(len(inside)):  # more than enough, and never for ever
        proposals = strategy.ask(6)
        strategy.tell(proposals, [(float(values[a]),) for a in proposals])
    assert strategy.elites[0] == max(inside, key=lambda a: values[a])
