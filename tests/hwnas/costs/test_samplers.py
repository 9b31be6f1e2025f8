from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from hwnas.costs.limits import counted_cost
from hwnas.costs.population import genes_of
from hwnas.costs.samplers import MOST_TRIES, CostBinned, Opening, UniformSampler, marginals
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile

DRAWS = 4000


def legal_after(listed: list[Architecture], prefix: tuple[int, ...]) -> list[int]:
    """What the next gene can be, read from the list of all architectures."""
    size = len(prefix)
    return sorted({a.genes[size] for a in listed if a.genes[:size] == prefix})


def probability(listed: list[Architecture], architecture: Architecture) -> Fraction:
    """Each gene uniform among what is legal after the genes before it."""
    genes, chance = architecture.genes, Fraction(1)
    for place in range(len(genes)):
        chance /= len(legal_after(listed, genes[:place]))
    return chance


def test_architectures_come_as_often_as_uniform_genes_say(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    chances = [probability(small_list, a) for a in small_list]
    assert sum(chances) == 1
    assert len(set(chances)) > 1, "uniform genes are not uniform architectures"
    rng, sampler = np.random.default_rng(1), UniformSampler(small)
    counts = Counter(sampler.sample(rng) for _ in range(DRAWS))
    assert set(counts) <= set(small_list)
    expected = [float(chance * DRAWS) for chance in chances]
    assert stats.chisquare([counts[a] for a in small_list], expected).pvalue > 0.001


def test_genes_that_are_always_free_are_uniform_in_the_preset(tiny: SearchSpace) -> None:
    rng, sampler = np.random.default_rng(2), UniformSampler(tiny)
    genes = np.array([sampler.sample(rng).genes for _ in range(DRAWS)])
    free = {"block0.block", "block1.block", "block1.width", "block3.precision", "head.precision"}
    for column, gene in enumerate(tiny.genes):
        if gene.name in free:
            counts = np.bincount(genes[:, column], minlength=len(gene.choices))
            assert stats.chisquare(counts).pvalue > 0.001, gene.name
            free.remove(gene.name)
    assert not free


def test_samples_are_canonical(tiny: SearchSpace) -> None:
    rng, sampler = np.random.default_rng(3), UniformSampler(tiny)
    for _ in range(200):
        architecture = sampler.sample(rng)
        assert tiny.architecture(architecture.genes) == architecture


# ---- when values open


@pytest.mark.parametrize(
    ("opening", "size", "changes"),
    [
        (Opening(-1, 0.5, 0.8), 4, {0.0: 1, 0.5: 2, 0.6: 3, 0.7: 4, 0.8: 4, 1.0: 4}),
        (Opening(0, 0.5, 0.8), 4, {0.0: 1, 0.5: 2, 0.6: 3, 0.7: 4, 1.0: 4}),
        (Opening(-1, 0.1, 0.4), 7, {0.0: 1, 0.1: 2, 0.15: 3, 0.2: 4, 0.25: 5, 0.3: 6, 0.35: 7}),
        (Opening(-1, 0.4, 0.4), 3, {0.0: 1, 0.4: 3}),
        (Opening(-1, 0.5, 0.8), 2, {0.0: 1, 0.5: 2}),
        (Opening(-1, 0.5, 0.8), 1, {0.0: 1, 0.5: 1, 1.0: 1}),
        (Opening(-1, 0.0, 0.0), 5, {0.0: 5}),
    ],
)
def test_values_join_one_at_a_time(opening: Opening, size: int, changes: dict[float, int]) -> None:
    for progress, count in changes.items():
        assert opening.open(size, progress) == count, progress
    starts = sorted(changes)
    for start, following in zip(starts, [*starts[1:], 1.01], strict=True):
        for progress in np.linspace(start, following, 50, endpoint=False):
            assert opening.open(size, progress) == changes[start], progress


@pytest.mark.parametrize(
    ("first", "order"),
    [(-1, [4, 3, 2, 1, 0]), (0, [0, 1, 2, 3, 4]), (2, [2, 1, 3, 0, 4]), (-2, [3, 2, 4, 1, 0])],
)
def test_values_near_the_first_join_before_those_further_off(first: int, order: list[int]) -> None:
    rank = Opening(first, 0.0, 1.0).rank(5)
    assert sorted(range(5), key=lambda index: rank[index]) == order


SCHEDULES = {
    "downward": {"width": Opening(-1, 0.3, 0.6)},
    "upward, and precisions from the end": {
        "width": Opening(0, 0.3, 0.6),
        "precision": Opening(-1, 0.2, 0.2),
    },
}


@pytest.fixture(scope="module")
def wide() -> SearchSpace:
    """Four widths, few enough networks to list, and skips that leave less than all legal."""
    stages = (Stage(1, 1, (8, 12, 16, 20)), Stage(1, 1, (12, 16, 20)))
    return mobile("wide", stages, classes=4, size=16, kernels=(3,), expansions=(2, 3),
                  head_precisions=("fp32",))  # fmt: skip


def scheduled_probability(
    listed: list[Architecture],
    names: list[str],
    sizes: list[int],
    architecture: Architecture,
    schedule: dict[str, Opening],
    progress: float,
) -> float:
    """Each gene uniform among what is legal and open, by hand from the list."""
    chance = 1.0
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        legal = legal_after(listed, architecture.genes[:place])
        if name in schedule:
            first = schedule[name].first % size
            joining = sorted(range(size), key=lambda index: (abs(index - first), index))
            joined = joining[: schedule[name].open(size, progress)]
            legal = [v for v in legal if v in joined] or [min(legal, key=joining.index)]
        if architecture.genes[place] not in legal:
            return 0.0
        chance /= len(legal)
    return chance


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("progress", [0.0, 0.25, 0.3, 0.4, 0.59, 0.6])
def test_paths_are_uniform_over_what_is_legal_and_open(
    wide: SearchSpace, schedule: dict[str, Opening], progress: float
) -> None:
    listed = list(wide.enumerate())
    names = [gene.name.partition(".")[2] for gene in wide.genes]
    sizes = [len(gene.choices) for gene in wide.genes]
    chances = np.array(
        [scheduled_probability(listed, names, sizes, a, schedule, progress) for a in listed]
    )
    assert chances.sum() == pytest.approx(1)
    rng, sampler = np.random.default_rng(1), UniformSampler(wide, schedule)
    counts = Counter(sampler.sample(rng, progress) for _ in range(1500))
    found = np.array([counts[a] for a in listed])
    assert not found[chances == 0].any(), "a value was drawn before it was open"
    seen = chances > 0
    assert stats.chisquare(found[seen], 1500 * chances[seen]).pvalue > 0.001


def test_a_gene_that_cannot_take_the_held_value_takes_a_legal_one(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    """A skipped block has one legal precision, the first."""
    sampler = UniformSampler(small, {"precision": Opening(1, 1.0, 1.0)})
    rng = np.random.default_rng(4)
    drawn = {sampler.sample(rng, 0.0) for _ in range(200)}
    assert drawn <= set(small_list)
    told = [small.describe(architecture) for architecture in drawn]
    assert {t["block0.precision"] for t in told if t["block0.block"] == "skip"} == {"fp32"}
    assert {t["block0.precision"] for t in told if t["block0.block"] != "skip"} == {"w8a8"}


def test_genes_without_a_schedule_stay_uniform_during_the_warm_up(small: SearchSpace) -> None:
    sampler = UniformSampler(small, {"width": Opening(-1, 1.0, 1.0)})
    rng = np.random.default_rng(5)
    place = [gene.name for gene in small.genes].index("head.precision")
    counts = np.bincount([sampler.sample(rng, 0.5).genes[place] for _ in range(1000)])
    assert stats.chisquare(counts).pvalue > 0.001


def test_a_schedule_that_is_over_changes_no_draw(tiny: SearchSpace) -> None:
    schedule = {"width": Opening(-1, 0.2, 0.5), "precision": Opening(0, 0.4, 0.4)}
    usual, scheduled = UniformSampler(tiny), UniformSampler(tiny, schedule)
    generators = [np.random.default_rng(6) for _ in range(2)]
    for progress in (0.5, 0.7, 1.0):
        assert usual.sample(generators[0]) == scheduled.sample(generators[1], progress)


def test_the_same_seed_draws_the_same_and_another_seed_does_not(tiny: SearchSpace) -> None:
    def drawn(seed: int) -> list[Architecture]:
        rng, sampler = np.random.default_rng(seed), UniformSampler(tiny)
        return [sampler.sample(rng) for _ in range(30)]

    assert drawn(7) == drawn(7)
    assert not set(drawn(7)) & set(drawn(8))


def test_a_sampler_draws_the_same_whatever_it_drew_before(tiny: SearchSpace) -> None:
    used, fresh = UniformSampler(tiny), UniformSampler(tiny)
    for _ in range(5):
        used.sample(np.random.default_rng(0))
    assert used.sample(np.random.default_rng(9)) == fresh.sample(np.random.default_rng(9))


def test_every_architecture_can_be_drawn() -> None:
    space = mobile("s", (Stage(2, 1, (16, 24)),), classes=4, size=16, kernels=(3,), expansions=(3,))
    rng, sampler = np.random.default_rng(10), UniformSampler(space)
    assert {sampler.sample(rng) for _ in range(3000)} == set(space.enumerate())


def test_a_space_with_one_architecture_is_sampled() -> None:
    space = mobile(
        "one",
        (Stage(1, 2, (16,)),),
        classes=4,
        size=16,
        kernels=(3,),
        expansions=(3,),
        precisions=("fp32",),
    )
    assert UniformSampler(space).sample(np.random.default_rng(0)) == Architecture(())


# ---- bins of a cost


def test_costs_are_uniform_over_the_bins(tiny: SearchSpace) -> None:
    cost = counted_cost(tiny, "macs")
    sampler, rng = CostBinned(UniformSampler(tiny), cost, 4), np.random.default_rng(1)
    edges = sampler.edges()
    drawn = [sampler.sample(rng) for _ in range(400)]
    totals = cost.totals(tiny, genes_of(drawn))
    assert ((totals >= edges[0]) & (totals <= edges[-1])).all()
    counts = np.histogram(totals, edges)[0]
    assert stats.chisquare(counts).pvalue > 0.001
    plain = [UniformSampler(tiny).sample(rng) for _ in range(400)]
    usual = np.histogram(cost.totals(tiny, genes_of(plain)), edges)[0]
    assert stats.chisquare(usual, usual.sum() / 4 * np.ones(4)).pvalue < 1e-6


def test_bins_are_of_equal_width_around_the_mean_cost_of_what_is_open(tiny: SearchSpace) -> None:
    cost = counted_cost(tiny, "macs")
    uniform = UniformSampler(tiny, {"width": Opening(-1, 0.5, 0.5)})
    sampler, rng = CostBinned(uniform, cost, 7), np.random.default_rng(9)
    for progress in (0.0, 0.9):
        edges = sampler.edges(progress)
        np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])
        drawn = [uniform.sample(rng, progress) for _ in range(2000)]
        totals = cost.totals(tiny, genes_of(drawn))
        assert edges.mean() == pytest.approx(totals.mean(), rel=0.03)
        assert edges[-1] - edges[0] == pytest.approx(6 * totals.std(), rel=0.1)
    assert sampler.edges(0.0).mean() > 1.1 * sampler.edges(0.9).mean()


class Counted(UniformSampler):
    """Counts what is drawn."""

    count = 0

    def sample(self, rng: np.random.Generator, progress: float = 1.0) -> Architecture:
        self.count += 1
        return super().sample(rng, progress)


def test_a_bin_that_nothing_falls_into_ends_after_its_tries(small: SearchSpace) -> None:
    """Thousands of bins: nearly all are empty."""
    counted = Counted(small)
    sampler = CostBinned(counted, counted_cost(small, "macs"), 5000)
    sampler.edges()
    most = []
    for seed in range(5):
        counted.count = 0
        found = sampler.sample(np.random.default_rng(seed))
        assert small.architecture(found.genes) == found
        most.append(counted.count)
    assert max(most) == MOST_TRIES


def test_binned_paths_depend_on_their_generator_alone(tiny: SearchSpace) -> None:
    one, other = (CostBinned(UniformSampler(tiny), counted_cost(tiny, "macs"), 5) for _ in range(2))
    other.sample(np.random.default_rng(0), 0.3)
    for seed in range(5):
        left = one.sample(np.random.default_rng(seed))
        assert left == other.sample(np.random.default_rng(seed))


@pytest.mark.parametrize("bins", [0, -1])
def test_no_bins_are_refused(tiny: SearchSpace, bins: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        CostBinned(UniformSampler(tiny), counted_cost(tiny, "macs"), bins)


def test_marginals_are_the_shares_of_each_value(small: SearchSpace) -> None:
    rng, sampler = np.random.default_rng(2), UniformSampler(small)
    drawn = [sampler.sample(rng) for _ in range(50)]
    told = marginals(small, drawn)
    assert list(told) == [gene.name for gene in small.genes]
    for gene in small.genes:
        counts = Counter(small.describe(a)[gene.name] for a in drawn)
        assert told[gene.name] == {choice: counts[choice] / 50 for choice in gene.choices}
