"""The contract of a search strategy."""

from collections.abc import Sequence
from typing import Protocol

from hwnas.costs.feasible import FeasibleSet
from hwnas.spaces.base import Architecture

Score = tuple[float, ...]
"""Larger is better, compared from left to right: accuracy first, then what breaks ties."""


class Strategy(Protocol):
    """Ask/tell: the caller owns the loop.

    `ask` proposes architectures that are feasible and were never told before. It depends on the
    seed and on what was told, on nothing else, so that a search told its history goes on as if it
    had never stopped. An empty answer means that no new one was found in a bounded number of tries.
    `rejected` counts what the last `ask` dropped for being over a limit; it was never scored.
    """

    feasible: FeasibleSet
    rejected: int

    def ask(self, count: int) -> list[Architecture]:
        """At most `count` new feasible architectures."""
        ...

    def tell(self, architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """The scores of architectures; raises ValueError for NaN."""
        ...


def check_scores(architectures: Sequence[Architecture], scores: Sequence[Score]) -> None:
    """Raise ValueError where a score is missing or holds NaN, which compares as nothing."""
    if len(architectures) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(architectures)} architectures")
    for score in scores:
        if any(value != value for value in score):
            raise ValueError(f"the score {score} holds NaN")
