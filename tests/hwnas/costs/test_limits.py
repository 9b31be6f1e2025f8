import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import (
    COUNTED,
    AdditiveCost,
    Cost,
    Limit,
    PeakCost,
    counted_cost,
    latency_cost,
    size_cost,
    violation,
)
from hwnas.costs.paths import Paths
from hwnas.costs.population import genes_of, peaks, totals
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.host import Host
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import COUNTS, peak_activation_bytes, total
from latency_tables.table import LatencyTable, Row
from quant.errors import InvalidInput, TableError

SMALLEST = mobile("smallest", (Stage(1, 2, (16,)),), classes=2, size=8, kernels=(3,))


def model(offset_us: float = 12.0, upper_ratio: float = 1.1) -> LatencyModel:
    quality = Quality(0, 0, 0, 0, 0, 0, 0, 0)
    return LatencyModel({"fp32": 0.9, "w8a8": 1.2}, -2.0, offset_us, upper_ratio, 0.99, quality)


def table(space: SearchSpace) -> LatencyTable:
    """Rows whose time is drawn from a fixed seed."""
    rng = np.random.default_rng(5)
    found = LatencyTable(Host("cpu", "onnxruntime", "1", "c", "f"), {})
    for op in space.lattice.ops:
        us = float(rng.uniform(1, 50))
        name = op.precision.name
        text = json.dumps([op.to_json()])
        found.rows[op.key] = Row(op.key, text, name, *[us] * 5, 0.0, 10, True)
    return found


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what never ends."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- costs


@pytest.mark.parametrize("name", COUNTS)
def test_a_counted_cost_is_its_own_prediction_bound_and_budget(
    small: SearchSpace, name: str
) -> None:
    cost = counted_cost(small, name)
    assert cost.name == name
    assert cost.per_op.tolist() == [COUNTS[name](op) for op in small.lattice.ops]
    assert cost.predict(7.5) == cost.upper(7.5) == cost.budget(7.5) == 7.5


def test_a_latency_is_the_calibrated_sum_of_the_rows(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    rows, fitted = table(small), model()
    cost = latency_cost(small, rows, fitted)
    sums = totals(small, cost.per_op, genes_of(small_list))
    for architecture, additive in zip(small_list, sums, strict=True):
        us = 12.0
        for op in small.lower(architecture):
            factor = 0.9 if op.precision.name == "fp32" else 1.2
            us += max(0.01, factor * rows.rows[op.key].median_us - 2.0)
        assert cost.predict(additive) == pytest.approx(us / 1000, rel=1e-12)
        assert cost.upper(additive) == pytest.approx(1.1 * us / 1000, rel=1e-12)
    assert cost.name == "latency_ms"
    assert min(cost.per_op) > 0


def test_a_table_that_lacks_rows_is_refused_with_how_many_and_the_first(
    small: SearchSpace,
) -> None:
    rows = table(small)
    keys = [op.key for op in small.lattice.ops]
    for key in (keys[1], keys[3]):
        del rows.rows[key]
    with pytest.raises(TableError) as caught:
        latency_cost(small, rows, model())
    assert f"2 of {len(keys)} rows of small" in str(caught.value)
    assert repr(keys[1]) in str(caught.value)
    assert caught.value.next_step


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    offset=st.floats(0, 20),
    ratio=st.floats(0.9, 3),
    additive=st.floats(0.1, 1e6),
)
def test_a_budget_is_the_largest_sum_whose_bound_meets_the_limit(
    offset: float, ratio: float, additive: float
) -> None:
    fitted = model(offset, ratio)
    cost = AdditiveCost(
        "latency_ms", np.ones(1), fitted.predict_ms, fitted.upper_ms, fitted.budget_us
    )
    limit = Limit(cost, fitted.upper_ms(additive))
    assert limit.budget >= additive
    assert cost.upper(limit.budget) <= limit.value
    assert cost.upper(math.nextafter(limit.budget, math.inf)) > limit.value


@pytest.mark.parametrize("left_us", [0.0, 1e-9, -1e-9])
def test_a_budget_is_told_at_once_where_the_limit_leaves_nothing_beside_the_offset(
    left_us: float,
) -> None:
    fitted = model(offset_us=16.0, upper_ratio=1.0)
    with within(1.0):
        budget = fitted.budget_us((16.0 + left_us) / 1000)
    assert fitted.upper_ms(budget) <= (16.0 + left_us) / 1000
    assert budget == pytest.approx(left_us, abs=1e-11)


@pytest.mark.parametrize("name", COUNTED)
def test_every_cost_that_can_be_limited_is_that_of_the_lowered_ops(
    small: SearchSpace, small_list: list[Architecture], name: str
) -> None:
    cost = counted_cost(small, name)
    found = cost.totals(small, genes_of(small_list))
    for architecture, raw in zip(small_list, found.tolist(), strict=True):
        ops = small.lower(architecture)
        expected = peak_activation_bytes(ops) / 1e6 if name == "activation_mb" else total(name, ops)
        assert cost.predict(raw) == cost.upper(raw) == cost.budget(raw) == raw == expected


def test_a_cost_that_is_not_counted_is_refused_with_those_that_are(small: SearchSpace) -> None:
    with pytest.raises(InvalidInput, match="'flops' is not a counted cost") as caught:
        counted_cost(small, "flops")
    assert caught.value.accepted == "params, macs, bitops, activation_mb"


def test_sums_and_peaks_have_one_interface(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    per_op = np.random.default_rng(1).lognormal(size=len(small.lattice.ops))
    genes = genes_of(small_list)
    for cost, values in (
        (AdditiveCost("sum", per_op, float, float, float), totals),
        (PeakCost("peak", per_op), peaks),
    ):
        expected = values(small, per_op, genes)
        assert cost.totals(small, genes).tolist() == expected.tolist()
        assert cost.totals(small, genes[:0]).shape == (0,)
        budget = float(np.median(expected))
        assert Limit(cost, budget).budget == budget
        narrowed = cost.narrowed(Paths(small), budget)
        assert not narrowed.empty
        assert cost.narrowed(Paths(small), float(expected.min()) * 0.99).empty


# ---- the size of a file


def test_a_size_is_the_megabytes_of_ops_and_base(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    op_bytes = [op.weight_bytes + 311 for op in small.lattice.ops]
    cost = size_cost(small, op_bytes, 2048)
    raw = cost.totals(small, genes_of(small_list)).tolist()
    for architecture, found in zip(small_list, raw, strict=True):
        expected = 2048 + sum(op.weight_bytes + 311 for op in small.lower(architecture))
        assert cost.predict(found) == cost.upper(found) == expected / 1e6
    assert cost.name == "size_mb"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(base=st.floats(0, 1e7), raw=st.floats(0.001, 1e9), limit=st.floats(1e-6, 1e4))
def test_the_budget_of_a_size_is_the_largest_sum_that_meets_the_limit(
    base: float, raw: float, limit: float
) -> None:
    space = SMALLEST
    cost = size_cost(space, [1.0] * len(space.lattice.ops), base)
    for value in (limit, cost.upper(raw)):
        budget = Limit(cost, value).budget
        assert cost.upper(budget) <= value < cost.upper(math.nextafter(budget, math.inf))
    assert Limit(cost, math.inf).budget == math.inf


def test_sizes_that_are_not_one_for_each_op_or_not_numbers_are_refused(small: SearchSpace) -> None:
    count = len(small.lattice.ops)
    with pytest.raises(ValueError, match=f"sizes for {count} ops"):
        size_cost(small, [1.0] * (count - 1), 0.0)
    for bad, base in ((math.nan, 0.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="not finite"):
            size_cost(small, [bad] * count, base)


# ---- limits


@pytest.mark.parametrize("value", [math.nan, 0.0, -0.0, -1.0, -math.inf])
@pytest.mark.parametrize("name", ["macs", "activation_mb"])
def test_a_limit_that_is_not_positive_is_refused(
    small: SearchSpace, name: str, value: float
) -> None:
    with pytest.raises(InvalidInput, match=f"The limit on {name} is") as caught:
        Limit(counted_cost(small, name), value)
    assert caught.value.accepted == "a positive number"


@pytest.mark.parametrize("name", ["macs", "activation_mb"])
def test_an_infinite_limit_bounds_nothing(
    small: SearchSpace, small_list: list[Architecture], name: str
) -> None:
    limit = Limit(counted_cost(small, name), math.inf)
    assert limit.budget == math.inf
    assert violation([limit], [limit.cost.totals(small, genes_of(small_list))]).max() == 0


# ---- violation


@pytest.mark.parametrize("name", ["macs", "weight_bytes", "latency_ms", "activation_mb"])
def test_a_violation_is_zero_exactly_where_an_architecture_is_feasible(
    small: SearchSpace,
    small_list: list[Architecture],
    cost_named: Callable[[SearchSpace, str], Cost],
    name: str,
) -> None:
    cost = cost_named(small, name)
    sums = cost.totals(small, genes_of(small_list))
    bounds = sorted(cost.upper(total) for total in sums)
    for bound in bounds[::7]:
        for value in (bound, math.nextafter(bound, 0), math.nextafter(bound, math.inf)):
            limit = Limit(cost, value)
            over = violation([limit], [sums])
            assert (over >= 0).all()
            assert ((over == 0) == [cost.upper(total) <= value for total in sums]).all()
            if value >= bounds[0]:
                assert ((over == 0) == FeasibleSet(small, [limit]).contains(small_list)).all()


def test_violations_add_up_as_relative_excesses(
    small: SearchSpace, cost_named: Callable[[SearchSpace, str], Cost]
) -> None:
    limits = [Limit(cost_named(small, "macs"), 100.0), Limit(cost_named(small, "params"), 10.0)]
    sums = [np.array([150.0, 100.0, 50.0, 300.0]), np.array([10.0, 15.0, 1.0, 40.0])]
    np.testing.assert_allclose(violation(limits, sums), [0.5, 0.5, 0.0, 5.0])


def test_being_far_below_one_limit_does_not_pay_for_another(small: SearchSpace) -> None:
    limits = [Limit(counted_cost(small, name), 100.0) for name in ("macs", "params")]
    assert violation(limits, [np.array([1.0]), np.array([101.0])])[0] > 0


def test_totals_for_another_number_of_limits_are_refused(small: SearchSpace) -> None:
    with pytest.raises(ValueError, match="zip"):
        violation([Limit(counted_cost(small, "macs"), 1.0)], [np.ones(2), np.ones(2)])
