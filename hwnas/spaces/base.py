"""Genes, architectures and search spaces.

A space is a chain of positions. At position p, in an incoming state, each legal combination of the
position's genes is a `Step`: an op (or a skip) and the outgoing state. Combinations that make no
difference are one step, with the smallest gene values, so that equal networks are equal
architectures: `SearchSpace.count` is the number of distinct op chains.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from latency_tables.ops import OpSpec, Tensor
from quant.errors import InvalidInput

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gene:
    """One decision: its name, such as `block3.precision`, and what it can be."""

    name: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One canonical choice for every gene of a space."""

    genes: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What a position finds: the tensor handed on so far.

    `skipped` names what could have stood, as (kind of block, output width), where positions were
    skipped since the last block. A block that could just as well stand there is not legal here:
    that network already exists, with the skip later.
    """

    tensor: Tensor
    skipped: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class Choice:
    """What one combination of genes builds: an op (None for a skip) and the state after it.

    `group` names the set of shared weights that the op uses; combinations that differ only in what
    can be sliced or in precision share one.
    """

    op: OpSpec | None
    state: State
    group: str = ""


Build = Callable[[State, Mapping[str, Any]], Choice | None]


@dataclass(frozen=True)
class Position:
    """A place in the chain.

    `options` maps a gene's name to its values, most telling gene first; an option with one value
    makes no gene. `build` gives the choice for a state and one value of each option, or None where
    that is not legal.
    """

    name: str
    options: Mapping[str, Sequence[Any]]
    build: Build

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The genes of this position."""
        return tuple(
            Gene(f"{self.name}.{name}", tuple(map(str, values)))
            for name, values in self.options.items()
            if len(values) > 1
        )

    def steps(self, state: State) -> list["Step"]:
        """The distinct choices from a state, each with its smallest gene values."""
        found: dict[tuple[str | None, State], Step] = {}
        sizes = [len(values) for values in self.options.values()]
        for indices in itertools.product(*map(range, sizes)):
            picked = zip(self.options.items(), indices, strict=True)
            choice = self.build(state, {name: values[i] for (name, values), i in picked})
            if choice is not None:
                genes = tuple(i for i, size in zip(indices, sizes, strict=True) if size > 1)
                identity = (choice.op.key if choice.op else None, choice.state)
                found.setdefault(identity, Step(genes, choice.op, choice.state, choice.group))
        return list(found.values())


@dataclass(frozen=True)
class Step:
    """A legal, canonical choice at a position from one state."""

    genes: tuple[int, ...]
    op: OpSpec | None
    state: State
    group: str


@dataclass(frozen=True)
class PlacedOp:
    """An op of an architecture, with where its shared weights are kept."""

    position: str
    group: str
    op: OpSpec


@dataclass(frozen=True)
class Level:
    """Everything that can happen at one position, as arrays over its edges (state, step).

    `lookup[state, flat gene index]` is the edge, or -1 where the combination is not legal and
    canonical there; `op[edge]` is the index in `Lattice.ops`, or -1 for a skip.
    """

    states: tuple[State, ...]
    steps: tuple[Step, ...]
    source: Ints
    target: Ints
    op: Ints
    lookup: Ints
    strides: Ints

    @cached_property
    def genes(self) -> Ints:
        """The genes of each edge, (edges, genes of the position)."""
        return np.array([step.genes for step in self.steps], np.int64)

    @cached_property
    def nearest(self) -> Ints:
        """The edge `SearchSpace.architecture` takes, (states, flat gene indices).

        -1 stands in a state that no edge leaves.
        """
        width = self.lookup.shape[1]
        sizes = np.append(width, self.strides[:-1])[: len(self.strides)] // self.strides
        wanted = np.arange(width)[:, None] // self.strides % sizes
        telling = 2 ** np.arange(len(sizes))[::-1]
        disagreement = (wanted[:, None] != self.genes) @ telling
        result = np.full(self.lookup.shape, -1, np.int64)
        for state in np.unique(self.source):
            own = np.flatnonzero(self.source == state)
            result[state] = own[disagreement[:, own].argmin(axis=1)]
        return result


@dataclass(frozen=True)
class Lattice:
    """A space unrolled: every reachable state and edge of every position, and the distinct ops."""

    levels: tuple[Level, ...]
    ops: tuple[OpSpec, ...]


@dataclass(frozen=True)
class SearchSpace:
    """A named chain of positions that starts at the network's input.

    >>> from hwnas.spaces.mobile import mobile_tiny
    >>> space = mobile_tiny(classes=10)
    >>> arch = space.architecture([0] * len(space.genes))
    >>> len(space.lower(arch)) == len(space.positions)
    True
    """

    name: str
    input: Tensor
    positions: tuple[Position, ...]
    classes: int = field(default=0)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """All genes, position by position."""
        return tuple(gene for position in self.positions for gene in position.genes)

    @cached_property
    def lattice(self) -> Lattice:
        """The space unrolled; built once."""
        ops: dict[str, int] = {}
        unique: list[OpSpec] = []
        levels = []
        states: tuple[State, ...] = (State(self.input),)
        for position in self.positions:
            following: dict[State, int] = {}
            steps: list[Step] = []
            edges: list[tuple[int, int, int]] = []
            sizes = [len(gene.choices) for gene in position.genes]
            strides = np.cumprod([1, *sizes[::-1]], dtype=np.int64)[:-1][::-1]
            lookup = np.full((len(states), int(np.prod(sizes, dtype=np.int64))), -1, np.int64)
            for number, state in enumerate(states):
                for step in position.steps(state):
                    lookup[number, int(np.dot(step.genes, strides))] = len(steps)
                    steps.append(step)
                    if step.op is not None and step.op.key not in ops:
                        ops[step.op.key] = len(unique)
                        unique.append(step.op)
                    target = following.setdefault(step.state, len(following))
                    edges.append((number, target, ops[step.op.key] if step.op else -1))
            source, targets, indices = np.array(edges, np.int64).T
            levels.append(Level(states, tuple(steps), source, targets, indices, lookup, strides))
            states = tuple(following)
        return Lattice(tuple(levels), tuple(unique))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every op, gene and weight group: equal only for equal spaces."""
        text = [self.name, *(f"{gene.name}:{gene.choices}" for gene in self.genes)]
        for position, level in zip(self.positions, self.lattice.levels, strict=True):
            text.append(position.name)
            for step, source, target in zip(level.steps, level.source, level.target, strict=True):
                roles = [layer.role for layer in step.op.layers] if step.op else []
                op = step.op.key if step.op else "skip"
                text.append(f"{source} {target} {step.genes} {step.group} {roles} {op}")
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]

    @cached_property
    def count(self) -> int:
        """How many architectures there are."""
        ways = [1] * len(self.lattice.levels[-1].steps)
        for level, before in zip(
            reversed(self.lattice.levels), [*reversed(self.lattice.levels[:-1]), None], strict=True
        ):
            per_state = [0] * len(level.states)
            for edge, source in enumerate(level.source):
                per_state[source] += ways[edge]
            if before is None:
                return per_state[0]
            ways = [per_state[target] for target in before.target]
        raise AssertionError("a space has at least one position")

    def edges(self, architecture: Architecture) -> list[int]:
        """The edge taken at each level; raises InvalidInput unless the genes are canonical."""
        self._check(architecture.genes)
        path, state = [], 0
        for level, part in zip(self.lattice.levels, self._parts(architecture.genes), strict=True):
            edge = int(level.lookup[state, int(np.dot(part, level.strides))])
            if edge < 0:
                raise InvalidInput(
                    f"The genes {architecture.genes} are not a canonical architecture of "
                    f"{self.name}.",
                    accepted="what SearchSpace.architecture returns",
                )
            path.append(edge)
            state = int(level.target[edge])
        return path

    def architecture(self, genes: Sequence[int]) -> Architecture:
        """The canonical architecture nearest to any gene values.

        Position by position, the legal step that agrees with the most telling genes; what has no
        effect becomes 0. Canonical genes are returned as they are.
        """
        self._check(genes)
        result: list[int] = []
        state = 0
        for level, part in zip(self.lattice.levels, self._parts(tuple(genes)), strict=True):
            edge = int(level.lookup[state, int(np.dot(part, level.strides))])
            if edge < 0:
                legal = np.flatnonzero(level.source == state)
                edge = int(min(legal, key=lambda e: _disagreement(level.steps[e].genes, part)))
            result.extend(level.steps[edge].genes)
            state = int(level.target[edge])
        return Architecture(tuple(result))

    def from_edges(self, edges: Sequence[int]) -> Architecture:
        """The architecture that takes the given edge at each level."""
        levels = self.lattice.levels
        return Architecture(
            tuple(g for level, e in zip(levels, edges, strict=True) for g in level.steps[e].genes)
        )

    def heaviest(self, weights: Sequence[npt.NDArray[np.float64]]) -> Architecture:
        """The architecture with the largest sum of weights; `weights` has one an edge, by level."""
        after = np.zeros(int(self.lattice.levels[-1].target.max()) + 1)
        sums: list[npt.NDArray[np.float64]] = []
        for level, weight in zip(reversed(self.lattice.levels), reversed(weights), strict=True):
            sums.insert(0, weight + after[level.target])
            after = np.full(len(level.states), -np.inf)
            np.maximum.at(after, level.source, sums[0])
        edges, state = [], 0
        for level, found in zip(self.lattice.levels, sums, strict=True):
            edges.append(int(np.argmax(np.where(level.source == state, found, -np.inf))))
            state = int(level.target[edges[-1]])
        return self.from_edges(edges)

    def walk(self, architecture: Architecture) -> list[PlacedOp]:
        """The ops of an architecture in order, skips left out."""
        placed = []
        for position, level, edge in zip(
            self.positions, self.lattice.levels, self.edges(architecture), strict=True
        ):
            step = level.steps[edge]
            if step.op is not None:
                placed.append(PlacedOp(position.name, step.group, step.op))
        return placed

    def lower(self, architecture: Architecture) -> tuple[OpSpec, ...]:
        """The op chain of an architecture."""
        return tuple(placed.op for placed in self.walk(architecture))

    def searched(self, architecture: Architecture) -> tuple[OpSpec, ...]:
        """The ops whose precision is a gene: SPOS counts the BitOPs of these alone."""
        genes = {gene.name for gene in self.genes}
        placed = self.walk(architecture)
        return tuple(item.op for item in placed if f"{item.position}.precision" in genes)

    def describe(self, architecture: Architecture) -> dict[str, str]:
        """Gene names with the chosen values, for people and for JSON."""
        return {
            gene.name: gene.choices[value]
            for gene, value in zip(self.genes, architecture.genes, strict=True)
        }

    def parse(self, description: Mapping[str, str]) -> Architecture:
        """The architecture that `describe` told; raises InvalidInput where it does not fit."""
        known = {gene.name for gene in self.genes}
        if unknown := sorted(set(description) - known):
            raise InvalidInput(
                f"{unknown[0]} is not a gene of {self.name}.", accepted=", ".join(sorted(known))
            )
        values = []
        for gene in self.genes:
            value = description.get(gene.name)
            if value not in gene.choices:
                raise InvalidInput(f"{gene.name} is {value!r}.", accepted=", ".join(gene.choices))
            values.append(gene.choices.index(value))
        architecture = Architecture(tuple(values))
        self.edges(architecture)
        return architecture

    def enumerate(self) -> Iterator[Architecture]:
        """Every architecture, in order; for spaces small enough to list."""
        levels = self.lattice.levels

        def extend(depth: int, state: int, genes: tuple[int, ...]) -> Iterator[Architecture]:
            if depth == len(levels):
                yield Architecture(genes)
                return
            level = levels[depth]
            for edge in np.flatnonzero(level.source == state):
                step = level.steps[edge]
                yield from extend(depth + 1, int(level.target[edge]), genes + step.genes)

        return extend(0, 0, ())

    @cached_property
    def gene_sizes(self) -> Ints:
        """How many choices each gene has."""
        return np.array([len(gene.choices) for gene in self.genes], np.int64)

    def _check(self, genes: Sequence[int]) -> None:
        """Raise InvalidInput unless every gene is there and within its choices."""
        if len(genes) != len(self.genes):
            raise InvalidInput(
                f"The architecture has {len(genes)} genes; {self.name} has {len(self.genes)}.",
                accepted="an architecture of this space",
            )
        for gene, value in zip(self.genes, genes, strict=True):
            if not 0 <= value < len(gene.choices):
                raise InvalidInput(
                    f"The gene {gene.name} is {value}.", accepted=f"0 to {len(gene.choices) - 1}"
                )

    def _parts(self, genes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        start = 0
        for position in self.positions:
            stop = start + len(position.genes)
            yield tuple(genes[start:stop])
            start = stop


def _disagreement(mine: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(a != b for a, b in zip(mine, wanted, strict=True))
