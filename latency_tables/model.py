"""What rows predict for a whole network: one additive cost, then a calibration and a bound.

An op's cost is what its row says that it costs inside a network (`LatencyTable.in_network_us`),
scaled by its precision's factor, plus a constant per op. A network's prediction is the sum of its
ops' costs plus an offset. Inside a network an op finds its weights further away than where it is
called over and over, and not equally so in every precision: that is what the factors and constants,
fitted on whole networks, put right.

Prediction and bound are strictly increasing functions of the one additive cost, so a latency limit
is a budget on that cost, and dynamic programming over it is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from latency_tables.percentiles import MEDIAN
from quant.errors import InvalidInput

Floats = npt.NDArray[np.float64]

COVERAGE = 0.99
"""The coverage that the upper bound aims at; it takes at least 99 networks to state it."""

FLOOR_US = 0.01
"""The least cost of an op: every op takes some time, so adding one always costs."""


def largest_within(
    upper: Callable[[float], float], limit: float, guess: float, magnitude: float
) -> float:
    """The largest sum whose `upper` bound is at most `limit`, to the last digit.

    `upper` is increasing; `guess` is its inverse at the limit up to rounding, and `magnitude` the
    size of the terms that it was computed from.
    """
    reach = 8 * math.ulp(max(abs(guess), abs(magnitude)))
    low, high = guess - reach, guess + reach
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if upper(middle) <= limit else (low, middle)
    return low


@dataclass(frozen=True)
class Quality:
    """How the model did on networks that neither fitted nor bounded it; errors are fractions."""

    networks: int
    mean_error: float
    worst_error: float
    within_5: float
    within_10: float
    tau: float
    spearman: float
    coverage: float


@dataclass(frozen=True)
class LatencyModel:
    """The calibration of a table on the networks of one space.

    `upper_ratio` times the prediction bounds the measured latency with probability `coverage`
    (split conformal prediction: Vovk et al. 2005; Lei et al. 2018, section 2.2) for a network drawn
    like the calibration networks. `tails` has the same for other percentiles of a network's calls:
    by percentile, its usual ratio to the predicted median, and the ratio that bounds it.

    Networks that a search chose are not drawn like those: it prefers what is predicted too low. So
    `searched` has by percentile, then by network, the measured latency of such networks over the
    predicted median, and they have a bound of their own (conformal prediction by group: Vovk et
    al. 2005, section 4.5); the higher of both holds.
    """

    scales: dict[str, float]
    per_op_us: float
    offset_us: float
    upper_ratio: float
    coverage: float
    quality: Quality
    tails: dict[str, tuple[float, float]] = field(default_factory=dict)
    usual_ratio: float = 1.0
    searched: dict[str, dict[str, float]] = field(default_factory=dict)

    def at(self, percentile: int) -> "LatencyModel":
        """The model of a percentile of a network's calls, its bound that of random and of searched
        networks; raises InvalidInput for one that was not calibrated.
        """
        if percentile != MEDIAN and str(percentile) not in self.tails:
            raise InvalidInput(
                f"The percentile {percentile} is not calibrated.",
                accepted=", ".join(map(str, (MEDIAN, *self.tails))),
            )
        usual, upper = self.tails.get(str(percentile), (1.0, self.upper_ratio))
        if found := self.searched.get(str(percentile)):
            upper = max(upper, conformal(list(found.values())))
        return replace(self, usual_ratio=usual, upper_ratio=upper / usual)

    def joined(self, percentile: int, network: str, latency_ms: float, additive_us: float) -> Self:
        """The model that knows what a searched network measures, too; its newest measurement."""
        ratio = 1000 * latency_ms / (self.offset_us + additive_us)
        known = self.searched.get(str(percentile), {})
        return replace(self, searched=self.searched | {str(percentile): known | {network: ratio}})

    @property
    def apart(self) -> Self:
        """The model of random networks alone."""
        return replace(self, searched={})

    def op_cost_us(self, precision: str, inside_us: float) -> float:
        """An op's additive cost, from what its row says that it costs inside a network."""
        return max(FLOOR_US, self.scales[precision] * inside_us + self.per_op_us)

    def predict_ms(self, additive_us: float) -> float:
        """The predicted latency of a network from the sum of its ops' costs."""
        return self.usual_ratio * (self.offset_us + additive_us) / 1000

    def upper_ms(self, additive_us: float) -> float:
        """The upper bound of the same network."""
        return self.upper_ratio * self.predict_ms(additive_us)

    def budget_us(self, limit_ms: float) -> float:
        """The largest additive cost whose upper bound is at most `limit_ms`."""
        if math.isinf(limit_ms):
            return limit_ms
        guess = limit_ms * 1000 / (self.upper_ratio * self.usual_ratio) - self.offset_us
        return largest_within(self.upper_ms, limit_ms, guess, max(self.offset_us, limit_ms * 1000))

    def at_pace(self, factor: float) -> "LatencyModel":
        """The model for rows whose times were multiplied; it bounds the same observed latencies."""
        return replace(
            self,
            per_op_us=factor * self.per_op_us,
            offset_us=factor * self.offset_us,
            upper_ratio=self.upper_ratio / factor,
            tails={n: (usual / factor, upper / factor) for n, (usual, upper) in self.tails.items()},
            searched={
                percentile: {network: ratio / factor for network, ratio in found.items()}
                for percentile, found in self.searched.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The model as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LatencyModel":
        """The model that `to_dict` wrote."""
        tails = {name: tuple(pair) for name, pair in data["tails"].items()}
        return cls(**{**data, "quality": Quality(**data["quality"]), "tails": tails})


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network that was run whole: its ops as (precision, cost inside a network in us).

    `latency_us` is at the table's pace; `observed_us` at the machine's pace of that moment, and so
    are `tails_us`, the percentiles of its calls.
    """

    rows: tuple[tuple[str, float], ...]
    latency_us: float
    observed_us: float
    tails_us: dict[int, float] = field(default_factory=dict)


def calibrate(
    fit: Sequence[MeasuredNetwork],
    bound: Sequence[MeasuredNetwork],
    test: Sequence[MeasuredNetwork],
) -> LatencyModel:
    """Fit the factors on `fit`, set the bound on `bound`, and state the quality on `test`.

    The three must be disjoint random networks of one space. Errors are those at the table's pace;
    the bound, and how often it holds, are about the latencies as they were observed. The fit
    minimises squared relative errors, with factors in [0.2, 2], the constant per op within 20 us of
    zero and the offset in [0, 20] us; where a tenth of the fastest network is more, within that.
    """
    if not (fit and bound and test):
        raise ValueError("calibration needs networks to fit, to bound and to test")
    precisions = sorted({p for network in fit for p, _ in network.rows})
    unseen = {p for network in (*bound, *test) for p, _ in network.rows} - set(precisions)
    features = np.array([_features(network, precisions) for network in fit])
    measured = np.array([network.latency_us for network in fit])
    most = max(20.0, 0.1 * float(measured.min()))
    low = [0.2] * len(precisions) + [-most, 0.0]
    high = [2.0] * len(precisions) + [most, most]
    solution = optimize.lsq_linear(
        features / measured[:, None], np.ones(len(measured)), bounds=(low, high)
    ).x
    plain = LatencyModel(
        scales=dict(zip(precisions, map(float, solution), strict=False))
        | dict.fromkeys(unseen, 1.0),
        per_op_us=float(solution[-2]),
        offset_us=float(solution[-1]),
        upper_ratio=1.0,
        coverage=0.0,
        quality=Quality(0, 0, 0, 0, 0, 0, 0, 0),
    )
    predicted = np.array([predict_us(plain, network) for network in bound])

    def usual_and_upper(observed: Sequence[float]) -> tuple[float, float]:
        ratios = np.array(observed) / predicted
        return float(np.median(ratios)), conformal(ratios)

    tails = {
        str(percentile): usual_and_upper([network.tails_us[percentile] for network in bound])
        for percentile in bound[0].tails_us
    }
    _, upper_ratio = usual_and_upper([network.observed_us for network in bound])
    coverage = min(COVERAGE, _rank(len(bound)) / (len(bound) + 1))
    bounded = replace(plain, upper_ratio=upper_ratio, coverage=coverage, tails=tails)
    return replace(bounded, quality=quality_of(bounded, test))


def conformal(ratios: Sequence[float] | Floats) -> float:
    """What bounds a further ratio of the same kind with probability `COVERAGE`; where there are too
    few for that, the largest.

    >>> conformal([1.02, 1.05, 1.01])
    1.05
    """
    return float(np.sort(ratios)[_rank(len(ratios)) - 1])


def _rank(count: int) -> int:
    """Which of `count` ratios, from the smallest, bounds a further one (Lei et al. 2018, eq. 2)."""
    return min(count, math.ceil(COVERAGE * (count + 1)))


def quality_of(model: LatencyModel, networks: Sequence[MeasuredNetwork]) -> Quality:
    """How a model does on networks that it has not seen."""
    predicted = np.array([predict_us(model, network) for network in networks])
    observed = np.array([network.observed_us for network in networks])
    true = np.array([network.latency_us for network in networks])
    return quality(predicted, true, float((observed <= model.upper_ratio * predicted).mean()))


def quality(predicted: Floats, true: Floats, coverage: float) -> Quality:
    """The quality of predictions (n,) of latencies (n,), with how often their bound held."""
    errors = np.abs(predicted / true - 1)
    return Quality(
        networks=len(true),
        mean_error=float(errors.mean()),
        worst_error=float(errors.max()),
        within_5=float((errors <= 0.05).mean()),
        within_10=float((errors <= 0.10).mean()),
        tau=float(stats.kendalltau(predicted, true).statistic),
        spearman=float(stats.spearmanr(predicted, true).statistic),
        coverage=coverage,
    )


def _features(network: MeasuredNetwork, precisions: list[str]) -> list[float]:
    sums = [sum(us for p, us in network.rows if p == precision) for precision in precisions]
    return [*sums, float(len(network.rows)), 1.0]


def predict_us(model: LatencyModel, network: MeasuredNetwork) -> float:
    """The median latency that a model predicts for a network."""
    return model.offset_us + sum(model.op_cost_us(p, us) for p, us in network.rows)
