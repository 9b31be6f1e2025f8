import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hwnas.costs import joint
from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import AdditiveCost, Cost, Limit, PeakCost, counted_cost
from hwnas.costs.population import architectures_of, genes_of, totals
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from quant.errors import InvalidInput, Unreachable

CostNamed = Callable[[SearchSpace, str], Cost]
SUMS = ["macs", "params", "bitops", "weight_bytes", "latency_ms"]
COST_NAMES = [*SUMS, "activation_mb"]

SMALL = mobile(
    "small",
    (Stage(2, 1, (16, 24)), Stage(1, 1, (16,), squeeze=4), Stage(1, 2, (24, 32))),
    classes=4,
    size=16,
    kernels=(3,),
    expansions=(3,),
)
ALL = list(SMALL.enumerate())
GENES = genes_of(ALL)
OPS = len(SMALL.lattice.ops)


def plain(per_op: Sequence[float], name: str = "cost") -> AdditiveCost:
    return AdditiveCost(name, np.array(per_op, float), float, float, float)


def raw_of(space: SearchSpace, architectures: Sequence[Architecture], cost: Cost) -> list[float]:
    """Python's own loop over the lowered ops."""
    number = {op.key: i for i, op in enumerate(space.lattice.ops)}
    join = max if isinstance(cost, PeakCost) else math.fsum
    return [join([cost.per_op[number[o.key]] for o in space.lower(a)]) for a in architectures]


def bounds_of(cost: Cost) -> np.ndarray:
    """The upper bound of every architecture of `SMALL`."""
    return np.array([cost.upper(raw) for raw in cost.totals(SMALL, GENES)])


@pytest.fixture(params=["listed", "drawn"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, where small sets are listed, and once with nothing listed."""
    if request.param == "drawn":
        monkeypatch.setattr(joint, "LISTED", 0)


def assert_uniform(feasible: FeasibleSet, allowed: set[Architecture], draws: int) -> None:
    """Chi-square against the uniform law over `allowed`, at p = 0.001, and nothing outside it."""
    rng = np.random.default_rng(2024)
    assert draws / len(allowed) >= 8, "too few draws for the test to mean anything"
    together: list[Architecture] = []
    while len(together) < draws:
        together += architectures_of(feasible.samples(rng, draws - len(together)))
    assert len(together) == draws
    for drawn in ([feasible.sample(rng) for _ in range(draws)], together):
        counts = Counter(drawn)
        assert set(counts) <= allowed
        if len(allowed) > 1:
            assert stats.chisquare([counts[a] for a in allowed]).pvalue > 0.001


# ---- extremes


@pytest.mark.parametrize("name", COST_NAMES)
def test_the_reachable_range_is_that_of_the_listed_architectures(
    cost_named: CostNamed, name: str
) -> None:
    cost = cost_named(SMALL, name)
    bounds = [cost.upper(total) for total in raw_of(SMALL, ALL, cost)]
    found = reachable(SMALL, cost)
    assert found.smallest == pytest.approx(min(bounds), rel=1e-12)
    assert found.largest == pytest.approx(max(bounds), rel=1e-12)
    ends = raw_of(SMALL, [found.cheapest, found.dearest], cost)
    assert [cost.upper(s) for s in ends] == pytest.approx([min(bounds), max(bounds)], rel=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_the_reachable_range_is_exact_for_any_costs(seed: int) -> None:
    cost = plain(np.random.default_rng(seed).normal(size=OPS))
    sums = totals(SMALL, cost.per_op, GENES)
    found = reachable(SMALL, cost)
    assert (found.smallest, found.largest) == pytest.approx((sums.min(), sums.max()), abs=1e-12)


# ---- membership


@pytest.mark.parametrize("name", COST_NAMES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_membership_is_that_the_bound_is_at_most_the_limit(
    cost_named: CostNamed, name: str, share: float
) -> None:
    cost = cost_named(SMALL, name)
    bounds = bounds_of(cost)
    value = float(np.quantile(bounds, share, method="nearest"))
    feasible = FeasibleSet(SMALL, [Limit(cost, value)])
    assert feasible.contains(ALL).tolist() == (bounds <= value).tolist()
    assert feasible.contains(ALL[:1]).tolist() == [bounds[0] <= value]


def test_arrays_and_architectures_are_inside_alike_and_as_their_bounds_say(
    cost_named: CostNamed,
) -> None:
    limits = []
    for name in COST_NAMES:
        cost = cost_named(SMALL, name)
        limits.append(Limit(cost, float(np.quantile(bounds_of(cost), 0.8, method="nearest"))))
    feasible = FeasibleSet(SMALL, limits)
    inside = feasible.inside(GENES)
    assert inside.tolist() == feasible.contains(ALL).tolist()
    assert inside.tolist() == [bool(feasible.contains([a])[0]) for a in ALL]
    bounds = feasible.bounds(ALL)
    within = [bounds[limit.cost.name] <= limit.value for limit in limits]
    assert inside.tolist() == np.all(within, axis=0).tolist()
    assert 0 < inside.sum() < len(ALL)


def test_membership_under_several_limits_is_that_of_each(cost_named: CostNamed) -> None:
    limits, expected = [], np.ones(len(ALL), bool)
    for name in ("macs", "weight_bytes", "latency_ms", "activation_mb"):
        cost = cost_named(SMALL, name)
        bounds = bounds_of(cost)
        limits.append(Limit(cost, float(np.quantile(bounds, 0.7, method="nearest"))))
        expected &= bounds <= limits[-1].value
    assert 0 < expected.sum() < len(ALL)
    assert (FeasibleSet(SMALL, limits).contains(ALL) == expected).all()


def test_nothing_asked_is_nothing_answered(cost_named: CostNamed) -> None:
    cost = cost_named(SMALL, "macs")
    assert FeasibleSet(SMALL, [Limit(cost, math.inf)]).contains([]).shape == (0,)


# ---- the ends


@pytest.mark.parametrize("name", COST_NAMES)
def test_a_limit_at_the_smallest_reachable_value_is_met_and_one_below_is_not(
    cost_named: CostNamed, name: str
) -> None:
    cost = cost_named(SMALL, name)
    smallest = reachable(SMALL, cost).smallest
    feasible = FeasibleSet(SMALL, [Limit(cost, smallest)])
    found = feasible.sample(np.random.default_rng(0))
    assert found is not None
    assert cost.upper(cost.totals(SMALL, genes_of([found]))[0]) == smallest
    with pytest.raises(Unreachable):
        FeasibleSet(SMALL, [Limit(cost, math.nextafter(smallest, 0))])


@pytest.mark.parametrize("name", COST_NAMES)
def test_an_unreachable_limit_is_answered_at_once_with_the_reachable_range(
    cost_named: CostNamed, name: str
) -> None:
    space = mobile_tiny(classes=10)
    other = counted_cost(space, "params" if name != "params" else "macs")
    cost = cost_named(space, name)
    found = reachable(space, cost)
    start = time.perf_counter()
    with pytest.raises(Unreachable) as caught:
        FeasibleSet(space, [Limit(other, math.inf), Limit(cost, found.smallest / 2)])
    assert time.perf_counter() - start < 0.5
    error = caught.value
    assert error.exit_code == 3
    ranges = {cost.name: found, other.name: reachable(space, other)}
    assert error.smallest == {n: r.smallest for n, r in ranges.items()}
    assert error.largest == {n: r.largest for n, r in ranges.items()}
    assert f"smallest reachable bound is {found.smallest:.6g}" in str(error)
    assert f"{cost.name} <= {found.smallest / 2:.6g}" in str(error)


def test_what_the_error_suggests_is_reachable(cost_named: CostNamed) -> None:
    for name in COST_NAMES:
        cost = cost_named(SMALL, name)
        with pytest.raises(Unreachable) as caught:
            FeasibleSet(SMALL, [Limit(cost, 0.001)])
        suggested = float(caught.value.next_step.split()[-1])
        assert FeasibleSet(SMALL, [Limit(cost, suggested)]).contains(ALL).any()


@pytest.mark.parametrize("name", COST_NAMES)
def test_a_limit_binds_exactly_where_an_architecture_is_over_it(
    cost_named: CostNamed, name: str
) -> None:
    cost = cost_named(SMALL, name)
    largest = max(bounds_of(cost))
    for value in (
        largest,
        math.nextafter(largest, 0),
        largest * 2,
        reachable(SMALL, cost).smallest,
    ):
        limit = Limit(cost, value)
        feasible = FeasibleSet(SMALL, [limit])
        assert feasible.binding(limit) == (not feasible.contains(ALL).all())


def test_two_limits_on_one_cost_are_refused() -> None:
    """Neither range may answer for the other; devices' costs need names of their own."""
    macs = counted_cost(SMALL, "macs")
    limits = [Limit(plain(macs.per_op * k, "latency_ms"), 1e12) for k in (1, 1000)]
    with pytest.raises(InvalidInput, match="Two limits are on one cost"):
        FeasibleSet(SMALL, limits)
    FeasibleSet(SMALL, [Limit(plain(macs.per_op * k, f"cost {k}"), 1e12) for k in (1, 1000)])


# ---- samples


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("factor", [1.0, 1.02, 1.3, 2.0, 100.0])
@pytest.mark.parametrize("name", ["macs", "weight_bytes", "latency_ms", "activation_mb"])
def test_samples_are_uniform_over_the_feasible_set(
    cost_named: CostNamed, name: str, factor: float
) -> None:
    cost = cost_named(SMALL, name)
    value = reachable(SMALL, cost).smallest * factor
    allowed = set(itertools.compress(ALL, bounds_of(cost) <= value))
    assert_uniform(FeasibleSet(SMALL, [Limit(cost, value)]), allowed, 10 * len(allowed))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("names", "shares"),
    [
        (("macs", "weight_bytes"), (0.5, 0.5)),
        (("latency_ms", "macs"), (0.3, 0.6)),
        (("latency_ms", "activation_mb"), (0.4, 0.5)),
        (("params", "latency_ms", "bitops"), (0.5, 0.5, 0.5)),
        (("params", "latency_ms", "activation_mb"), (0.6, 0.6, 0.5)),
        (("params", "latency_ms", "bitops", "activation_mb", "macs"), (0.7, 0.6, 0.7, 0.5, 0.6)),
    ],
)
def test_samples_under_several_limits_are_uniform_over_what_meets_all(
    cost_named: CostNamed, names: tuple[str, ...], shares: tuple[float, ...]
) -> None:
    limits, inside = [], np.ones(len(ALL), bool)
    for name, share in zip(names, shares, strict=True):
        cost = cost_named(SMALL, name)
        bounds = bounds_of(cost)
        limits.append(Limit(cost, float(np.quantile(bounds, share, method="nearest"))))
        inside &= bounds <= limits[-1].value
    allowed = set(itertools.compress(ALL, inside))
    assert 5 < len(allowed) < len(ALL) / 2
    assert_uniform(FeasibleSet(SMALL, limits), allowed, 10 * len(allowed))


def test_without_limits_samples_are_uniform_over_the_space(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    feasible = FeasibleSet(small, [])
    assert feasible.size == small.count
    assert feasible.contains(small_list).all()
    assert_uniform(feasible, set(small_list), 10 * len(small_list))


@pytest.mark.usefixtures("either_way")
def test_costs_below_zero_are_sampled_uniformly_too(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    per_op = np.round(np.random.default_rng(8).normal(size=len(small.lattice.ops)) * 64) / 64
    cost = AdditiveCost("cost", per_op, float, lambda s: s + 100.0, lambda bound: bound - 100.0)
    sums = totals(small, cost.per_op, genes_of(small_list))
    value = float(np.median(sums))
    assert value < 0
    allowed = set(itertools.compress(small_list, sums <= value))
    assert_uniform(FeasibleSet(small, [Limit(cost, value + 100.0)]), allowed, 12 * len(allowed))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    magnitude=st.integers(-6, 9),
    place=st.integers(0, len(ALL) - 1),
)
def test_no_feasible_architecture_is_lost_and_no_infeasible_one_drawn(
    seed: int, magnitude: int, place: int
) -> None:
    rng = np.random.default_rng(seed)
    cost = plain(rng.lognormal(size=OPS) * 10.0**magnitude)
    sums = np.sort(totals(SMALL, cost.per_op, GENES))
    feasible = FeasibleSet(SMALL, [Limit(cost, float(sums[place]))])
    assert feasible.size >= (sums <= sums[place]).sum()
    drawn = [feasible.sample(rng) for _ in range(5)]
    assert all(a is not None for a in drawn)
    assert feasible.contains([a for a in drawn if a is not None]).all()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6, 1e12])
def test_the_one_cheapest_architecture_is_found_at_its_own_cost(magnitude: float) -> None:
    for seed in range(20):
        cost = plain(np.random.default_rng(seed).lognormal(size=OPS) * magnitude)
        sums = totals(SMALL, cost.per_op, GENES)
        feasible = FeasibleSet(SMALL, [Limit(cost, float(sums.min()))])
        assert feasible.sample(np.random.default_rng(0)) == ALL[int(sums.argmin())]


@pytest.mark.usefixtures("either_way")
def test_architectures_that_tie_for_the_cheapest_are_all_found() -> None:
    cost = plain(np.random.default_rng(1).integers(1, 3, OPS).astype(float))
    sums = totals(SMALL, cost.per_op, GENES)
    ties = set(itertools.compress(ALL, sums == sums.min()))
    assert len(ties) > 3
    assert_uniform(FeasibleSet(SMALL, [Limit(cost, float(sums.min()))]), ties, 20 * len(ties))


def test_samples_depend_on_the_generator_alone(tiny: SearchSpace) -> None:
    cost = counted_cost(tiny, "macs")
    limit = Limit(cost, reachable(tiny, cost).smallest * 2)
    one, other = (FeasibleSet(tiny, [limit]) for _ in range(2))
    generators = [np.random.default_rng(5) for _ in range(2)]
    first = [one.sample(generators[0]) for _ in range(20)]
    assert first == [other.sample(generators[1]) for _ in range(20)]
    assert len(set(first)) > 15


def test_marginals_in_the_preset_are_those_of_rejection_sampling(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    """Too many to list: every edge's frequency against uniform samples that were filtered."""
    cost = cost_named(tiny, "latency_ms")
    free, rng = FeasibleSet(tiny, []), np.random.default_rng(11)
    drawn = [a for a in (free.sample(rng) for _ in range(4000)) if a is not None]
    bounds = np.array([cost.upper(s) for s in totals(tiny, cost.per_op, genes_of(drawn))])
    limit = Limit(cost, float(np.quantile(bounds, 0.25, method="nearest")))
    kept = genes_of(list(itertools.compress(drawn, bounds <= limit.value)))
    feasible = FeasibleSet(tiny, [limit])
    direct = genes_of([a for a in (feasible.sample(rng) for _ in range(2000)) if a is not None])
    for column, gene in enumerate(tiny.genes):
        values = range(len(gene.choices))
        seen = np.array([[(g[:, column] == v).sum() for v in values] for g in (kept, direct)])
        seen = seen[:, seen.sum(axis=0) >= 10]
        assert stats.chi2_contingency(seen).pvalue > 0.001 / len(tiny.genes), gene.name


# ---- size


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), slack=st.integers(1, 20))
def test_the_size_is_the_exact_count_where_rounding_has_no_part(seed: int, slack: int) -> None:
    cost = plain(np.random.default_rng(seed).integers(1, 7, OPS).astype(float))
    sums = totals(SMALL, cost.per_op, GENES)
    value = float(sums.min() + slack)
    assert FeasibleSet(SMALL, [Limit(cost, value)]).size == (sums <= value).sum()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", COST_NAMES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8, 1.0])
def test_the_size_is_never_below_the_count_and_close_to_it(
    cost_named: CostNamed, name: str, share: float
) -> None:
    cost = cost_named(SMALL, name)
    bounds = bounds_of(cost)
    value = float(np.quantile(bounds, share, method="nearest"))
    count = int((bounds <= value).sum())
    size = FeasibleSet(SMALL, [Limit(cost, value)]).size
    assert count <= size <= 1.05 * count + 2


@pytest.mark.usefixtures("either_way")
def test_the_size_under_two_limits_is_at_most_that_of_either(cost_named: CostNamed) -> None:
    costs = [cost_named(SMALL, name) for name in ("params", "latency_ms")]
    limits = [Limit(cost, float(np.quantile(bounds_of(cost), 0.6))) for cost in costs]
    alone = [FeasibleSet(SMALL, [limit]) for limit in limits]
    together = FeasibleSet(SMALL, limits)
    assert together.contains(ALL).sum() <= together.size <= min(found.size for found in alone)
    assert FeasibleSet(SMALL, limits[::-1]).size == together.size


def test_the_size_of_a_limit_that_does_not_bind_is_the_count_of_the_space(
    tiny: SearchSpace,
) -> None:
    cost = counted_cost(tiny, "macs")
    assert FeasibleSet(tiny, [Limit(cost, 1e18)]).size == tiny.count
    assert FeasibleSet(tiny, [Limit(cost, reachable(tiny, cost).largest)]).size == tiny.count
