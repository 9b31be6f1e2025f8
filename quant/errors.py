"""The error tree, drawn once. It lives on the lowest floor because every floor raises from it.

    HwnasError              exit code 1
    |- InvalidInput         2   what the user gave cannot be used
    |  |- TableError        2   a latency table is corrupt, foreign or lacks a row
    |  `- MissingDependency 2   an optional package or a driver is not there
    |- Unreachable          3   no architecture can meet the limits
    `- Unstable             4   the machine is too noisy to measure on

Each error says what was given and where, what would be accepted, and what to do next.
"""


class HwnasError(Exception):
    """An error with a sentence for the user.

    >>> str(InvalidInput("--latency-ms is -1.", accepted="a positive number", next_step="try 0.5"))
    '--latency-ms is -1. Accepted: a positive number. Next: try 0.5.'
    """

    exit_code = 1

    def __init__(self, what: str, *, accepted: str = "", next_step: str = "") -> None:
        self.what = what
        self.accepted = accepted
        self.next_step = next_step
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what
        if self.accepted:
            text += f" Accepted: {self.accepted}."
        if self.next_step:
            text += f" Next: {self.next_step}."
        return text


class InvalidInput(HwnasError):
    """What the user gave cannot be used."""

    exit_code = 2


class TableError(InvalidInput):
    """A latency table is corrupt, was measured under other conditions, or lacks a row."""


class MissingDependency(InvalidInput):
    """An optional package, a runtime or a driver is not installed."""


class Unreachable(HwnasError):
    """No architecture of the space can meet the limits.

    `smallest` and `largest` map each limited cost to the smallest and the largest upper bound that
    the space can reach for it alone; `together` maps costs to limits that can be met together.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        smallest: dict[str, float],
        largest: dict[str, float],
        together: dict[str, float] | None = None,
        next_step: str = "",
    ) -> None:
        super().__init__(what, next_step=next_step)
        self.smallest = smallest
        self.largest = largest
        self.together = together or {}


class Unstable(HwnasError):
    """The spread of repeated measurements is too large to state a latency."""

    exit_code = 4
