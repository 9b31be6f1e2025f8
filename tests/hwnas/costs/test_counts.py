import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hwnas.costs.counts import RESOLUTION, Counts
from hwnas.costs.paths import Knapsack, Paths
from hwnas.costs.population import architectures_of, genes_of, totals
from hwnas.spaces.base import Architecture, SearchSpace

RandomSpace = Callable[[int], SearchSpace]
SEEDS = st.integers(0, 10**6)


def knapsack(per_op: np.ndarray, budget: float) -> Knapsack:
    return Knapsack(per_op, budget, np.abs(per_op))


def rows(genes: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in genes.tolist()]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, slack=st.integers(0, 12))
def test_whole_costs_are_counted_and_listed_exactly(
    random_space: RandomSpace, seed: int, slack: int
) -> None:
    space = random_space(seed)
    listed = list(space.enumerate())
    costs = np.random.default_rng(seed).integers(-3, 6, len(space.lattice.ops)).astype(float)
    sums = totals(space, costs, genes_of(listed))
    budget = float(sums.min() + slack)
    found = Counts(Paths(space), knapsack(costs, budget))
    inside = [a.genes for a, total in zip(listed, sums, strict=True) if total <= budget]
    assert found.count == len(inside)
    assert sorted(rows(found.every())) == sorted(inside)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, place=st.floats(0, 1), magnitude=st.integers(-9, 12))
def test_none_within_the_budget_is_lost_and_few_others_let_in(
    random_space: RandomSpace, seed: int, place: float, magnitude: int
) -> None:
    space = random_space(seed)
    listed = list(space.enumerate())
    costs = np.random.default_rng(seed).normal(size=len(space.lattice.ops)) * 10.0**magnitude
    sums = totals(space, costs, genes_of(listed))
    budget = float(np.quantile(sums, place, method="nearest"))
    found = Counts(Paths(space), knapsack(costs, budget))
    kept = rows(found.every())
    assert len(set(kept)) == len(kept) == found.count
    assert {a.genes for a, s in zip(listed, sums, strict=True) if s <= budget} <= set(kept)
    above = budget + len(space.positions) * (budget - sums.min()) / RESOLUTION
    assert (totals(space, costs, np.array(kept)) <= above + 1e-9 * 10.0**magnitude).all()


def test_barred_edges_are_neither_counted_nor_drawn(small: SearchSpace) -> None:
    barred = np.arange(len(small.lattice.ops)) % 5 == 1
    paths = Paths(small).avoiding(barred)
    free = Counts(paths, knapsack(np.zeros(len(barred)), math.inf), 0)
    ops = [op for i, op in enumerate(small.lattice.ops) if barred[i]]
    left = [a for a in small.enumerate() if not set(small.lower(a)) & set(ops)]
    assert 0 < free.count == len(left) < small.count
    assert set(architectures_of(free.draw(np.random.default_rng(0), 500))) <= set(left)


def test_without_a_budget_the_space_is_counted_at_any_resolution(
    tiny: SearchSpace, large: SearchSpace
) -> None:
    for space in (tiny, large):
        free = knapsack(np.zeros(len(space.lattice.ops)), math.inf)
        for resolution in (0, 7):
            counted = Counts(Paths(space), free, resolution).count
            assert counted == pytest.approx(space.count, rel=1e-12)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7, 1.0])
def test_draws_are_uniform_over_what_is_listed(
    small: SearchSpace, small_list: list[Architecture], share: float
) -> None:
    costs = np.random.default_rng(5).lognormal(size=len(small.lattice.ops))
    sums = totals(small, costs, genes_of(small_list))
    found = Counts(Paths(small), knapsack(costs, float(np.quantile(sums, share))))
    kept = rows(found.every())
    counts = Counter(rows(found.draw(np.random.default_rng(6), 30 * len(kept))))
    assert set(counts) <= set(kept)
    assert len(kept) > 1
    assert stats.chisquare([counts[row] for row in kept]).pvalue > 0.001


def test_draws_follow_each_other_independently(small: SearchSpace) -> None:
    """Neighbouring draws of one call: their pairs are uniform over pairs of gene values."""
    free = Counts(Paths(small), knapsack(np.zeros(len(small.lattice.ops)), math.inf), 0)
    drawn = free.draw(np.random.default_rng(1), 4000)
    for column in range(len(small.genes)):
        pairs = Counter(zip(drawn[::2, column], drawn[1::2, column], strict=True))
        values = sorted({value for pair in pairs for value in pair})
        table = np.array([[pairs[a, b] for b in values] for a in values])
        assert stats.chi2_contingency(table).pvalue > 0.001 / len(small.genes)


def test_draws_depend_on_the_generator_alone(tiny: SearchSpace) -> None:
    costs = np.random.default_rng(2).lognormal(size=len(tiny.lattice.ops))
    budget = float(costs.mean()) * len(tiny.positions)
    one, other = (Counts(Paths(tiny), knapsack(costs, budget)) for _ in range(2))
    first = one.draw(np.random.default_rng(3), 40).tolist()
    assert first == other.draw(np.random.default_rng(3), 40).tolist()
    assert first != one.draw(np.random.default_rng(4), 40).tolist()
