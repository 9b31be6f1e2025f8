"""What a latency limit is about: a device, and which percentile of its calls is held under it."""

import re
from dataclasses import dataclass

from latency_tables.percentiles import MEDIAN, PERCENTILES

LATENCY = "latency_ms"

_NAME = re.compile(r"latency(?:_p(\d+))?_ms(?:@([\w-]+))?")


@dataclass(frozen=True)
class Condition:
    """A device, "" for the run's own, and a percentile.

    >>> Condition().name, Condition("gpu", 95).name
    ('latency_ms', 'latency_p95_ms@gpu')
    """

    device: str = ""
    percentile: int = MEDIAN

    @property
    def name(self) -> str:
        """The name of the cost."""
        tail = "" if self.percentile == MEDIAN else f"_p{self.percentile}"
        return f"latency{tail}_ms" + (f"@{self.device}" if self.device else "")


def condition(name: str) -> Condition | None:
    """The condition that a cost's name stands for; None for a cost that is no latency, or one at a
    percentile that is not known.

    >>> condition("latency_p95_ms"), condition("params")
    (Condition(device='', percentile=95), None)
    """
    if (found := _NAME.fullmatch(name)) is None:
        return None
    asked = Condition(found[2] or "", int(found[1] or MEDIAN))
    known = asked.percentile in (MEDIAN, *PERCENTILES) and asked.name == name
    return asked if known else None
