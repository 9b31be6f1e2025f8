"""Whether a table still matches the machine: a few rows, timed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable
from profilers.base import Profiler
from profilers.build import row_model
from profilers.host import pinned
from profilers.measure import Protocol, Samples, pace_of, summarise

PROBED = 8
BLOCKS = 3

TOLERATED = 0.1
"""A table is said not to match where the probed rows differ by more than this, typically."""


@dataclass(frozen=True)
class Drift:
    """Now against then: the median ratio of the probed rows, both at the table's pace, and the
    ratio of the pace itself (above 1 the machine is slower now).
    """

    rows: float
    pace: float

    @property
    def matches(self) -> bool:
        """Whether the rows still hold."""
        return abs(self.rows - 1) <= TOLERATED


def drift(
    profiler: Profiler, table: LatencyTable, ops: Sequence[OpSpec], protocol: Protocol
) -> Drift:
    """Time `PROBED` of the ops again, from the quickest to the slowest; takes half a second."""
    executed = dict.fromkeys(op.executed for op in ops)
    ranked = sorted(executed, key=lambda op: table.lookup(op).median_us)
    places = np.unique(np.linspace(0, len(ranked) - 1, PROBED).astype(int))
    models = {ranked[place].key: row_model((ranked[place],), profiler) for place in places}
    blocks: dict[str, list[Samples]] = {key: [] for key in models}
    with pinned(profiler.threads):
        for _ in range(BLOCKS):
            for key, model in models.items():
                with profiler.prepare(model) as session:
                    blocks[key].append(session.block(protocol))
    ratios = [
        summarise(each, protocol, pace_us=table.pace_us).median_us / table.rows[key].median_us
        for key, each in blocks.items()
    ]
    now_us = pace_of(block for each in blocks.values() for block in each)
    return Drift(float(np.median(ratios)), now_us / table.pace_us)
