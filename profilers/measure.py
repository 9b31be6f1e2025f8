"""The only clock of the project.

Calls are timed in blocks, each after a warm-up of its own; a row or a network is measured in
several blocks, spread over rounds (or fresh processes) so that a drift of the machine hits all
alike. The median of the block medians is the latency.

A core changes its frequency many times a second, by several percent, and takes every op along. So
the calls of a block have a pace beside them: how long a fixed piece of arithmetic takes before and
after. Times divided by their pace compare ops; times as they are tell what a user waits.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """How latencies are taken; part of a table's condition.

    A block warms up for `warmup_ms`, then lasts `block_ms`, but at least `min_runs` and at most
    `max_runs` calls; the pace is taken every `pace_ms`. After `rounds` blocks, a row goes on up to
    `max_rounds` while the half width of its interval is above `tolerance` of a network's latency.
    A spread above `max_spread`, or for a row such an interval, makes it unstable.
    """

    rounds: int = 4
    max_rounds: int = 8
    tolerance: float = 0.005
    warmup_ms: float = 2.0
    pace_ms: float = 1.0
    block_ms: float = 8.0
    min_runs: int = 16
    max_runs: int = 200
    max_spread: float = 0.10

    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain data."""
        return asdict(self)


GPU_PROTOCOL = Protocol(
    rounds=3, max_rounds=6, warmup_ms=200, block_ms=100, min_runs=50, max_runs=200, max_spread=0.025
)
"""For a GPU: its clocks need long to rise, then move little (after trtexec's defaults)."""


@dataclass(frozen=True)
class Measurement:
    """A latency with its uncertainty.

    `latency_us` is the statistic that a limit is held against: the median, or the percentile asked
    for. The median lies between `low_us` and `high_us` (see `interval`); `spread` is the
    interquartile range of the block medians over their median; `runs` counts all timed calls.
    """

    latency_us: float
    median_us: float
    low_us: float
    high_us: float
    min_us: float
    p95_us: float
    spread: float
    runs: int
    stable: bool


def now_s() -> float:
    """Seconds on the monotonic clock, for durations that are told, not for tables."""
    return time.perf_counter_ns() / 1e9


def time_block(call: Callable[[], object], protocol: Protocol) -> Samples:
    """One block, (runs, 2): microseconds of each timed call, and the pace around it.

    The pace is taken every `pace_ms`, and after longer calls after each; a call's is the quicker of
    the one before and the one after, since an interruption can only slow it.
    """
    with uncollected():
        runs = _warmed_up(call, protocol)
        times, before = np.empty(runs), np.empty(runs, np.int64)
        _pace_ns()
        paces = [_pace_ns()]
        due = time.perf_counter_ns() + protocol.pace_ms * 1e6
        for index in range(runs):
            start = time.perf_counter_ns()
            call()
            end = time.perf_counter_ns()
            times[index], before[index] = end - start, len(paces) - 1
            if end > due or index == runs - 1:
                paces.append(_pace_ns())
                due = time.perf_counter_ns() + protocol.pace_ms * 1e6
    pace = np.array(paces, float)
    return np.column_stack([times, np.minimum(pace[before], pace[before + 1])]) / 1000


def time_replays(replay_us: Callable[[], float], protocol: Protocol) -> Samples:
    """One block of a device that tells times itself, (runs, 2): what `replay_us` answers, in
    microseconds, and a pace of 1, since such a device has none of ours.
    """
    with uncollected():
        runs = _warmed_up(replay_us, protocol)
        return np.column_stack([[replay_us() for _ in range(runs)], np.ones(runs)])


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected while the block lasts."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _warmed_up(call: Callable[[], object], protocol: Protocol) -> int:
    """Call for the warm-up, twice at least; how many calls then make a block."""
    calls, start = 0, time.perf_counter_ns()
    while calls < 2 or (time.perf_counter_ns() - start) < protocol.warmup_ms * 1e6:
        call()
        calls += 1
    each_ns = (time.perf_counter_ns() - start) / calls
    return int(np.clip(protocol.block_ms * 1e6 / each_ns, protocol.min_runs, protocol.max_runs))


def _pace_ns() -> float:
    """How long fixed arithmetic takes now, in ns: what the core's frequency alone decides.

    Square roots of numbers that stay in the nearest cache: the memory has no part in it.
    """
    start = time.perf_counter_ns()
    for _ in range(40):
        np.sqrt(_NUMBERS, out=_ROOTS)
    return time.perf_counter_ns() - start


_NUMBERS = np.arange(1.0, 2049.0)
_ROOTS = np.empty_like(_NUMBERS)


def shuffled(keys: Iterable[str], turn: int) -> list[str]:
    """The keys in an order of the turn's own, so that a drift hits other keys in every turn."""
    ordered = sorted(keys)
    return [ordered[place] for place in np.random.default_rng(turn).permutation(len(ordered))]


def interval(values: Samples) -> tuple[float, float]:
    """The narrowest pair of order statistics, symmetric about the middle, that holds the median of
    what `values` (n,) are drawn from with probability 0.9 (Conover 1999, section 3.2); for fewer
    than five values their ends, which hold it less often.

    >>> interval(np.arange(10.0))
    (1.0, 8.0)
    """
    ordered, count = np.sort(values), len(values)
    outside, left = 0.0, 0
    for below in range(count // 2):
        outside += 2 * math.comb(count, below) / 2**count
        if outside > 0.1:
            break
        left = below
    return float(ordered[left]), float(ordered[count - 1 - left])


def pace_of(blocks: Iterable[Samples]) -> float:
    """The median pace of blocks, in us."""
    return float(np.median(np.concatenate([block[:, 1] for block in blocks])))


def summarise(
    blocks: Sequence[Samples],
    protocol: Protocol,
    *,
    pace_us: float | None = None,
    percentile: float = 50,
) -> Measurement:
    """One measurement from the blocks of all rounds, each (runs, 2) as `time_block` gives it.

    With `pace_us`, times are told as they would be at that pace; else as they were. The latency at
    a `percentile` other than the median is that of all calls.

    >>> blocks = [np.array([[10.0, 2.0], [11.0, 2.0]]), np.array([[21.0, 4.0], [21.0, 4.0]])]
    >>> summarise(blocks, Protocol()).median_us, summarise(blocks, Protocol(), pace_us=2).median_us
    (15.75, 10.5)
    """
    times = [
        block[:, 0] if pace_us is None else block[:, 0] * (pace_us / block[:, 1])
        for block in blocks
    ]
    medians = np.array([np.median(block) for block in times])
    everything = np.concatenate(times)
    median = float(np.median(medians))
    low, high = np.percentile(medians, [25, 75])
    spread = float((high - low) / median)
    at = median if percentile == 50 else float(np.percentile(everything, percentile))
    return Measurement(
        at,
        median,
        *interval(medians),
        min_us=float(everything.min()),
        p95_us=float(np.percentile(everything, 95)),
        spread=spread,
        runs=len(everything),
        stable=spread <= protocol.max_spread,
    )
