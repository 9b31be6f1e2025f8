"""The fixed recipe that trains one network: quantisation-aware where the network is quantised."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from hwnas.batches import evaluation_batch, in_order
from hwnas.data import Images, Splits
from hwnas.recipes import RetrainRecipe, TrainingRecipe
from hwnas.spaces.floats import op_in_float
from hwnas.training import Checkpoint, Teacher, train_steps
from hwnas.weights import damaged, load_state, save_state
from profilers.build import Progress
from profilers.modules import Network


def retrain(
    network: Network,
    splits: Splits,
    recipe: TrainingRecipe,
    *,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
    recalibration_images: int = 2048,
    label: str = "retraining",
    teacher: Teacher | None = None,
) -> None:
    """Train a network's own weights on TRAIN, then set its batch norms to the cumulative mean
    over the first images of TRAIN; the network is left in inference mode. Goes on from
    `checkpoint`, where one is named and there. The teacher, where there is one, has to answer
    alike before and after a stop.
    """
    keys = "\n".join(op.key for op in network.ops)
    identity = f"the network {hashlib.sha256(keys.encode()).hexdigest()[:16]}"

    def logits(_step: int, batch: Tensor) -> Tensor:
        result: Tensor = network(batch)
        return result

    kept = Checkpoint(checkpoint, identity) if checkpoint else None
    train_steps(
        network, splits.train, recipe, logits, kept,
        seed=seed, progress=progress, label=label, teacher=teacher,
    )  # fmt: skip
    recalibrate(network, splits, images=recalibration_images)
    network.eval()


def teacher_of(network: Network, recipe: RetrainRecipe) -> Teacher:
    """A network as the recipe's teacher: in inference mode, and never trained by its pupils."""
    network.eval()
    return Teacher(network, recipe.teacher_weight, recipe.temperature)


def in_float(network: Network, splits: Splits, *, recalibration_images: int = 2048) -> Network:
    """The same network in float: a copy of its weights, with its own batch-norm statistics."""
    twin = Network([op_in_float(op) for op in network.ops])
    known = network.state_dict()
    twin.load_state_dict({name: known[name] for name in twin.state_dict()})
    recalibrate(twin, splits, images=recalibration_images)
    return twin


def recalibrate(
    network: Network, splits: Splits, *, images: int = 2048, batch: int | None = None
) -> None:
    """Set the running statistics of every batch norm to the cumulative mean over TRAIN images."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        batch = batch or evaluation_batch(splits.train)
        for x, _ in in_order(splits.train.first(images), batch, whole=True):
            network(x)
    network.eval()


def accuracy(network: Network, splits: Splits, *, batch: int | None = None) -> float:
    """The share of SEARCH-VAL images that a network in inference mode classifies rightly."""
    return accuracy_on(network, splits.search_val, batch=batch)


def accuracy_on(network: Network, images: Images, *, batch: int | None = None) -> float:
    """The same of other images."""
    right = 0
    with torch.no_grad():
        for x, y in in_order(images, batch or evaluation_batch(images)):
            right += int((network(x).argmax(1) == y).sum())
    return right / len(images)


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
