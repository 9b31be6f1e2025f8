"""What an op costs inside a network, from chains that differ in that op alone.

On some devices a graph's two ends cost as much as its ops: an engine of a GPU converts layouts
there. Over chains of k copies of an op, latency = a + b * k has the ends in a, and in b what the op
costs inside a network. An op that cannot follow itself stands behind a host, the cheapest of the
ops that hand on what it takes: its cost is what the chain of both takes more than the host alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latency_tables.boundaries import LEAST_SHARE, Chain, chain_key, heads
from latency_tables.ops import OpSpec

Way = Literal["slope", "host", "boundary", "alone"]
"""What tells an op's cost inside a network: the slope over its copies, the difference that it makes
behind a host, its row less what its boundary saves, or its row alone."""

LEAST_LENGTHS = 3
"""Two lengths have a slope too, but no error of it."""


@dataclass(frozen=True)
class Inside:
    """What an op costs inside a network, in us, and what tells it; `error_us` is the standard
    error of a slope.
    """

    us: float
    way: Way
    error_us: float = 0.0


def repeated(ops: Iterable[OpSpec], repeats: Sequence[int]) -> list[Chain]:
    """Chains of each of `repeats` copies, for every op that can follow itself, as executed."""
    return [(op,) * k for op in _executed(ops) if _follows_itself(op) for k in repeats]


def hosted(ops: Iterable[OpSpec]) -> list[Chain]:
    """Each op that cannot follow itself, as executed, behind the head that can stand before it
    (`boundaries.heads`, which also says in which order `ops` come), where there is one.
    """
    executed = _executed(ops)
    before = heads(executed)
    return [
        (*before[op.inputs[0]], op)
        for op in executed
        if op.inputs[0] in before and not _follows_itself(op)
    ]


def by_chains(costs_us: Mapping[str, float], chains: Iterable[Chain]) -> dict[str, Inside]:
    """What chains tell of ops inside a network, by op: a slope where at least `LEAST_LENGTHS`
    chains are copies of it, else the median difference that it makes at a chain's end.

    `costs_us` has what each chain, and each op alone, was measured at, by key. Noise may leave a
    cost that is not positive.
    """
    copies: dict[str, dict[int, float]] = {}
    differences: dict[str, list[float]] = {}
    for chain in chains:
        whole_us, head, last = costs_us[chain_key(chain)], chain_key(chain[:-1]), chain[-1].key
        if all(op.key == last for op in chain):
            copies.setdefault(last, {})[len(chain)] = whole_us
        if head in costs_us:
            differences.setdefault(last, []).append(whole_us - costs_us[head])
    found = {key: Inside(float(np.median(us)), "host") for key, us in differences.items()}
    return found | {
        key: slope(list(points), list(points.values()))
        for key, points in copies.items()
        if len(points) >= LEAST_LENGTHS
    }


def across_boundary(alone_us: float, saved_us: float | None) -> Inside:
    """What an op costs inside a network that saves `saved_us` of what it costs alone; None where
    nothing is known of its boundary.
    """
    if saved_us is None:
        return Inside(alone_us, "alone")
    return Inside(max(alone_us - saved_us, LEAST_SHARE * alone_us), "boundary")


def slope(lengths: Sequence[int], costs_us: Sequence[float]) -> Inside:
    """The least-squares slope of costs (n,) over the lengths (n,) of their chains, with its
    standard error; n is at least 3.

    >>> slope([2, 4, 8], [13.0, 21.0, 37.0])
    Inside(us=4.0, way='slope', error_us=0.0)
    """
    away, cost = (np.array(x, float) - np.mean(x) for x in (lengths, costs_us))
    us = away @ cost / (away @ away)
    left = cost - us * away
    error_us = np.sqrt(left @ left / (len(away) - 2) / (away @ away))
    return Inside(float(us), "slope", float(error_us))


def _executed(ops: Iterable[OpSpec]) -> list[OpSpec]:
    return list({op.executed.key: op.executed for op in ops}.values())


def _follows_itself(op: OpSpec) -> bool:
    return op.inputs == (op.output,) and not op.logits
