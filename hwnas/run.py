"""The stages over a run directory: profile, train, search, retrain, export, verify.

Each stage does what is missing and returns; called again it goes on where it stopped. Feasibility
is decided from the table, before any training.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import hwnas.data
from hwnas import store
from hwnas.costs.feasible import FeasibleSet, Range, reachable
from hwnas.costs.limits import Limit, latency_cost
from hwnas.costs.population import genes_of, totals
from hwnas.costs.samplers import UniformSampler
from hwnas.data import Splits
from hwnas.export import certificate as certificates
from hwnas.export.onnx_file import Agreement, accuracy, agreement, write_onnx
from hwnas.methods.registry import method
from hwnas.recipes import recipe
from hwnas.report import page
from hwnas.retrain import accuracy as torch_accuracy
from hwnas.retrain import load_weights, retrain, save_weights
from hwnas.search.base import Strategy
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.registry import load_space
from hwnas.store import History, Proposal, Run, RunConfig, read_run
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import load_supernet, train_supernet
from latency_tables.files import write_atomically, write_text
from latency_tables.model import LatencyModel, MeasuredNetwork, calibrate
from latency_tables.ops import peak_activation_bytes, total
from latency_tables.table import Host, LatencyTable
from profilers.base import Profiler
from profilers.build import Progress, build_rows, measure_models, minutes, open_table, quiet
from profilers.devices import open_profiler
from profilers.graphs import emit, random_parameters
from profilers.measure import Measurement
from profilers.modules import Network
from quant.errors import HwnasError, InvalidInput, Unstable

__all__ = [
    "FeasibleSet", "Job", "Request", "export", "open_run", "plan", "profile", "read_limits",
    "read_run", "remeasure", "request_of", "result_rows", "retrain_finalists", "search",
    "search_to_certificate", "torch_accuracy", "train", "verify",
]  # fmt: skip

CALIBRATION_SEED = 1
BASELINE = "random"
LEAST_NETWORKS = 10
LEAST_AGREEMENT = 0.97
"""The share of images on which a shipped file must answer as its PyTorch network does; int8 files
round biases to the accumulator's grid, which moves answers near a tie."""


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


@dataclass(frozen=True)
class Finalist:
    """An architecture to retrain, with its shared-weight scores and its predicted latency."""

    genes: tuple[int, ...]
    search_val: float
    latency_ms: float
    upper_latency_ms: float


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

    @property
    def model(self) -> LatencyModel:
        """What the table predicts for this space."""
        return self.table.models[self.model_name]

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
        if not value_ms > 0:
            raise InvalidInput(
                f"--latency-ms is {value_ms}.", accepted="a positive number of milliseconds"
            )
        return Limit(latency_cost(self.space, self.table, self.model), value_ms)

    def latency_range(self) -> Range:
        """The smallest and largest upper bound that the space can reach."""
        return reachable(self.space, latency_cost(self.space, self.table, self.model))


def request_of(run: Run, tables: Path) -> Request:
    """The request that a run answers."""
    fields = run.config.model_dump(exclude={"space_fingerprint", "data_fingerprint"})
    return Request(**fields, tables=tables, run=run.path)


# ---- profile


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
        measured = _measure(job, paths)
    networks = [
        MeasuredNetwork(
            tuple((row.precision, row.median_us) for row in map(table.lookup, ops)), m.median_us
        )
        for ops, m in zip(chains, measured, strict=True)
    ]
    fit = max(4, round(len(networks) * counts.fit / counts.networks))
    bound = max(1, round(len(networks) * counts.bound / counts.networks))
    return calibrate(networks[:fit], networks[fit : fit + bound], networks[fit + bound :])


# ---- train


def open_run(job: Job) -> Run:
    """The run of a job."""
    return store.open_run(job.config(), job.request.run)


def train(job: Job, run: Run) -> Supernet:
    """The trained supernet; trained now as far as it is not."""
    torch.manual_seed(job.request.seed)
    supernet = Supernet(job.space, job.profiler.runtime)
    steps = load_supernet(supernet, run.supernet)
    if steps < job.recipe.supernet.steps:
        run.log("train", steps=job.recipe.supernet.steps, start=steps)
        train_supernet(
            supernet,
            job.splits,
            job.method.sampler(job.space),
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


# ---- search


def search(job: Job, run: Run, limits: Sequence[Limit]) -> list[Finalist]:
    """The best feasible architectures found, by the method and by the random baseline.

    Raises Unreachable before any training where a limit cannot be met.
    """
    feasible = FeasibleSet(job.space, limits)
    result = run.result(limits_name(limits))
    finalists = result / "finalists.json"
    if not finalists.exists():
        score = evaluator(job, train(job, run))
        history = History(run.history)
        try:
            for name in (job.method.name, BASELINE):
                _run_strategy(job, _strategy(job, name, feasible), name, score, history)
            ranked = _ranked(feasible, history, _searches(job, limits))
        finally:
            history.close()
        chosen = [_finalist(feasible, a, acc) for a, acc in ranked[: job.recipe.finalists]]
        content = {
            "limits": {limit.cost.name: limit.value for limit in limits},
            "finalists": [asdict(item) for item in chosen],
        }
        job.table.save(run.table)
        write_text(finalists, json.dumps(content, indent=2) + "\n")
        run.log("search", limits=limits_name(limits), finalists=len(chosen))
    run.point_to(result)
    return read_finalists(result)


def limits_name(limits: Sequence[Limit]) -> str:
    """The name of a set of limits, such as `latency_ms=0.21`."""
    return ",".join(f"{limit.cost.name}={limit.value:.6g}" for limit in limits)


def _searches(job: Job, limits: Sequence[Limit]) -> dict[str, str]:
    """The history's name of each strategy's search."""
    return {
        name: f"{name} {limits_name(limits)} table {job.model.upper_ratio:.6g}"
        for name in (job.method.name, BASELINE)
    }


def _strategy(job: Job, name: str, feasible: FeasibleSet) -> Strategy:
    if name == BASELINE:
        return RandomSearch(feasible, seed=job.request.seed)
    return job.method.strategy(feasible, job.request.seed, job.recipe)


def _run_strategy(
    job: Job, strategy: Strategy, name: str, score: Evaluator, history: History
) -> None:
    """Ask, score, tell, until the recipe's evaluations are done or nothing is left to propose."""
    feasible: FeasibleSet = strategy.feasible
    limits = {limit.cost.name: limit.value for limit in feasible.limits}
    search_name = _searches(job, feasible.limits)[name]
    known = history.generations(search_name)
    budget, done, number = job.recipe.evaluations, 0, 0
    while done < budget:
        if number < len(known):
            architectures = [Architecture(genes) for genes in known[number]]
        else:
            architectures = strategy.ask(min(job.recipe.population, budget - done))
            proposals = [Proposal(a.genes, _bounds(feasible, a)) for a in architectures]
            history.add_generation(search_name, number, proposals, limits, strategy.rejected)
        if not architectures:
            return
        scores = []
        for architecture in architectures:
            found = history.score(architecture.genes)
            if found is None:
                evaluation = score(architecture)
                history.add_score(architecture.genes, evaluation.accuracy, evaluation.loss)
                found = (evaluation.accuracy, evaluation.loss)
            scores.append((found[0], -found[1]))
            done += 1
            job.progress(f"scoring architectures ({name})", done, budget)
        strategy.tell(architectures, scores)
        number += 1


def _bounds(feasible: FeasibleSet, architecture: Architecture) -> dict[str, float]:
    genes = genes_of([architecture])
    return {
        limit.cost.name: limit.cost.upper(
            float(totals(feasible.space, limit.cost.per_op, genes)[0])
        )
        for limit in feasible.limits
    }


def _ranked(
    feasible: FeasibleSet, history: History, searches: dict[str, str]
) -> list[tuple[Architecture, float]]:
    """Every scored architecture of these searches, best first, with its accuracy."""
    scores: dict[Architecture, tuple[float, float]] = {}
    for search_name in searches.values():
        for generation in history.generations(search_name):
            for genes in generation:
                if found := history.score(genes):
                    scores[Architecture(genes)] = (found[0], -found[1])
    inside = feasible.contains(list(scores))
    kept = [a for a, fits in zip(scores, inside, strict=True) if fits]
    kept.sort(key=lambda a: scores[a], reverse=True)
    return [(a, scores[a][0]) for a in kept]


def _finalist(feasible: FeasibleSet, architecture: Architecture, search_val: float) -> Finalist:
    latency = next(limit.cost for limit in feasible.limits if limit.cost.name == "latency_ms")
    additive = float(totals(feasible.space, latency.per_op, genes_of([architecture]))[0])
    return Finalist(
        architecture.genes, search_val, latency.predict(additive), latency.upper(additive)
    )


def read_finalists(result: Path) -> list[Finalist]:
    """The finalists of a result; raises InvalidInput where it has none yet."""
    return [
        Finalist(**{**item, "genes": tuple(item["genes"])})
        for item in _search_outcome(result)["finalists"]
    ]


def read_limits(job: Job, result: Path) -> list[Limit]:
    """The limits that a result was searched under."""
    return [job.latency_limit(_search_outcome(result)["limits"]["latency_ms"])]


def _search_outcome(result: Path) -> dict[str, Any]:
    file = result / "finalists.json"
    if not file.exists():
        raise InvalidInput(f"{result} has no finalists yet.", next_step="run hwnas search")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


# ---- retrain, export


def retrain_finalists(job: Job, run: Run, result: Path) -> list[Network]:
    """The finalists with trained weights of their own; trained now where they are not."""
    networks: list[Network] = []
    score: Evaluator | None = None
    finalists = read_finalists(result)
    for number, finalist in enumerate(finalists):
        architecture = Architecture(finalist.genes)
        weights = result / f"finalist-{number}.pt"
        if weights.exists():
            network = Network(job.space.lower(architecture), job.profiler.runtime)
            load_weights(network, weights)
        else:
            score = score or evaluator(job, train(job, run))
            network = score.supernet.extract(architecture, score.statistics(architecture))
            retrain(
                network,
                job.splits,
                job.recipe.retrain,
                seed=job.request.seed,
                progress=_labelled(job.progress, f"finalist {number + 1} of {len(finalists)}"),
            )
            save_weights(network, weights)
            run.log("retrain", finalist=number, search_val=torch_accuracy(network, job.splits))
        networks.append(network)
    return networks


def _labelled(progress: Progress, what: str) -> Progress:
    return lambda label, done, count: progress(f"{label} {what}", done, count)


@dataclass(frozen=True)
class Candidate:
    """A finalist's file, and what it does on SEARCH-VAL."""

    number: int
    path: Path
    search_val: float
    agreement: Agreement


def export(job: Job, run: Run, result: Path) -> list[Candidate]:
    """Write every finalist's ONNX file and hold it against its PyTorch network."""
    candidates = []
    for number, network in enumerate(retrain_finalists(job, run, result)):
        path = result / f"finalist-{number}.onnx"
        model = write_onnx(network, job.profiler, path)
        images = job.splits.search_val
        with job.profiler.prepare(model) as session:
            agreed = agreement(network, session, images.first(1000))
            right = accuracy(session, images)
        if agreed.same_class < LEAST_AGREEMENT and job.request.recipe != "smoke":
            raise HwnasError(
                f"{path} answers as its PyTorch network on {agreed.same_class:.1%} of the images "
                f"only, so it is not shipped.",
                next_step="train longer: an untrained network's answers hang on rounding",
            )
        candidates.append(Candidate(number, path, right, agreed))
    return candidates


# ---- verify


def verify(job: Job, run: Run, limits: Sequence[Limit]) -> dict[str, Any]:
    """Measure every candidate in fresh processes, ship the most accurate one that is under every
    limit, and write its certificate.
    """
    result = run.result(limits_name(limits))
    candidates = export(job, run, result)
    measured = _measure(job, [candidate.path for candidate in candidates])
    latency = next(limit for limit in limits if limit.cost.name == "latency_ms")
    under = [
        (candidate, m)
        for candidate, m in zip(candidates, measured, strict=True)
        if m.median_us <= latency.value * 1000
    ]
    if not under:
        least = min(m.median_us for m in measured) / 1000
        raise Unstable(
            f"All {len(candidates)} finalists measure over {latency.value:.6g} ms (the fastest "
            f"{least:.6g} ms), though their predicted bounds are under it: the machine now runs "
            "slower than when its table was measured.",
            next_step="profile again on a quiet machine, then run the same command",
        )
    shipped, measurement = max(under, key=lambda item: item[0].search_val)
    finalist = read_finalists(result)[shipped.number]
    shutil.copyfile(result / f"finalist-{shipped.number}.pt", result / "weights.pt")
    write_atomically(
        result / "model.onnx", lambda temporary: shutil.copyfile(shipped.path, temporary)
    )
    architecture = job.space.describe(Architecture(finalist.genes))
    write_text(result / "architecture.json", json.dumps(architecture, indent=2) + "\n")
    model = onnx.load(result / "model.onnx")
    with job.profiler.prepare(model) as session, job.splits.final() as images:
        test = accuracy(session, images)
    content = _certificate(job, run, limits, finalist, shipped, measurement, test)
    certificates.write_certificate(result / "certificate.json", content)
    run.point_to(result)
    run.log("verify", **content["measured"], test=test)
    return content


def remeasure(job: Job, result: Path) -> dict[str, Any]:
    """Hold a certificate against its file once more: hash, latency in fresh processes, accuracy."""
    content = certificates.read_certificate(result / "certificate.json")
    file = result / "model.onnx"
    if certificates.sha256(file) != content["hashes"]["model"]:
        raise InvalidInput(
            f"{file} is not the file that its certificate describes.",
            next_step="run hwnas export again",
        )
    if difference := job.profiler.host().difference(Host(**content["host"])):
        raise InvalidInput(
            f"The certificate was made on another host ({difference}).",
            next_step="profile and search on this one",
        )
    measured = _measure(job, [file])[0]
    with job.profiler.prepare(onnx.load(file)) as session, job.splits.final() as images:
        test = accuracy(session, images)
    return {
        **content,
        "measured": _measured(measured),
        "accuracy": {**content["accuracy"], "test": test},
    }


def _measure(job: Job, paths: Sequence[Path]) -> list[Measurement]:
    """The latency of model files, each in the recipe's number of fresh processes."""
    return measure_models(
        job.profiler, paths, job.recipe.protocol, job.progress, processes=job.recipe.processes
    )


def _measured(m: Measurement) -> dict[str, Any]:
    return {
        "median_ms": m.median_us / 1000,
        "p95_ms": m.p95_us / 1000,
        "min_ms": m.min_us / 1000,
        "spread": m.spread,
        "runs": m.runs,
        "stable": m.stable,
    }


def _certificate(
    job: Job,
    run: Run,
    limits: Sequence[Limit],
    finalist: Finalist,
    shipped: Candidate,
    measurement: Measurement,
    test: float,
) -> dict[str, Any]:
    result = run.result(limits_name(limits))
    ops = job.space.lower(Architecture(finalist.genes))
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": {limit.cost.name: limit.value for limit in limits},
        "predicted": {
            "latency_ms": finalist.latency_ms,
            "upper_latency_ms": finalist.upper_latency_ms,
            "coverage": job.model.coverage,
        },
        "measured": _measured(measurement),
        "protocol": job.recipe.protocol.to_dict(),
        "accuracy": {
            "search_val": shipped.search_val,
            "search_val_shared_weights": finalist.search_val,
            "test": test,
        },
        "agreement": asdict(shipped.agreement),
        "architecture": job.space.describe(Architecture(finalist.genes)),
        "counts": {
            "params": total("params", ops),
            "macs": total("macs", ops),
            "bitops": total("bitops", ops),
            "peak_activation_bytes": peak_activation_bytes(ops),
            "size_bytes": (result / "model.onnx").stat().st_size,
        },
        "input": "float32 (batch, channels, height, width), image bytes / 255",
        "hashes": {
            "model": certificates.sha256(result / "model.onnx"),
            "table": certificates.sha256(run.table),
            "code": certificates.code_version(),
        },
        "host": asdict(job.profiler.host()),
        "run": run.config.model_dump(),
    }


# ---- the whole path


def search_to_certificate(job: Job, run: Run, limits: Sequence[Limit]) -> dict[str, Any]:
    """From whatever is there to a certified file: what `hwnas search --json` prints."""
    feasible = FeasibleSet(job.space, limits)
    search(job, run, limits)
    result = run.result(limits_name(limits))
    file = result / "certificate.json"
    content = certificates.read_certificate(file) if file.exists() else verify(job, run, limits)
    summary = {
        "status": "ok" if content["measured"]["stable"] else "unstable",
        "exit_code": 0 if content["measured"]["stable"] else Unstable.exit_code,
        "run": str(run.path),
        "architecture": content["architecture"],
        "limits": {
            limit.cost.name: {"value": limit.value, "binding": feasible.binding(limit)}
            for limit in limits
        },
        "predicted": content["predicted"],
        "measured": content["measured"],
        "accuracy": content["accuracy"],
        **_search_facts(job, run, feasible),
        **feasible_range(feasible),
        "method": {"name": job.method.name, "evidence": job.method.evidence},
        "model": str(result / "model.onnx"),
        "certificate": str(file),
        "report": str(run.report),
    }
    page.write_report(run.report, summary, *_points(job, run, feasible))
    return summary


def result_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A search's summary as (what, value) lines for people."""
    return page.rows(summary)


def feasible_range(feasible: FeasibleSet) -> dict[str, dict[str, float]]:
    """The smallest and the largest upper bound of each limited cost."""
    return {
        "feasible_min": {name: r.smallest for name, r in feasible.ranges.items()},
        "feasible_max": {name: r.largest for name, r in feasible.ranges.items()},
    }


def _search_facts(job: Job, run: Run, feasible: FeasibleSet) -> dict[str, Any]:
    history = History(run.history)
    try:
        names = _searches(job, feasible.limits)
        best = {
            name: _ranked(feasible, history, {name: search_name})[:1]
            for name, search_name in names.items()
        }
        return {
            "evaluated": sum(map(len, history.generations(names[job.method.name]))),
            "rejected": history.rejected(names[job.method.name]),
            "search_val_shared_weights": {
                name: found[0][1] if found else None for name, found in best.items()
            },
        }
    finally:
        history.close()


def _points(
    job: Job, run: Run, feasible: FeasibleSet
) -> tuple[list[tuple[float, float, str]], list[tuple[float, float, str]]]:
    """(latency in ms, accuracy, genes) of everything that the method and the baseline scored."""
    history = History(run.history)
    try:
        names = _searches(job, feasible.limits)
        found = []
        for name in (job.method.name, BASELINE):
            ranked = _ranked(feasible, history, {name: names[name]})
            found.append(
                [
                    (_finalist(feasible, a, acc).latency_ms, acc, _label(job.space, a))
                    for a, acc in ranked
                ]
            )
        return found[0], found[1]
    finally:
        history.close()


def _label(space: SearchSpace, architecture: Architecture) -> str:
    return " ".join(space.describe(architecture).values())
