"""The fixed recipe that trains one network: quantisation-aware where the network is quantised."""

from collections.abc import Callable
from pathlib import Path

import torch

from hwnas.batches import in_order, step_batch
from hwnas.data import Splits
from hwnas.recipes import TrainingRecipe
from hwnas.weights import damaged, load_state, save_state
from profilers.modules import Network


def retrain(
    network: Network,
    splits: Splits,
    recipe: TrainingRecipe,
    *,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Train a network's own weights on TRAIN, then set its batch norms to the cumulative mean
    over TRAIN; the network is left in inference mode.
    """
    optimiser = recipe.optimiser(network)
    network.train()
    for step in range(recipe.steps):
        images, classes = step_batch(splits.train, recipe.batch, seed=seed, step=step)
        recipe.set_rate(optimiser, step)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(recipe.loss(network(images), classes))
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimiser.step()
        progress("retraining", step + 1, recipe.steps)
    recalibrate(network, splits)
    network.eval()


def recalibrate(network: Network, splits: Splits, *, images: int = 2048, batch: int = 128) -> None:
    """Set the running statistics of every batch norm to the cumulative mean over TRAIN images."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        for x, _ in in_order(splits.train.first(images), batch, whole=True):
            network(x)
    network.eval()


def accuracy(network: Network, splits: Splits, *, batch: int = 256) -> float:
    """The share of SEARCH-VAL images that a network in inference mode classifies rightly."""
    right = 0
    with torch.no_grad():
        for x, y in in_order(splits.search_val, batch):
            right += int((network(x).argmax(1) == y).sum())
    return right / len(splits.search_val)


def save_weights(network: Network, path: Path) -> None:
    """Write a network's weights atomically."""
    save_state(network.state_dict(), path)


def load_weights(network: Network, path: Path) -> None:
    """Read what `save_weights` wrote into a network of the same ops."""
    state = load_state(path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise damaged(path, error) from error
    network.eval()
