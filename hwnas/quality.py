"""How true a table is: its predictions against networks that it has not seen, beside rivals'."""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hwnas.calibration import (
    calibration_networks,
    draw,
    measured_networks,
    model_files,
    network_models,
)
from hwnas.job import Job, is_profiled
from hwnas.spaces.base import Architecture
from latency_tables.model import LatencyModel, MeasuredNetwork, predict_us, quality, quality_of
from latency_tables.ops import FUSED_ACTIVATIONS, Layer, OpSpec, total
from latency_tables.table import LatencyTable
from profilers.build import build_rows, forget, journalled, measure_models, table_lock
from quant.errors import InvalidInput, TableError

SEED = 2
"""Held-out networks are the same for every check of a space, and none of those calibrated on."""

LEAST = 5
"""Fewer networks than these say nothing of ranks."""

Floats = npt.NDArray[np.float64]


def check(job: Job, count: int) -> dict[str, Any]:
    """Measure `count` held-out networks twice, hold the table against them, keep the report in it.

    Goes on where it stopped while networks were timed.
    Raises InvalidInput for too few networks, TableError where the space is not profiled yet.
    """
    if count < LEAST:
        raise InvalidInput(f"--networks is {count}.", accepted=f"at least {LEAST}")
    if not is_profiled(job):
        raise TableError(
            f"{job.table_path} does not hold all of {job.space.name}.",
            next_step="run hwnas profile with the same flags",
        )
    known = set(calibration_networks(job.space, job.recipe.calibration))
    chosen = draw(job.space, count, seed=SEED, but=known)
    if len(chosen) < LEAST:
        raise InvalidInput(
            f"{job.space.name} has {len(chosen)} networks that it is not calibrated on.",
            accepted="a larger space, or a recipe with fewer calibration networks",
        )
    chains = [list(job.space.lower(architecture)) for architecture in chosen]
    journal = job.table_path.with_suffix(f".{job.space.fingerprint}-check.journal")
    with table_lock(job.table_path):
        report = _report(job, chosen, chains, journal)
        table = LatencyTable.load(job.table_path)
        table.reports[job.model_name] = report
        table.save(job.table_path)
        forget(journal)
    return report


def _report(
    job: Job, chosen: Sequence[Architecture], chains: Sequence[Sequence[OpSpec]], journal: Path
) -> dict[str, Any]:
    first, second = _measured_twice(job, chains, journal)
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **held_against(job.model, first, second),
        "ranking": {
            "noise": _floor(first, second)["mean_error"],
            "step": _step(job, chosen),
        },
        "rivals": {
            "macs": _rival(_line([total("macs", ops) for ops in chains], first), first),
            "single_operators": _rival(_single_operators(job, chains), first),
        },
    }


def held_against(
    model: LatencyModel, first: Sequence[MeasuredNetwork], second: Sequence[MeasuredNetwork]
) -> dict[str, Any]:
    """A model's quality on networks that were measured twice.

    `quality` is at the table's pace; `observed` is the same against latencies as they were, at the
    machine's pace of that hour. `floor` is how far the two measurements of one network lie apart,
    which no table can be better than half of. `additivity` is the plain sum of what ops cost inside
    a network, by the latency: its mean, and its standard deviation.
    """
    found = quality_of(model, first)
    predicted = np.array([predict_us(model, network) for network in first])
    seen = np.array([network.observed_us for network in first])
    sums = np.array([sum(us for _, us in network.rows) for network in first])
    ratios = sums / np.array([network.latency_us for network in first])
    return {
        "quality": asdict(found),
        "observed": asdict(quality(predicted, seen, found.coverage)),
        "floor": _floor(first, second),
        "additivity": {"ratio": float(ratios.mean()), "spread": float(ratios.std())},
    }


def single_operators(op: OpSpec) -> list[OpSpec]:
    """The op taken apart: an op for each layer, with the activation that is fused into it."""
    first, found, fused = len(op.inputs), [], set()
    for place, layer in enumerate(op.layers):
        if place in fused:
            continue
        sources = tuple(op.values[i] for i in layer.inputs)
        last = place == len(op.layers) - 1
        layers = [_moved(layer, tuple(range(len(sources))))]
        after = op.layers[place + 1] if not last else None
        if after and after.function in FUSED_ACTIVATIONS and after.inputs == (first + place,):
            layers.append(_moved(after, (len(sources),)))
            fused.add(place + 1)
            last = place + 1 == len(op.layers) - 1
        found.append(OpSpec(sources, tuple(layers), op.precision, op.logits and last))
    return found


def _moved(layer: Layer, inputs: tuple[int, ...]) -> Layer:
    return Layer(**{**asdict(layer), "inputs": inputs})


def _measured_twice(
    job: Job, chains: Sequence[Sequence[OpSpec]], journal: Path
) -> tuple[list[MeasuredNetwork], list[MeasuredNetwork]]:
    processes = job.recipe.processes
    known = journalled(job.profiler, job.recipe.protocol, journal)
    models = network_models(chains, job.profiler, job.progress, known=known)
    with model_files(models) as paths:
        blocks = measure_models(
            job.profiler,
            paths,
            job.recipe.protocol,
            job.progress,
            processes=2 * processes,
            journal=journal,
        )
    first, second = (
        measured_networks(chains, [each[half] for each in blocks], job.table, job.recipe)
        for half in (slice(0, None, 2), slice(1, None, 2))
    )
    return first, second


def _floor(first: Sequence[MeasuredNetwork], second: Sequence[MeasuredNetwork]) -> dict[str, float]:
    one, other = (np.array([n.latency_us for n in each]) for each in (first, second))
    found = quality(one, other, 0.0)
    return {name: getattr(found, name) for name in ("mean_error", "worst_error", "tau")}


def _step(job: Job, architectures: Sequence[Architecture]) -> float:
    """The median relative change of the predicted latency where one gene of a network changes."""
    rng, steps = np.random.default_rng(SEED), []
    sizes = [len(gene.choices) for gene in job.space.genes]
    for architecture in architectures:
        genes = list(architecture.genes)
        place = int(rng.integers(len(sizes)))
        genes[place] = (genes[place] + int(rng.integers(1, sizes[place]))) % sizes[place]
        pair = np.array([architecture.genes, job.space.architecture(genes).genes], np.int64)
        before, after = map(job.latency.predict, job.latency.totals(job.space, pair).tolist())
        steps.append(abs(after / before - 1))
    return float(np.median(steps))


def _line(counts: Sequence[float], networks: Sequence[MeasuredNetwork]) -> Floats:
    """The best straight line through (count, latency): it is fitted to these very networks."""
    true = np.array([network.latency_us for network in networks])
    features = np.column_stack([np.array(counts, float), np.ones(len(counts))])
    weights = np.linalg.lstsq(features / true[:, None], np.ones(len(true)), rcond=None)[0]
    line: Floats = features @ weights
    return line


def _single_operators(job: Job, chains: Sequence[Sequence[OpSpec]]) -> Floats:
    """The plain sum of rows of single operators, each timed alone."""
    parts = {op.key: single_operators(op) for op in itertools.chain(*chains)}
    units = {unit.key: unit for found in parts.values() for unit in found}
    with tempfile.TemporaryDirectory() as folder:
        table = build_rows(
            job.profiler,
            list(units.values()),
            Path(folder) / job.table_path.name,
            job.recipe.protocol,
            job.progress,
            boundaries=False,
        )
    scale = job.table.pace_us / table.pace_us
    cost = {
        key: sum(table.lookup(unit).median_us for unit in found) for key, found in parts.items()
    }
    return np.array([scale * sum(cost[op.key] for op in ops) for ops in chains])


def _rival(predicted: Floats, networks: Sequence[MeasuredNetwork]) -> dict[str, float]:
    true = np.array([network.latency_us for network in networks])
    found = asdict(quality(predicted, true, 0.0))
    return {name: value for name, value in found.items() if name not in ("networks", "coverage")}
