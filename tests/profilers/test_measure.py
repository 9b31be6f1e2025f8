"""The clock: exact on a hand-driven clock, sane on the real one."""

import gc
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profilers import measure
from profilers.measure import Protocol, now_s, summarise, time_block


class HandClock:
    """Time passes only in `spend`."""

    def __init__(self) -> None:
        self.ns = 0
        self.calls: list[int] = []

    def perf_counter_ns(self) -> int:
        return self.ns

    def spend(self, us: float) -> None:
        self.calls.append(self.ns)
        self.ns += round(us * 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    hand = HandClock()
    monkeypatch.setattr(measure, "time", hand)
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
    assert samples.tolist() == [100.0] * 80
    assert len(clock.calls) == 20 + 80


@pytest.mark.parametrize(
    ("us", "runs"), [(1, 200), (39, 200), (41, 195), (790, 10), (900, 10), (50_000, 10)]
)
def test_a_block_has_at_least_min_runs_and_at_most_max_runs(
    clock: HandClock, us: float, runs: int
) -> None:
    protocol = Protocol(warmup_ms=2, block_ms=8, min_runs=10, max_runs=200)
    assert len(time_block(lambda: clock.spend(us), protocol)) == runs


def test_a_slow_call_warms_up_three_times_at_least(clock: HandClock) -> None:
    time_block(lambda: clock.spend(50_000), Protocol(warmup_ms=2, min_runs=10))
    assert len(clock.calls) == 3 + 10


def test_each_call_is_timed_by_itself(clock: HandClock) -> None:
    durations = iter([5.0] * 3 + [float(us) for us in range(1, 11)])
    protocol = Protocol(warmup_ms=0, block_ms=0.001, min_runs=10, max_runs=200)
    samples = time_block(lambda: clock.spend(next(durations)), protocol)
    assert samples.tolist() == [float(us) for us in range(1, 11)]


def test_the_first_slow_calls_are_not_among_the_samples(clock: HandClock) -> None:
    durations = iter([3000.0] + [10.0] * 1000)
    samples = time_block(lambda: clock.spend(next(durations)), Protocol(max_runs=50))
    assert samples.max() == 10.0


def test_real_sleeps_are_told_in_microseconds() -> None:
    protocol = Protocol(warmup_ms=1, block_ms=5, min_runs=5, max_runs=5)
    samples = time_block(lambda: time.sleep(0.002), protocol)
    assert samples.shape == (5,)
    assert (samples >= 2000).all()
    assert np.median(samples) < 50_000


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


def test_a_summary_of_hand_made_blocks() -> None:
    """Medians 10, 20, 30, 40: their median is 25, their quartiles 17.5 and 32.5."""
    blocks = [np.array([m - 1.0, m, m + 100.0]) for m in (40, 10, 30, 20)]
    measured = summarise(blocks, Protocol(max_spread=0.6))
    assert measured.median_us == 25.0
    assert measured.min_us == 9.0
    assert measured.runs == 12
    assert measured.spread == pytest.approx((32.5 - 17.5) / 25)
    assert measured.stable
    assert measured.p95_us == pytest.approx(130 + 0.45 * 10)  # between the two largest of twelve


def test_the_latency_is_the_median_of_medians_not_of_all_calls() -> None:
    blocks = [np.full(1000, 1.0), np.full(3, 5.0), np.full(3, 6.0)]
    assert summarise(blocks, Protocol()).median_us == 5.0


@pytest.mark.parametrize(("spread", "stable"), [(0.10, True), (0.1001, False), (0.0, True)])
def test_a_spread_above_the_protocols_is_unstable(spread: float, stable: bool) -> None:
    half = 100 * spread
    blocks = [np.full(4, value) for value in (100 - half, 100.0, 100 + half)]
    measured = summarise(blocks, Protocol(max_spread=0.1))
    assert measured.spread == pytest.approx(spread)
    assert measured.stable is stable


def test_outliers_inside_blocks_do_not_make_a_measurement_unstable() -> None:
    blocks = [np.array([10.0] * 20 + [1000.0]) for _ in range(5)]
    measured = summarise(blocks, Protocol())
    assert (measured.median_us, measured.spread, measured.stable) == (10.0, 0.0, True)


@given(
    st.lists(
        st.lists(st.floats(0.1, 1e5), min_size=1, max_size=8).map(np.array), min_size=1, max_size=6
    )
)
def test_a_summary_is_that_of_sorting(blocks: list[np.ndarray]) -> None:
    def middle(values: list[float]) -> float:
        ordered = sorted(values)
        low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        return (low + high) / 2

    measured = summarise(blocks, Protocol())
    everything = sorted(value for block in blocks for value in block.tolist())
    assert measured.median_us == pytest.approx(middle([middle(b.tolist()) for b in blocks]))
    assert measured.min_us == everything[0]
    assert measured.runs == len(everything)
    assert everything[0] <= measured.p95_us <= everything[-1]
    assert measured.spread >= 0
    assert measured.stable == (measured.spread <= 0.10)


def test_a_protocol_is_plain_data_that_reads_back() -> None:
    protocol = Protocol(rounds=3, max_spread=0.2)
    assert Protocol(**protocol.to_dict()) == protocol
