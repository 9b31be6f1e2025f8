"""SPOS: what the warm-up holds, what is uniform after it, and how it searches."""

from collections import Counter

import numpy as np
import pytest

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import Limit, counted_cost
from hwnas.costs.samplers import CostBinned
from hwnas.methods.registry import METHODS, method
from hwnas.methods.spos import SPOS, sampler, schedule, strategy
from hwnas.recipes import RECIPES, SupernetRecipe
from hwnas.search.base import Strategy
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from quant.errors import InvalidInput

RECIPE = SupernetRecipe(
    steps=100, batch=8, learning_rate=0.1, float_share=0.4, widths_from=0.4, widths_by=0.6
)


def space_of(*, skip: bool) -> SearchSpace:
    return mobile(
        "small",
        (Stage(2, 1, (6, 8)), Stage(2, 2, (8, 12, 16))),
        classes=3,
        size=8,
        image_channels=1,
        stem_channels=8,
        head_channels=16,
        kernels=(3, 5),
        expansions=(2, 3),
        skip=skip,
    )


def drawn(space: SearchSpace, progress: float, count: int) -> list[dict[str, str]]:
    chosen = sampler(space, RECIPE)
    return [
        space.describe(chosen.sample(np.random.default_rng([1, n]), progress)) for n in range(count)
    ]


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4 - 1e-9])
def test_the_warm_up_holds_the_largest_width_and_the_first_precision(progress: float) -> None:
    for genes in drawn(space_of(skip=False), progress, 60):
        assert genes["block0.width"] == "8"
        assert genes["block2.width"] == "16"
        assert {v for name, v in genes.items() if name.endswith("precision")} == {"fp32"}


def test_the_warm_up_with_skips_gives_every_block_that_stands_its_largest_legal_width() -> None:
    space = space_of(skip=True)
    chosen = sampler(space, RECIPE)
    skipped = 0
    for number in range(200):
        architecture = chosen.sample(np.random.default_rng(number), 0.0)
        genes = space.describe(architecture)
        assert {v for name, v in genes.items() if name.endswith("precision")} == {"fp32"}
        skipped += genes["block0.block"] == "skip"
        for name in ("block0", "block2"):
            if genes[f"{name}.block"] == "skip":
                continue
            part = dict(genes)
            wider = []
            for width in next(g.choices for g in space.genes if g.name == f"{name}.width"):
                part[f"{name}.width"] = width
                try:
                    space.parse(part)
                except InvalidInput:
                    continue
                wider.append(int(width))
            assert int(genes[f"{name}.width"]) == max(wider)
    assert 10 < skipped < 100


def test_blocks_are_sampled_uniformly_in_the_warm_up() -> None:
    found = drawn(space_of(skip=False), 0.0, 1200)
    for block in range(4):
        counts = np.array([*Counter(genes[f"block{block}.block"] for genes in found).values()])
        assert len(counts) == 4
        assert ((counts - 300) ** 2 / 300).sum() < 16.3  # 3 degrees of freedom, p = 0.001
    pairs = Counter((genes["block0.block"], genes["block1.block"]) for genes in found)
    counts = np.array([*pairs.values()])
    assert len(counts) == 16
    assert ((counts - 75) ** 2 / 75).sum() < 37.7  # 15 degrees of freedom: independent


@pytest.mark.parametrize("progress", [0.6, 0.7, 1.0])
def test_after_the_warm_up_every_gene_is_uniform(progress: float) -> None:
    space = space_of(skip=False)
    found = drawn(space, progress, 900)
    critical = {2: 10.9, 3: 13.9, 4: 16.3}  # p = 0.001
    for gene in space.genes:
        counts = np.array([*Counter(genes[gene.name] for genes in found).values()])
        size = len(gene.choices)
        assert len(counts) == size, gene.name
        expected = 900 / size
        assert ((counts - expected) ** 2 / expected).sum() < critical[size], gene.name


def test_a_path_depends_on_its_generator_alone() -> None:
    space = space_of(skip=True)
    one, other = sampler(space, RECIPE), sampler(space, RECIPE)
    for _ in range(50):
        other.sample(np.random.default_rng(), 0.9)
    for seed in range(20):
        left = one.sample(np.random.default_rng(seed), 0.9)
        assert left == other.sample(np.random.default_rng(seed), 0.9)
        assert space.architecture(left.genes) == left


def test_what_has_a_schedule_is_an_option_of_the_space() -> None:
    options = {gene.name.rpartition(".")[2] for gene in space_of(skip=True).genes}
    assert set(schedule(RECIPE)) < options


def test_widths_join_from_the_largest_down_while_precisions_are_all_open() -> None:
    space = space_of(skip=False)
    for progress, widths in ((0.4, {"12", "16"}), (0.49, {"12", "16"}), (0.5, {"8", "12", "16"})):
        found = drawn(space, progress, 80)
        assert {genes["block2.width"] for genes in found} == widths
        assert {genes["block1.precision"] for genes in found} == {"fp32", "w8a8"}


def test_a_recipe_with_bins_draws_over_bins_of_macs() -> None:
    recipe = RECIPE.model_copy(update={"cost_bins": 7})
    found = sampler(space_of(skip=True), recipe)
    assert isinstance(found, CostBinned)
    assert (found.bins, found.cost.name) == (7, "macs")
    assert all(plain.supernet.cost_bins == 0 for plain in RECIPES.values()), "the paper's is usual"


# ---- the search


def feasible_set(share: float) -> FeasibleSet:
    space = space_of(skip=True)
    cost = counted_cost(space, "params")
    free = FeasibleSet(space, [Limit(cost, 1e12)]).ranges["params"]
    return FeasibleSet(space, [Limit(cost, free.smallest + share * (free.largest - free.smallest))])


def parameters(space: SearchSpace, architecture: Architecture) -> int:
    return sum(op.parameters for op in space.lower(architecture))


def bitops(space: SearchSpace, architecture: Architecture) -> int:
    return sum(op.bitops for op in space.lower(architecture))


def searched(search: Strategy, generations: int, population: int) -> list[list[Architecture]]:
    """Ask and tell with toy scores: the fewer BitOPs the better."""
    history = []
    for _ in range(generations):
        proposals = search.ask(population)
        history.append(proposals)
        search.tell(proposals, [(-float(bitops(search.feasible.space, a)),) for a in proposals])
    return history


def test_every_proposal_is_new_and_under_the_limit() -> None:
    feasible = feasible_set(0.3)
    history = searched(strategy(feasible, 0, RECIPES["smoke"]), 8, 6)
    proposals = [a for generation in history for a in generation]
    assert len(proposals) == len(set(proposals)) == 48
    limit = feasible.limits[0].value
    assert all(parameters(feasible.space, a) <= limit for a in proposals)


def test_a_search_is_repeated_by_its_seed() -> None:
    feasible = feasible_set(0.5)
    first, again, other = (
        searched(strategy(feasible, seed, RECIPES["smoke"]), 4, 6) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_evolution_finds_better_than_random_search_with_as_many_evaluations() -> None:
    feasible = feasible_set(0.5)
    for seed in range(3):
        best = [
            min(bitops(feasible.space, a) for generation in history for a in generation)
            for history in (
                searched(strategy(feasible, seed, RECIPES["quick"]), 6, 30),
                searched(RandomSearch(feasible, seed=seed), 6, 30),
            )
        ]
        assert best[0] < 0.9 * best[1]


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_proportions_are_kept_in_each_recipe(name: str) -> None:
    """Guo et al. 2019, section 4: 50 a generation, 10 parents, 25 mutations, 25 crossovers."""
    recipe = RECIPES[name]
    found = strategy(feasible_set(0.5), 0, recipe)
    assert found.population == recipe.population
    assert found.shares == (0.5, 0.5)
    assert found.parents == max(2, recipe.population // 5)
    assert found.mutation_probability == 0.1


# ---- names


def test_spos_is_a_method_by_name() -> None:
    assert method("spos") is SPOS
    assert all(METHODS[name].name == name for name in METHODS)


@pytest.mark.parametrize("name", ["", "SPOS", "darts"])
def test_an_unknown_method_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        method(name)
    assert caught.value.what == f"--method is {name!r}."
    assert caught.value.accepted == ", ".join(METHODS)
