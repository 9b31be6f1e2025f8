"""A narrowed space, against the list of all gene values that spell its networks."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Limit, counted_cost
from hwnas.costs.narrowed import narrowed
from hwnas.costs.population import canonical, genes_of
from hwnas.costs.samplers import UniformSampler
from hwnas.search.evolution import Evolution
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, SearchSpace, State
from quant.errors import InvalidInput, Unreachable

OPTIONS = ("block", "width", "precision")


def spelt(space: SearchSpace, fixed: dict[str, str]) -> set[tuple[str, ...]]:
    """What stands at each position, for every combination of gene values with the fixed ones."""

    def choices(name: str, values: tuple[object, ...]) -> Iterator[object]:
        return (v for v in values if len(values) == 1 or fixed.get(name, str(v)) == str(v))

    def extend(depth: int, state: State, chain: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if depth == len(space.positions):
            yield chain
            return
        position = space.positions[depth]
        sets = [
            list(choices(f"{position.name}.{option}", tuple(values)))
            for option, values in position.options.items()
        ]
        for values in itertools.product(*sets):
            built = position.build(state, dict(zip(position.options, values, strict=True)))
            if built is not None:
                key = "skip" if built.op is None else built.op.key
                yield from extend(depth + 1, built.state, (*chain, key))

    return set(extend(0, State(space.input), ()))


def fixed_like(space: SearchSpace, architecture: Architecture, *options: str) -> dict[str, str]:
    told = space.describe(architecture)
    return {name: v for name, v in told.items() if name.rpartition(".")[2] in options}


def chains(space: SearchSpace, architectures: list[Architecture]) -> list[tuple[str, ...]]:
    steps = [
        [level.steps[e] for level, e in zip(space.lattice.levels, space.edges(a), strict=True)]
        for a in architectures
    ]
    return [tuple(step.op.key if step.op else "skip" for step in path) for path in steps]


def assert_exact(space: SearchSpace, fixed: dict[str, str], listed: list[Architecture]) -> None:
    wanted = spelt(space, fixed)
    expected = [a for a, c in zip(listed, chains(space, listed), strict=True) if c in wanted]
    assert len(expected) == len(wanted), "every spelling is a network of the whole space"
    found = narrowed(space, fixed)
    assert list(found.enumerate()) == expected
    assert found.count == len(expected)
    assert chains(found, expected) == chains(space, expected)
    assert found.lattice.ops == space.lattice.ops


@pytest.mark.parametrize(
    "options", [o for n in (1, 2, 3) for o in itertools.combinations(OPTIONS, n)]
)
def test_what_is_left_is_what_can_be_spelt_with_the_fixed_values(
    small: SearchSpace, small_list: list[Architecture], options: tuple[str, ...]
) -> None:
    for architecture in small_list[:: len(small_list) // 12]:
        fixed = fixed_like(small, architecture, *options)
        assert_exact(small, fixed, small_list)
        assert architecture in set(narrowed(small, fixed).enumerate())


@pytest.mark.parametrize("seed", range(12))
def test_spaces_with_dead_ends_are_narrowed_exactly(
    random_space: Callable[[int], SearchSpace], seed: int
) -> None:
    space = random_space(seed)
    listed = list(space.enumerate())
    rng = np.random.default_rng(seed)
    for architecture in rng.permutation(np.array(listed, object))[:4] if listed else ():
        told = space.describe(architecture)
        names = rng.permutation(list(told))[: int(rng.integers(1, len(told) + 1))]
        assert_exact(space, {str(name): told[name] for name in names}, listed)


def test_with_nothing_fixed_a_space_is_itself(small: SearchSpace) -> None:
    assert narrowed(small, {}) is small


def test_a_skip_agrees_with_every_precision(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    fixed = {gene.name: "w8a8" for gene in small.genes if gene.name.endswith("precision")}
    left = [small.describe(a) for a in narrowed(small, fixed).enumerate()]
    assert any(told["block0.block"] == "skip" for told in left)
    assert {t["block0.precision"] for t in left if t["block0.block"] != "skip"} == {"w8a8"}
    assert 0 < len(left) < len(small_list)


def test_any_genes_come_to_an_architecture_with_the_fixed_values(tiny: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    fixed = fixed_like(tiny, UniformSampler(tiny).sample(rng), "block")
    left = narrowed(tiny, fixed)
    genes = rng.integers(0, tiny.gene_sizes, (300, len(tiny.genes)))
    for row, once in zip(genes, canonical(left, genes), strict=True):
        architecture = left.architecture(tuple(map(int, row)))
        assert architecture.genes == tuple(once)
        assert tiny.architecture(architecture.genes) == architecture, "canonical in the whole space"
        assert fixed_like(tiny, architecture, "block") == fixed


@pytest.mark.parametrize("strategy", ["evolution", "random"])
@pytest.mark.parametrize("options", [("block",), ("block", "precision"), ("width",)])
def test_every_strategy_keeps_what_is_fixed_and_the_limits(
    tiny: SearchSpace, strategy: str, options: tuple[str, ...]
) -> None:
    """The costs are those of the whole space."""
    found = UniformSampler(tiny).sample(np.random.default_rng(3))
    left = narrowed(tiny, fixed_like(tiny, found, *options))
    cost = counted_cost(tiny, "macs")
    ends = reachable(left, cost)
    feasible = FeasibleSet(left, [Limit(cost, (ends.smallest + ends.largest) / 2)])
    search = (
        Evolution(feasible, seed=0, population=10, parents=3, mutations=5, crossovers=3)
        if strategy == "evolution"
        else RandomSearch(feasible, seed=0)
    )
    asked: list[Architecture] = []
    for _ in range(4):
        proposals = search.ask(10)
        search.tell(proposals, [(float(sum(a.genes)),) for a in proposals])
        asked += proposals
    assert len(set(asked)) == len(asked)
    assert len(asked) == min(40, len(feasible.listed or range(40)))
    for architecture in asked:
        assert sum(op.macs for op in tiny.lower(architecture)) <= feasible.limits[0].value
        left.edges(architecture)  # refuses what it does not have
        if "width" not in options:  # of a skipped block it has no effect
            assert fixed_like(tiny, architecture, *options) == fixed_like(tiny, found, *options)


def test_limits_over_what_is_left_are_decided_as_by_a_list(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    cost = counted_cost(small, "params")
    for architecture in small_list[::17]:
        left = narrowed(small, fixed_like(small, architecture, "block"))
        sums = cost.totals(small, genes_of(list(left.enumerate())))
        assert reachable(left, cost).smallest == sums.min()
        assert reachable(left, cost).largest == sums.max()
        middle = float(np.median(sums))
        feasible = FeasibleSet(left, [Limit(cost, middle)])
        assert len(feasible.listed or ()) == (sums <= middle).sum()
        with pytest.raises(Unreachable, match=f"small with fixed block .*{sums.min():.6g}"):
            FeasibleSet(left, [Limit(cost, sums.min() * 0.99)])


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"block9.block": "skip"}, "block9.block is not a gene of small."),
        ({"block0.block": "k9e9"}, "block0.block is 'k9e9'."),
    ],
)
def test_what_a_space_does_not_have_is_refused(
    small: SearchSpace, fixed: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        narrowed(small, fixed)
    assert caught.value.what == words
    assert caught.value.accepted


def test_values_that_no_architecture_has_together_are_refused(
    random_space: Callable[[int], SearchSpace],
) -> None:
    refused = 0
    for seed in range(6):
        space = random_space(seed)
        first, second = (next(g for g in space.genes if g.name == f"p{n}.width") for n in (0, 1))
        for values in itertools.product(first.choices, second.choices):
            fixed = dict(zip((first.name, second.name), values, strict=True))
            if spelt(space, fixed):
                assert narrowed(space, fixed).count
                continue
            told = f"No architecture of {space.name} has p0.width={values[0]}, p1.width={values[1]}"
            with pytest.raises(InvalidInput, match=told):
                narrowed(space, fixed)
            refused += 1
    assert refused > 10
