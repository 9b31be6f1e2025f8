"""The only clock of the project.

Calls are timed in blocks, each after a warm-up of its own; a row or a network is measured in
several blocks, spread over rounds (or fresh processes) so that a drift of the machine hits all
alike. The median of the block medians is the latency.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """How latencies are taken; part of a table's condition.

    A block warms up for `warmup_ms`, then lasts `block_ms`, but at least `min_runs` and at most
    `max_runs` calls. A spread above `max_spread` makes a measurement unstable.
    """

    rounds: int = 5
    warmup_ms: float = 2.0
    block_ms: float = 8.0
    min_runs: int = 10
    max_runs: int = 200
    max_spread: float = 0.10

    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """A latency with its uncertainty.

    `spread` is the interquartile range of the block medians over their median; `runs` counts all
    timed calls.
    """

    median_us: float
    min_us: float
    p95_us: float
    spread: float
    runs: int
    stable: bool


def now_s() -> float:
    """Seconds on the monotonic clock, for durations that are told, not for tables."""
    return time.perf_counter()


def time_block(call: Callable[[], object], protocol: Protocol) -> Samples:
    """Microseconds of each timed call of one block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        calls, start = 0, time.perf_counter_ns()
        while calls < 3 or (time.perf_counter_ns() - start) < protocol.warmup_ms * 1e6:
            call()
            calls += 1
        each_ns = (time.perf_counter_ns() - start) / calls
        runs = int(np.clip(protocol.block_ms * 1e6 / each_ns, protocol.min_runs, protocol.max_runs))
        samples = np.empty(runs)
        for index in range(runs):
            before = time.perf_counter_ns()
            call()
            samples[index] = time.perf_counter_ns() - before
    finally:
        if collecting:
            gc.enable()
    return samples / 1000


def summarise(blocks: Sequence[Samples], protocol: Protocol) -> Measurement:
    """One measurement from the blocks of all rounds.

    >>> blocks = [np.array([10.0, 11.0, 12.0]), np.array([11.0, 11.0, 30.0])]
    >>> summarise(blocks, Protocol()).median_us, summarise(blocks, Protocol()).stable
    (11.0, True)
    """
    medians = np.array([np.median(block) for block in blocks])
    everything = np.concatenate(list(blocks))
    median = float(np.median(medians))
    low, high = np.percentile(medians, [25, 75])
    spread = float((high - low) / median)
    return Measurement(
        median_us=median,
        min_us=float(everything.min()),
        p95_us=float(np.percentile(everything, 95)),
        spread=spread,
        runs=len(everything),
        stable=spread <= protocol.max_spread,
    )
