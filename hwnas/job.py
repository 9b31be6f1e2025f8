"""A request made concrete, and the table that it needs: rows, then the calibrated model."""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import hwnas.data
from hwnas.costs.feasible import Range, reachable
from hwnas.costs.limits import AdditiveCost, Limit, latency_cost
from hwnas.costs.samplers import UniformSampler
from hwnas.data import Splits
from hwnas.methods.registry import method
from hwnas.recipes import recipe
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.registry import load_space
from hwnas.store import Run, RunConfig
from latency_tables.model import LatencyModel, MeasuredNetwork, calibrate
from latency_tables.table import LatencyTable
from profilers.base import Profiler
from profilers.build import Progress, build_rows, measure_models, minutes, open_table, quiet
from profilers.devices import open_profiler
from profilers.graphs import emit, random_parameters
from profilers.measure import Measurement
from quant.errors import InvalidInput

CALIBRATION_SEED = 1
LEAST_NETWORKS = 10


@dataclass(frozen=True)
class Request:
    """What a run is asked to be of, and where things are kept."""

    space: str = "mobile-tiny"
    data: str = "digits"
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    method: str = "spos"
    recipe: str = "quick"
    seed: int = 0
    tables: Path = Path("tables")
    run: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What `profile` will do: rows to measure, and about how long all of it takes."""

    rows: int
    missing: int
    networks: int
    minutes: float


class Job:
    """A request made concrete: data, space, profiler, table; everything made on first use."""

    def __init__(self, request: Request, progress: Progress = quiet) -> None:
        self.request = request
        self.progress = progress
        self.recipe = recipe(request.recipe)
        self.method = method(request.method)

    @cached_property
    def splits(self) -> Splits:
        """The data."""
        return hwnas.data.load(self.request.data)

    @cached_property
    def space(self) -> SearchSpace:
        """The space, for the data's classes and images."""
        data = self.splits
        return load_space(
            self.request.space, classes=data.classes, image_channels=data.channels, size=data.size
        )

    @cached_property
    def profiler(self) -> Profiler:
        """The device in its condition."""
        request = self.request
        return open_profiler(request.device, threads=request.threads, batch=request.batch)

    @property
    def table_path(self) -> Path:
        """Where this condition's table is kept."""
        return self.request.tables / self.profiler.host().file_name

    @property
    def model_name(self) -> str:
        """Under which the table keeps this space's latency model."""
        networks = self.recipe.calibration.networks
        return f"{self.space.name} {self.space.fingerprint} from {networks} networks"

    @cached_property
    def table(self) -> LatencyTable:
        """The table with every row and the latency model; measured now where it is missing."""
        return profile(self)

    @cached_property
    def table_id(self) -> str:
        """A hash of what the table predicts for this space: rows and model."""
        rows = [(op.key, self.table.lookup(op).median_us) for op in self.space.lattice.ops]
        text = json.dumps([rows, self.model.to_dict()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def model(self) -> LatencyModel:
        """What the table predicts for this space."""
        return self.table.models[self.model_name]

    @cached_property
    def latency(self) -> AdditiveCost:
        """The space's latency on this device, from the table."""
        return latency_cost(self.space, self.table, self.model)

    def config(self) -> RunConfig:
        """The identity of the request's run."""
        request = self.request
        return RunConfig(
            space=request.space,
            space_fingerprint=self.space.fingerprint,
            data=request.data,
            data_fingerprint=self.splits.fingerprint,
            device=request.device,
            threads=request.threads,
            batch=request.batch,
            method=request.method,
            recipe=request.recipe,
            seed=request.seed,
        )

    def latency_limit(self, value_ms: float) -> Limit:
        """The limit on this device's latency."""
        if not 0 < value_ms < math.inf:
            raise InvalidInput(
                f"--latency-ms is {value_ms}.", accepted="a positive number of milliseconds"
            )
        return Limit(self.latency, float(value_ms))

    def latency_range(self) -> Range:
        """The smallest and largest upper bound that the space can reach."""
        return reachable(self.space, self.latency)


def request_of(run: Run, tables: Path) -> Request:
    """The request that a run answers."""
    fields = run.config.model_dump(exclude={"space_fingerprint", "data_fingerprint"})
    return Request(**fields, tables=tables, run=run.path)


def plan(job: Job) -> Plan:
    """What is missing from the table, and how long measuring it will take."""
    protocol = job.recipe.protocol
    table = open_table(job.profiler, job.table_path, protocol)
    missing = len(table.missing(job.space.lattice.ops))
    networks = (
        0 if job.model_name in table.models and not missing else job.recipe.calibration.networks
    )
    return Plan(
        rows=len(job.space.lattice.ops),
        missing=missing,
        networks=networks,
        minutes=minutes(job.profiler, missing + 2 * networks, protocol),
    )


def profile(job: Job) -> LatencyTable:
    """Measure the rows that are missing, and calibrate the latency model on whole networks."""
    protocol = job.recipe.protocol
    before = open_table(job.profiler, job.table_path, protocol)
    grown = bool(before.missing(job.space.lattice.ops))
    table = build_rows(job.profiler, job.space.lattice.ops, job.table_path, protocol, job.progress)
    if grown or job.model_name not in table.models:
        table.models[job.model_name] = _calibrate(job, table)
        table.save(job.table_path)
    return table


def _calibrate(job: Job, table: LatencyTable) -> LatencyModel:
    counts = job.recipe.calibration
    sampler = UniformSampler(job.space)
    rng = np.random.default_rng(CALIBRATION_SEED)
    chosen: dict[Architecture, None] = {}
    for _ in range(20 * counts.networks):
        if len(chosen) == counts.networks:
            break
        chosen[sampler.sample(rng)] = None
    if len(chosen) < LEAST_NETWORKS:
        raise InvalidInput(
            f"The space {job.space.name} has too few networks to calibrate on ({len(chosen)}).",
            accepted=f"a space with at least {LEAST_NETWORKS}",
        )
    chains = [job.space.lower(architecture) for architecture in chosen]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, ops in enumerate(chains):
            parameters = [random_parameters(op, np.random.default_rng([number, i]))
                          for i, op in enumerate(ops)]  # fmt: skip
            model = emit(ops, parameters, job.profiler.runtime)
            job.profiler.check(model)
            paths.append(Path(folder) / f"{number}.onnx")
            paths[-1].write_bytes(model.SerializeToString())
        measured = measure(job, paths)
    networks = [
        MeasuredNetwork(
            tuple((row.precision, row.median_us) for row in map(table.lookup, ops)), m.median_us
        )
        for ops, m in zip(chains, measured, strict=True)
    ]
    fit = max(4, round(len(networks) * counts.fit / counts.networks))
    bound = max(1, round(len(networks) * counts.bound / counts.networks))
    return calibrate(networks[:fit], networks[fit : fit + bound], networks[fit + bound :])


def measure(job: Job, paths: Sequence[Path]) -> list[Measurement]:
    """The latency of model files, each in the recipe's number of fresh processes."""
    return measure_models(
        job.profiler, paths, job.recipe.protocol, job.progress, processes=job.recipe.processes
    )
