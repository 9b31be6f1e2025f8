"""Training shared weights: one sampled path a step."""

from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from hwnas.batches import step_batch
from hwnas.data import Splits
from hwnas.recipes import TrainingRecipe
from hwnas.spaces.base import Architecture
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
    recipe: TrainingRecipe,
    *,
    seed: int,
    checkpoint: Path,
    progress: Progress,
    checkpoint_every: int = CHECKPOINT_STEPS,
) -> None:
    """Train shared weights on TRAIN; goes on from `checkpoint` if it is there.

    A step leaves every tensor that its path does not use as it is. Inside a tensor that is used in
    part, the channels beyond the sampled width get zero gradients, as in every sliced supernet.
    """
    kept = Checkpoint(checkpoint, _identity(supernet), checkpoint_every)

    def logits(step: int, batch: Tensor) -> Tensor:
        rng = np.random.default_rng([seed, 3, step])
        result: Tensor = supernet(batch, sampler.sample(rng, step / recipe.steps))
        return result

    if not checkpoint.exists():
        batch, _ = step_batch(splits.train, recipe.batch, seed=seed, step=0)
        supernet.initialise_ranges(batch)
    train_steps(
        supernet, splits.train, recipe, logits, kept,
        seed=seed, progress=progress, label="training the supernet",
    )  # fmt: skip


def load_supernet(supernet: Supernet, checkpoint: Path) -> int:
    """Read trained weights; the answer is how many steps they were trained for (0: none)."""
    steps = restore(supernet, Checkpoint(checkpoint, _identity(supernet)))
    supernet.eval()
    return steps


def _identity(supernet: Supernet) -> str:
    return f"the space {supernet.space.name} {supernet.space.fingerprint}"
