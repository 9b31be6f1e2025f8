"""The latency model: what calibration recovers, what its bound covers, and exact budgets."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_tables.model import (
    COVERAGE,
    FLOOR_US,
    LatencyModel,
    MeasuredNetwork,
    Quality,
    calibrate,
    quality_of,
)

NO_QUALITY = Quality(0, 0, 0, 0, 0, 0, 0, 0)
SCALES = {"fp32": 0.85, "w8a8": 1.2, "w4a8": 0.6}


def _networks(
    count: int,
    *,
    seed: int,
    scales: dict[str, float] = SCALES,
    per_op: float = -2.0,
    offset: float = 7.0,
    noise: float = 0.0,
) -> list[MeasuredNetwork]:
    """Random networks of 8 to 24 ops whose latency is additive, times lognormal noise."""
    rng = np.random.default_rng(seed)
    networks = []
    for _ in range(count):
        names = rng.choice(list(scales), rng.integers(8, 25))
        rows = tuple((str(name), float(rng.uniform(5, 200))) for name in names)
        latency = offset + sum(scales[name] * us + per_op for name, us in rows)
        noisy = float(latency * np.exp(noise * rng.normal()))
        networks.append(MeasuredNetwork(rows, noisy, noisy))
    return networks


def _model(offset: float = 0.0, ratio: float = 1.0) -> LatencyModel:
    return LatencyModel({"fp32": 1.0}, 0.0, offset, ratio, COVERAGE, NO_QUALITY)


def _additive(model: LatencyModel, network: MeasuredNetwork) -> float:
    return sum(model.op_cost_us(precision, us) for precision, us in network.rows)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Fail where the body does not come back in time, rather than hang."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- calibration


def test_calibration_recovers_the_factors_of_an_additive_device() -> None:
    parts = [_networks(count, seed=seed) for seed, count in enumerate((60, 99, 50))]
    model = calibrate(*parts)
    assert model.scales == pytest.approx(SCALES, rel=1e-6)
    assert model.per_op_us == pytest.approx(-2.0, rel=1e-5)
    assert model.offset_us == pytest.approx(7.0, rel=1e-4)
    assert model.upper_ratio == pytest.approx(1.0, abs=1e-6)
    quality = model.quality
    assert (quality.networks, quality.within_5, quality.within_10) == (50, 1.0, 1.0)
    assert quality.worst_error < 1e-6
    assert quality.tau == pytest.approx(1.0)
    assert quality.spearman == pytest.approx(1.0)


def test_calibration_is_the_least_squares_of_relative_errors() -> None:
    fit = _networks(80, seed=0, noise=0.02)
    rows = [
        [sum(us for p, us in n.rows if p == name) for name in SCALES] + [len(n.rows), 1]
        for n in fit
    ]
    measured = np.array([n.latency_us for n in fit])[:, None]
    expected = np.linalg.lstsq(np.array(rows) / measured, np.ones(80), rcond=None)[0]
    assert 0 < expected[-1] < 20, "inside the limits, where the two must agree"
    assert -20 < expected[-2] < 20, "inside the limits, where the two must agree"
    model = calibrate(fit, _networks(9, seed=1), _networks(9, seed=2))
    found = [*(model.scales[name] for name in SCALES), model.per_op_us, model.offset_us]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("scale", "stays"), [(0.05, 0.2), (5.0, 2.0)])
def test_a_factor_does_not_leave_its_limits(scale: float, stays: float) -> None:
    parts = [
        _networks(40, seed=seed, scales={"fp32": scale}, per_op=0.0, offset=1.0)
        for seed in range(3)
    ]
    model = calibrate(*parts)
    assert 0.2 <= model.scales["fp32"] <= 2.0
    assert model.scales["fp32"] == pytest.approx(stays, rel=1e-3)
    most = max(20.0, min(network.latency_us for network in parts[0]) / 10)
    assert (most > 20) is (scale > 1), "both sizes of networks take part"
    assert -most <= model.per_op_us <= most
    assert 0 <= model.offset_us <= most


@pytest.mark.parametrize("cost", [30.0, 600.0])
@pytest.mark.parametrize("constant", ["per op", "offset"])
def test_the_constants_stay_within_20_us_or_a_tenth_of_the_fastest_network(
    cost: float, constant: str
) -> None:
    """Networks that cost far more per op, or at once, than their rows and the limits tell."""
    rng = np.random.default_rng(0)
    first, each = (cost, 3 * cost) if constant == "per op" else (1.3 * cost, 0.01 * cost)
    networks = []
    for count in [1, 2, *rng.integers(1, 9, 60).tolist()]:
        rows = tuple(("fp32", float(us)) for us in cost * rng.uniform(1, 1.002, count))
        latency = first + (count - 1) * each
        networks.append(MeasuredNetwork(rows, latency, latency))
    most = max(20.0, first / 10)
    model = calibrate(networks[:40], networks[40:50], networks[50:])
    assert abs(model.per_op_us) <= most * (1 + 1e-9)
    assert 0 <= model.offset_us <= most * (1 + 1e-9)
    assert max(abs(model.per_op_us), model.offset_us) == pytest.approx(most, rel=1e-3)


def test_errors_are_at_the_tables_pace_and_the_bound_is_as_observed() -> None:
    """A machine that is quick in half of its networks, by 5 %, and slow in the others, by 20 %."""
    fit, bound, test = (_networks(count, seed=seed) for seed, count in enumerate((40, 99, 50)))

    def observed(networks: list[MeasuredNetwork]) -> list[MeasuredNetwork]:
        rng = np.random.default_rng(len(networks))
        speeds = rng.permutation(np.resize([0.95, 1.2], len(networks))).tolist()
        return [
            replace(network, observed_us=speed * network.latency_us)
            for network, speed in zip(networks, speeds, strict=True)
        ]

    model = calibrate(observed(fit), observed(bound), observed(test))
    steady = calibrate(fit, bound, test)
    assert model.scales == steady.scales == pytest.approx(SCALES, rel=1e-6)
    assert (model.per_op_us, model.offset_us) == (steady.per_op_us, steady.offset_us)
    assert model.upper_ratio == pytest.approx(1.2, rel=1e-6)
    assert steady.upper_ratio == pytest.approx(1.0, rel=1e-6)
    assert model.quality.worst_error < 1e-6
    assert model.quality.within_5 == 1.0
    assert model.quality.tau == pytest.approx(1.0)
    below = replace(model, upper_ratio=1.1)
    assert quality_of(below, observed(test)).coverage == 0.5
    assert quality_of(below, test).coverage == 1.0
    assert quality_of(below, observed(test)).mean_error == model.quality.mean_error


def test_a_model_at_another_pace_predicts_in_proportion_and_bounds_the_same() -> None:
    model = calibrate(*(_networks(30, seed=seed, noise=0.05) for seed in range(3)))
    moved = model.at_pace(1.25)
    for network in _networks(10, seed=9):
        slower = replace(network, rows=tuple((name, 1.25 * us) for name, us in network.rows))
        before, after = _additive(model, network), _additive(moved, slower)
        assert moved.predict_ms(after) == pytest.approx(1.25 * model.predict_ms(before))
        assert moved.upper_ms(after) == pytest.approx(model.upper_ms(before))
    assert (moved.scales, moved.coverage, moved.quality) == (
        model.scales, model.coverage, model.quality,
    )  # fmt: skip


def test_the_quality_is_that_of_the_test_networks_written_out() -> None:
    fit, bound, test = (_networks(50, seed=seed, noise=0.05) for seed in range(3))
    model = calibrate(fit, bound, test)
    predicted = [model.predict_ms(_additive(model, n)) * 1000 for n in test]
    true = [n.latency_us for n in test]
    errors = [abs(p / t - 1) for p, t in zip(predicted, true, strict=True)]
    quality = model.quality
    assert quality.mean_error == pytest.approx(sum(errors) / 50)
    assert quality.worst_error == pytest.approx(max(errors))
    assert quality.within_5 == sum(e <= 0.05 for e in errors) / 50
    assert quality.within_10 == sum(e <= 0.10 for e in errors) / 50
    signs = [
        math.copysign(1, (predicted[i] - predicted[j]) * (true[i] - true[j]))
        for i in range(50)
        for j in range(i)
    ]
    assert quality.tau == pytest.approx(sum(signs) / len(signs))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, true)]
    assert quality.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    upper = [model.upper_ratio * p for p in predicted]
    assert quality.coverage == sum(t <= u for t, u in zip(true, upper, strict=True)) / 50


def test_calibration_is_deterministic_and_reads_back_from_plain_data() -> None:
    parts = [_networks(30, seed=seed, noise=0.05) for seed in range(3)]
    model = calibrate(*parts)
    assert calibrate(*parts) == model
    assert LatencyModel.from_dict(model.to_dict()) == model


# ---- the bound


@pytest.mark.parametrize(
    ("networks", "rank", "coverage"),
    [
        (1, 1, 1 / 2),
        (9, 9, 9 / 10),
        (50, 50, 50 / 51),
        (98, 98, 98 / 99),
        (99, 99, COVERAGE),
        (150, 150, COVERAGE),
        (199, 198, COVERAGE),
        (299, 297, COVERAGE),
    ],
)
def test_the_bound_is_the_conformal_rank_and_says_what_so_few_networks_can_cover(
    networks: int, rank: int, coverage: float
) -> None:
    fit, bound, test = (
        _networks(count, seed=seed, noise=0.03) for seed, count in enumerate((40, networks, 20))
    )
    model = calibrate(fit, bound, test)
    ratios = sorted(n.latency_us / 1000 / model.predict_ms(_additive(model, n)) for n in bound)
    assert model.upper_ratio == pytest.approx(ratios[rank - 1], rel=1e-12)
    assert model.coverage == pytest.approx(coverage, rel=1e-12)


@pytest.mark.parametrize(
    ("networks", "low", "high"), [(9, 0.86, 0.94), (49, 0.967, 0.993), (199, 0.984, 0.996)]
)
def test_over_many_calibrations_the_bound_covers_as_often_as_it_says(
    networks: int, low: float, high: float
) -> None:
    """The mean over 60 seeds; split conformal coverage is Beta(rank, n + 1 - rank).

    Its standard deviations are 0.090, 0.020 and 0.007; the limits are three or more standard errors
    of the mean wide on each side.
    """
    found, stated = [], 0.0
    for seed in range(60):
        fit, bound, test = (
            _networks(count, seed=1000 * seed + part, noise=0.04)
            for part, count in enumerate((30, networks, 150))
        )
        model = calibrate(fit, bound, test)
        found.append(model.quality.coverage)
        stated = model.coverage
    assert low < stated < high
    assert low < np.mean(found) < high


# ---- one increasing function


@given(
    offset=st.floats(0, 20),
    ratio=st.floats(0.9, 2),
    cost=st.floats(0, 1e6),
    share=st.floats(1e-9, 1),
)
def test_prediction_and_bound_grow_with_every_cost(
    offset: float, ratio: float, cost: float, share: float
) -> None:
    model = _model(offset, ratio)
    more = cost + (cost + 1) * share
    assert model.predict_ms(cost) < model.predict_ms(more)
    assert model.upper_ms(cost) < model.upper_ms(more)
    assert model.upper_ms(cost) == pytest.approx(ratio * (offset + cost) / 1000)


@given(row=st.floats(1e-3, 1e5), scale=st.floats(0.2, 2), per_op=st.floats(-20, 20))
def test_every_op_costs_something_and_a_longer_row_never_less(
    row: float, scale: float, per_op: float
) -> None:
    model = replace(_model(), scales={"fp32": scale}, per_op_us=per_op)
    cost = model.op_cost_us("fp32", row)
    assert cost >= FLOOR_US
    assert cost == max(FLOOR_US, scale * row + per_op)
    assert model.op_cost_us("fp32", row * 1.5) >= cost


# ---- budgets


@settings(max_examples=300, deadline=None)
@given(
    offset=st.floats(0, 20),
    ratio=st.floats(0.9, 2),
    limit=st.one_of(st.floats(0.05, 1e4), st.sampled_from([0.1, 0.5, 1.0, 2.0, 33.3])),
)
def test_a_budget_meets_its_limit_and_the_next_float_does_not(
    offset: float, ratio: float, limit: float
) -> None:
    model = _model(offset, ratio)
    with _within(5):
        budget = model.budget_us(limit)
    assert model.upper_ms(budget) <= limit
    assert model.upper_ms(math.nextafter(budget, math.inf)) > limit


@pytest.mark.parametrize(
    ("offset", "ratio", "limit"),
    [
        (20.0, 1.0, 0.02),
        (20.0, 1.25, 0.025),
        (5.0, 1.0, 0.005),
        (20.0, 1.0, 0.02 + 1e-15),
        (20.0, 1.0, 0.02 - 1e-15),
        (20.0, 1.0, 0.01),
        (0.0, 1.0, 1e-6),
    ],
)
def test_a_limit_near_the_offset_has_its_budget_at_once(
    offset: float, ratio: float, limit: float
) -> None:
    """The budget is about zero, where floats lie far closer together than those of the sum."""
    model = _model(offset, ratio)
    with _within(2):
        budget = model.budget_us(limit)
    assert model.upper_ms(budget) <= limit
    assert model.upper_ms(math.nextafter(budget, math.inf)) > limit


def test_no_limit_at_all_has_an_endless_budget_at_once() -> None:
    with _within(2):
        assert _model(3.0, 1.1).budget_us(math.inf) == math.inf


# ---- searched networks


def _searched(model: LatencyModel, count: int, *, seed: int, slower: float) -> list[float]:
    """Measured latencies over predictions of networks that take longer than random ones do."""
    noise = np.random.default_rng(seed).normal(size=count)
    return (slower * np.exp(0.02 * noise)).tolist()


def _joined(model: LatencyModel, ratios: list[float], percentile: int = 50) -> LatencyModel:
    for number, ratio in enumerate(ratios):
        predicted_us = 100.0 + number + model.offset_us
        model = model.joined(percentile, str(number), ratio * predicted_us / 1000, 100.0 + number)
    return model


def test_a_searched_network_over_the_bound_raises_it_to_what_it_measures() -> None:
    model = _model(offset=7.0, ratio=1.1)
    assert _joined(model, [1.05, 1.08]).at(50).upper_ratio == 1.1
    raised = _joined(model, [1.05, 1.2, 1.08])
    assert raised.at(50).upper_ratio == pytest.approx(1.2, rel=1e-12)
    assert raised.apart == model
    assert LatencyModel.from_dict(raised.to_dict()) == raised
    assert raised.at(50).upper_ms(raised.at(50).budget_us(0.5)) <= 0.5


def test_a_network_that_is_measured_again_counts_once_with_its_newest_latency() -> None:
    model = _model(ratio=1.1)
    twice = model.joined(50, "one", 0.15, 100.0).joined(50, "one", 0.12, 100.0)
    assert twice.searched == {"50": {"one": pytest.approx(1.2)}}
    assert twice.at(50).upper_ratio == pytest.approx(1.2)


def test_searched_networks_bound_their_own_percentile_alone() -> None:
    model = replace(_model(ratio=1.1), tails={"95": (1.3, 1.5)})
    raised = _joined(model, [1.9], percentile=95)
    assert raised.at(50).upper_ratio == 1.1
    high = raised.at(95)
    assert high.predict_ms(1000.0) == pytest.approx(1.3)
    assert high.upper_ms(1000.0) == pytest.approx(1.9)


def test_a_table_told_at_another_pace_bounds_the_same_searched_latencies() -> None:
    raised = _joined(_model(offset=7.0, ratio=1.1), [1.2])
    other = raised.at_pace(1.25)
    assert other.at(50).upper_ms(1.25 * 500.0) == pytest.approx(raised.at(50).upper_ms(500.0))


@pytest.mark.parametrize(("networks", "low"), [(3, 0.70), (19, 0.93), (99, 0.98)])
def test_the_joined_bound_covers_searched_networks_where_that_of_random_ones_does_not(
    networks: int, low: float
) -> None:
    """The mean over 200 seeds of how often it holds for 50 more; a bound from k ratios covers
    k / (k + 1) of further ones, whose standard error here is below 0.02, 0.005 and 0.002.
    """
    model = _model(ratio=1.05)
    held, plain = [], []
    for seed in range(200):
        known = _searched(model, networks, seed=seed, slower=1.06)
        further = np.array(_searched(model, 50, seed=10_000 + seed, slower=1.06))
        bound = _joined(model, known).at(50).upper_ratio
        held.append(float((further <= bound).mean()))
        plain.append(float((further <= model.upper_ratio).mean()))
    assert np.mean(held) > low
    assert np.mean(plain) < 0.4
