"""SPOS, Single Path One-Shot (Guo et al. 2019): uniform single paths, then evolution.

Blocks, channels and precisions are sampled in one supernet. Widths and precisions join after a
warm-up at the largest width in the first precision: sampled from the start, training diverges.
"""

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.samplers import UniformSampler
from hwnas.methods.base import Method
from hwnas.recipes import Recipe
from hwnas.search.evolution import Evolution
from hwnas.spaces.base import SearchSpace

WARM_UP = 0.4
"""The share of training in which widths and precisions are held."""

HELD = {"width": -1, "precision": 0}


def sampler(space: SearchSpace) -> UniformSampler:
    """Uniform paths, after the warm-up."""
    return UniformSampler(space, held=HELD, held_for=WARM_UP)


def strategy(feasible: FeasibleSet, seed: int, recipe: Recipe) -> Evolution:
    """The paper's evolution, its proportions scaled to the recipe's population."""
    half = recipe.population // 2
    return Evolution(
        feasible,
        seed=seed,
        population=recipe.population,
        parents=max(2, recipe.population // 5),
        mutations=half,
        crossovers=recipe.population - half,
    )


SPOS = Method("spos", "no claim check is committed yet", sampler, strategy)
