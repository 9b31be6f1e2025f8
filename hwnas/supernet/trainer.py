"""The training loop of a supernet: one sampled path a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hwnas.batches import step_batch
from hwnas.data import Splits
from hwnas.recipes import TrainingRecipe
from hwnas.spaces.base import Architecture
from hwnas.supernet.network import Supernet
from hwnas.weights import damaged, load_state, save_state
from quant.errors import InvalidInput


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
    progress: Callable[[str, int, int], None],
    checkpoint_every: int = 100,
) -> None:
    """Train shared weights on TRAIN, one path a step; goes on from `checkpoint` if it is there.

    A step leaves every tensor that its path does not use as it is: gradients that are not there
    (rather than zero) keep momentum and weight decay away. Inside a tensor that is used in part,
    the channels beyond the sampled width get zero gradients, as in every sliced supernet.
    """
    optimiser = recipe.optimiser(supernet)
    start = _restore(supernet, optimiser, checkpoint)
    if start == 0:
        batch, _ = step_batch(splits.train, recipe.batch, seed=seed, step=0)
        supernet.initialise_ranges(batch)
    supernet.train()
    for step in range(start, recipe.steps):
        images, classes = step_batch(splits.train, recipe.batch, seed=seed, step=step)
        architecture = sampler.sample(np.random.default_rng([seed, 3, step]), step / recipe.steps)
        recipe.set_rate(optimiser, step)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(recipe.loss(supernet(images, architecture), classes))
        torch.nn.utils.clip_grad_norm_(supernet.parameters(), recipe.clip_norm)
        optimiser.step()
        done = step + 1
        if done == recipe.steps or done % checkpoint_every == 0:
            _save(supernet, optimiser, checkpoint, done)
        progress("training the supernet", done, recipe.steps)
    supernet.eval()


def load_supernet(supernet: Supernet, checkpoint: Path) -> int:
    """Read trained weights; the answer is how many steps they were trained for (0: none)."""
    steps = _restore(supernet, None, checkpoint)
    supernet.eval()
    return steps


def _save(
    supernet: Supernet, optimiser: torch.optim.Optimizer, checkpoint: Path, step: int
) -> None:
    state = {
        "space": supernet.space.fingerprint,
        "step": step,
        "weights": supernet.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    save_state(state, checkpoint)


def _restore(supernet: Supernet, optimiser: torch.optim.Optimizer | None, checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    state = load_state(checkpoint)
    if state.get("space", supernet.space.fingerprint) != supernet.space.fingerprint:
        raise InvalidInput(
            f"{checkpoint} holds the weights of another space.",
            accepted=f"a checkpoint of {supernet.space.name} ({supernet.space.fingerprint})",
            next_step="name the run that it belongs to, or another --run",
        )
    try:
        supernet.load_state_dict(state["weights"])
        if optimiser is not None:
            optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise damaged(checkpoint, error) from error
