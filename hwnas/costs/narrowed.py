"""A space with the values of some genes given: the rest of it can be searched like any space."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hwnas.costs.paths import Bools, Paths
from hwnas.spaces.base import Ints, Lattice, Level, Position, SearchSpace
from quant.errors import InvalidInput


def narrowed(space: SearchSpace, fixed: Mapping[str, str]) -> SearchSpace:
    """The architectures of a space that can be spelt with the given values, by name of the gene.

    A gene without an effect has any value: a skipped block agrees with every precision. Genes, ops
    and their numbers are those of `space`, so that its costs, limits and shared weights serve both.

    >>> from hwnas.spaces.mobile import mobile_tiny
    >>> tiny = mobile_tiny(classes=10)
    >>> narrowed(tiny, {gene.name: gene.choices[0] for gene in tiny.genes}).count
    1

    Raises InvalidInput for a gene or value that the space does not have, and where no architecture
    has all values.
    """
    if not fixed:
        return space
    for name, value in fixed.items():
        choices = next((gene.choices for gene in space.genes if gene.name == name), None)
        if choices is None:
            raise InvalidInput(
                f"{name} is not a gene of {space.name}.",
                accepted=", ".join(gene.name for gene in space.genes),
            )
        if value not in choices:
            raise InvalidInput(f"{name} is {value!r}.", accepted=", ".join(choices))
    positions = zip(space.positions, space.lattice.levels, strict=True)
    paths = Paths(space, [_agreeing(*each, fixed) for each in positions])
    if paths.empty:
        told = ", ".join(f"{name}={value}" for name, value in fixed.items())
        raise InvalidInput(
            f"No architecture of {space.name} has {told}.",
            accepted="values that one architecture has together",
        )
    options = dict.fromkeys(name.rpartition(".")[2] for name in fixed)
    result = replace(space, name=f"{space.name} with fixed {', '.join(options)}")
    kept = zip(space.lattice.levels, paths.levels, strict=True)
    levels = tuple(_only(level, edges.number) for level, edges in kept)
    result.__dict__["lattice"] = Lattice(levels, space.lattice.ops)
    return result


def _agreeing(position: Position, level: Level, fixed: Mapping[str, str]) -> Bools:
    """Which edges of a level can be spelt with the values, (edges,)."""
    options = {
        option: [
            value
            for value in values
            if fixed.get(f"{position.name}.{option}", str(value)) == str(value)
        ]
        for option, values in position.options.items()
    }
    part = replace(position, options=options)
    number = {
        (source, step.op and step.op.key, step.state): edge
        for edge, (source, step) in enumerate(zip(level.source.tolist(), level.steps, strict=True))
    }
    result = np.zeros(len(level.steps), bool)
    for source, state in enumerate(level.states):
        for step in part.steps(state):
            result[number[source, step.op and step.op.key, step.state]] = True
    return result


def _only(level: Level, kept: Ints) -> Level:
    """The level without its other edges; `lookup` finds them no more."""
    place = np.full(len(level.steps) + 1, -1, np.int64)
    place[kept] = np.arange(len(kept))
    return replace(
        level,
        steps=tuple(level.steps[edge] for edge in kept),
        source=level.source[kept],
        target=level.target[kept],
        op=level.op[kept],
        lookup=place[level.lookup],
    )
