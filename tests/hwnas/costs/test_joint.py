import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs import joint
from hwnas.costs.counts import Counts
from hwnas.costs.joint import Superset, nearest, ratios
from hwnas.costs.limits import AdditiveCost, Cost, Limit, PeakCost, counted_cost
from hwnas.costs.paths import Paths
from hwnas.costs.population import genes_of
from hwnas.costs.surrogates import Sums, dual
from hwnas.spaces.base import Architecture, SearchSpace

RandomSpace = Callable[[int], SearchSpace]
SEEDS = st.integers(0, 10**6)
KINDS = st.lists(st.booleans(), min_size=1, max_size=5)


def some_costs(space: SearchSpace, seed: int, peaks: list[bool]) -> list[Cost]:
    rng = np.random.default_rng(seed)
    costs: list[Cost] = []
    for number, peak in enumerate(peaks):
        per_op = rng.lognormal(size=len(space.lattice.ops))
        name = f"c{number}"
        costs.append(PeakCost(name, per_op) if peak else AdditiveCost(name, per_op, *[float] * 3))
    return costs


def bounds_of(space: SearchSpace, costs: list[Cost]) -> np.ndarray:
    """(costs, architectures)."""
    genes = genes_of(list(space.enumerate()))
    return np.array([[c.upper(raw) for raw in c.totals(space, genes)] for c in costs])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, peaks=KINDS, place=st.floats(0, 1))
def test_the_superset_holds_all_that_meets_the_limits(
    random_space: RandomSpace, seed: int, peaks: list[bool], place: float
) -> None:
    space = random_space(seed)
    costs = some_costs(space, seed, peaks)
    bounds = bounds_of(space, costs)
    values = np.quantile(bounds, place, axis=1, method="nearest")
    limits = [Limit(cost, float(value)) for cost, value in zip(costs, values, strict=True)]
    inside = (bounds <= values[:, None]).all(axis=0)
    genes = {a.genes for a, i in zip(space.enumerate(), inside, strict=True) if i}
    superset = Superset(space, limits)
    if superset.empty:
        assert not genes
    else:
        assert superset.listed is not None
        listed = set(map(tuple, superset.listed.tolist()))
        assert genes <= listed
        assert len(listed) == superset.counts.count


def test_the_superset_is_smaller_than_that_of_any_limit_alone(tiny: SearchSpace) -> None:
    costs = [counted_cost(tiny, name) for name in ("macs", "params", "bitops")]
    paths = Paths(tiny)
    limits = []
    for cost in costs:
        dearest, cheapest = (
            cost.totals(tiny, genes_of([paths.best(cost.per_op, np.add, better)]))[0]
            for better in (np.maximum, np.minimum)
        )
        limits.append(Limit(cost, float(cheapest + (dearest - cheapest) * 0.2)))
    alone = [Superset(tiny, [limit]).counts.count for limit in limits]
    together = Superset(tiny, limits)
    assert together.counts.count < min(alone)
    assert together.listed is None


def test_a_superset_is_listed_up_to_its_bound(
    small: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "LISTED", small.count)
    listed = Superset(small, []).listed
    assert listed is not None
    assert len(listed) == small.count
    monkeypatch.setattr(joint, "LISTED", small.count - 1)
    assert Superset(small, []).listed is None


def test_ops_over_a_peak_can_leave_sums_that_are_out_of_reach(small: SearchSpace) -> None:
    """The lattice is cut: the least sum takes an op that the peak bars."""
    macs = counted_cost(small, "macs")
    assert isinstance(macs, AdditiveCost)
    genes = genes_of([Paths(small).best(macs.per_op, np.add, np.minimum)])
    least = float(macs.totals(small, genes)[0])
    peak = PeakCost("peak", macs.per_op.max() - macs.per_op + 1)
    cap = float(peak.totals(small, genes)[0])
    assert not Superset(small, [Limit(macs, least), Limit(peak, cap)]).empty
    assert Superset(small, [Limit(macs, least), Limit(peak, math.nextafter(cap, 0))]).empty


# ---- the nearest


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=SEEDS, peaks=KINDS, place=st.floats(0, 0.4))
def test_the_nearest_has_the_smallest_largest_ratio_of_all(
    random_space: RandomSpace, seed: int, peaks: list[bool], place: float
) -> None:
    space = random_space(seed)
    costs = some_costs(space, seed, peaks)
    bounds = bounds_of(space, costs)
    values = np.quantile(bounds, place, axis=1, method="nearest") * 0.9
    limits = [Limit(cost, float(value)) for cost, value in zip(costs, values, strict=True)]
    every = (bounds / values[:, None]).max(axis=0)
    found = nearest(space, limits)
    ratio = ratios(space, limits, genes_of([found]))[0]
    assert max(ratio, 1.0) == pytest.approx(max(every.min(), 1.0), rel=1e-9)
    told = ratios(space, limits, genes_of(list(space.enumerate())))
    np.testing.assert_allclose(told, every)


def test_the_nearest_of_a_large_space_is_close_to_what_the_dual_allows(large: SearchSpace) -> None:
    costs = some_costs(large, 3, [False] * 4)
    limits = [Limit(cost, 3.0) for cost in costs]
    found = ratios(large, limits, genes_of([nearest(large, limits)]))[0]
    least = 1 + dual(Paths(large), Sums(large, limits)).excess
    assert 1.5 < least <= found <= 1.1 * least
    assert Superset(large, limits).empty


def test_counts_of_a_superset_drawn_from_do_not_outgrow_the_list(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    macs = counted_cost(small, "macs")
    superset = Superset(small, [Limit(macs, 2e5)])
    assert isinstance(superset.counts, Counts)
    assert superset.listed is not None
    assert set(map(tuple, superset.listed.tolist())) <= {a.genes for a in small_list}
