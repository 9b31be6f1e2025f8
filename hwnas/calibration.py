"""Whole networks of a space, measured: what its latency model is fitted, bounded and tested on."""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from hwnas.costs.samplers import UniformSampler
from hwnas.recipes import CalibrationRecipe, Recipe
from hwnas.spaces.base import Architecture, SearchSpace
from latency_tables.files import explained
from latency_tables.model import LatencyModel, MeasuredNetwork, calibrate
from latency_tables.ops import OpSpec
from latency_tables.percentiles import MEDIAN, PERCENTILES
from latency_tables.table import LatencyTable
from profilers.base import Profiler
from profilers.build import Progress, file_hash, journalled, measure_models, quiet
from profilers.graphs import emit, random_parameters
from profilers.measure import Samples, summarise
from quant.errors import InvalidInput

SEED = 1
"""Calibration networks are the same for every run of a space; others are drawn apart from them."""

LEAST_NETWORKS = 10


def draw(
    space: SearchSpace, count: int, *, seed: int = SEED, but: Collection[Architecture] = ()
) -> list[Architecture]:
    """At most `count` different random architectures, none of those in `but`."""
    sampler, rng = UniformSampler(space), np.random.default_rng(seed)
    chosen: dict[Architecture, None] = {}
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        if (architecture := sampler.sample(rng)) not in but:
            chosen[architecture] = None
    return list(chosen)


def calibration_networks(space: SearchSpace, counts: CalibrationRecipe) -> list[Architecture]:
    """The architectures that the space is calibrated on; raises InvalidInput for too few."""
    chosen = draw(space, counts.networks)
    if len(chosen) < LEAST_NETWORKS:
        raise InvalidInput(
            f"{len(chosen)} networks of {space.name} are too few to calibrate on.",
            accepted=f"a space, and a recipe's calibration, of at least {LEAST_NETWORKS}",
        )
    return chosen


def network_models(
    chains: Sequence[Sequence[OpSpec]],
    profiler: Profiler,
    progress: Progress = quiet,
    *,
    known: Collection[str] = (),
) -> Iterator[onnx.ModelProto]:
    """The graph of each network, with random weights, checked to run in its declared kernels unless
    its hash is `known`: a check may build an engine.
    """
    for number, ops in enumerate(chains):
        rngs = [np.random.default_rng([number, place]) for place in range(len(ops))]
        numbers = [random_parameters(op, rng) for op, rng in zip(ops, rngs, strict=True)]
        model = emit(ops, numbers, profiler.runtime)
        if file_hash(model.SerializeToString()) not in known:
            profiler.check(model)
        yield model
        progress("building whole networks", number + 1, len(chains))


@contextmanager
def model_files(models: Iterable[onnx.ModelProto]) -> Iterator[list[Path]]:
    """The models as files, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, model in enumerate(models):
            paths.append(Path(folder) / f"{number}.onnx")
            with explained(paths[-1]):
                paths[-1].write_bytes(model.SerializeToString())
        yield paths


def measured_networks(
    chains: Sequence[Sequence[OpSpec]],
    blocks: Iterable[Sequence[Samples]],
    table: LatencyTable,
    recipe: Recipe,
) -> list[MeasuredNetwork]:
    """Networks with their blocks, as the latency model takes them: priced by a table."""
    ops_by_key = {op.key: op for ops in chains for op in ops}
    inside = dict(zip(ops_by_key, table.in_network_us(list(ops_by_key.values())), strict=True))
    found = []
    for ops, each in zip(chains, blocks, strict=True):
        paced = summarise(each, recipe.protocol, pace_us=table.pace_us)
        seen = {
            percentile: summarise(each, recipe.protocol, percentile=percentile).latency_us
            for percentile in (MEDIAN, *PERCENTILES)
        }
        rows = tuple((op.executed.precision.name, inside[op.key]) for op in ops)
        found.append(MeasuredNetwork(rows, paced.latency_us, seen.pop(MEDIAN), seen))
    return found


def calibrated(
    space: SearchSpace,
    profiler: Profiler,
    table: LatencyTable,
    recipe: Recipe,
    *,
    journal: Path,
    progress: Progress = quiet,
) -> LatencyModel:
    """The latency model of a space; what was measured before an interruption is in the journal."""
    chosen = calibration_networks(space, recipe.calibration)
    chains = [space.lower(architecture) for architecture in chosen]
    known = journalled(profiler, recipe.protocol, journal)
    with model_files(network_models(chains, profiler, progress, known=known)) as paths:
        blocks = measure_models(
            profiler, paths, recipe.protocol, progress, processes=recipe.processes, journal=journal
        )
    return fitted(measured_networks(chains, blocks, table, recipe), recipe.calibration)


def fitted(networks: Sequence[MeasuredNetwork], counts: CalibrationRecipe) -> LatencyModel:
    """The model of networks, shared out to fit, to bound and to test as the recipe says."""
    fit = max(4, round(len(networks) * counts.fit / counts.networks))
    bound = max(1, round(len(networks) * counts.bound / counts.networks))
    return calibrate(networks[:fit], networks[fit : fit + bound], networks[fit + bound :])
