"""What a published system is here: which paths it trains, and how it searches."""

from collections.abc import Callable
from dataclasses import dataclass

from hwnas.costs.feasible import FeasibleSet
from hwnas.recipes import Recipe, SupernetRecipe
from hwnas.search.base import Strategy
from hwnas.spaces.base import SearchSpace
from hwnas.supernet.trainer import Sampler


@dataclass(frozen=True)
class Method:
    """A named choice of the shared parts. `evidence` says what its claim was checked by."""

    name: str
    evidence: str
    sampler: Callable[[SearchSpace, SupernetRecipe], Sampler]
    strategy: Callable[[FeasibleSet, int, Recipe], Strategy]
