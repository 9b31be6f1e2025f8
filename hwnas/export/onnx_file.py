"""A trained network as an ONNX file, and what the file does on real images."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch

from hwnas.batches import evaluation_batch, in_order
from hwnas.data import Images
from latency_tables.files import write_atomically, write_bytes
from profilers.base import Profiler, Session
from profilers.graphs import emit
from profilers.modules import Network


@dataclass(frozen=True)
class Agreement:
    """How near the file is to the PyTorch network, on the same images.

    `same_class` is the share of images with the same answer; `largest_difference` is that of any
    logit, and `logit_range` the distance between the network's largest and smallest logit.
    """

    images: int
    same_class: float
    largest_difference: float
    logit_range: float


def write_onnx(network: Network, profiler: Profiler, path: Path) -> onnx.ModelProto:
    """Emit a trained network, check that it runs in its declared kernels, and write the file."""
    model = emit(network.ops, network.parameters_for_graph(), profiler.runtime)
    onnx.checker.check_model(model)
    profiler.check(model)
    write_bytes(path, model.SerializeToString())
    return model


def write_engine(profiler: Profiler, path: Path) -> Path:
    """The file that the device runs of a graph's file: `path` itself, or an engine beside it."""
    made = profiler.compiled(path)
    if made == path:
        return path
    engine = path.with_suffix(profiler.suffix)
    write_atomically(engine, partial(shutil.copyfile, made))
    return engine


def agreement(network: Network, session: Session, images: Images) -> Agreement:
    """Run both on the same images."""
    references, answers = [], []
    for x, _ in in_order(images, evaluation_batch(images)):
        with torch.no_grad():
            references.append(network(x).numpy())
        answers.append(session.run(x.numpy()))
    reference, shipped = np.concatenate(references), np.concatenate(answers)
    return Agreement(
        images=len(images),
        same_class=float((reference.argmax(1) == shipped.argmax(1)).mean()),
        largest_difference=float(np.abs(reference - shipped).max()),
        logit_range=float(reference.max() - reference.min()),
    )


def accuracy(session: Session, images: Images, *, batch: int | None = None) -> float:
    """The share of images that the shipped file classifies rightly."""
    right = 0
    for x, y in in_order(images, batch or evaluation_batch(images)):
        right += int((session.run(x.numpy()).argmax(1) == y.numpy()).sum())
    return right / len(images)
