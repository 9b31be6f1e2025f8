"""The shared weights of a run: trained as far as they are not, and scoring architectures."""

import numpy as np
import torch

from hwnas.costs.samplers import marginals
from hwnas.job import Job
from hwnas.store import Run
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import load_supernet, train_supernet

MARGINAL_PATHS = 1000
"""So many paths tell the log how often binned training draws each value of each gene at its end."""


def train(job: Job, run: Run) -> Supernet:
    """The trained supernet, where it is trained; trained now as far as it is not."""
    torch.manual_seed(job.request.seed)
    supernet = Supernet(job.space, job.profiler.runtime)
    job.placement.move(supernet)
    steps = load_supernet(supernet, run.supernet)
    if steps < job.recipe.supernet.steps:
        sampler = job.method.sampler(job.space, job.recipe.supernet)
        run.log("train", steps=job.recipe.supernet.steps, start=steps, on=job.placement.text)
        if job.recipe.supernet.cost_bins and not steps:
            rng = np.random.default_rng(job.request.seed)
            drawn = [sampler.sample(rng, 1.0) for _ in range(MARGINAL_PATHS)]
            run.log("paths", marginals=marginals(job.space, drawn))
        train_supernet(
            supernet,
            job.splits,
            sampler,
            job.recipe.supernet,
            seed=job.request.seed,
            checkpoint=run.supernet,
            progress=job.progress,
        )
    return supernet


def evaluator(job: Job, supernet: Supernet) -> Evaluator:
    """Scores architectures of a trained supernet."""
    return Evaluator(
        supernet,
        job.splits,
        recalibration_images=job.recipe.recalibration_images,
        validation_images=job.recipe.validation_images,
    )
