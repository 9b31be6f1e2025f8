"""A request made concrete: its data, space, device, limits, and the table that it needs."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import hwnas.data
from hwnas.calibration import calibrated
from hwnas.conditions import LATENCY, Condition, condition
from hwnas.costs.feasible import FeasibleSet, Range, reachable
from hwnas.costs.limits import AdditiveCost, Cost, Limit, counted_cost, latency_cost, size_cost
from hwnas.costs.narrowed import narrowed
from hwnas.costs.population import genes_of
from hwnas.data import Splits
from hwnas.methods.registry import method
from hwnas.placement import Placement, placement
from hwnas.recipes import Recipe, recipe
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.registry import image_size, load_space
from hwnas.store import RUN_TABLE, Run, RunConfig
from latency_tables.model import LatencyModel
from latency_tables.ops import OpSpec
from latency_tables.percentiles import MEDIAN
from latency_tables.table import LatencyTable
from profilers.base import GRAPH, Profiler
from profilers.build import (
    Progress,
    build_rows,
    empty_table,
    forget,
    measure_models,
    minutes,
    missing_chains,
    open_table,
    quiet,
    row_minutes,
    table_lock,
)
from profilers.devices import open_profiler, protocol_of
from profilers.graphs import check_kernels, emit, random_parameters
from profilers.measure import Measurement, summarise
from profilers.sizes import BASE_BYTES, file_bytes
from quant.errors import InvalidInput

LIMITS = {
    LATENCY: "--latency-ms",
    "params": "--max-params",
    "macs": "--max-macs",
    "size_mb": "--max-size-mb",
    "bitops": "--max-bitops",
    "activation_mb": "--max-activation-mb",
}
"""The costs that can be limited, and the flag of each."""


@dataclass(frozen=True)
class Request:
    """What a run is asked to be of, and where things are kept.

    `precisions` are what blocks choose from, where they are not the space's own. Without `recipe`
    it is `quick` for digits, else `standard`; a mapping names a recipe and the
    fields that differ. Without `image_size` it is the data's own, or what the space is meant for.
    `portable` asks for files that are exact on CPUs that need weights of 7 bits; the host's own may
    be one.
    `train_on` is where weights are trained and scored, `cpu` or `cuda`: without it, cuda where
    PyTorch can use it. `fixed` has the values of genes that a search leaves as they are. Like
    limits, neither is part of what the run is.
    """

    space: str = "mobile-tiny"
    precisions: Sequence[str] | None = None
    data: str = "digits"
    image_size: int | None = None
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    portable: bool = False
    method: str = "spos"
    recipe: str | Mapping[str, Any] | Recipe | None = None
    seed: int = 0
    tables: Path = Path("tables")
    run: Path | None = None
    train_on: str | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What `profile` will do: rows to measure, of ops and of chains of them, and about how long all
    of it takes. `probe_ms` is what the smallest and the largest network (by MACs) take, timed once;
    zero where all is there.
    """

    rows: int
    missing: int
    networks: int
    minutes: float
    probe_ms: tuple[float, float]


class Job:
    """A request made concrete: data, space, profiler, table; everything made on first use."""

    def __init__(
        self, request: Request, progress: Progress = quiet, percentile: int = MEDIAN
    ) -> None:
        self.request = request
        self.progress = progress
        self.percentile = percentile
        self.recipe = recipe(
            request.recipe or ("quick" if request.data == "digits" else "standard"),
            protocol_of(request.device),
        )
        self.method = method(request.method)
        if request.train_on is not None:
            placement(request.train_on)  # refused at once where it cannot be used
        self._costs: dict[str, Cost] = {}
        self._under: dict[Condition, Job] = {}

    @cached_property
    def splits(self) -> Splits:
        """The data."""
        asked = self.request.image_size
        size = image_size(self.request.space) if asked is None else asked
        return hwnas.data.load(self.request.data, size=size, resize=asked is not None)

    @property
    def placement(self) -> Placement:
        """Where weights are trained and scored."""
        return placement(self.request.train_on)

    def check_images(self) -> None:
        """Raise InvalidInput where there are no images to train on."""
        if not len(self.splits.train):
            raise InvalidInput(
                f"--data {self.request.data} has no images to train on.",
                accepted=f"one of {', '.join(hwnas.data.FORMS[:-1])}",
            )

    @cached_property
    def space(self) -> SearchSpace:
        """The space, for the data's classes and images."""
        data = self.splits
        return load_space(
            self.request.space,
            classes=data.classes,
            image_channels=data.channels,
            size=data.size,
            precisions=self.request.precisions,
        )

    @cached_property
    def searched(self) -> SearchSpace:
        """What a search looks at: the space, or what `fixed` leaves of it."""
        return narrowed(self.space, self.request.fixed)

    @cached_property
    def profiler(self) -> Profiler:
        """The device in its condition."""
        request = self.request
        return open_profiler(
            request.device,
            threads=request.threads,
            batch=request.batch,
            portable=request.portable,
        )

    def under(self, name: str) -> "Job":
        """The same job under the condition that a latency's name stands for.

        Where that device takes another file, the same network is requantised for it
        (`hwnas.files`). Raises InvalidInput where it has no kernel for an op of the space.
        """
        asked = condition(name)
        assert asked is not None, f"{name} is a latency"
        device = asked.device or self.request.device
        if (device, asked.percentile) == (self.request.device, self.percentile):
            return self
        if asked not in self._under:
            same = device == self.request.device
            request = replace(self.request, device=device, run=self.request.run if same else None)
            other = Job(request, self.progress, asked.percentile)
            known = {"splits": self.splits, "space": self.space, "searched": self.searched}
            other.__dict__ |= known
            if same:
                other.__dict__ |= {"profiler": self.profiler, "table": self.table}
            else:
                check_kernels(self.searched.lattice.ops, other.profiler.runtime)
            self._under[asked] = other
        return self._under[asked]

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
        """A hash of what the table predicts for this space: rows and model, as first measured."""
        ops = self.space.lattice.ops
        inside = zip(ops, self.table.in_network_us(ops), strict=True)
        rows = [(op.key, us) for op, us in inside]
        text = json.dumps([rows, self._first_model.to_dict()])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def model(self) -> LatencyModel:
        """What the table predicts for this space."""
        return self.table.models[self.model_name].at(self.percentile)

    @property
    def _first_model(self) -> LatencyModel:
        """The same before any search: what must not move with what searches measure."""
        return self.table.models[self.model_name].apart.at(self.percentile)

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
            precisions=list(request.precisions) if request.precisions else None,
            data=request.data,
            data_fingerprint=self.splits.fingerprint,
            image_size=self.splits.size,
            device=request.device,
            threads=request.threads,
            batch=request.batch,
            portable=self.profiler.runtime.is_portable,
            method=request.method,
            recipe=self.recipe.model_dump(),
            seed=request.seed,
        )

    def cost(self, name: str) -> Cost:
        """One of `LIMITS` over this space, or a latency under a condition; a latency needs the
        table.
        """
        if name not in self._costs:
            self._costs[name] = self._cost(name)
        return self._costs[name]

    def bounded(self, name: str, upper_ratio: float) -> Cost:
        """A latency, held to lie at most so far above its prediction."""
        there = self.under(name)
        model = replace(there.model, upper_ratio=upper_ratio)
        return replace(latency_cost(there.space, there.table, model), name=name)

    def _cost(self, name: str) -> Cost:
        if condition(name) is not None:
            cost = self.under(name).latency
            return cost if cost.name == name else replace(cost, name=name)
        match name:
            case "size_mb":
                if self.profiler.suffix != GRAPH:
                    raise InvalidInput(
                        "--max-size-mb is not known for an engine before it is built.",
                        accepted="--max-params, or --device cpu, whose engine is the ONNX file",
                    )
                return size_cost(self.space, self._op_bytes(), BASE_BYTES)
            case _:
                return counted_cost(self.space, name)

    def _op_bytes(self) -> list[int]:
        """Bytes of each op of the lattice in a file: the most, where steps name its layers' roles
        differently.
        """
        sizes = [0] * len(self.space.lattice.ops)
        known: dict[OpSpec, int] = {}
        for level in self.space.lattice.levels:
            for step, index in zip(level.steps, level.op.tolist(), strict=True):
                if step.op is not None:
                    if step.op not in known:
                        known[step.op] = file_bytes(step.op, self.profiler.runtime)
                    sizes[index] = max(sizes[index], known[step.op])
        return sizes

    def limits(self, values: Mapping[str, float]) -> list[Limit]:
        """Limits by the name of their cost, latency last: it alone may have to be measured.

        Raises InvalidInput for an unknown name and for a value that is not positive, Unreachable
        where a limit that needs no table cannot be met.
        """
        check_limits(values)
        counted = [
            Limit(self.cost(name), float(values[name]))
            for name in LIMITS
            if name in values and name != LATENCY
        ]
        FeasibleSet(self.searched, counted)
        latencies = [name for name in sorted(values) if condition(name) is not None]
        return counted + [Limit(self.cost(name), float(values[name])) for name in latencies]

    def latency_limit(self, value_ms: float) -> Limit:
        """The limit on this device's latency."""
        return self.limits({LATENCY: value_ms})[0]

    def latency_range(self) -> Range:
        """The smallest and largest upper bound that a search can reach."""
        return reachable(self.searched, self.latency)

    def first_range(self) -> Range:
        """The same before any search: a fraction of the way through it stays where it is."""
        first = latency_cost(self.space, self.table, self._first_model)
        return reachable(self.searched, first)


def check_limits(values: Mapping[str, float]) -> None:
    """Raise InvalidInput for an unknown cost, and for a value that is not positive."""
    for name, value in values.items():
        if name not in LIMITS and condition(name) is None:
            raise InvalidInput(f"{name!r} is not a limit.", accepted=", ".join(LIMITS))
        if not 0 < value < math.inf:
            raise InvalidInput(f"{flag_of(name)} is {value}.", accepted="a positive number")


def flag_of(name: str) -> str:
    """The flag that limits a cost.

    >>> flag_of("params"), flag_of("latency_p95_ms@gpu")
    ('--max-params', '--latency-ms gpu=')
    """
    asked = condition(name)
    if asked is None:
        return LIMITS[name]
    return LIMITS[LATENCY] + (f" {asked.device}=" if asked.device else "")


def request_of(run: Run, tables: Path) -> Request:
    """The request that a run answers."""
    return Request(**request_fields(run, {}), tables=tables, run=run.path)


def request_fields(run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own fields; raises InvalidInput where one that was given contradicts them."""
    known = run.config.model_dump(exclude={"space_fingerprint", "data_fingerprint"})
    for name, value in given.items():
        asked = value
        if name == "recipe":
            asked = recipe(value, protocol_of(known["device"])).model_dump()
        if asked != known[name]:
            told, mine = (x["name"] if isinstance(x, dict) else x for x in (asked, known[name]))
            differs = f"is {mine}" if told != mine else f"differs from the plain {told} in a field"
            raise InvalidInput(
                f"--{name.replace('_', '-')} {told} contradicts {run.path}, whose {name} "
                f"{differs}.",
                next_step=f"drop --{name.replace('_', '-')}, or name another --run",
            )
    return known


def plan(job: Job) -> Plan:
    """What is missing from the table, and how long measuring it will take."""
    protocol, ops = job.recipe.protocol, job.space.lattice.ops
    rows = len(missing_chains(empty_table(job.profiler, protocol), ops))
    if _known_table(job) is not None:
        return Plan(rows, 0, 0, 0.0, (0.0, 0.0))
    table = open_table(job.profiler, job.table_path, protocol)
    missing = missing_chains(table, ops)
    networks = job.recipe.calibration.networks if job.model_name not in table.models else 0
    low, high = _probe_ms(job)
    each_ms = (low + high) / 2
    depth = len(job.space.positions)
    alone = row_minutes(job.profiler, missing, protocol, op_ms=each_ms / depth)
    whole = minutes(job.profiler, networks, protocol, each_ms=each_ms, ops=depth)
    return Plan(rows, len(missing), networks, alone + whole, (low, high))


def is_profiled(job: Job) -> bool:
    """Whether a table with all that the space needs is there."""
    return _known_table(job) is not None


def _known_table(job: Job) -> LatencyTable | None:
    """A table that has all: in the folder of tables, else the run's own copy."""
    for path in (job.table_path, job.request.run and job.request.run / RUN_TABLE):
        if path is not None and path.exists():
            table = open_table(job.profiler, path, job.recipe.protocol)
            if job.model_name in table.models and not missing_chains(table, job.space.lattice.ops):
                return table
    return None


def profile(job: Job) -> LatencyTable:
    """The table with every row of the space and its latency model; what is missing is measured.

    Where the folder of tables has none, a run's own copy does. Raises InvalidInput where another
    process is measuring the same table.
    """
    networks = job.recipe.calibration.networks
    journal = job.table_path.with_suffix(f".{job.space.fingerprint}-{networks}.journal")
    if (known := _known_table(job)) is not None:
        forget(journal)
        return known
    with table_lock(job.table_path):
        ops, protocol = job.space.lattice.ops, job.recipe.protocol
        low_ms, high_ms = _probe_ms(job)
        table = build_rows(
            job.profiler,
            ops,
            job.table_path,
            protocol,
            job.progress,
            network_us=1000 * math.sqrt(low_ms * high_ms),
        )
        if job.model_name not in table.models:
            table.models[job.model_name] = calibrated(
                job.space, job.profiler, table, job.recipe, journal=journal, progress=job.progress
            )
            table.save(job.table_path)
        forget(journal)
    return table


def join(job: Job, measured: Mapping[Architecture, Measurement]) -> bool:
    """Keep what searched networks measure in the table, where later searches find their bound;
    whether that raised it.

    Unsteady measurements are left out, and so are all where another process holds the table.
    """
    steady = {a: m for a, m in measured.items() if m.stable}
    if not steady or not job.table_path.exists():
        return False
    sums = job.latency.totals(job.space, genes_of(list(steady)))
    with suppress(InvalidInput), table_lock(job.table_path):
        table = LatencyTable.load(job.table_path)
        model = table.models.get(job.model_name)
        if model is None or model.apart != job.table.models[job.model_name].apart:
            return False  # it was measured anew since
        for (architecture, m), additive_us in zip(steady.items(), sums.tolist(), strict=True):
            name = " ".join(map(str, architecture.genes))
            model = model.joined(job.percentile, name, m.latency_us / 1000, additive_us)
        table.models[job.model_name] = model
        table.save(job.table_path)
        return model.at(job.percentile).upper_ratio > job.model.upper_ratio
    return False


def measure(job: Job, paths: Sequence[Path], journal: Path | None = None) -> list[Measurement]:
    """The latency of model files, each in the recipe's number of fresh processes."""
    protocol, processes = job.recipe.protocol, job.recipe.processes
    blocks = measure_models(
        job.profiler, paths, protocol, job.progress, processes=processes, journal=journal
    )
    return [summarise(each, protocol, percentile=job.percentile) for each in blocks]


def _probe_ms(job: Job) -> tuple[float, float]:
    """The latency of the space's smallest and largest network by MACs, timed once, in ms: what a
    user can be told before a table is there.
    """
    check_kernels(job.space.lattice.ops, job.profiler.runtime)
    found = reachable(job.space, job.cost("macs"))
    times = []
    for architecture in (found.cheapest, found.dearest):
        ops = job.space.lower(architecture)
        rng = np.random.default_rng(0)
        model = emit(ops, [random_parameters(op, rng) for op in ops], job.profiler.runtime)
        with job.profiler.prepare(model) as session:
            times.append(float(np.median(session.block(job.recipe.protocol)[:, 0])) / 1000)
    return min(times), max(times)
