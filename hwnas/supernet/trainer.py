"""Training shared weights: one sampled path a step."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hwnas.data import Splits
from hwnas.recipes import SupernetRecipe
from hwnas.spaces.base import Architecture
from hwnas.spaces.floats import space_in_float
from hwnas.supernet.network import Supernet
from hwnas.training import CHECKPOINT_STEPS, Checkpoint, restore, train_steps
from profilers.build import Progress


class Sampler(Protocol):
    """Chooses the path of a training step."""

    def sample(self, rng: np.random.Generator, progress: float) -> Architecture:
        """One architecture; `progress` is the share of training that is done."""
        ...


def train_supernet(
    supernet: Supernet,
    splits: Splits,
    sampler: Sampler,
    recipe: SupernetRecipe,
    *,
    seed: int,
    checkpoint: Path,
    progress: Progress,
    checkpoint_every: int = CHECKPOINT_STEPS,
) -> None:
    """Train shared weights on TRAIN, where they are; goes on from `checkpoint` if it is there.

    The recipe's first steps run each path in float. The first quantised step sets the ranges of
    activations, from its batch and the weights as they then are.

    A step leaves every tensor that its path does not use as it is. Inside a tensor that is used in
    part, the channels beyond the sampled width get zero gradients, as in every sliced supernet.
    """
    kept = Checkpoint(checkpoint, _identity(supernet), checkpoint_every)
    twin = in_float(supernet) if recipe.float_steps else supernet

    def logits(step: int, batch: Tensor) -> Tensor:
        rng = np.random.default_rng([seed, 3, step])
        path = sampler.sample(rng, step / recipe.steps)
        if step < recipe.float_steps:
            result: Tensor = twin(batch, twin.space.architecture(path.genes))
            return result
        if step == recipe.float_steps:
            supernet.initialise_ranges(batch)
        result = supernet(batch, path)
        return result

    train_steps(
        supernet, splits.train, recipe, logits, kept,
        seed=seed, progress=progress, label="training the supernet",
    )  # fmt: skip


def in_float(supernet: Supernet) -> Supernet:
    """The very weights of a supernet, read by a space without quantisers."""
    with torch.device("meta"):  # weights of its own are not needed
        twin = Supernet(space_in_float(supernet.space), supernet.runtime)
    twin.layers = supernet.layers
    return twin


def load_supernet(supernet: Supernet, checkpoint: Path) -> int:
    """Read trained weights; the answer is how many steps they were trained for (0: none)."""
    steps = restore(supernet, Checkpoint(checkpoint, _identity(supernet)))
    supernet.eval()
    return steps


def _identity(supernet: Supernet) -> str:
    return f"the space {supernet.space.name} {supernet.space.fingerprint}"
