from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from hwnas.costs.samplers import UniformSampler
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


@pytest.mark.parametrize(
    "held", [{"width": -1}, {"width": 0, "precision": -1}], ids=["one option", "two options"]
)
def test_held_genes_take_the_value_at_their_index_until_held_for(
    small: SearchSpace, small_list: list[Architecture], held: dict[str, int]
) -> None:
    sampler, rng = UniformSampler(small, held=held, held_for=0.3), np.random.default_rng(4)
    names = [gene.name.split(".")[1] for gene in small.genes]
    seen: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for progress in (0.0, 0.15, 0.2999, 0.3, 0.31, 1.0):
        for _ in range(150):
            genes = sampler.sample(rng, progress).genes
            for place, name in enumerate(names):
                legal = legal_after(small_list, genes[:place])
                if name in held and len(legal) > 1:
                    at_index = genes[place] == legal[held[name]]
                    assert at_index or progress >= 0.3
                    seen[progress < 0.3][f"{name} {at_index}"] += 1
    for name in held:
        assert seen[True][f"{name} True"] > 100
        assert seen[False][f"{name} False"] > 100, "after held_for the gene must be free again"


def test_a_gene_that_cannot_take_the_held_value_takes_a_legal_one(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    """A skipped block has one legal precision, the first."""
    sampler = UniformSampler(small, held={"precision": 1}, held_for=1.0)
    rng = np.random.default_rng(4)
    drawn = {sampler.sample(rng, 0.0) for _ in range(200)}
    assert drawn <= set(small_list)
    told = [small.describe(architecture) for architecture in drawn]
    assert {t["block0.precision"] for t in told if t["block0.block"] == "skip"} == {"fp32"}
    assert {t["block0.precision"] for t in told if t["block0.block"] != "skip"} == {"w8a8"}


def test_genes_that_are_not_held_stay_uniform_during_the_warm_up(small: SearchSpace) -> None:
    sampler = UniformSampler(small, held={"width": -1}, held_for=1.0)
    rng = np.random.default_rng(5)
    place = [gene.name for gene in small.genes].index("head.precision")
    counts = np.bincount([sampler.sample(rng, 0.5).genes[place] for _ in range(1000)])
    assert stats.chisquare(counts).pvalue > 0.001


def test_without_a_warm_up_nothing_is_held(small: SearchSpace) -> None:
    usual, held = UniformSampler(small), UniformSampler(small, held={"width": -1})
    generators = [np.random.default_rng(6) for _ in range(2)]
    for progress in (0.0, 0.5, 1.0):
        assert usual.sample(generators[0], progress) == held.sample(generators[1], progress)


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
