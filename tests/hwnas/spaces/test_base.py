import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs.feasible import reachable
from hwnas.costs.limits import counted_cost
from hwnas.spaces.base import Architecture, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import conv_norm_activation
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from latency_tables.ops import Tensor
from quant.errors import InvalidInput
from quant.precision import Format, Precision

Floats = npt.NDArray[np.float64]

INPUT = Tensor(8, 4, 4, Format("fp32", signed=False))
SKIPPING = mobile(
    "skipping",
    (Stage(2, 1, (16, 24)), Stage(1, 1, (16, 24), squeeze=4), Stage(1, 2, (24, 32))),
    classes=4,
    size=16,
    kernels=(3,),
    expansions=(3,),
)
ALL = list(SKIPPING.enumerate())
CANONICAL = {architecture.genes for architecture in ALL}


def chain(*kernels: Mapping[str, int], groups: Sequence[str] = ("", "", "", "")) -> SearchSpace:
    """Positions that choose a kernel by a name; every op leaves the tensor as it found it."""

    def position(number: int, table: Mapping[str, int]) -> Position:
        def build(state: State, values: Mapping[str, Any]) -> Choice:
            op = conv_norm_activation(
                state.tensor, 8, kernel=table[values["kind"]], precision=Precision("fp32")
            )
            return Choice(op, State(op.output), groups[number])

        return Position(f"p{number}", {"kind": list(table)}, build)

    return SearchSpace("chain", INPUT, tuple(position(i, table) for i, table in enumerate(kernels)))


def parts(space: SearchSpace, genes: Sequence[int]) -> list[tuple[int, ...]]:
    found, start = [], 0
    for position in space.positions:
        found.append(tuple(genes[start : start + len(position.genes)]))
        start += len(position.genes)
    return found


def nearest_by_brute_force(space: SearchSpace, wanted: Sequence[int]) -> tuple[int, ...]:
    """Position by position among the listed architectures: agree with the first genes first."""
    prefix: tuple[int, ...] = ()
    for part in parts(space, wanted):
        after = {
            genes[len(prefix) : len(prefix) + len(part)]
            for genes in CANONICAL
            if genes[: len(prefix)] == prefix
        }
        prefix += min(after, key=lambda p: (tuple(a != b for a, b in zip(p, part, strict=True)), p))
    return prefix


def any_genes(space: SearchSpace) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(0, len(gene.choices) - 1) for gene in space.genes))


# ---- genes and positions


def test_an_option_with_one_value_makes_no_gene() -> None:
    space = chain({"a": 1}, {"a": 1, "b": 3}, {"a": 5})
    assert [gene.name for gene in space.genes] == ["p1.kind"]
    assert [a.genes for a in space.enumerate()] == [(0,), (1,)]


def test_choices_that_build_the_same_op_are_one_step_with_the_smallest_value() -> None:
    space = chain({"a": 3, "b": 1, "c": 3, "d": 1, "e": 5})
    assert [a.genes for a in space.enumerate()] == [(0,), (1,), (4,)]
    assert space.count == 3


def test_a_state_that_differs_makes_a_different_step_even_for_the_same_op() -> None:
    def build(state: State, values: Mapping[str, Any]) -> Choice:
        op = conv_norm_activation(state.tensor, 8, kernel=3, precision=Precision("fp32"))
        return Choice(op, State(op.output, frozenset({("mark", values["mark"])})))

    space = SearchSpace("marks", INPUT, (Position("p", {"mark": [0, 1]}, build),))
    assert space.count == 2


@pytest.mark.parametrize("length", [1, 7, 70])
def test_count_is_an_exact_integer_however_large(length: int) -> None:
    space = chain(*[{"a": 1, "b": 3, "c": 5}] * length, groups=[""] * length)
    assert space.count == 3**length


def test_count_is_the_number_of_listed_architectures_and_the_list_is_in_order() -> None:
    assert SKIPPING.count == len(ALL) == len(set(ALL))
    assert [a.genes for a in ALL] == sorted(a.genes for a in ALL)


# ---- canonical genes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(wanted=any_genes(SKIPPING))
def test_any_genes_become_the_nearest_listed_architecture(wanted: tuple[int, ...]) -> None:
    found = SKIPPING.architecture(wanted)
    assert found.genes == nearest_by_brute_force(SKIPPING, wanted)
    assert SKIPPING.architecture(found.genes) == found


def test_canonical_genes_are_returned_as_they_are() -> None:
    assert all(SKIPPING.architecture(a.genes) == a for a in ALL)


TINY = mobile_tiny(classes=10)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(wanted=any_genes(TINY))
def test_any_genes_of_the_preset_become_canonical(wanted: tuple[int, ...]) -> None:
    found = TINY.architecture(wanted)
    assert TINY.architecture(found.genes) == found
    assert TINY.from_edges(TINY.edges(found)) == found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(genes=any_genes(SKIPPING))
def test_exactly_the_listed_genes_are_accepted(genes: tuple[int, ...]) -> None:
    if genes in CANONICAL:
        assert SKIPPING.from_edges(SKIPPING.edges(Architecture(genes))).genes == genes
    else:
        with pytest.raises(InvalidInput, match="not a canonical architecture of skipping"):
            SKIPPING.edges(Architecture(genes))


@pytest.mark.parametrize("extra", [-1, 1])
def test_genes_of_the_wrong_length_are_refused(extra: int) -> None:
    genes = (*ALL[0].genes, 0)[: len(ALL[0].genes) + extra]
    for refuse in (SKIPPING.edges, SKIPPING.walk, SKIPPING.lower):
        with pytest.raises(InvalidInput, match=f"{len(genes)} genes"):
            refuse(Architecture(genes))


def test_a_gene_outside_its_choices_is_refused_in_either_direction() -> None:
    for place, gene in enumerate(SKIPPING.genes):
        for value in (-1, -len(gene.choices), len(gene.choices), 10**6):
            genes = list(ALL[0].genes)
            genes[place] = value
            with pytest.raises(InvalidInput):
                SKIPPING.edges(Architecture(tuple(genes)))


# ---- readings


def test_edges_and_architectures_are_one_to_one() -> None:
    paths = [tuple(SKIPPING.edges(a)) for a in ALL]
    assert len(set(paths)) == len(ALL)
    assert [SKIPPING.from_edges(path) for path in paths] == ALL


def test_walk_tells_positions_in_order_and_lower_is_its_ops() -> None:
    names = [position.name for position in SKIPPING.positions]
    for architecture in ALL:
        placed = SKIPPING.walk(architecture)
        places = [names.index(item.position) for item in placed]
        assert places == sorted(set(places))
        assert tuple(item.op for item in placed) == SKIPPING.lower(architecture)


def test_each_op_of_a_chain_reads_what_the_op_before_it_wrote() -> None:
    for architecture in ALL:
        tensor = SKIPPING.input
        for op in SKIPPING.lower(architecture):
            assert op.inputs == (tensor,)
            tensor = op.output
        assert (tensor.channels, tensor.height, tensor.width) == (4, 1, 1)


def test_the_lattice_names_each_op_once_and_edges_point_at_theirs() -> None:
    lattice = SKIPPING.lattice
    assert len({op.key for op in lattice.ops}) == len(lattice.ops)
    used = set()
    for level in lattice.levels:
        for step, index in zip(level.steps, level.op, strict=True):
            assert (step.op is None) == (index < 0)
            if step.op is not None:
                assert lattice.ops[index].key == step.op.key
                used.add(int(index))
    assert used == set(range(len(lattice.ops)))


def test_describe_and_parse_are_inverse() -> None:
    for architecture in ALL:
        told = SKIPPING.describe(architecture)
        assert list(told) == [gene.name for gene in SKIPPING.genes]
        assert SKIPPING.parse(told) == architecture
        assert SKIPPING.parse(dict(reversed(told.items()))) == architecture


def test_parse_names_the_gene_and_what_it_can_be() -> None:
    told = SKIPPING.describe(ALL[0])
    gene = SKIPPING.genes[1]
    for wrong in ({**told, gene.name: "int8"}, {k: v for k, v in told.items() if k != gene.name}):
        with pytest.raises(InvalidInput, match=gene.name) as caught:
            SKIPPING.parse(wrong)
        assert caught.value.accepted == ", ".join(gene.choices)


def test_parse_refuses_a_description_that_is_not_canonical() -> None:
    skipping = next(a for a in ALL if "skip" in SKIPPING.describe(a).values())
    told = SKIPPING.describe(skipping)
    name = next(name for name, value in told.items() if value == "skip")
    told[name.replace(".block", ".precision")] = "w8a8"
    with pytest.raises(InvalidInput, match="not a canonical"):
        SKIPPING.parse(told)


# ---- the heaviest path


def weight_of(space: SearchSpace, weights: Sequence[Floats], architecture: Architecture) -> float:
    edges = space.edges(architecture)
    return sum(float(w[edge]) for w, edge in zip(weights, edges, strict=True))


def some_weights(space: SearchSpace, rng: np.random.Generator, kind: str) -> list[Floats]:
    sizes = [len(level.steps) for level in space.lattice.levels]
    match kind:
        case "any":
            return [rng.normal(0, 1, size) for size in sizes]
        case "negative":
            return [-rng.uniform(1, 2, size) for size in sizes]
        case "few":
            return [(rng.random(size) < 0.1).astype(float) for size in sizes]
        case _:
            return [np.zeros(size) for size in sizes]


@pytest.mark.parametrize("kind", ["any", "negative", "few", "none"])
def test_the_heaviest_path_is_that_of_a_search_through_all(
    kind: str, random_space: Callable[[int], SearchSpace]
) -> None:
    """Some of the random spaces have dead ends, which a greedy choice would run into."""
    rng = np.random.default_rng(0)
    spaces = [SKIPPING, chain({"a": 1, "b": 3}, {"a": 1}), *map(random_space, range(15))]
    for space in spaces:
        everything = list(space.enumerate())
        for _ in range(3):
            weights = some_weights(space, rng, kind)
            found = space.heaviest(weights)
            assert found in everything
            best = max(weight_of(space, weights, a) for a in everything)
            assert weight_of(space, weights, found) == pytest.approx(best, abs=1e-12)


def test_the_random_spaces_have_dead_ends(random_space: Callable[[int], SearchSpace]) -> None:
    def used(space: SearchSpace) -> set[tuple[int, int]]:
        return {(i, e) for a in space.enumerate() for i, e in enumerate(space.edges(a))}

    def edges(space: SearchSpace) -> int:
        return sum(len(level.steps) for level in space.lattice.levels)

    assert sum(len(used(s)) < edges(s) for s in map(random_space, range(15))) >= 3


@pytest.mark.parametrize("space", [SKIPPING, TINY, chain({"a": 1})], ids=lambda s: s.name)
def test_a_weight_on_one_edge_alone_leads_through_it(space: SearchSpace) -> None:
    """And a second one beats it: nothing else decides."""
    for depth, level in enumerate(space.lattice.levels):
        for edge in range(len(level.steps)):
            weights = [np.zeros(len(other.steps)) for other in space.lattice.levels]
            weights[depth][edge] = 1.0
            assert space.edges(space.heaviest(weights))[depth] == edge
            other = (edge + 1) % len(level.steps)
            weights[depth][other] = 2.0
            assert space.edges(space.heaviest(weights))[depth] == other


def test_the_largest_network_of_the_preset_is_the_same_by_two_ways() -> None:
    """The additive cost's own search for its dearest network (hwnas.costs) is another one."""
    macs = np.array([0.0, *(op.macs for op in TINY.lattice.ops)])
    for sign in (1, -1):
        found = TINY.heaviest([sign * macs[level.op + 1] for level in TINY.lattice.levels])
        ends = reachable(TINY, counted_cost(TINY, "macs"))
        expected = ends.largest if sign == 1 else ends.smallest
        assert sum(op.macs for op in TINY.lower(found)) == expected


def test_every_edge_is_used_by_some_listed_architecture() -> None:
    used = Counter((depth, e) for a in ALL for depth, e in enumerate(SKIPPING.edges(a)))
    assert len(used) == sum(len(level.steps) for level in SKIPPING.lattice.levels)


# ---- fingerprint


def test_the_fingerprint_is_the_same_in_other_processes(
    in_process: Callable[[str, str], str],
) -> None:
    script = (
        "from hwnas.spaces.mobile import *\n"
        "print(mobile_tiny(classes=10).fingerprint, mobile('s', (Stage(2, 1, (16, 24)), "
        "Stage(2, 1, (16, 24), squeeze=4)), classes=4, size=16).fingerprint)"
    )
    stages = (Stage(2, 1, (16, 24)), Stage(2, 1, (16, 24), squeeze=4))
    here = [TINY.fingerprint, mobile("s", stages, classes=4, size=16).fingerprint]
    assert [in_process(script, seed).split() for seed in ("1", "2")] == [here, here]


def test_equal_spaces_built_twice_have_one_fingerprint() -> None:
    assert mobile_tiny(classes=10).fingerprint == TINY.fingerprint


def test_the_fingerprint_differs_when_any_argument_differs() -> None:
    stages = (Stage(1, 1, (16, 24)), Stage(2, 2, (24, 32)))
    usual: dict[str, Any] = {
        "name": "s",
        "stages": stages,
        "classes": 4,
        "size": 16,
        "kernels": (3, 5),
        "expansions": (3, 6),
    }
    changes: list[dict[str, Any]] = [
        {},
        {"name": "t"},
        {"classes": 5},
        {"size": 32},
        {"image_channels": 1},
        {"stem_channels": 24},
        {"stem_stride": 1},
        {"head_channels": 64},
        {"kernels": (3, 7)},
        {"kernels": (5, 3)},
        {"kernels": (3, 5, 7)},
        {"expansions": (3, 4)},
        {"precisions": ("fp32",)},
        {"precisions": ("w8a8", "fp32")},
        {"stem_precisions": ("fp32", "w8a8")},
        {"head_precisions": ("fp32",)},
        {"skip": False},
        {"stages": stages[::-1]},
        *(
            {"stages": (stages[0], replace(stages[1], **change))}
            for change in (
                {"blocks": 1},
                {"stride": 1},
                {"widths": (24, 40)},
                {"widths": (32, 24)},
                {"squeeze": 4},
                {"activation": "relu6"},
            )
        ),
    ]
    prints = [mobile(**{**usual, **change}).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)


def test_the_fingerprint_tells_which_choice_builds_which_op() -> None:
    straight = chain({"a": 1, "b": 3}, {"a": 1, "b": 3})
    crossed = chain({"a": 1, "b": 3}, {"a": 3, "b": 1})
    assert straight.lower(Architecture((0, 0))) != crossed.lower(Architecture((0, 0)))
    assert straight.fingerprint != crossed.fingerprint


def test_the_fingerprint_tells_where_shared_weights_are_kept() -> None:
    plain = chain({"a": 1}, {"a": 1, "b": 3})
    grouped = chain({"a": 1}, {"a": 1, "b": 3}, groups=("", "shared"))
    renamed = replace(plain, positions=(replace(plain.positions[0], name="q"), plain.positions[1]))
    kept = [[(p.position, p.group) for p in s.walk(next(s.enumerate()))] for s in (plain, renamed)]
    assert kept[0] != kept[1]
    assert plain.fingerprint != grouped.fingerprint
    assert plain.fingerprint != renamed.fingerprint


def test_architectures_are_values() -> None:
    assert len({Architecture((0, 1)), Architecture((0, 1)), Architecture((1, 0))}) == 2
    assert all(isinstance(gene, int) and not isinstance(gene, np.integer) for gene in ALL[-1].genes)
    assert all(a.genes < b.genes for a, b in itertools.pairwise(ALL))
