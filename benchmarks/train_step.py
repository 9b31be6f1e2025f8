"""What do quantisers cost a training step of the supernet?

`mobile-tiny`'s blocks on images of 32 x 32 and 64 x 64, batches of 64, all threads that PyTorch
takes by default. Each step draws a path; the same path is trained with random precisions,
quantisers compiled and uncompiled, and in fp32: forward, backward, clipping and optimiser, on one
supernet, in turns. The first turns are dropped. A figure is the median over paths of the ratio of a
step's seconds to those of its fp32 step. `pact` has DoReFa weights and PACT's ranges, `floats`
casts.

`memory`: steps at random bits on images of 128 x 128, in processes that keep the memory that
tensors free (`Placement.keep_memory`) and in others that do not, in turns: the ratios of their
seconds and of the most memory that they had.

`on(device)` asks another question, on any device: what does sharing weights cost? A path's step on
the supernet, in fp and at random bits, beside the same step of the same network alone (extracted,
plain modules in fp). Blocks of steps take turns; a block is timed by the device's own clock, which
is read when all is done, so that nothing waits in between.

Band: with compiled quantisers a step at random bits (absmax weights, LSQ) takes at most 1.15 times
its fp32 step, at either size. Compiled and uncompiled steps leave the same weights, to the last
bit. A process that keeps its memory is no slower.
"""

import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from unittest import mock

import numpy as np
import torch

from hwnas.costs.samplers import UniformSampler
from hwnas.placement import HOST, Placement, placement
from hwnas.recipes import RECIPES
from hwnas.spaces.mobile import Stage, mobile
from hwnas.supernet.network import Supernet
from hwnas.training import Training
from quant.kernels import SWITCH

PRECISIONS = {
    "bits": ("w8a8", "w4a8", "w4a4", "w3a4", "w2a4"),
    "pact": ("pact-w4a4", "pact-w2a2", "pact-w1a2"),
    "floats": ("fp16", "bf16", "fp8"),
}
CASES = {
    "bits": ("bits", 32), "bits_64px": ("bits", 64), "pact": ("pact", 32), "floats": ("floats", 32),
}  # fmt: skip
"""The precisions and the size of each figure."""
MOST = 1.15
STAGES = (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48)), Stage(3, 2, (64, 96)))
RECIPE = RECIPES["standard"].supernet
BATCH, DROPPED = 64, 2
WAYS = {"compiled": "1", "uncompiled": "0"}
SHARING = {"fp": 1.05, "mixed": 1.25}
"""A path's step takes at most so many times the step of its network alone in fp, on a GPU."""


def measure(*, reduced: bool):
    """Steps in turns, for each family of precisions."""
    paths = 12 if reduced else 100
    with switch_kept():
        raw = {
            name: steps(PRECISIONS[family], paths if size == 32 else paths // 4, size)
            for name, (family, size) in CASES.items()
        }
    figures = {
        name: {
            **{way: ratio(rows, way) for way in WAYS},
            "fp32_ms": 1000 * float(np.median([row["fp32"] for row in rows])),
        }
        for name, rows in raw.items()
    }
    figures["threads"] = torch.get_num_threads()
    with switch_kept():
        figures["same_weights"] = same_weights(PRECISIONS["bits"], steps=4)
    raw["memory"] = memory(1 if reduced else 4)
    turns = list(zip(raw["memory"][::2], raw["memory"][1::2], strict=True))
    figures["memory"] = {
        name: float(np.median([kept[name] / left[name] for kept, left in turns]))
        for name in ("step_s", "most_mb")
    }
    return {"figures": figures, "raw": raw}


def memory(turns, *, steps=6):
    """Fresh processes in turns: one keeps its memory, the next does not."""
    rows = []
    for _ in range(turns):
        for kept in (True, False):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows.append(pool.submit(large_steps, kept, steps).result())
    return rows


def large_steps(kept, steps):
    """Steps on large images, and the most memory that this process had."""
    with nullcontext() if kept else mock.patch.object(Placement, "keep_memory"):
        trained, rng = Trained(PRECISIONS["bits"], size=128), np.random.default_rng(0)
    taken = [
        trained.step(trained.at(UniformSampler(trained.space).sample(rng), rng))
        for _ in range(DROPPED + steps)
    ]
    most_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"kept": kept, "step_s": float(np.median(taken[DROPPED:])), "most_mb": most_mb}


def on(device, *, size=32, batch=BATCH, paths=20, steps=20):
    """What sharing costs on a device (`cpu`, `cuda`), images of `size` x `size`.

    For each of `paths` random paths, blocks of `steps` steps in turns. `ratio` has the medians over
    paths of a block's seconds over those of the network alone in fp (`fp`, `mixed`), and of the
    path at random bits over its extracted quantised network (`mixed_extracted`).
    """
    where = placement(device)
    with switch_kept():
        os.environ[SWITCH] = "1"
        trained = Trained(PRECISIONS["bits"], where, size=size, batch=batch)
        rng = np.random.default_rng(0)
        raw = [trained.turns(rng, steps) for _ in range(paths + DROPPED)][DROPPED:]
    pairs = {
        "fp": ("path_fp", "alone_fp"),
        "mixed": ("path_mixed", "alone_fp"),
        "mixed_extracted": ("path_mixed", "alone_mixed"),
    }
    ratio = {
        name: float(np.median([row[over] / row[under] for row in raw]))
        for name, (over, under) in pairs.items()
    }
    alone_ms = 1000 * float(np.median([row["alone_fp"] for row in raw])) / steps
    return {
        "device": where.text, "size": size, "batch": batch, "alone_fp_ms": alone_ms,
        "ratio": ratio, "raw": raw,
    }  # fmt: skip


def sharing_band(found):
    """What of `on` is outside the stated band; it is one for GPUs."""
    return [
        f"a {name} path's step takes {found['ratio'][name]:.2f} times its network's alone"
        for name, most in SHARING.items()
        if found["ratio"][name] > most
    ]


@contextmanager
def switch_kept():
    """Leave the switch of compiling as it was."""
    before = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


def ratio(rows, way):
    """The median over paths of a way's seconds over those in fp32."""
    return float(np.median([row[way] / row["fp32"] for row in rows]))


def steps(precisions, paths, size):
    """The seconds of each way of each path."""
    trained = Trained(precisions, size=size)
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

    def __init__(self, precisions, where=HOST, *, size=32, batch=BATCH):
        self.space = mobile(
            "train-step", STAGES, classes=10, size=size, precisions=("fp32", *precisions)
        )
        torch.manual_seed(0)
        self.where = where
        self.supernet = Supernet(self.space)
        where.move(self.supernet)
        images, classes = torch.rand(batch, 3, size, size), torch.randint(0, 10, (batch,))
        self.images = images.to(where.device, memory_format=where.memory_format)
        self.classes = classes.to(where.device)
        self.supernet.initialise_ranges(self.images)
        self.training = Training(self.supernet, RECIPE)

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
        self._take(self.training, lambda _, x: self.supernet(x, architecture))
        return time.perf_counter() - start

    def turns(self, rng, steps):
        """The seconds of a block of steps, each way of one random path; one block of each goes
        before, untimed.
        """
        path = UniformSampler(self.space).sample(rng)
        ways = {}
        for name, architecture in (("fp", self.at(path, None)), ("mixed", self.at(path, rng))):
            statistics = self.supernet.recalibrate(architecture, [self.images])
            alone = self.supernet.extract(architecture, statistics).train()
            ways[f"path_{name}"] = (self.training, self._shared(architecture))
            ways[f"alone_{name}"] = (Training(alone, RECIPE), self._alone(alone))
        order = [list(ways)[place] for place in rng.permutation(len(ways))]
        marks = []
        for name in order * 2:
            before = self._mark()
            for _ in range(steps):
                self._take(*ways[name])
            marks.append((before, self._mark()))
        self.where.finish()
        return {
            name: _between_s(*pair) for name, pair in zip(order, marks[len(order) :], strict=True)
        }

    def _take(self, training, answer):
        training.take(0, answer, self.images, self.classes)

    def _shared(self, architecture):
        return lambda _, x: self.supernet(x, architecture)

    @staticmethod
    def _alone(network):
        return lambda _, x: network(x)

    def _mark(self):
        """A moment on the device's clock, noted by the device where it is one apart."""
        if not self.where.is_apart:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_s(start, end):
    """The seconds between two marks, once the device has passed both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def band(figures):
    """What is outside the stated band."""
    complaints = []
    for name in ("bits", "bits_64px"):
        times = figures[name]["compiled"]
        if times > MOST:
            complaints.append(f"{name}: a step takes {times:.2f} times its fp32 step")
    if figures["memory"]["step_s"] > 1:
        complaints.append("a step takes longer where memory is kept")
    if not figures["same_weights"]:
        complaints.append("compiled and uncompiled quantisers train different weights")
    return complaints
