"""What is left of a search, and about how long it takes here: told before it starts."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from hwnas.batches import PlacedImages, TrainingBatches
from hwnas.costs.limits import Limit
from hwnas.costs.samplers import UniformSampler
from hwnas.history import History
from hwnas.job import Job
from hwnas.loop import is_answered, read_finalists, result_name, searches, settled
from hwnas.ship import weights_of
from hwnas.store import Run
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import load_supernet
from hwnas.training import loss
from profilers.measure import now_s


@dataclass(frozen=True)
class Estimate:
    """What is left of a run before its certificate: units of work, and about how long here.

    `step_ms` is what one training step took, measured on an untrained supernet where it is to be
    trained.
    """

    steps: int
    scored: int
    retrained: int
    step_ms: float
    minutes: float


def estimate(job: Job, run: Run, limits: Sequence[Limit]) -> Estimate:
    """What is left of a search under these limits (of training alone where there are none)."""
    torch.manual_seed(job.request.seed)
    supernet = Supernet(job.space, job.profiler.runtime)
    job.placement.move(supernet)
    recipe = job.recipe
    steps = recipe.supernet.steps - load_supernet(supernet, run.supernet)
    scored, retrained = _left(job, run, limits) if limits else (0, 0)
    step_s = _step_s(job, supernet) if steps or scored or retrained else 0.0
    images = recipe.recalibration_images + min(recipe.validation_images, len(job.splits.search_val))
    scoring_s = scored * images / recipe.supernet.batch * step_s / 3  # forward alone
    retrain_s = retrained * recipe.retrain.steps * step_s
    retrain_s *= {"none": 1.0, "float": 2 + 1 / 3, "largest": 1 + 1 / 3}[recipe.retrain.teacher]
    retrain_s *= recipe.retrain.batch / recipe.supernet.batch
    total_s = steps * step_s + scoring_s + retrain_s
    return Estimate(steps, scored, retrained, step_s * 1000, total_s / 60)


def _left(job: Job, run: Run, limits: Sequence[Limit]) -> tuple[int, int]:
    """Architectures still to be scored, and finalists still to be trained."""
    recipe, result = job.recipe, run.result(result_name(job, limits))
    limits = settled(job, result, limits)
    if is_answered(job, result, limits):
        if (result / "certificate.json").exists():
            return 0, 0
        numbers = range(len(read_finalists(result)))
        return 0, sum(not weights_of(result, number).exists() for number in numbers)
    names = searches(job, limits).values()
    with closing(History(run.history)) as history:
        proposed = [genes for name in names for g in history.generations(name) for genes in g]
        scored = sum(history.score(genes) is not None for genes in proposed)
    return max(0, len(names) * recipe.evaluations - scored), recipe.finalists


def _step_s(job: Job, supernet: Supernet) -> float:
    """Seconds of a forward and backward pass on one batch, the mean over a few random paths."""
    recipe, where = job.recipe.supernet, job.placement
    few = PlacedImages(job.splits.train.first(recipe.batch), where)
    batch, classes = TrainingBatches(few, recipe.batch, seed=0).at(0)
    sampler, rng = UniformSampler(job.space), np.random.default_rng(0)
    supernet.initialise_ranges(batch[:2])  # a thrown-away supernet: any range will do
    supernet.train()
    for warm_up in (True, False):
        start, count = now_s(), 0
        while count < 1 or (count < 5 and now_s() - start < 2 and not warm_up):
            with where.training():
                value = loss(supernet(batch, sampler.sample(rng)), classes, recipe)
            torch.autograd.backward(value)
            where.finish()
            count += 1
        seconds = (now_s() - start) / count
    return seconds
