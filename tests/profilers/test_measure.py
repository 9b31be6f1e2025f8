"""The clock: exact on a hand-driven clock, sane on the real one."""

import gc
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers import measure
from profilers.measure import (
    Protocol,
    interval,
    now_s,
    pace_of,
    summarise,
    time_block,
    time_replays,
)


class HandClock:
    """Time passes only in `spend` and in `pace`, which takes what `paces` says, at last 3 us."""

    def __init__(self) -> None:
        self.ns = 0
        self.calls: list[int] = []
        self.paces: list[float] = []
        self.paced: list[int] = []

    def perf_counter_ns(self) -> int:
        return self.ns

    def spend(self, us: float) -> None:
        self.calls.append(self.ns)
        self.ns += round(us * 1000)

    def pace_ns(self) -> float:
        took = 1000 * (self.paces.pop(0) if self.paces else PACE_US)
        self.paced.append(len(self.calls))
        self.ns += round(took)
        return took


PACE_US = 3.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    hand = HandClock()
    monkeypatch.setattr(measure, "time", hand)
    monkeypatch.setattr(measure, "_pace_ns", hand.pace_ns)
    return hand


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    before = gc.isenabled()
    yield
    (gc.enable if before else gc.disable)()


# ---- one block


def test_a_block_warms_up_then_lasts_as_long_as_told(clock: HandClock) -> None:
    """100 us a call: 2 ms of warm-up are 20 calls, 8 ms of block are 80."""
    protocol = Protocol(warmup_ms=2, block_ms=8, min_runs=10, max_runs=200)
    samples = time_block(lambda: clock.spend(100), protocol)
    assert samples.tolist() == [[100.0, PACE_US]] * 80
    assert len(clock.calls) == 20 + 80


@pytest.mark.parametrize(
    ("us", "runs"), [(1, 200), (39, 200), (41, 195), (790, 10), (900, 10), (50_000, 10)]
)
def test_a_block_has_at_least_min_runs_and_at_most_max_runs(
    clock: HandClock, us: float, runs: int
) -> None:
    protocol = Protocol(warmup_ms=2, block_ms=8, min_runs=10, max_runs=200)
    assert len(time_block(lambda: clock.spend(us), protocol)) == runs


def test_a_slow_call_warms_up_twice_at_least(clock: HandClock) -> None:
    time_block(lambda: clock.spend(50_000), Protocol(warmup_ms=2, min_runs=10))
    assert len(clock.calls) == 2 + 10


@pytest.mark.parametrize(("us", "runs"), [(1, 200), (100, 80), (900, 10)])
def test_replays_are_as_many_as_their_own_time_allows_whatever_they_tell(
    clock: HandClock, us: float, runs: int
) -> None:
    """A graph of fifty copies tells a fiftieth of what it takes."""
    protocol = Protocol(warmup_ms=2, block_ms=8, min_runs=10, max_runs=200)

    def replay_us() -> float:
        assert not gc.isenabled()
        clock.spend(us)
        return us / 50

    gc.enable()
    samples = time_replays(replay_us, protocol)
    assert gc.isenabled()
    assert samples.tolist() == [[us / 50, 1.0]] * runs
    assert len(clock.calls) == max(2, -(-2000 // us)) + runs


def test_each_call_is_timed_by_itself(clock: HandClock) -> None:
    durations = iter([5.0] * 2 + [float(us) for us in range(1, 11)])
    protocol = Protocol(warmup_ms=0, block_ms=0.001, min_runs=10, max_runs=200)
    samples = time_block(lambda: clock.spend(next(durations)), protocol)
    assert samples[:, 0].tolist() == [float(us) for us in range(1, 11)]


def test_the_first_slow_calls_are_not_among_the_samples(clock: HandClock) -> None:
    durations = iter([3000.0] + [10.0] * 1000)
    samples = time_block(lambda: clock.spend(next(durations)), Protocol(max_runs=50))
    assert samples[:, 0].max() == 10.0


# ---- the pace beside the calls


def test_a_warm_up_of_the_pace_then_one_every_pace_ms_and_one_at_the_end(clock: HandClock) -> None:
    """100 us a call: a millisecond is over in the 11th call after the last pace."""
    protocol = Protocol(warmup_ms=2, block_ms=8, pace_ms=1, min_runs=10)
    time_block(lambda: clock.spend(100), protocol)
    assert [calls - 20 for calls in clock.paced] == [0, 0, 11, 22, 33, 44, 55, 66, 77, 80]


def test_the_pace_is_taken_after_each_call_that_is_longer_than_pace_ms(clock: HandClock) -> None:
    protocol = Protocol(warmup_ms=2, pace_ms=1, min_runs=4)
    time_block(lambda: clock.spend(5000), protocol)
    assert [calls - 2 for calls in clock.paced] == [0, 0, 1, 2, 3, 4]


def test_a_calls_pace_is_the_quicker_of_the_one_before_and_the_one_after(clock: HandClock) -> None:
    clock.paces = [900.0, 5.0, 7.0, 90.0, 6.0, 4.0]
    samples = time_block(lambda: clock.spend(5000), Protocol(warmup_ms=2, min_runs=4))
    assert samples.tolist() == [[5000.0, 5.0], [5000.0, 7.0], [5000.0, 6.0], [5000.0, 4.0]]


def test_calls_between_two_paces_share_theirs(clock: HandClock) -> None:
    clock.paces = [1.0, 8.0, 6.0, 7.0]
    protocol = Protocol(warmup_ms=1, block_ms=1, pace_ms=0.25, min_runs=5, max_runs=5)
    samples = time_block(lambda: clock.spend(100), protocol)
    assert clock.paced == [10, 10, 13, 15]
    assert samples.tolist() == [[100.0, 6.0]] * 5


def test_the_time_of_the_pace_is_in_no_call(clock: HandClock) -> None:
    clock.paces = [1e6] * 20
    protocol = Protocol(warmup_ms=2, block_ms=8, min_runs=10)
    samples = time_block(lambda: clock.spend(100), protocol)
    assert samples[:, 0].tolist() == [100.0] * 80


def test_the_real_pace_is_a_piece_of_work_of_tens_of_microseconds() -> None:
    paces = sorted(measure._pace_ns() for _ in range(50))
    assert 5_000 < paces[0] < 2_000_000
    assert paces[25] < 3 * paces[0], "it hangs on nothing but the speed of the core"


def test_real_sleeps_are_told_in_microseconds() -> None:
    protocol = Protocol(warmup_ms=1, block_ms=5, min_runs=5, max_runs=5)
    samples = time_block(lambda: time.sleep(0.002), protocol)
    assert samples.shape == (5, 2)
    assert (samples[:, 0] >= 2000).all()
    assert np.median(samples[:, 0]) < 50_000
    assert (samples[:, 1] > 0).all()
    assert samples[:, 1].max() < 50_000


def test_seconds_never_run_backwards() -> None:
    moments = [now_s() for _ in range(100)]
    assert moments == sorted(moments)
    before = now_s()
    time.sleep(0.01)
    assert 0.009 < now_s() - before < 5


# ---- the garbage collector


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_rests_during_a_block_and_is_as_before_afterwards(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    seen: set[bool] = set()
    time_block(lambda: seen.add(gc.isenabled()), Protocol(warmup_ms=0, block_ms=0.01))
    assert seen == {False}
    assert gc.isenabled() is collecting


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("good_calls", [0, 3, 7])
def test_the_collector_is_as_before_after_an_error(collecting: bool, good_calls: int) -> None:
    """In the warm-up and in the timed part alike."""
    (gc.enable if collecting else gc.disable)()
    left = iter(range(good_calls))

    def call() -> None:
        if next(left, None) is None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        time_block(call, Protocol(warmup_ms=0, min_runs=10))
    assert gc.isenabled() is collecting


# ---- many blocks


def block(*us: float, pace: float = 1.0) -> np.ndarray:
    """Calls of a machine of one pace."""
    return np.column_stack([us, np.full(len(us), pace)])


def test_a_summary_of_hand_made_blocks() -> None:
    """Medians 10, 20, 30, 40: their median is 25, their quartiles 17.5 and 32.5."""
    blocks = [block(m - 1.0, m, m + 100.0) for m in (40, 10, 30, 20)]
    measured = summarise(blocks, Protocol(max_spread=0.6))
    assert measured.latency_us == measured.median_us == 25.0
    assert (measured.low_us, measured.high_us) == (10.0, 40.0)
    assert measured.min_us == 9.0
    assert measured.runs == 12
    assert measured.spread == pytest.approx((32.5 - 17.5) / 25)
    assert measured.stable
    assert measured.p95_us == pytest.approx(130 + 0.45 * 10)  # between the two largest of twelve


def test_the_latency_is_the_median_of_medians_not_of_all_calls() -> None:
    blocks = [block(*[1.0] * 1000), block(*[5.0] * 3), block(*[6.0] * 3)]
    assert summarise(blocks, Protocol()).median_us == 5.0


@pytest.mark.parametrize(("spread", "stable"), [(0.10, True), (0.1001, False), (0.0, True)])
def test_a_spread_above_the_protocols_is_unstable(spread: float, stable: bool) -> None:
    half = 100 * spread
    blocks = [block(*[value] * 4) for value in (100 - half, 100.0, 100 + half)]
    measured = summarise(blocks, Protocol(max_spread=0.1))
    assert measured.spread == pytest.approx(spread)
    assert measured.stable is stable


def test_outliers_inside_blocks_do_not_make_a_measurement_unstable() -> None:
    blocks = [block(*[10.0] * 20, 1000.0) for _ in range(5)]
    measured = summarise(blocks, Protocol())
    assert (measured.median_us, measured.spread, measured.stable) == (10.0, 0.0, True)


@given(
    st.lists(
        st.lists(st.floats(0.1, 1e5), min_size=1, max_size=8).map(lambda us: block(*us)),
        min_size=1,
        max_size=6,
    )
)
def test_a_summary_is_that_of_sorting(blocks: list[np.ndarray]) -> None:
    def middle(values: list[float]) -> float:
        ordered = sorted(values)
        low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        return (low + high) / 2

    measured = summarise(blocks, Protocol())
    everything = sorted(value for each in blocks for value in each[:, 0].tolist())
    assert measured.median_us == pytest.approx(
        middle([middle(each[:, 0].tolist()) for each in blocks])
    )
    assert measured.min_us == everything[0]
    assert measured.runs == len(everything)
    assert everything[0] <= measured.p95_us <= everything[-1]
    assert measured.spread >= 0
    assert measured.stable == (measured.spread <= 0.10)


@pytest.mark.parametrize("percentile", [50, 90, 95, 99])
def test_the_latency_is_at_the_percentile_that_is_asked_for(percentile: float) -> None:
    """The median is that of the blocks' medians, any other that of all calls."""
    blocks = [block(m - 1.0, m, m + 2.0) for m in (40, 10, 30)] + [block(19.0, 20.0, 141.0)]
    measured = summarise(blocks, Protocol(), percentile=percentile)
    calls = sorted([9, 10, 12, 19, 20, 141, 29, 30, 32, 39, 40, 42])
    place = percentile / 100 * 11
    between = calls[int(place)] + (place % 1) * (calls[min(int(place) + 1, 11)] - calls[int(place)])
    assert measured.latency_us == pytest.approx(25.0 if percentile == 50 else between)
    assert measured.median_us == 25.0


# ---- the interval of a median


def holding(count: int, low: int) -> float:
    """How probably the median lies between the order statistics `low` and count - 1 - `low`, from
    the binomial distribution: the median lies below the first if at most `low` draws do.
    """
    return 1 - 2 * sum(math.comb(count, below) for below in range(low + 1)) / 2**count


@pytest.mark.parametrize("count", range(1, 40))
def test_the_interval_is_the_narrowest_that_holds_the_median_nine_times_in_ten(count: int) -> None:
    low, high = interval(np.random.default_rng(count).permutation(count).astype(float))
    assert low + high == count - 1, "symmetric about the middle"
    if count < 5:
        assert low == 0, "nothing holds it so often; the ends come nearest"
        return
    assert holding(count, int(low)) >= 0.9
    if low + 1 < high - 1:
        assert holding(count, int(low) + 1) < 0.9, "a narrower one would not"


@pytest.mark.parametrize("count", range(5, 16))
def test_the_interval_holds_the_median_as_often_as_the_binomial_says(count: int) -> None:
    """20,000 draws of a skewed distribution of median 1: within four standard errors."""
    rng = np.random.default_rng(count)
    draws = np.exp(rng.normal(size=(20_000, count))) ** 3
    low, high = np.array([interval(row) for row in draws]).T
    stated = holding(count, int(interval(np.arange(float(count)))[0]))
    found = float(((low <= 1) & (high >= 1)).mean())
    assert 0.9 <= stated < 1
    assert found == pytest.approx(stated, abs=4 * math.sqrt(stated * (1 - stated) / 20_000))


@given(
    st.lists(st.floats(0.1, 1e6), min_size=1, max_size=15),
    st.lists(st.floats(0, 1e6), min_size=15, max_size=15),
)
def test_the_interval_is_of_the_values_in_any_order_and_grows_with_them(
    values: list[float], more: list[float]
) -> None:
    low, high = interval(np.array(values))
    assert low <= np.median(values) <= high
    assert {low, high} <= set(values)
    assert interval(np.array(values[::-1])) == (low, high)
    larger = interval(np.array(values) + more[: len(values)])
    assert larger[0] >= low
    assert larger[1] >= high


def test_more_blocks_make_the_interval_narrower() -> None:
    widths = []
    for count in (5, 10, 20, 40, 80):
        draws = np.random.default_rng(0).normal(size=(400, count))
        widths.append(np.mean([np.subtract(*interval(row)[::-1]) for row in draws]))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 3


# ---- a machine whose speed drifts


def drifting(speed: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Nine blocks of 30 noisy calls, times and paces multiplied by what `speed` says of a call."""
    rng = np.random.default_rng(5)
    factors = speed(np.linspace(0, 1, 9 * 30)).reshape(9, 30)
    return [np.column_stack([rng.normal(80, 2, 30) * factor, 40 * factor]) for factor in factors]


SPEEDS = {
    "a ramp": lambda t: 1 + 0.3 * t,
    "a step": lambda t: np.where(t < 0.4, 1.0, 1.25),
    "swings": lambda t: 1 + 0.1 * np.sin(50 * t),
    "jumps at every call": lambda t: np.random.default_rng(1).uniform(0.7, 1.4, len(t)),
    "another speed": lambda t: np.full(len(t), 2.0),
}


@pytest.mark.parametrize("percentile", [50, 90])
@pytest.mark.parametrize("name", SPEEDS)
def test_at_one_pace_a_drifting_machine_measures_what_a_steady_one_does(
    name: str, percentile: float
) -> None:
    steady, drifted = drifting(np.ones_like), drifting(SPEEDS[name])
    wanted = summarise(steady, Protocol(), percentile=percentile)
    found = summarise(drifted, Protocol(), pace_us=40.0, percentile=percentile)
    assert list(vars(found).values()) == pytest.approx(list(vars(wanted).values()), rel=1e-12)
    as_it_was = summarise(drifted, Protocol(), percentile=percentile)
    assert as_it_was.median_us != pytest.approx(wanted.median_us, rel=1e-3)


def test_times_at_another_pace_are_in_proportion_to_it() -> None:
    blocks = drifting(SPEEDS["swings"])
    one, two = (summarise(blocks, Protocol(), pace_us=pace) for pace in (40.0, 100.0))
    for name in ("latency_us", "median_us", "low_us", "high_us", "min_us", "p95_us"):
        assert getattr(two, name) == pytest.approx(2.5 * getattr(one, name))
    assert (two.spread, two.runs, two.stable) == (pytest.approx(one.spread), one.runs, one.stable)


def test_the_pace_of_blocks_is_the_median_over_all_calls() -> None:
    blocks = [block(1.0, pace=9.0), block(1.0, 1.0, 1.0, pace=5.0), block(1.0, pace=7.0)]
    assert pace_of(blocks) == 5.0
    assert pace_of(iter(blocks)) == 5.0


def test_a_protocol_is_plain_data_that_reads_back() -> None:
    protocol = Protocol(rounds=3, max_spread=0.2)
    assert Protocol(**protocol.to_dict()) == protocol
