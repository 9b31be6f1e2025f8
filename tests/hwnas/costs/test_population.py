from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs import population as population_module
from hwnas.costs.limits import counted_cost
from hwnas.costs.population import (
    JointCosts,
    architectures_of,
    canonical,
    genes_of,
    op_indices,
    peaks,
    totals,
)
from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import mobile_tiny
from latency_tables.ops import COUNTS
from quant.errors import InvalidInput

TINY = mobile_tiny(classes=10)


def population(space: SearchSpace, count: int, seed: int) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    sampler = UniformSampler(space)
    return [sampler.sample(rng) for _ in range(count)]


@pytest.mark.parametrize("name", COUNTS)
def test_totals_equal_a_loop_over_the_lowered_ops(tiny: SearchSpace, name: str) -> None:
    architectures = population(tiny, 300, seed=1)
    expected = [sum(COUNTS[name](op) for op in tiny.lower(a)) for a in architectures]
    found = totals(tiny, counted_cost(tiny, name).per_op, genes_of(architectures))
    assert found.tolist() == expected
    assert len(set(expected)) > 100


def test_totals_of_float_costs_equal_a_loop(tiny: SearchSpace) -> None:
    per_op = np.random.default_rng(3).normal(size=len(tiny.lattice.ops))
    number = {op.key: i for i, op in enumerate(tiny.lattice.ops)}
    architectures = population(tiny, 300, seed=2)
    expected = [sum(per_op[number[op.key]] for op in tiny.lower(a)) for a in architectures]
    np.testing.assert_allclose(totals(tiny, per_op, genes_of(architectures)), expected, atol=1e-12)


def test_peaks_equal_a_loop_in_which_a_skip_counts_nothing(tiny: SearchSpace) -> None:
    per_op = np.random.default_rng(3).normal(size=len(tiny.lattice.ops))
    number = {op.key: i for i, op in enumerate(tiny.lattice.ops)}
    architectures = population(tiny, 300, seed=2)
    expected = []
    for architecture in architectures:
        ops = tiny.lower(architecture)
        skipped = [0.0] * (len(ops) < len(tiny.positions))
        expected.append(max([per_op[number[op.key]] for op in ops] + skipped))
    assert peaks(tiny, per_op, genes_of(architectures)).tolist() == expected


def test_genes_and_architectures_are_each_others_inverse(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    assert architectures_of(genes_of(small_list)) == small_list
    assert architectures_of(np.empty((0, len(small.genes)), np.int64)) == []


def test_an_architecture_costs_the_same_to_the_last_bit_alone_and_in_a_crowd(
    tiny: SearchSpace,
) -> None:
    per_op = np.random.default_rng(3).lognormal(sigma=4, size=len(tiny.lattice.ops))
    genes = genes_of(population(tiny, 200, seed=4))
    alone = [totals(tiny, per_op, row[None])[0] for row in genes]
    assert totals(tiny, per_op, genes).tolist() == alone


def test_op_indices_point_at_the_lowered_ops(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    indices = op_indices(small, genes_of(small_list))
    assert indices.shape == (len(small_list), len(small.positions))
    for architecture, row in zip(small_list, indices, strict=True):
        keys = [small.lattice.ops[i].key for i in row if i >= 0]
        assert keys == [op.key for op in small.lower(architecture)]


def test_no_rows_have_no_totals(small: SearchSpace) -> None:
    per_op = np.ones(len(small.lattice.ops))
    nobody = np.empty((0, len(small.genes)), np.int64)
    assert totals(small, per_op, nobody).shape == peaks(small, per_op, nobody).shape == (0,)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.tuples(*(st.integers(0, len(gene.choices) - 1) for gene in TINY.genes)))
def test_a_row_is_refused_exactly_where_it_is_not_canonical(genes: tuple[int, ...]) -> None:
    good = TINY.architecture(genes)
    rows = np.array([good.genes, genes], np.int64)
    if good.genes == genes:
        assert len(op_indices(TINY, rows)) == 2
    else:
        with pytest.raises(InvalidInput, match="not a canonical architecture of mobile-tiny"):
            op_indices(TINY, rows)


def test_the_refused_row_is_named(small: SearchSpace) -> None:
    told = small.describe(small.architecture([0] * len(small.genes)))
    skip = next(i for i, gene in enumerate(small.genes) if "skip" in gene.choices)
    genes = [0] * len(small.genes)
    genes[skip], genes[skip + 1] = small.genes[skip].choices.index("skip"), 1
    assert list(told)[skip + 1].endswith(".precision")
    with pytest.raises(InvalidInput) as caught:
        totals(small, np.ones(len(small.lattice.ops)), np.array([[0] * len(genes), genes]))
    assert str(genes) in str(caught.value)


@pytest.mark.parametrize("beyond", [-1, 0])
def test_a_gene_outside_its_choices_is_refused_and_never_read_as_another_gene(
    small: SearchSpace, small_list: list[Architecture], beyond: int
) -> None:
    for place, gene in enumerate(small.genes):
        genes = list(small_list[0].genes)
        genes[place] = len(gene.choices) if beyond == 0 else -1
        with pytest.raises(InvalidInput):
            op_indices(small, np.array([genes], np.int64))


@pytest.mark.parametrize("extra", [-1, 1])
def test_rows_of_the_wrong_length_are_refused(small: SearchSpace, extra: int) -> None:
    with pytest.raises(InvalidInput):
        op_indices(small, np.zeros((1, len(small.genes) + extra), np.int64))


# ---- canonical genes


def any_rows(space: SearchSpace, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Gene values drawn independently; few rows are canonical."""
    return np.random.default_rng(seed).integers(0, space.gene_sizes, (count, len(space.genes)))


def test_canonical_rows_are_those_of_the_space(
    tiny: SearchSpace, small: SearchSpace, large: SearchSpace
) -> None:
    for space, count in ((tiny, 400), (small, 400), (large, 60)):
        rows = any_rows(space, count)
        expected = [space.architecture(row) for row in rows.tolist()]
        found = canonical(space, rows)
        assert architectures_of(found) == expected
        assert (found != rows).any(axis=1).sum() > count // 10
        assert (canonical(space, found) == found).all()


@pytest.mark.parametrize("seed", range(25))
def test_canonical_rows_of_any_space_are_those_of_the_space(
    random_space: Callable[[int], SearchSpace], seed: int
) -> None:
    space = random_space(seed)
    for row in any_rows(space, 30, seed):
        try:
            expected = space.architecture(row.tolist())
        except ValueError:  # a dead end
            with pytest.raises(ValueError, match="nothing leaves"):
                canonical(space, row[None])
        else:
            assert architectures_of(canonical(space, row[None])) == [expected]


def test_what_is_made_canonical_is_left_as_it_was(small: SearchSpace) -> None:
    rows = any_rows(small, 50)
    before = rows.copy()
    canonical(small, rows)
    assert (rows == before).all()
    assert canonical(small, rows[:0]).shape == (0, len(small.genes))


# ---- several costs at once


def plain_cost(
    space: SearchSpace, per_op: npt.NDArray[np.float64], join: np.ufunc, genes: list[int]
) -> float:
    """A loop over the positions, from the input on; a skip counts 0."""
    number = {op.key: i for i, op in enumerate(space.lattice.ops)}
    values = []
    for level, edge in zip(
        space.lattice.levels, space.edges(Architecture(tuple(genes))), strict=True
    ):
        op = level.steps[edge].op
        values.append(0.0 if op is None else float(per_op[number[op.key]]))
    total = values[0]
    for value in values[1:]:
        total = total + value if join is np.add else max(total, value)
    return total


@pytest.mark.parametrize("joins", ["", "s", "p", "ss", "sps", "sssss", "pspsps"])
@pytest.mark.parametrize("batch", [1, 7, 2048])
def test_joint_costs_are_those_of_a_loop_to_the_last_bit(
    tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch, joins: str, batch: int
) -> None:
    monkeypatch.setattr(population_module, "BATCH", batch)
    rng = np.random.default_rng(5)
    costs = [
        (rng.normal(size=len(tiny.lattice.ops)), np.add if kind == "s" else np.maximum)
        for kind in joins
    ]
    genes = genes_of(population(tiny, 40, seed=6))
    found = JointCosts(tiny, costs)(genes)
    assert found.shape == (len(joins), 40)
    for (per_op, join), row in zip(costs, found, strict=True):
        assert row.tolist() == [plain_cost(tiny, per_op, join, g) for g in genes.tolist()]
        alone = (totals if join is np.add else peaks)(tiny, per_op, genes)
        assert row.tolist() == alone.tolist()


@pytest.mark.parametrize("seed", range(15))
def test_joint_costs_of_any_space_are_those_of_a_loop(
    random_space: Callable[[int], SearchSpace], seed: int
) -> None:
    space = random_space(seed)
    genes = genes_of(list(space.enumerate()))
    per_op = np.random.default_rng(seed).normal(size=len(space.lattice.ops))
    for join, row in zip(
        (np.add, np.maximum),
        JointCosts(space, [(per_op, np.add), (per_op, np.maximum)])(genes),
        strict=True,
    ):
        assert row.tolist() == [plain_cost(space, per_op, join, g) for g in genes.tolist()]


def test_joint_costs_refuse_exactly_the_rows_that_are_not_canonical(small: SearchSpace) -> None:
    costs = JointCosts(small, [(np.ones(len(small.lattice.ops)), np.add)])
    good = canonical(small, any_rows(small, 1))
    rows = any_rows(small, 200)
    for row, fits in zip(rows, (canonical(small, rows) == rows).all(axis=1), strict=True):
        crowd = np.vstack([good, row, good])
        if fits:
            assert costs(crowd).shape == (1, 3)
        else:
            with pytest.raises(InvalidInput, match="not a canonical architecture of small"):
                costs(crowd)


@pytest.mark.parametrize("value", [-1, -(2**40), 2**40, 2**32, 7])
def test_values_outside_the_choices_are_refused_however_large(
    small: SearchSpace, value: int
) -> None:
    costs = JointCosts(small, [(np.ones(len(small.lattice.ops)), np.add)])
    for place in range(len(small.genes)):
        rows = canonical(small, any_rows(small, 3))
        rows[1, place] = value
        for refused in (costs, lambda genes: canonical(small, genes)):
            with pytest.raises(InvalidInput, match="outside the choices of small"):
                refused(rows)


@pytest.mark.parametrize("extra", [-1, 1])
def test_joint_costs_and_canonical_refuse_rows_of_the_wrong_length(
    small: SearchSpace, extra: int
) -> None:
    rows = np.zeros((1, len(small.genes) + extra), np.int64)
    for refused in (JointCosts(small, []), lambda genes: canonical(small, genes)):
        with pytest.raises(InvalidInput, match="is not of small"):
            refused(rows)
