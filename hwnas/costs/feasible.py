"""The feasible set: its extremes, whether there is any network in it, and exact uniform samples.

A limit on one cost is decided by dynamic programming over the lattice. Several limits are decided
together: by a proof that none meets them (`hwnas.costs.surrogates`), by a list where few networks
are left, or by a network that meets them. Samples are drawn uniformly from a superset that is
counted exactly (`hwnas.costs.joint`), and kept where they meet every limit: what is kept is uniform
over the feasible set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hwnas.costs.joint import Superset, nearest
from hwnas.costs.limits import Cost, Limit
from hwnas.costs.paths import Paths
from hwnas.costs.population import JointCosts, architectures_of, genes_of
from hwnas.spaces.base import Architecture, Ints, SearchSpace
from quant.errors import InvalidInput, Unreachable

BATCHES = (1, 3, 16, 80, 400, 1500, 6000, 12000)
MAX_TRIES = sum(BATCHES)
"""Draws come in batches; a sample is given up after so many draws that broke a limit."""

MARGIN = 1.02
"""How far above what is known to be reachable the values lie that errors tell."""

SAMPLES = 1000
"""What the feasibility table's medians and share are estimated from."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """The smallest and largest upper bound of a cost in a space, with an architecture at each."""

    smallest: float
    largest: float
    cheapest: Architecture
    dearest: Architecture


def reachable(space: SearchSpace, cost: Cost) -> Range:
    """The exact range of a cost over the whole space."""
    paths = Paths(space)
    ends = [paths.best(cost.per_op, cost.join, better) for better in (np.minimum, np.maximum)]
    least, most = cost.totals(space, genes_of(ends)).tolist()
    return Range(cost.upper(least), cost.upper(most), *ends)


@dataclass(frozen=True)
class LimitedCost:
    """A limit beside the upper bounds of its cost over the whole space, in the cost's unit.

    `smallest` and `largest` are exact; `median` is that of `SAMPLES` uniform architectures.
    `binding` says whether any architecture is over the limit.
    """

    name: str
    limit: float
    smallest: float
    median: float
    largest: float
    binding: bool


@dataclass(frozen=True)
class Feasibility:
    """A row for each limit, in the order given, and the share of the space that meets all.

    `share` is 1 exactly where no limit binds, and exact where the feasible set is listed. Otherwise
    it is an estimate: the size of a superset that is counted, times the share of `SAMPLES` uniform
    draws from it that meet every limit, and one architecture at least.
    """

    rows: tuple[LimitedCost, ...]
    share: float


class FeasibleSet:
    """The architectures of a space that meet every limit.

    `ranges` has the range of each limited cost alone, over the whole space; `witness` is an
    architecture that meets every limit; `superset` is what samples are drawn from.

    Raises Unreachable where a limit is below the smallest reachable value, where it is proven that
    no architecture meets all limits together, and where none was found in `MAX_TRIES` draws from
    those that might: the sentence says which. Raises InvalidInput for two limits on one cost.
    """

    def __init__(self, space: SearchSpace, limits: Sequence[Limit]) -> None:
        self.space = space
        self.limits = tuple(limits)
        self._costs = JointCosts(space, [(x.cost.per_op, x.cost.join) for x in limits])
        names = [limit.cost.name for limit in limits]
        if len(set(names)) < len(names):
            raise InvalidInput(f"Two limits are on one cost ({', '.join(names)}).")
        self.ranges = {limit.cost.name: reachable(space, limit.cost) for limit in limits}
        for limit in limits:
            found = self.ranges[limit.cost.name]
            if found.smallest > limit.value:
                enough = _rounded_up(MARGIN * found.smallest)
                raise self._unreachable(
                    f"No architecture of {space.name} meets {limit.cost.name} <= "
                    f"{limit.value:.6g}: the smallest reachable bound is {found.smallest:.6g}.",
                    {limit.cost.name: enough},
                    f"ask for at least {enough:.4g}",
                )
        self._binding = [limit for limit in limits if self.binding(limit)]
        self.superset = Superset(space, self._binding)
        self.witness = self._find_witness()

    def binding(self, limit: Limit) -> bool:
        """Whether any architecture of the space is over the limit."""
        return self.ranges[limit.cost.name].largest > limit.value

    def contains(self, architectures: Sequence[Architecture]) -> npt.NDArray[np.bool_]:
        """Which architectures meet every limit, (n,)."""
        return self.inside(self._genes(architectures))

    def inside(self, genes: Ints) -> npt.NDArray[np.bool_]:
        """Which of the genes (n, genes) meet every limit, (n,): `contains` for arrays.

        Raises InvalidInput where a row is not canonical.
        """
        result = np.ones(len(genes), bool)
        for limit, values in self._raw(genes):
            result &= values <= limit.budget
        return result

    def bounds(self, architectures: Sequence[Architecture]) -> dict[str, Floats]:
        """The upper bound of each limited cost, (n,), by the cost's name and in its unit."""
        raw = self._raw(self._genes(architectures))
        return {limit.cost.name: _each(limit.cost.upper, values) for limit, values in raw}

    def predictions(self, architectures: Sequence[Architecture]) -> dict[str, Floats]:
        """What is predicted of each limited cost, (n,), by the cost's name and in its unit."""
        raw = self._raw(self._genes(architectures))
        return {limit.cost.name: _each(limit.cost.predict, values) for limit, values in raw}

    def sample(self, rng: np.random.Generator) -> Architecture | None:
        """One architecture, uniform over the set; None where `MAX_TRIES` draws found none."""
        found = architectures_of(self.samples(rng, 1))
        return found[0] if found else None

    def samples(self, rng: np.random.Generator, count: int) -> Ints:
        """The genes (n, genes) of 1 to `count` architectures, independent and uniform over the set.

        None where `MAX_TRIES` draws or more found none; how many come back says nothing else.
        """
        if self.listed is not None:
            genes = self._genes(self.listed)
            return genes[rng.integers(len(genes), size=count)] if len(genes) else genes
        for batch in BATCHES:
            genes = self.superset.counts.draw(rng, max(batch, count))
            genes = genes[self.inside(genes)]
            if len(genes):
                break
        return genes[:count]

    @property
    def size(self) -> float:
        """How many architectures meet every limit: exact where listed, else from above."""
        return self.superset.counts.count if self.listed is None else float(len(self.listed))

    @cached_property
    def listed(self) -> tuple[Architecture, ...] | None:
        """Every architecture of the set, where a superset of it is small; else None."""
        listed = self.superset.listed
        return None if listed is None else tuple(architectures_of(listed[self.inside(listed)]))

    def feasibility(self) -> Feasibility:
        """What the limits leave of the space; the same numbers on every call."""
        medians = self.bounds(_drawn(Superset(self.space, ())))
        rows = tuple(
            LimitedCost(
                name=limit.cost.name,
                limit=limit.value,
                smallest=self.ranges[limit.cost.name].smallest,
                median=float(np.median(medians[limit.cost.name])),
                largest=self.ranges[limit.cost.name].largest,
                binding=self.binding(limit),
            )
            for limit in self.limits
        )
        return Feasibility(rows, self._share())

    def _share(self) -> float:
        if not self._binding:
            return 1.0
        count = float(self.space.count)
        if self.listed is not None:
            return len(self.listed) / count
        accepted = float(self.contains(_drawn(self.superset)).mean())
        return min(max(self.size * accepted, 1.0) / count, 1.0)

    def _genes(self, architectures: Sequence[Architecture]) -> Ints:
        if not architectures:
            return np.empty((0, len(self.space.genes)), np.int64)
        return genes_of(architectures)

    def _raw(self, genes: Ints) -> list[tuple[Limit, Floats]]:
        """Each limit with the sums or peaks of its cost, (n,), for genes (n, genes)."""
        return list(zip(self.limits, self._costs(genes), strict=True))

    def _find_witness(self) -> Architecture:
        known = [self.ranges[limit.cost.name].cheapest for limit in self._binding]
        known += self.superset.dual.met
        inside = self.inside(self._genes(known))
        if inside.any():
            return known[int(np.argmax(inside))]
        if not self.superset.empty and (drawn := self.sample(np.random.default_rng(0))):
            return drawn
        closest = nearest(self.space, self._binding)
        if self.inside(genes_of([closest]))[0]:
            return closest
        raise self._apart(closest, proven=self.superset.empty or self.listed is not None)

    def _apart(self, closest: Architecture, *, proven: bool) -> Unreachable:
        asked = " and ".join(f"{x.cost.name} <= {x.value:.6g}" for x in self._binding)
        what = f"Each limit can be met alone in {self.space.name}, but "
        if proven:
            what += f"no architecture meets {asked} together."
        else:
            what += (
                f"none of {MAX_TRIES} uniform draws from a superset of the architectures that may "
                f"meet {asked} together did. That none exists is not proven."
            )
        together = {}
        for limit in self._binding:
            bound = float(self.bounds([closest])[limit.cost.name][0])
            enough = limit.value if bound <= limit.value else MARGIN * bound
            together[limit.cost.name] = _rounded_up(enough)
        values = " and ".join(f"{name}={value:.4g}" for name, value in together.items())
        return self._unreachable(what, together, f"ask for at least {values} together")

    def _unreachable(self, what: str, together: dict[str, float], next_step: str) -> Unreachable:
        return Unreachable(
            what,
            smallest={name: found.smallest for name, found in self.ranges.items()},
            largest={name: found.largest for name, found in self.ranges.items()},
            together=together,
            next_step=next_step,
        )


def _each(told: Callable[[float], float], raw: Floats) -> Floats:
    return np.array([told(value) for value in raw.tolist()], np.float64)


def _drawn(superset: Superset) -> list[Architecture]:
    return architectures_of(superset.counts.draw(np.random.default_rng(0), SAMPLES))


def _rounded_up(value: float) -> float:
    """The smallest number with four digits that is not below a positive value."""
    rounded = float(f"{value:.3e}")
    if rounded < value:
        rounded = float(f"{value + 10.0 ** (math.floor(math.log10(value)) - 3):.3e}")
    return rounded
