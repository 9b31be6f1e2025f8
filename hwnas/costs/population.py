"""Costs of whole populations: arrays, and no Python loop over architectures.

Every sum is added up position by position, from the input on. So an architecture costs the same to
the last bit alone and in a crowd, for one cost at a time and for several at once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwnas.spaces.base import Architecture, Ints, SearchSpace
from quant.errors import InvalidInput

BATCH = 2048
"""So many architectures at a time: their genes and sums stay in a core's cache."""

Floats = npt.NDArray[np.float64]


def genes_of(architectures: Sequence[Architecture]) -> Ints:
    """The genes of n architectures as an array (n, genes)."""
    return np.array([architecture.genes for architecture in architectures], np.int64)


def architectures_of(genes: Ints) -> list[Architecture]:
    """The architectures of genes (n, genes): what `genes_of` takes apart."""
    return [Architecture(tuple(row)) for row in genes.tolist()]


def canonical(space: SearchSpace, genes: Ints) -> Ints:
    """The genes of `SearchSpace.architecture` for each row of any gene values, (n, genes).

    Raises InvalidInput where a value is outside its gene's choices, ValueError where the genes lead
    to a state that nothing leaves.
    """
    _check_shape(space, genes)
    columns = np.array(genes.T, np.int64, order="C")
    if not _within(space, columns):
        _check(space, genes)
    state = np.zeros(len(genes), np.int64)
    start = 0
    for level in space.lattice.levels:
        stop = start + len(level.strides)
        flat = _flat(columns[start:stop], level.strides, len(genes))
        edge = level.nearest.take(state * level.nearest.shape[1] + flat)
        if edge.min(initial=0) < 0:
            raise ValueError(f"the genes lead to a state of {space.name} that nothing leaves")
        columns[start:stop] = level.genes.take(edge, axis=0).T
        state = level.target.take(edge)
        start = stop
    return np.array(columns.T, order="C")


def op_indices(space: SearchSpace, genes: Ints) -> Ints:
    """The op of each architecture at each position, (n, positions); -1 stands for a skip.

    `genes` is (n, genes). Raises InvalidInput where a row is not canonical.
    """
    _check(space, genes)
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
    padded = np.append(per_op, 0.0)
    joined: Floats = functools.reduce(join, (padded[column] for column in ops.T))
    return joined


def totals(space: SearchSpace, per_op: Floats, genes: Ints) -> Floats:
    """The sum of an additive cost over each architecture's ops, (n,)."""
    return over_ops(per_op, op_indices(space, genes), np.add)


def peaks(space: SearchSpace, per_op: Floats, genes: Ints) -> Floats:
    """The largest value over each architecture's ops, (n,); a skip counts 0."""
    return over_ops(per_op, op_indices(space, genes), np.maximum)


@dataclass(frozen=True)
class _Cells:
    """A position's cells, `state * combinations + flat gene index`, in one more state: stuck.

    `onward` is the first cell of the state that a cell leads to at the next position; what is not
    legal and canonical leads to the stuck state. `added` has a table (cells, costs) for each join.
    """

    strides: Ints
    onward: Ints
    added: tuple[Floats, ...]


class JointCosts:
    """Several costs of many architectures at once, in one walk from their genes to the costs.

    `costs` are pairs of `per_op`, which belongs to `space.lattice.ops`, and of np.add for a sum or
    np.maximum for a peak. The results are those of `over_ops`, to the last bit.
    """

    def __init__(self, space: SearchSpace, costs: Sequence[tuple[Floats, np.ufunc]]) -> None:
        self.space = space
        self.count = len(costs)
        self._joins = [
            (join, [number for number, (_, own) in enumerate(costs) if own is join])
            for join in dict.fromkeys(join for _, join in costs)
        ]
        tables = [_packed([costs[number][0] for number in own]) for _, own in self._joins]
        levels = space.lattice.levels
        widths = [*(level.lookup.shape[1] for level in levels[1:]), 1]
        self._end = int(levels[-1].target.max()) + 1
        states = [*(len(level.states) for level in levels[1:]), self._end]
        self._cells = []
        for level, width, stuck in zip(levels, widths, states, strict=True):
            edge = np.append(level.lookup, np.full(level.lookup.shape[1], -1))
            onward = np.where(edge < 0, stuck, level.target[edge]) * width
            added = tuple(table[np.where(edge < 0, -1, level.op[edge])] for table in tables)
            self._cells.append(_Cells(level.strides, onward, added))

    def __call__(self, genes: Ints) -> Floats:
        """Each cost of each architecture, (costs, n), for genes (n, genes).

        Raises InvalidInput where a row is not canonical.
        """
        _check_shape(self.space, genes)
        result = np.empty((self.count, len(genes)))
        for start in range(0, len(genes), BATCH):
            batch = genes[start : start + BATCH]
            joined = self._walk(batch)
            if joined is None:
                op_indices(self.space, batch)
                raise AssertionError("the slow walk refuses what the quick one refuses")
            for (_, own), values in zip(self._joins, joined, strict=True):
                result[own, start : start + BATCH] = values.T[: len(own)]
        return result

    def _walk(self, genes: Ints) -> list[Floats] | None:
        """The costs (n, costs) for each join; None where a row is not canonical."""
        columns = np.array(genes.T, np.int64, order="C")
        if not _within(self.space, columns):
            return None
        cell = np.zeros(len(genes), np.int64)
        joined: list[Floats] = []
        start = 0
        for cells in self._cells:
            stop = start + len(cells.strides)
            cell += _flat(columns[start:stop], cells.strides, len(genes))
            if not joined:
                joined = [table.take(cell, axis=0) for table in cells.added]
                scratch = [np.empty_like(values) for values in joined]
            else:
                for (join, _), values, table, own in zip(
                    self._joins, joined, cells.added, scratch, strict=True
                ):
                    join(values, table.take(cell, axis=0, out=own, mode="clip"), out=values)
            cell = cells.onward.take(cell)
            start = stop
        return None if (cell == self._end).any() else joined


def _packed(per_ops: Sequence[Floats]) -> Floats:
    """Costs by op and a last row for a skip, (ops + 1, costs), padded with costs of 0.

    NumPy takes rows of 8, 16 and 32 bytes several times as fast as others.
    """
    width = 1 << (len(per_ops) - 1).bit_length()
    result = np.zeros((len(per_ops[0]) + 1, width))
    result[:-1, : len(per_ops)] = np.transpose(per_ops)
    return result


def _flat(columns: Ints, strides: Ints, count: int) -> Ints:
    """The flat gene index at one position, (n,), for the position's genes (genes, n).

    The last stride is always 1.
    """
    if not len(strides):
        return np.zeros(count, np.int64)
    result: Ints = columns[-1]
    for column, stride in zip(columns[:-1], strides[:-1].tolist(), strict=True):
        result = column * stride + result
    return result


def _within(space: SearchSpace, columns: Ints) -> bool:
    """Whether all of (genes, n) are within their choices; negative ones are huge as unsigned."""
    most = columns.view(np.uint64).max(axis=1, initial=0)
    return bool((most < space.gene_sizes.astype(np.uint64)).all())


def _check_shape(space: SearchSpace, genes: Ints) -> None:
    if genes.ndim != 2 or genes.shape[1] != len(space.genes):
        raise InvalidInput(
            f"A population of shape {genes.shape} is not of {space.name}.",
            accepted=f"(n, {len(space.genes)})",
        )


def _check(space: SearchSpace, genes: Ints) -> None:
    _check_shape(space, genes)
    outside = ((genes < 0) | (genes >= space.gene_sizes)).any(axis=1)
    if outside.any():
        raise InvalidInput(
            f"The genes {genes[np.argmax(outside)].tolist()} are outside the choices of "
            f"{space.name}."
        )
