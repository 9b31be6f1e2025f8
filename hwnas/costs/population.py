"""Costs of whole populations: arrays, and no Python loop over architectures."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hwnas.spaces.base import Architecture, Ints, SearchSpace
from quant.errors import InvalidInput

Floats = npt.NDArray[np.float64]


def genes_of(architectures: Sequence[Architecture]) -> Ints:
    """The genes of n architectures as an array (n, genes)."""
    return np.array([architecture.genes for architecture in architectures], np.int64)


def architectures_of(genes: Ints) -> list[Architecture]:
    """The architectures of genes (n, genes): what `genes_of` takes apart."""
    return [Architecture(tuple(row)) for row in genes.tolist()]


def op_indices(space: SearchSpace, genes: Ints) -> Ints:
    """The op of each architecture at each position, (n, positions); -1 stands for a skip.

    `genes` is (n, genes). Raises InvalidInput where a row is not canonical.
    """
    if genes.ndim != 2 or genes.shape[1] != len(space.genes):
        raise InvalidInput(
            f"A population of shape {genes.shape} is not of {space.name}.",
            accepted=f"(n, {len(space.genes)})",
        )
    outside = ((genes < 0) | (genes >= space.gene_sizes)).any(axis=1)
    if outside.any():
        raise InvalidInput(
            f"The genes {genes[np.argmax(outside)].tolist()} are outside the choices of "
            f"{space.name}."
        )
    result = np.empty((len(genes), len(space.positions)), np.int64)
    state = np.zeros(len(genes), np.int64)
    start = 0
    for column, (position, level) in enumerate(
        zip(space.positions, space.lattice.levels, strict=True)
    ):
        stop = start + len(position.genes)
        edge = level.lookup[state, genes[:, start:stop] @ level.strides]
        if (bad := np.flatnonzero(edge < 0)).size:
            raise InvalidInput(
                f"The genes {genes[bad[0]].tolist()} are not a canonical architecture of "
                f"{space.name}."
            )
        result[:, column] = level.op[edge]
        state = level.target[edge]
        start = stop
    return result


def over_ops(per_op: Floats, ops: Ints, join: np.ufunc) -> Floats:
    """A cost joined over each architecture's ops, (n,): np.add for sums, np.maximum for peaks.

    `ops` is (n, positions) as `op_indices` gives it; a skip counts 0.
    """
    joined: Floats = join.reduce(np.append(per_op, 0.0)[ops], axis=1)
    return joined


def totals(space: SearchSpace, per_op: Floats, genes: Ints) -> Floats:
    """The sum of an additive cost over each architecture's ops, (n,)."""
    return over_ops(per_op, op_indices(space, genes), np.add)


def peaks(space: SearchSpace, per_op: Floats, genes: Ints) -> Floats:
    """The largest value over each architecture's ops, (n,); a skip counts 0."""
    return over_ops(per_op, op_indices(space, genes), np.maximum)
