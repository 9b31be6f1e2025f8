"""What two tables have in common, and where they differ."""

from dataclasses import dataclass

import numpy as np

from latency_tables.table import LatencyTable

TOLD = 10
"""How many of the rows that changed most are told."""


@dataclass(frozen=True)
class Changed:
    """A row of both tables, each at its own table's pace, in us."""

    key: str
    first_us: float
    second_us: float


@dataclass(frozen=True)
class Difference:
    """The second table against the first.

    `condition` is the first field of host or protocol that differs, with both values; empty if none
    does. Rows are counted with chains; `ratio` is the median of second over first of those that
    both have, `pace_ratio` that of the machine's pace (None where none are common). `changed` are
    the rows whose ratio lies furthest from the median one.
    """

    condition: str
    only_first: int
    only_second: int
    common: int
    ratio: float | None
    pace_ratio: float
    changed: tuple[Changed, ...]


def difference(first: LatencyTable, second: LatencyTable) -> Difference:
    """Compare two tables, of whatever hosts."""
    one, other = first.rows | first.chains, second.rows | second.chains
    common = [key for key in one if key in other]
    pairs = [Changed(key, one[key].median_us, other[key].median_us) for key in common]
    ratios = np.array([pair.second_us / pair.first_us for pair in pairs])
    middle = float(np.median(ratios)) if pairs else None
    furthest = np.argsort(-np.abs(np.log(ratios / (middle or 1.0))))
    return Difference(
        condition=first.host.difference(second.host) or first.protocol_difference(second),
        only_first=len(one) - len(common),
        only_second=len(other) - len(common),
        common=len(common),
        ratio=middle,
        pace_ratio=second.pace_us / first.pace_us,
        changed=tuple(pairs[place] for place in furthest[:TOLD]),
    )
