"""Several limits together: decided as a brute force decides, told honestly, within a bound."""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs import joint
from hwnas.costs.feasible import MAX_TRIES, SAMPLES, FeasibleSet, reachable
from hwnas.costs.limits import AdditiveCost, Cost, Limit, PeakCost, counted_cost, size_cost
from hwnas.costs.population import genes_of
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from quant.errors import Unreachable

CostNamed = Callable[[SearchSpace, str], Cost]
RandomSpace = Callable[[int], SearchSpace]
SEEDS = st.integers(0, 10**6)


@pytest.fixture(params=["listed", "drawn"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Once as it is, where small sets are listed, and once with nothing listed."""
    if request.param == "drawn":
        monkeypatch.setattr(joint, "LISTED", 0)
    return bool(request.param == "listed")


def costs_of(space: SearchSpace, cost_named: CostNamed) -> dict[str, Cost]:
    names = ("latency_ms", "params", "macs", "bitops", "activation_mb")
    size = size_cost(space, [op.weight_bytes + 400 for op in space.lattice.ops], 1500)
    return {**{name: cost_named(space, name) for name in names}, "size_mb": size}


def bounds_of(space: SearchSpace, costs: Sequence[Cost]) -> np.ndarray:
    """The upper bound of every architecture, (costs, architectures)."""
    genes = genes_of(list(space.enumerate()))
    return np.array([[c.upper(raw) for raw in c.totals(space, genes)] for c in costs])


def some_costs(space: SearchSpace, seed: int, kinds: Sequence[str]) -> list[Cost]:
    """Costs of each kind from a seed: they know nothing of each other."""
    rng, costs = np.random.default_rng(seed), []
    for number, kind in enumerate(kinds):
        per_op = rng.lognormal(size=len(space.lattice.ops))
        name = f"c{number}"
        if kind == "peak":
            costs.append(PeakCost(name, per_op))
        elif kind == "whole":
            whole = rng.integers(1, 4, len(per_op)).astype(float)
            costs.append(AdditiveCost(name, whole, float, float, float))
        elif kind == "size":
            size = size_cost(space, per_op.tolist(), 3.0)
            costs.append(AdditiveCost(name, per_op, size.predict, size.upper, size.budget))
        else:
            costs.append(AdditiveCost(name, per_op, float, float, float))
    return costs


def is_as_listed(
    space: SearchSpace, limits: Sequence[Limit], bounds: np.ndarray, listing: bool = True
) -> str:
    """Check a decision against the list of all architectures; what it was."""
    values = np.array([limit.value for limit in limits])
    inside = (bounds <= values[:, None]).all(axis=0)
    every = list(space.enumerate())
    try:
        feasible = FeasibleSet(space, limits)
    except Unreachable as error:
        assert not inside.any()
        proven = "not proven" not in error.what
        assert proven or not listing
        costs = {limit.cost.name: limit.cost for limit in limits}
        FeasibleSet(space, [Limit(costs[n], value) for n, value in error.together.items()])
        return "proven" if proven else "not proven"
    assert (feasible.contains(every) == inside).all()
    assert inside[every.index(feasible.witness)]
    assert feasible.size >= inside.sum()
    rng = np.random.default_rng(0)
    allowed = set(itertools.compress(every, inside))
    assert {feasible.sample(rng) for _ in range(10)} <= allowed
    if feasible.listed is not None:
        assert set(feasible.listed) == allowed
        assert len(feasible.listed) == len(allowed) == feasible.size
        assert feasible.feasibility().share == len(allowed) / space.count
    return "met"


# ---- every combination, against the list


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_every_combination_of_limits_at_many_places_is_decided_as_listed(
    small: SearchSpace, cost_named: CostNamed, count: int, either_way: bool
) -> None:
    costs = costs_of(small, cost_named)
    bounds = dict(zip(costs, bounds_of(small, list(costs.values())), strict=True))
    found = []
    for names in itertools.combinations(costs, count):
        for share in (0.0, 0.02, 0.1, 0.25, 0.5, 0.9, 1.0):
            shares = [share * (1 + number % 2) / 2 for number in range(count)]
            limits = [
                Limit(costs[name], float(np.quantile(bounds[name], s, method="nearest")))
                for name, s in zip(names, shares, strict=True)
            ]
            chosen = np.array([bounds[name] for name in names])
            found.append(is_as_listed(small, limits, chosen, either_way))
    assert "met" in found


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=SEEDS,
    kinds=st.lists(st.sampled_from(["sum", "peak", "whole", "size"]), min_size=1, max_size=5),
    places=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    tightness=st.sampled_from([0.1, 0.3, 1.0]),
)
def test_random_limits_on_random_spaces_are_decided_as_listed(
    random_space: RandomSpace, seed: int, kinds: list[str], places: list[float], tightness: float
) -> None:
    space = random_space(seed)
    costs = some_costs(space, seed, kinds)
    bounds = bounds_of(space, costs)
    limits = [
        Limit(cost, float(np.quantile(row, place * tightness, method="nearest")))
        for cost, row, place in zip(costs, bounds, places, strict=False)
    ]
    is_as_listed(space, limits, bounds)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS, kinds=st.lists(st.sampled_from(["sum", "peak"]), min_size=1, max_size=4))
def test_limits_at_the_bounds_of_one_architecture_are_met(
    random_space: RandomSpace, seed: int, kinds: list[str]
) -> None:
    """To the last digit, and nothing that is smaller in every cost is there by chance."""
    space = random_space(seed)
    costs = some_costs(space, seed, kinds)
    bounds = bounds_of(space, costs)
    place = int(np.random.default_rng(seed).integers(bounds.shape[1]))
    limits = [Limit(c, float(v)) for c, v in zip(costs, bounds[:, place], strict=True)]
    assert is_as_listed(space, limits, bounds) == "met"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS, kind=st.sampled_from(["sum", "peak", "whole", "size"]))
def test_the_range_of_either_kind_is_that_of_the_list(
    random_space: RandomSpace, seed: int, kind: str
) -> None:
    space = random_space(seed)
    (cost,) = some_costs(space, seed, [kind])
    bounds = bounds_of(space, [cost])[0]
    found = reachable(space, cost)
    assert (found.smallest, found.largest) == pytest.approx((bounds.min(), bounds.max()), rel=1e-12)
    every = list(space.enumerate())
    ends = [bounds[every.index(a)] for a in (found.cheapest, found.dearest)]
    assert ends == [found.smallest, found.largest]


# ---- out of reach together


def opposed(space: SearchSpace) -> tuple[Cost, Cost]:
    """MACs, and what there is less of with more MACs."""
    macs = counted_cost(space, "macs")
    against = AdditiveCost("against", macs.per_op.max() - macs.per_op, float, float, float)
    return macs, against


def test_limits_that_exclude_each_other_are_proven_to_and_soon(
    tiny: SearchSpace, either_way: bool
) -> None:
    limits = [Limit(cost, reachable(tiny, cost).smallest * 1.01) for cost in opposed(tiny)]
    start = time.perf_counter()
    with pytest.raises(Unreachable) as caught:
        FeasibleSet(tiny, limits)
    assert time.perf_counter() - start < 2
    error = caught.value
    assert error.exit_code == 3
    assert error.what.startswith("Each limit can be met alone in mobile-tiny, but no architecture")
    assert f"macs <= {limits[0].value:.6g} and against <= {limits[1].value:.6g}" in error.what
    ranges = {limit.cost.name: reachable(tiny, limit.cost) for limit in limits}
    assert error.smallest == {name: found.smallest for name, found in ranges.items()}
    assert error.largest == {name: found.largest for name, found in ranges.items()}


def test_what_the_error_suggests_can_be_met_and_is_not_far(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    costs = costs_of(tiny, cost_named)
    for factor in (1.02, 1.05, 1.1):
        limits = {n: Limit(c, reachable(tiny, c).smallest * factor) for n, c in costs.items()}
        with pytest.raises(Unreachable) as caught:
            FeasibleSet(tiny, list(limits.values()))
        together, told = caught.value.together, caught.value.next_step
        assert set(together) == set(costs)
        assert told.startswith("ask for at least ")
        pairs = told.removeprefix("ask for at least ").removesuffix(" together").split(" and ")
        read = {name: float(value) for name, value in (pair.split("=") for pair in pairs)}
        assert read == together
        assert all(value >= limits[name].value for name, value in read.items())
        raised = [Limit(costs[name], value) for name, value in read.items()]
        assert FeasibleSet(tiny, raised).witness
        with pytest.raises(Unreachable):  # 5 % less is out of reach again
            FeasibleSet(tiny, [Limit(x.cost, max(x.value * 0.95, limits[x.cost.name].value))
                               for x in raised])  # fmt: skip


def test_a_limit_that_does_not_bind_is_not_told_to_be_raised(tiny: SearchSpace) -> None:
    limits = [Limit(cost, reachable(tiny, cost).smallest * 1.01) for cost in opposed(tiny)]
    with pytest.raises(Unreachable) as caught:
        FeasibleSet(tiny, [*limits, Limit(counted_cost(tiny, "params"), 1e12)])
    assert set(caught.value.together) == {"macs", "against"}
    assert set(caught.value.smallest) == {"macs", "against", "params"}


def test_one_limit_alone_out_of_reach_is_told_alone(tiny: SearchSpace) -> None:
    macs, against = opposed(tiny)
    least = reachable(tiny, macs).smallest
    with pytest.raises(Unreachable) as caught:
        FeasibleSet(tiny, [Limit(against, math.inf), Limit(macs, least / 2)])
    assert set(caught.value.together) == {"macs"}
    assert least < caught.value.together["macs"] < 1.03 * least


def test_peaks_that_exclude_each_other_are_proven_to(small: SearchSpace) -> None:
    peak = counted_cost(small, "activation_mb")
    against = PeakCost("against", 2 * peak.per_op.max() - peak.per_op)
    limits = [Limit(cost, reachable(small, cost).smallest) for cost in (peak, against)]
    bounds = bounds_of(small, [peak, against])
    assert is_as_listed(small, limits, bounds) == "proven"


def gap(space: SearchSpace, count: int) -> list[Limit]:
    """Each of `count` blocks costs 2 of one or 2 of the other; there is 1 of each a block.

    With an odd count nothing meets both, though a mixture of architectures does.
    """
    integer = np.array([op.precision.is_integer for op in space.lattice.ops])
    costs = [AdditiveCost(name, 2.0 * which, float, float, float)
             for name, which in (("a", integer), ("b", ~integer))]  # fmt: skip
    return [Limit(cost, float(count)) for cost in costs]


@pytest.fixture(scope="module")
def chain() -> SearchSpace:
    """Seven positions that choose their precision and nothing else: 2^7 architectures."""
    return mobile(
        "chain",
        (Stage(5, 1, (16,)),),
        classes=4,
        size=8,
        kernels=(3,),
        expansions=(3,),
        stem_precisions=("fp32", "w8a8"),
        skip=False,
    )


def test_what_no_weighted_sum_can_prove_is_proven_by_the_list(chain: SearchSpace) -> None:
    assert chain.count == 2**7
    with pytest.raises(Unreachable, match="no architecture meets a <= 7 and b <= 7 together"):
        FeasibleSet(chain, gap(chain, 7))


def test_what_a_weighted_sum_proves_needs_no_list(
    chain: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every op is within each limit somewhere, but the two costs add up to 14 everywhere."""
    monkeypatch.setattr(joint, "LISTED", 0)
    with pytest.raises(Unreachable, match="no architecture meets a <= 6 and b <= 6 together"):
        FeasibleSet(chain, gap(chain, 6))


def test_what_is_not_proven_is_told_as_not_proven(
    chain: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "LISTED", 0)
    start = time.perf_counter()
    with pytest.raises(Unreachable) as caught:
        FeasibleSet(chain, gap(chain, 7))
    assert time.perf_counter() - start < 3
    error = caught.value
    assert f"none of {MAX_TRIES} uniform draws from a superset" in error.what
    assert error.what.endswith("That none exists is not proven.")
    raised = [Limit(limit.cost, error.together[limit.cost.name]) for limit in gap(chain, 7)]
    assert max(limit.value for limit in raised) == pytest.approx(8 * 1.02)
    assert FeasibleSet(chain, raised).contains([FeasibleSet(chain, raised).witness]).all()


# ---- what is told of a set


def test_bounds_and_predictions_are_those_of_each_architecture(
    small: SearchSpace, small_list: list[Architecture], cost_named: CostNamed
) -> None:
    costs = costs_of(small, cost_named)
    feasible = FeasibleSet(small, [Limit(cost, math.inf) for cost in costs.values()])
    bounds, predictions = feasible.bounds(small_list), feasible.predictions(small_list)
    assert list(bounds) == list(predictions) == list(costs)
    number = {op.key: i for i, op in enumerate(small.lattice.ops)}
    for name, cost in costs.items():
        for place, architecture in enumerate(small_list):
            values = [cost.per_op[number[op.key]] for op in small.lower(architecture)]
            raw = max(values) if name == "activation_mb" else math.fsum(values)
            assert bounds[name][place] == pytest.approx(cost.upper(raw), rel=1e-12)
            assert predictions[name][place] == pytest.approx(cost.predict(raw), rel=1e-12)
    assert all(found.shape == (0,) for found in feasible.bounds([]).values())


def test_the_feasibility_table_is_that_of_the_list(
    small: SearchSpace, small_list: list[Architecture], cost_named: CostNamed, either_way: bool
) -> None:
    costs = costs_of(small, cost_named)
    bounds = dict(zip(costs, bounds_of(small, list(costs.values())), strict=True))
    shares = dict(zip(costs, (0.5, 0.6, 1.0, 0.7, 0.5, 0.8), strict=True))
    limits = [
        Limit(cost, float(np.quantile(bounds[name], shares[name], method="nearest")))
        for name, cost in costs.items()
    ]
    feasible = FeasibleSet(small, limits)
    found = feasible.feasibility()
    assert found == feasible.feasibility()
    assert [row.name for row in found.rows] == list(costs)
    for row, limit in zip(found.rows, limits, strict=True):
        assert row.limit == limit.value
        assert row.smallest == pytest.approx(bounds[row.name].min(), rel=1e-12)
        assert row.largest == pytest.approx(bounds[row.name].max(), rel=1e-12)
        assert row.binding == (row.name != "macs") == feasible.binding(limit)
        spread = 3 * 0.5 / math.sqrt(SAMPLES)  # three standard errors of a median's rank
        low, high = np.quantile(bounds[row.name], [0.5 - spread, 0.5 + spread])
        assert low <= row.median <= high
    share = feasible.contains(small_list).mean()
    assert found.share == pytest.approx(share, rel=1e-12 if either_way else 0.15)


def test_where_nothing_binds_all_of_the_space_is_left(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    limits = [Limit(cost, math.inf) for cost in costs_of(tiny, cost_named).values()]
    found = FeasibleSet(tiny, limits).feasibility()
    assert found.share == 1.0
    assert not any(row.binding for row in found.rows)
    assert FeasibleSet(tiny, []).feasibility().rows == ()


def test_the_share_of_the_preset_is_that_of_uniform_samples(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    costs = list(costs_of(tiny, cost_named).values())
    free, rng = (
        FeasibleSet(tiny, [Limit(cost, math.inf) for cost in costs]),
        np.random.default_rng(4),
    )
    drawn = [a for a in (free.sample(rng) for _ in range(4000)) if a is not None]
    bounds = free.bounds(drawn)
    limits = [Limit(c, float(np.quantile(bounds[c.name], 0.5, method="nearest"))) for c in costs]
    feasible = FeasibleSet(tiny, limits)
    expected = float(feasible.contains(drawn).mean())
    error = math.sqrt(expected / len(drawn)) + expected / math.sqrt(SAMPLES)
    assert 0.05 < expected < 0.5
    assert feasible.feasibility().share == pytest.approx(expected, abs=4 * error)


# ---- bounded, and the same everywhere


def five_limits(space: SearchSpace, cost_named: CostNamed, place: float) -> list[Limit]:
    """Limits on a share of the way from the smallest to the median bound of every cost."""
    costs = costs_of(space, cost_named)
    free = FeasibleSet(space, [Limit(cost, math.inf) for cost in costs.values()]).feasibility()
    return [
        Limit(costs[row.name], row.smallest + place * (row.median - row.smallest))
        for row in free.rows
    ]


@pytest.mark.parametrize("place", [0.5, 0.1, 0.03, 0.01, 0.001])
def test_a_large_space_is_decided_and_told_within_seconds(
    large: SearchSpace, cost_named: CostNamed, place: float, record_property: Callable[..., None]
) -> None:
    assert len(large.positions) == 20
    assert len(large.lattice.ops) > 2000
    limits = five_limits(large, cost_named, place)
    took: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        took[name] = time.perf_counter() - start
        return result

    def decide() -> FeasibleSet | Unreachable:
        try:
            return FeasibleSet(large, limits)
        except Unreachable as error:
            return error

    found = timed("decided", decide)
    if isinstance(found, FeasibleSet):
        timed("table", found.feasibility)
        rng = np.random.default_rng(0)
        samples = timed("50 samples", lambda: [found.sample(rng) for _ in range(50)])
        assert isinstance(samples, list)
        assert found.contains(samples).all()
    else:
        assert place < 0.05
        assert isinstance(found, Unreachable)
        assert "not proven" not in found.what
    for name, seconds in took.items():
        record_property(name, f"{seconds:.3f} s")
    assert max(took.values()) < 3


SCRIPT = """
import json
import numpy as np
from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import COUNTED, AdditiveCost, Limit, counted_cost, size_cost
from hwnas.spaces.mobile import mobile_tiny
from quant.errors import Unreachable

space = mobile_tiny(classes=10)
costs = [counted_cost(space, name) for name in COUNTED]
costs.append(size_cost(space, [op.weight_bytes for op in space.lattice.ops], 1000))
limits = [Limit(cost, reachable(space, cost).smallest * 6) for cost in costs]
feasible = FeasibleSet(space, limits)
rng = np.random.default_rng(3)
told = [feasible.sample(rng).genes for _ in range(30)]
table = feasible.feasibility()
macs = costs[COUNTED.index("macs")].per_op
costs.append(AdditiveCost("against", macs.max() - macs, float, float, float))
try:
    FeasibleSet(space, [Limit(cost, reachable(space, cost).smallest * 1.05) for cost in costs])
except Unreachable as error:
    together = error.together
print(json.dumps([told, feasible.witness.genes, feasible.size, table.share,
                  [row.median for row in table.rows], together, feasible.listed is None]))
"""


def test_everything_is_the_same_in_another_process_with_another_hash_seed(
    in_process: Callable[[str, str], str],
) -> None:
    one, other = (json.loads(in_process(SCRIPT, seed)) for seed in ("1", "2"))
    assert one == other
    assert len(set(map(tuple, one[0]))) > 20
    assert one[-1], "drawn, not listed"
