"""What do quantisers cost a training step of the supernet?

`mobile-tiny`'s blocks on images of 32 x 32, batches of 64, all threads that PyTorch takes by
default. Each step draws a path; the same path is trained with random precisions, quantisers
compiled and uncompiled, and in fp32: forward, backward, clipping and optimiser, on one supernet, in
turns. The first turns are dropped. A figure is the median over paths of the ratio of a step's
seconds to those of its fp32 step. `pact` has DoReFa weights and PACT's ranges, `floats` casts.

Band: with compiled quantisers a step at random bits (absmax weights, LSQ) takes at most 1.15 times
its fp32 step. Compiled and uncompiled steps leave the same weights, to the last bit.
"""

import os
import time

import numpy as np
import torch

from hwnas.costs.samplers import UniformSampler
from hwnas.recipes import RECIPES
from hwnas.spaces.mobile import Stage, mobile
from hwnas.supernet.network import Supernet
from hwnas.training import loss, optimiser_of
from quant.kernels import SWITCH

PRECISIONS = {
    "bits": ("w8a8", "w4a8", "w4a4", "w3a4", "w2a4"),
    "pact": ("pact-w4a4", "pact-w2a2", "pact-w1a2"),
    "floats": ("fp16", "bf16", "fp8"),
}
STAGES = (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48)), Stage(3, 2, (64, 96)))
RECIPE = RECIPES["standard"].supernet
BATCH, DROPPED = 64, 2
WAYS = {"compiled": "1", "uncompiled": "0"}


def measure(*, reduced: bool):
    """Steps in turns, for each family of precisions."""
    paths = 12 if reduced else 100
    before = os.environ.get(SWITCH)
    try:
        raw = {name: steps(precisions, paths) for name, precisions in PRECISIONS.items()}
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before
    figures = {
        name: {
            **{way: ratio(rows, way) for way in WAYS},
            "fp32_ms": 1000 * float(np.median([row["fp32"] for row in rows])),
        }
        for name, rows in raw.items()
    }
    figures["threads"] = torch.get_num_threads()
    figures["same_weights"] = same_weights(PRECISIONS["bits"], steps=4)
    return {"figures": figures, "raw": raw}


def ratio(rows, way):
    """The median over paths of a way's seconds over those in fp32."""
    return float(np.median([row[way] / row["fp32"] for row in rows]))


def steps(precisions, paths):
    """The seconds of each way of each path."""
    trained = Trained(precisions)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(paths + DROPPED):
        path = UniformSampler(trained.space).sample(rng)
        quantised = trained.at(path, rng)
        turns = [(way, switch, quantised) for way, switch in WAYS.items()]
        turns.append(("fp32", "0", trained.at(path, None)))
        rows.append({})
        for place in rng.permutation(len(turns)):
            way, os.environ[SWITCH], architecture = turns[place]
            rows[-1][way] = trained.step(architecture)
    return rows[DROPPED:]


def same_weights(precisions, *, steps):
    """Whether both ways of the quantisers end in the same weights."""
    ends = []
    for switch in WAYS.values():
        os.environ[SWITCH] = switch
        trained, rng = Trained(precisions), np.random.default_rng(1)
        for _ in range(steps):
            trained.step(trained.at(UniformSampler(trained.space).sample(rng), rng))
        ends.append(trained.supernet.state_dict())
    return all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


class Trained:
    """A supernet with fp32 and other precisions in its blocks and head, and its optimiser."""

    def __init__(self, precisions):
        self.space = mobile(
            "train-step", STAGES, classes=10, size=32, precisions=("fp32", *precisions)
        )
        torch.manual_seed(0)
        self.supernet = Supernet(self.space)
        self.images, self.classes = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        os.environ[SWITCH] = "0"
        self.supernet.initialise_ranges(self.images)
        self.optimiser = optimiser_of(self.supernet, RECIPE)

    def at(self, path, rng):
        """The same path at random precisions, or all in fp32 where `rng` is None."""
        values = [
            gene
            if not kind.name.endswith("precision")
            else 0
            if rng is None
            else rng.integers(1, len(kind.choices))
            for kind, gene in zip(self.space.genes, path.genes, strict=True)
        ]
        return self.space.architecture(values)

    def step(self, architecture):
        """The seconds of one training step."""
        start = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.supernet(self.images, architecture)
        torch.autograd.backward(loss(logits, self.classes, RECIPE))
        torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), RECIPE.clip_norm)
        self.optimiser.step()
        return time.perf_counter() - start


def band(figures):
    """What is outside the stated band."""
    complaints = []
    if figures["bits"]["compiled"] > 1.15:
        complaints.append(f"a step takes {figures['bits']['compiled']:.2f} times its fp32 step")
    if not figures["same_weights"]:
        complaints.append("compiled and uncompiled quantisers train different weights")
    return complaints
