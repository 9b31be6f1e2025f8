import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs.counts import Counts
from hwnas.costs.paths import Knapsack, Paths
from hwnas.costs.population import genes_of, op_indices, peaks, totals
from hwnas.spaces.base import Architecture, SearchSpace

RandomSpace = Callable[[int], SearchSpace]
SEEDS = st.integers(0, 10**6)
JOINS = {"sum": (np.add, totals), "peak": (np.maximum, peaks)}
ENDS = {"least": (np.minimum, min), "most": (np.maximum, max)}


def drawn_costs(space: SearchSpace, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=len(space.lattice.ops))


def every(paths: Paths) -> set[Architecture]:
    """The networks of the paths, walked edge by edge in Python."""
    found: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for edges, level in zip(paths.levels, paths.space.lattice.levels, strict=True):
        found = [
            (int(edges.target[place]), genes + level.steps[edges.number[place]].genes)
            for state, genes in found
            for place in range(edges.first[state], edges.last[state])
        ]
    return {Architecture(genes) for _, genes in found}


def edges_of(space: SearchSpace, architectures: Iterable[Architecture]) -> list[set[int]]:
    """Every edge that one of the architectures takes, level by level."""
    taken = [space.edges(architecture) for architecture in architectures]
    return [set(column) for column in zip(*taken, strict=True)]


# ---- what is left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_without_bars_the_paths_are_the_architectures_dead_ends_left_out(
    random_space: RandomSpace, seed: int
) -> None:
    space = random_space(seed)
    paths, listed = Paths(space), list(space.enumerate())
    assert not paths.empty
    assert every(paths) == set(listed)
    assert [set(level.number.tolist()) for level in paths.levels] == edges_of(space, listed)


def test_some_random_spaces_do_have_dead_ends(random_space: RandomSpace) -> None:
    spaces = [random_space(seed) for seed in range(40)]
    lost = [
        sum(len(level.steps) for level in space.lattice.levels)
        - sum(len(level.number) for level in Paths(space).levels)
        for space in spaces
    ]
    assert sum(count > 0 for count in lost) > 5


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, share=st.floats(0, 1))
def test_barred_ops_are_on_no_path_and_nothing_else_is_lost(
    random_space: RandomSpace, seed: int, share: float
) -> None:
    space = random_space(seed)
    listed = list(space.enumerate())
    barred = np.random.default_rng(seed).random(len(space.lattice.ops)) < share
    indices = op_indices(space, genes_of(listed))
    free = ~np.append(barred, False)[indices].any(axis=1)
    paths = Paths(space).avoiding(barred)
    assert paths.empty == (not free.any())
    assert every(paths) == set(itertools.compress(listed, free))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, place=st.floats(0, 1))
def test_within_a_budget_the_edges_that_something_within_it_takes_are_left(
    random_space: RandomSpace, seed: int, place: float
) -> None:
    space = random_space(seed)
    listed, costs = list(space.enumerate()), drawn_costs(space, seed)
    sums = totals(space, costs, genes_of(listed))
    budget = float(np.quantile(sums, place, method="nearest"))
    paths = Paths(space).within(Knapsack(costs, budget, np.abs(costs)))
    left = [set(level.number.tolist()) for level in paths.levels]
    inside = edges_of(space, itertools.compress(listed, sums <= budget))
    or_by_rounding = edges_of(space, itertools.compress(listed, sums <= budget + 1e-9))
    assert all(a <= b <= c for a, b, c in zip(inside, left, or_by_rounding, strict=True))
    nothing = Knapsack(costs, float(sums.min()) - 1e-6, np.abs(costs))
    assert Paths(space).within(nothing).empty
    assert Paths(space).within(nothing).within(nothing).empty


@pytest.mark.parametrize("magnitude", [1e-9, 1.0, 1e12])
def test_rounding_never_loses_what_is_exactly_at_its_budget(
    tiny: SearchSpace, magnitude: float
) -> None:
    rng = np.random.default_rng(3)
    paths = Paths(tiny)
    free = Knapsack(np.zeros(len(tiny.lattice.ops)), math.inf, np.zeros(len(tiny.lattice.ops)))
    genes = Counts(paths, free, 0).draw(rng, 50)
    for row in genes:
        costs = rng.lognormal(sigma=3, size=len(tiny.lattice.ops)) * magnitude
        budget = float(totals(tiny, costs, row[None])[0])
        left = paths.within(Knapsack(costs, budget, costs))
        taken = tiny.edges(Architecture(tuple(row.tolist())))
        assert all(e in level.number for e, level in zip(taken, left.levels, strict=True))


# ---- the best path


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("end", ENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_the_best_path_is_that_of_the_list(
    random_space: RandomSpace, join: str, end: str, seed: int
) -> None:
    space = random_space(seed)
    listed, costs = list(space.enumerate()), drawn_costs(space, seed)
    (ufunc, values), (better, best) = JOINS[join], ENDS[end]
    found = Paths(space).best(costs, ufunc, better)
    expected = best(values(space, costs, genes_of(listed)).tolist())
    assert values(space, costs, genes_of([found]))[0] == pytest.approx(expected, abs=1e-12)
    onward = Paths(space).to_go(Paths(space).costs(costs), ufunc, better)
    assert onward[0][0] == pytest.approx(expected, abs=1e-12)


def test_the_best_path_avoids_what_is_barred(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    costs = drawn_costs(small, 1)
    barred = costs > np.quantile(costs, 0.8)
    left = every(Paths(small).avoiding(barred))
    assert 0 < len(left) < len(small_list)
    sums = {a: float(totals(small, costs, genes_of([a]))[0]) for a in left}
    found = Paths(small).avoiding(barred).best(costs, np.add, np.maximum)
    assert found == max(sums, key=lambda a: sums[a])


def test_the_same_path_comes_first_among_ties(small: SearchSpace) -> None:
    costs = np.zeros(len(small.lattice.ops))
    found = Paths(small).best(costs, np.add, np.minimum)
    assert found == Paths(small).best(costs, np.maximum, np.maximum)
    assert found == next(small.enumerate())
