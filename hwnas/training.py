"""The training loop, for shared weights and for one network alike; it goes on where it stopped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwnas.batches import PlacedImages, TrainingBatches
from hwnas.data import Images
from hwnas.placement import placement_of
from hwnas.recipes import TrainingRecipe
from hwnas.weights import damaged, load_state, save_state
from profilers.build import Progress
from profilers.measure import now_s
from quant.errors import InvalidInput
from quant.ranges import LearnedRange

CHECKPOINT_STEPS = 100
CHECKPOINT_S = 20.0
"""A checkpoint is written after so many steps or seconds, whichever come first: what a stop loses.
When it is written changes nothing in the result."""


@dataclass(frozen=True)
class Checkpoint:
    """Where training keeps its state, and of what it is: `identity` must be equal to go on."""

    path: Path
    identity: str
    every_steps: int = CHECKPOINT_STEPS


@dataclass(frozen=True)
class Teacher:
    """Whose answers a network is trained to give, beside the classes.

    `logits` answers a batch; `weight` is the teacher's share of the loss; `temperature` softens the
    answers of both sides.
    """

    logits: Callable[[Tensor], Tensor]
    weight: float
    temperature: float

    def loss(self, logits: Tensor, batch: Tensor, hard: Tensor) -> Tensor:
        """(1 - weight) hard + weight T^2 KL(softmax(teacher / T) || softmax(logits / T)).

        After Hinton et al. 2015, section 2: T^2 keeps the share of the soft part in the gradients
        as T changes; the KL divergence differs from their cross-entropy by a constant.
        """
        with torch.no_grad():
            told = functional.log_softmax(self.logits(batch) / self.temperature, 1)
        given = functional.log_softmax(logits / self.temperature, 1)
        soft = functional.kl_div(given, told, reduction="batchmean", log_target=True)
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * soft


def optimiser_of(module: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW over a module's parameters; weight decay is on weights, not on norms, biases and LSQ's
    ranges. PACT's ranges have a decay of their own, the paper's L2 on alpha.
    """
    pact = {m.limit for m in module.modules() if isinstance(m, LearnedRange) and m.pact}
    parameters = [p for p in module.parameters() if p not in pact]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if pact:
        clipping = [p for p in module.parameters() if p in pact]
        groups.append({"params": clipping, "weight_decay": recipe.clipping_decay})
    options = placement_of(module).optimiser_options
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, **options)


def set_rate(optimiser: torch.optim.Optimizer, recipe: TrainingRecipe, step: int) -> None:
    """The learning rate of a step."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(step)


def loss(logits: Tensor, classes: Tensor, recipe: TrainingRecipe) -> Tensor:
    """The loss to minimise."""
    return functional.cross_entropy(logits, classes, label_smoothing=recipe.label_smoothing)


class Training:
    """What a training step takes beside its batch: the same code on every device. Nothing in a step
    waits for the device, so that it always has work in its queue.
    """

    def __init__(
        self, module: nn.Module, recipe: TrainingRecipe, teacher: Teacher | None = None
    ) -> None:
        self.where = placement_of(module)
        self.where.keep_memory()
        self.parameters = list(module.parameters())
        self.optimiser = optimiser_of(module, recipe)
        self.recipe = recipe
        self.teacher = teacher

    def take(
        self, step: int, logits: Callable[[int, Tensor], Tensor], batch: Tensor, classes: Tensor
    ) -> None:
        """One step: forward, backward, clipping of the gradients, optimiser."""
        set_rate(self.optimiser, self.recipe, step)
        self.optimiser.zero_grad(set_to_none=True)
        with self.where.training():
            answers = logits(step, batch)
            value = loss(answers, classes, self.recipe)
            if self.teacher is not None:
                value = self.teacher.loss(answers, batch, value)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimiser.step()

    def restore(self, optimiser: dict[str, Any]) -> None:
        """Go on from the optimiser's state of a checkpoint, made on whatever device."""
        for group in optimiser["param_groups"]:
            group |= self.where.optimiser_options
        self.optimiser.load_state_dict(optimiser)


def train_steps(
    module: nn.Module,
    images: Images,
    recipe: TrainingRecipe,
    logits: Callable[[int, Tensor], Tensor],
    checkpoint: Checkpoint | None,
    *,
    seed: int,
    progress: Progress,
    label: str,
    teacher: Teacher | None = None,
) -> None:
    """Train `module` for the recipe's steps; `logits(step, batch)` is its answer at a step.

    Trains where the module's weights are. Goes on from the checkpoint where it is there, to the
    same weights as without a stop on a CPU, to about the same on another device. The checkpoint of
    the last step stays. A tensor that a step does not use keeps its value: gradients that are not
    there (rather than zero) keep momentum and weight decay away.
    """
    state: dict[str, Any] = _restored(module, checkpoint) if checkpoint else {"step": 0}
    start = int(state["step"])
    training = Training(module, recipe, teacher)  # now: Brevitas replaces parameters in loading
    if checkpoint and start:
        with _whole(checkpoint.path):
            training.restore(state["optimiser"])
    placed = PlacedImages(images, training.where)
    batches = TrainingBatches(placed, recipe.batch, seed=seed, flip=recipe.flip)
    module.train()
    saved_s = now_s()
    for step in range(start, recipe.steps):
        training.take(step, logits, *batches.at(step))
        done = step + 1
        if checkpoint and (
            done == recipe.steps
            or done % checkpoint.every_steps == 0
            or now_s() - saved_s > CHECKPOINT_S
        ):
            _save(module, training.optimiser, checkpoint, done)
            saved_s = now_s()
        progress(label, done, recipe.steps)
    module.eval()


def restore(module: nn.Module, checkpoint: Checkpoint) -> int:
    """Read a checkpoint's weights into a module; how many steps they were trained for, 0 where
    there is none. Raises InvalidInput where the file is damaged or of something else.
    """
    return int(_restored(module, checkpoint)["step"])


def _restored(module: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's state, with its weights read into a module; step 0 where there is none."""
    if not checkpoint.path.exists():
        return {"step": 0}
    state = load_state(checkpoint.path)
    with _whole(checkpoint.path):
        if state["identity"] != checkpoint.identity:
            raise InvalidInput(
                f"{checkpoint.path} holds the weights of something else ({state['identity']}).",
                accepted=f"a checkpoint of {checkpoint.identity}",
                next_step="name the run that it belongs to, or another --run",
            )
        where = placement_of(module)
        module.load_state_dict(state["weights"])
        where.move(module)  # what Brevitas replaces in loading is on the host
        return {**state, "step": int(state["step"])}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what a state that is not whole leads to into one sentence for the user."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise damaged(path, error) from error


def _save(
    module: nn.Module, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint, step: int
) -> None:
    state = {
        "identity": checkpoint.identity,
        "step": step,
        "weights": module.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    save_state(state, checkpoint.path)
