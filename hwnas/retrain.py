"""The fixed recipe that trains one network: quantisation-aware where the network is quantised."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hwnas.batches import PlacedImages, evaluation_batch, in_order
from hwnas.data import Images, Splits
from hwnas.placement import placement_of, total
from hwnas.recipes import RetrainRecipe, TrainingRecipe
from hwnas.spaces.floats import op_in_float
from hwnas.training import Checkpoint, Teacher, train_steps
from hwnas.weights import damaged, load_state, save_state
from profilers.build import Progress
from profilers.modules import Network
from quant.layers import Fp8Cast


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
    """Train a network's own weights on TRAIN, then set its batch norms, and its fp8 ranges, by the
    first images of TRAIN (`recalibrate`); the network is left in inference mode. Goes on from
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
    """The same network in float beside it: a copy of its weights, with its own batch-norm
    statistics.
    """
    twin = Network([op_in_float(op) for op in network.ops])
    placement_of(network).move(twin)
    known = network.state_dict()
    twin.load_state_dict({name: known[name] for name in twin.state_dict()})
    recalibrate(twin, splits, images=recalibration_images)
    return twin


def recalibrate(
    network: Network, splits: Splits, *, images: int = 2048, batch: int | None = None
) -> None:
    """Set the running statistics of every batch norm to the cumulative mean over TRAIN images, then
    the ranges of what is cast to fp8 to the largest values of the same images.
    """
    where = placement_of(network)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    network.train()
    with where.scoring():
        placed = PlacedImages(splits.train.first(images), where)
        size = batch or evaluation_batch(splits.train)
        for count, (x, _) in enumerate(in_order(placed, size, whole=True), start=1):
            for norm in norms:
                norm.momentum = 1 / count  # None would mean the same, read from the device
            network(x)
        network.eval()
        _set_ranges(network, (x for x, _ in in_order(placed, size, whole=True)))


def _set_ranges(network: Network, batches: Iterable[Tensor]) -> None:
    """Set the range of whatever a network in inference mode casts to fp8, to the largest magnitude
    that it has on the batches.
    """
    casts = [module for module in network.modules() if isinstance(module, Fp8Cast)]
    if not casts:
        return

    def see(cast: Fp8Cast, given: tuple[Tensor]) -> None:
        cast.see(given[0])

    hooks = [cast.register_forward_pre_hook(see) for cast in casts]
    try:
        for cast in casts:
            cast.limit = None
        for x in batches:
            network(x)
    finally:
        for hook in hooks:
            hook.remove()


def accuracy(network: Network, splits: Splits, *, batch: int | None = None) -> float:
    """The share of SEARCH-VAL images that a network in inference mode classifies rightly."""
    return accuracy_on(network, splits.search_val, batch=batch)


def accuracy_on(network: Network, images: Images, *, batch: int | None = None) -> float:
    """The same of other images."""
    where = placement_of(network)
    with where.scoring():
        batches = in_order(PlacedImages(images, where), batch or evaluation_batch(images))
        right = [(network(x).argmax(1) == y).sum() for x, y in batches]
    return total(right) / len(images)


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
    placement_of(network).move(network)
    network.eval()
