import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from hwnas.costs import surrogates
from hwnas.costs.counts import Counts
from hwnas.costs.limits import AdditiveCost, Cost, Limit, PeakCost, counted_cost, size_cost
from hwnas.costs.paths import Knapsack, Paths
from hwnas.costs.population import genes_of, totals
from hwnas.costs.surrogates import Sums, dual, tilted
from hwnas.spaces.base import Architecture, SearchSpace

RandomSpace = Callable[[int], SearchSpace]
SEEDS = st.integers(0, 10**6)


def some_limits(space: SearchSpace, seed: int, places: list[float]) -> list[Limit]:
    """Costs from a seed, with limits between their least and their most."""
    rng = np.random.default_rng(seed)
    genes = genes_of(list(space.enumerate()))
    limits = []
    for number, place in enumerate(places):
        cost = AdditiveCost(f"c{number}", rng.lognormal(size=len(space.lattice.ops)), *[float] * 3)
        sums = totals(space, cost.per_op, genes)
        limits.append(Limit(cost, float(sums.min() + place * np.ptp(sums) + 1e-9)))
    return limits


def best_of_the_mixtures(excesses: np.ndarray) -> float:
    """The least largest excess of a mixture of all architectures: the dual's other side."""
    count, k = excesses.shape
    found = optimize.linprog(
        np.append(np.zeros(count), 1.0),
        A_ub=np.column_stack([excesses.T, -np.ones(k)]),
        b_ub=np.zeros(k),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[*[(0, None)] * count, (None, None)],
    )
    return float(found.fun)


# ---- the scale


def test_an_excess_is_the_bound_over_the_limit_less_one(
    small: SearchSpace,
    small_list: list[Architecture],
    cost_named: Callable[[SearchSpace, str], Cost],
) -> None:
    latency = cost_named(small, "latency_ms")
    size = size_cost(small, [op.weight_bytes for op in small.lattice.ops], 5000.0)
    limits = [Limit(latency, 0.2), Limit(counted_cost(small, "macs"), 2e5), Limit(size, 0.01)]
    genes = genes_of(small_list)
    found = Sums(small, limits).excesses(genes)
    assert found.shape == (len(small_list), 3)
    for limit, column in zip(limits, found.T, strict=True):
        bounds = np.array([limit.cost.upper(raw) for raw in limit.cost.totals(small, genes)])
        np.testing.assert_allclose(column, bounds / limit.value - 1, atol=1e-9)


def test_peaks_have_no_part_in_the_sums(small: SearchSpace, small_list: list[Architecture]) -> None:
    sums = Sums(small, [Limit(PeakCost("peak", np.ones(len(small.lattice.ops))), 2.0)])
    assert len(sums) == 0
    assert sums.excesses(genes_of(small_list)).shape == (len(small_list), 0)
    found = dual(Paths(small), sums)
    assert found.excess == -math.inf
    assert set(found.met) <= set(small_list)
    assert len(found.met) == 1


# ---- the dual


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS, places=st.lists(st.floats(0, 0.9), min_size=1, max_size=5))
def test_the_dual_is_the_linear_programme_over_all_architectures(
    random_space: RandomSpace, seed: int, places: list[float]
) -> None:
    space = random_space(seed)
    sums = Sums(space, some_limits(space, seed, places))
    excesses = sums.excesses(genes_of(list(space.enumerate())))
    found = dual(Paths(space), sums)
    expected = best_of_the_mixtures(excesses)
    assert found.excess == pytest.approx(expected, abs=1e-5 * (1 + abs(expected)))
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1)
    assert (excesses @ found.weights).min() == pytest.approx(found.excess, abs=1e-9)
    assert excesses.max(axis=1).min() >= found.excess - 1e-9


def test_one_limit_is_the_least_excess(small: SearchSpace, small_list: list[Architecture]) -> None:
    sums = Sums(small, [Limit(counted_cost(small, "macs"), 2e5)])
    found = dual(Paths(small), sums)
    excesses = sums.excesses(genes_of(small_list))[:, 0]
    assert found.excess == pytest.approx(excesses.min())
    assert found.met == (small_list[int(excesses.argmin())],)


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_a_dual_cut_short_still_bounds(
    tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(surrogates, "ROUNDS", rounds)
    rng = np.random.default_rng(0)
    rows = rng.lognormal(size=(4, len(tiny.lattice.ops)))
    limits = [Limit(AdditiveCost(f"c{i}", row, *[float] * 3), 3.0) for i, row in enumerate(rows)]
    sums = Sums(tiny, limits)
    found = dual(Paths(tiny), sums)
    assert 1 <= len(found.met) <= rounds
    least = Paths(tiny).best(sums.weighted(found.weights).per_op, np.add, np.minimum)
    assert found.excess == pytest.approx(float(sums.excesses(genes_of([least]))[0] @ found.weights))
    assert sums.excesses(genes_of(found.met)).max(axis=1).min() >= found.excess


def test_the_dual_of_a_large_space_closes_within_its_rounds(large: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    rows = rng.lognormal(size=(6, len(large.lattice.ops)))
    limits = [Limit(AdditiveCost(f"c{i}", row, *[float] * 3), 9.0) for i, row in enumerate(rows)]
    found = dual(Paths(large), Sums(large, limits))
    assert len(found.met) < surrogates.ROUNDS


# ---- the exponential bound


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=SEEDS, places=st.lists(st.floats(0.1, 0.9), min_size=2, max_size=4))
def test_tilted_weights_minimise_the_exponential_bound(
    random_space: RandomSpace, seed: int, places: list[float]
) -> None:
    space = random_space(seed)
    sums = Sums(space, some_limits(space, seed, places))
    excesses = sums.excesses(genes_of(list(space.enumerate())))
    if best_of_the_mixtures(excesses) > -0.01:
        return  # the bound has no least value where nothing is inside

    def bound(weights: np.ndarray) -> float:
        return float(np.logaddexp.reduce(-excesses @ weights))

    found = tilted(Paths(space), sums)
    assert (found >= 0).all()
    assert bound(found) >= math.log(max(1, int((excesses <= 0).all(axis=1).sum()))) - 1e-9
    rng = np.random.default_rng(seed)
    for other in rng.lognormal(sigma=2, size=(200, len(sums))) * rng.integers(0, 2, len(sums)):
        assert bound(found) <= bound(other) + 1e-3
    for scale in (0.9, 1.1):
        assert bound(found) <= bound(found * scale) + 1e-3


def test_tilted_weights_leave_fewer_than_plainer_weights(large: SearchSpace) -> None:
    rng = np.random.default_rng(1)
    nothing = np.zeros(len(large.lattice.ops))
    free = Knapsack(nothing, math.inf, nothing)
    genes = Counts(Paths(large), free, 0).draw(rng, 500)
    limits = []
    for number, place in enumerate((0.02, 0.1, 0.3, 0.05, 0.5)):
        cost = AdditiveCost(f"c{number}", rng.lognormal(size=len(large.lattice.ops)), *[float] * 3)
        limits.append(Limit(cost, float(np.quantile(cost.totals(large, genes), place))))
    paths, sums = Paths(large), Sums(large, limits)

    def left(weights: np.ndarray) -> float:
        return Counts(paths, sums.weighted(weights)).count

    plain = [np.ones(5), dual(paths, sums).weights, *np.eye(5)]
    assert left(tilted(paths, sums)) < 0.7 * min(map(left, plain))


def test_tilted_weights_are_bounded_where_nothing_is_inside(small: SearchSpace) -> None:
    macs = counted_cost(small, "macs")
    against = AdditiveCost("against", macs.per_op.max() - macs.per_op, *[float] * 3)
    found = tilted(Paths(small), Sums(small, [Limit(macs, 1.0), Limit(against, 1.0)]))
    assert np.isfinite(found).all()
    assert found.min() >= 0


def test_costs_that_are_the_same_everywhere_have_finite_weights(small: SearchSpace) -> None:
    ones = np.ones(len(small.lattice.ops))
    limits = [Limit(AdditiveCost(f"c{i}", ones * i, *[float] * 3), 50.0) for i in (0, 1)]
    assert np.isfinite(tilted(Paths(small), Sums(small, limits))).all()
