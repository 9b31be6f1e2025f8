"""The stages over a run directory: profile, train, search, retrain, export, verify.

Each stage does what is missing and returns; called again it goes on where it stopped. Feasibility
is decided from the table, before any training.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx
import torch

from hwnas import store
from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import Limit
from hwnas.costs.population import genes_of, totals
from hwnas.export import certificate as certificates
from hwnas.export.onnx_file import Agreement, accuracy, agreement, write_onnx
from hwnas.job import Job, Request, measure, plan, request_of
from hwnas.loop import limits_name, ranked, run_strategy, searches
from hwnas.report import page
from hwnas.retrain import accuracy as torch_accuracy
from hwnas.retrain import load_weights, retrain, save_weights
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.store import History, Run, read_run
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import load_supernet, train_supernet
from latency_tables.files import write_atomically, write_text
from latency_tables.ops import peak_activation_bytes, total
from latency_tables.table import Host
from profilers.build import Progress
from profilers.measure import Measurement
from profilers.modules import Network
from quant.errors import HwnasError, InvalidInput, Unstable

__all__ = [
    "FeasibleSet", "Job", "Request", "export", "limits_name", "open_run", "plan", "read_limits",
    "read_run", "remeasure", "request_of", "result_rows", "retrain_finalists", "search",
    "search_to_certificate", "torch_accuracy", "train", "verify",
]  # fmt: skip


@dataclass(frozen=True)
class Finalist:
    """An architecture to retrain, with its shared-weight scores and its predicted latency."""

    genes: tuple[int, ...]
    search_val: float
    latency_ms: float
    upper_latency_ms: float


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
    asked = {"limits": {limit.cost.name: limit.value for limit in limits}, "table": job.table_id}
    if not _is_answered(result, asked):
        score = evaluator(job, train(job, run))
        names = searches(job, limits)
        with closing(History(run.history)) as history:
            for name in names:
                run_strategy(job, name, feasible, score, history)
            best = ranked(feasible, history, list(names.values()))
        chosen = [_finalist(feasible, a, acc) for a, acc in best[: job.recipe.finalists]]
        job.table.save(run.table)
        for stale in result.glob("*"):
            stale.unlink()
        content = {**asked, "finalists": [asdict(item) for item in chosen]}
        write_text(result / "finalists.json", json.dumps(content, indent=2) + "\n")
        run.log("search", limits=limits_name(limits), finalists=len(chosen))
    run.point_to(result)
    return read_finalists(result)


def _is_answered(result: Path, asked: dict[str, Any]) -> bool:
    """Whether a result holds the finalists of this very question."""
    if not (result / "finalists.json").exists():
        return False
    outcome = _search_outcome(result)
    return all(outcome.get(name) == value for name, value in asked.items())


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
        if agreed.same_class < job.recipe.least_agreement:
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
    measured = measure(job, [candidate.path for candidate in candidates])
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
            next_step="run the same command again, or profile again on a quiet machine",
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
            next_step="remove the certificate, then run hwnas verify",
        )
    if difference := job.profiler.host().difference(Host(**content["host"])):
        raise InvalidInput(
            f"The certificate was made on another host ({difference}).",
            next_step="profile and search on this one",
        )
    measured = measure(job, [file])[0]
    with job.profiler.prepare(onnx.load(file)) as session, job.splits.final() as images:
        test = accuracy(session, images)
    return {
        **content,
        "measured": _measured(measured),
        "accuracy": {**content["accuracy"], "test": test},
    }


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
    content = certificates.read_certificate(file) if file.exists() else None
    if content is None or not content["measured"]["stable"]:
        content = verify(job, run, limits)
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
    names = searches(job, feasible.limits)
    with closing(History(run.history)) as history:
        best = {name: ranked(feasible, history, [names[name]])[:1] for name in names}
        mine = names[job.method.name]
        return {
            "evaluated": sum(map(len, history.generations(mine))),
            "rejected": history.rejected(mine),
            "search_val_shared_weights": {
                name: found[0][1] if found else None for name, found in best.items()
            },
        }


def _points(job: Job, run: Run, feasible: FeasibleSet) -> list[list[page.Point]]:
    """What the method and the baseline scored: latency in ms, accuracy, what was chosen."""
    with closing(History(run.history)) as history:
        return [
            [
                (_finalist(feasible, a, right).latency_ms, right, _label(job.space, a))
                for a, right in ranked(feasible, history, [name])
            ]
            for name in searches(job, feasible.limits).values()
        ]


def _label(space: SearchSpace, architecture: Architecture) -> str:
    return " ".join(space.describe(architecture).values())
