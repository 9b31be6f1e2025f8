"""From finalists to a certified file: retrain, export, measure, choose, prove."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hwnas.conditions import LATENCY, condition
from hwnas.costs.feasible import reachable
from hwnas.costs.limits import Limit
from hwnas.export import certificate as certificates
from hwnas.files import (
    OWN,
    DeviceFile,
    accuracy_on_test,
    file_facts,
    graph_name,
    jobs_of,
    key_of,
    write_file,
)
from hwnas.job import Job, join, measure
from hwnas.loop import Finalist, limits_name, read_asked, read_finalists, result_name, values_of
from hwnas.placement import HOST
from hwnas.retrain import accuracy as torch_accuracy
from hwnas.retrain import in_float, load_weights, retrain, save_weights, teacher_of
from hwnas.scoring import evaluator, train
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.store import Run
from hwnas.supernet.evaluator import Evaluator
from hwnas.training import Teacher
from latency_tables.files import write_atomically, write_text
from latency_tables.host import Host
from latency_tables.ops import peak_activation_bytes, total
from profilers.base import GRAPH
from profilers.measure import Measurement
from profilers.modules import Network
from quant.errors import InvalidInput, Unstable


def retrain_finalists(job: Job, run: Run, result: Path) -> list[Network]:
    """The finalists with trained weights of their own, where they are trained; trained now where
    they are not.
    """
    networks: list[Network] = []
    score: Evaluator | None = None
    finalists = read_finalists(result)
    for number, finalist in enumerate(finalists):
        architecture = Architecture(finalist.genes)
        weights = weights_of(result, number)
        training = result / f"finalist-{number}.training.pt"
        if weights.exists():
            network = Network(job.space.lower(architecture), job.profiler.runtime)
            job.placement.move(network)
            load_weights(network, weights)
        else:
            score = score or evaluator(job, train(job, run))
            network = score.supernet.extract(architecture, score.statistics(architecture))
            label = f"finalist {number + 1} of {len(finalists)}"
            run.log("retraining", finalist=number, on=job.placement.text)
            teacher = _teacher(job, score, network, result / f"finalist-{number}.teacher.pt", label)
            _retrain(job, network, training, f"retraining {label}", teacher)
            network.round_biases()
            save_weights(network, weights)
            training.unlink(missing_ok=True)
            right = torch_accuracy(network, job.splits)
            run.log("retrain", finalist=number, search_val=right)
        networks.append(network)
    return networks


def _retrain(
    job: Job, network: Network, checkpoint: Path, label: str, teacher: Teacher | None = None
) -> None:
    retrain(
        network,
        job.splits,
        job.recipe.retrain,
        seed=job.request.seed,
        checkpoint=checkpoint,
        recalibration_images=8 * job.recipe.recalibration_images,
        progress=job.progress,
        label=label,
        teacher=teacher,
    )


def _teacher(
    job: Job, score: Evaluator, network: Network, weights: Path, label: str
) -> Teacher | None:
    """The recipe's teacher of an extracted network; trained now, into `weights`, if it is not."""
    recipe = job.recipe.retrain
    match recipe.teacher:
        case "float":
            images = 8 * job.recipe.recalibration_images
            teacher = in_float(network, job.splits, recalibration_images=images)
            if weights.exists():
                load_weights(teacher, weights)
            else:
                training = weights.with_suffix(".training.pt")
                _retrain(job, teacher, training, f"training the teacher of {label}")
                save_weights(teacher, weights)
                training.unlink(missing_ok=True)
        case "largest":
            largest = reachable(job.space, job.cost("macs")).dearest
            teacher = score.supernet.extract(largest, score.statistics(largest))
        case "none":
            return None
    return teacher_of(teacher, recipe)


def weights_of(result: Path, number: int) -> Path:
    """Where a finalist's trained weights are kept."""
    return result / f"finalist-{number}.pt"


STEM = "model"
"""How the names of a result's shipped files begin."""


@dataclass(frozen=True)
class Candidate:
    """A finalist's files, by `files.key_of`."""

    number: int
    files: Mapping[str, DeviceFile]

    @property
    def own(self) -> DeviceFile:
        """The file for the device that was searched on."""
        return self.files[OWN]

    @property
    def paths(self) -> dict[str, Path]:
        """What each device runs."""
        return {key: file.path for key, file in self.files.items()}


def export(job: Job, run: Run, result: Path) -> list[Candidate]:
    """Write every finalist's files and hold what each device runs against its PyTorch network."""
    candidates = []
    jobs = jobs_of(job, read_asked(result))
    for number, network in enumerate(retrain_finalists(job, run, result)):
        HOST.move(network)
        stem = f"finalist-{number}"
        files = {
            key: write_file(there, network, result / graph_name(stem, key))
            for key, there in jobs.items()
        }
        candidates.append(Candidate(number, files))
    return candidates


def verify(job: Job, run: Run, limits: Sequence[Limit]) -> dict[str, Any]:
    """Measure every candidate in fresh processes, ship the most accurate one that is under every
    limit, and write its certificate.
    """
    result = run.result(result_name(job, limits))
    candidates = export(job, run, result)
    asked = values_of(limits)
    measured = _measured_under(job, asked, [candidate.paths for candidate in candidates])
    finalists = read_finalists(result)
    raised = _join(job, [finalists[candidate.number] for candidate in candidates], measured)
    under = [
        (candidate, m)
        for candidate, m in zip(candidates, measured, strict=True)
        if all(_limits_hold(asked, m, candidate.own.path).values())
    ]
    if not under:
        least = min(m[LATENCY].median_us for m in measured) / 1000
        raise Unstable(
            f"All {len(candidates)} finalists measure over {limits_name(limits)} (the fastest "
            f"{least:.6g} ms), though their predicted bounds are under it: the machine now runs "
            "slower than when its table was measured.",
            next_step="run hwnas search again: it now looks below a bound that these measurements "
            "raised"
            if raised
            else "run the same command again, or profile again on a quiet machine",
        )
    shipped, measurement = max(under, key=lambda item: item[0].own.search_val)
    finalist = finalists[shipped.number]
    copies = {weights_of(result, shipped.number): result / "weights.pt"}
    for key, file in shipped.files.items():
        graph = result / graph_name(STEM, key)
        copies |= {file.graph: graph, file.path: graph.with_suffix(file.path.suffix)}
    for source, target in copies.items():
        write_atomically(target, partial(shutil.copyfile, source))
    architecture = job.space.describe(Architecture(finalist.genes))
    write_text(result / "architecture.json", json.dumps(architecture, indent=2) + "\n")
    test = accuracy_on_test(job, shipped_file(job, result))
    content = _certificate(job, run, limits, finalist, shipped, measurement, test)
    certificates.write_certificate(result / "certificate.json", content)
    run.point_to(result)
    run.log("verify", **content["measured"], test=test)
    return content


def remeasure(job: Job, result: Path) -> dict[str, Any]:
    """Hold a certificate against its file once more: hash, latency in fresh processes, accuracy."""
    content = certificates.read_certificate(result / "certificate.json")
    file = shipped_file(job, result)
    if not is_shipped(result, content):
        raise InvalidInput(
            f"{file} is not the file that its certificate describes.",
            next_step="remove the certificate, then run hwnas verify",
        )
    if difference := job.profiler.host().difference(Host(**content["host"])):
        raise InvalidInput(
            f"The certificate was made on another host ({difference}).",
            next_step="profile and search on this one",
        )
    others = {key: result / told["file"] for key, told in content.get("files", {}).items()}
    measured = _measured_under(job, content["limits"], [{OWN: file, **others}])[0]
    test = accuracy_on_test(job, file)
    return {
        **content,
        **_told(measured),
        "holds": _limits_hold(content["limits"], measured, file),
        "accuracy": {**content["accuracy"], "test": test},
    }


def bitops(space: SearchSpace, architecture: Architecture) -> dict[str, int]:
    """BitOPs of all layers, and of those whose precision is searched."""
    return {
        "bitops": int(total("bitops", space.lower(architecture))),
        "bitops_searched": int(total("bitops", space.searched(architecture))),
    }


def is_stable(certificate: Mapping[str, Any]) -> bool:
    """Whether every measurement of a certificate was quiet enough to trust."""
    measured = [certificate["measured"], *certificate.get("measured_under", {}).values()]
    return all(each["stable"] for each in measured)


def shipped_file(job: Job, result: Path) -> Path:
    """The file of a result that the job's device runs."""
    return (result / graph_name(STEM, OWN)).with_suffix(job.profiler.suffix)


def is_shipped(result: Path, certificate: dict[str, Any]) -> bool:
    """Whether the files of a result are those that its certificate describes."""
    files = {graph_name(STEM, OWN): certificate["hashes"]["model"]}
    if engine := certificate.get("engine"):
        files[engine["file"]] = certificate["hashes"]["engine"]
    for told in certificate.get("files", {}).values():
        files |= {told["file"]: told["hashes"]["file"], told["graph"]: told["hashes"]["graph"]}
    return all(
        (result / name).is_file() and certificates.sha256(result / name) == known
        for name, known in files.items()
    )


def _measured_under(
    job: Job, asked: Mapping[str, float], networks: Sequence[Mapping[str, Path]]
) -> list[dict[str, Measurement]]:
    """What the files of each network measure under every latency that is limited, and on the job's
    own device.
    """
    names = {LATENCY: None} | {name: None for name in asked if condition(name) is not None}
    found = [
        measure(job.under(name), [files[key_of(job, name)] for files in networks]) for name in names
    ]
    return [dict(zip(names, each, strict=True)) for each in zip(*found, strict=True)]


def _join(
    job: Job, finalists: Sequence[Finalist], measured: Sequence[Mapping[str, Measurement]]
) -> bool:
    """Tell each condition's table what the finalists measure; whether that raised a bound."""
    raised = False
    for name in measured[0]:
        found = {
            Architecture(f.genes): each[name] for f, each in zip(finalists, measured, strict=True)
        }
        raised |= join(job.under(name), found)
    return raised


def _limits_hold(
    asked: Mapping[str, float], measured: Mapping[str, Measurement], file: Path
) -> dict[str, bool]:
    """Which limits hold of what can be measured: latencies, and the bytes of the file. Counted
    costs were exact before.
    """
    actual = {name: m.latency_us / 1000 for name, m in measured.items()}
    actual["size_mb"] = file.stat().st_size / 1e6
    return {name: actual.get(name, 0.0) <= value for name, value in asked.items()}


def _told(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """Measurements as a certificate tells them: the device's own, then those of other limits."""
    others = {name: _measured(m) for name, m in measured.items() if name != LATENCY}
    told = {"measured": _measured(measured[LATENCY])}
    return told | ({"measured_under": others} if others else {})


def _engine(job: Job, result: Path) -> dict[str, Any]:
    """What a certificate tells of the engine that was measured, where it is not the ONNX file."""
    file, host = shipped_file(job, result), job.profiler.host()
    if file.suffix == GRAPH:
        return {}
    told = {
        "file": file.name,
        "size_bytes": file.stat().st_size,
        "runtime": f"{host.runtime} {host.runtime_version}",
        "runs_on": f"{host.cpu}, {host.flags}, batches of {host.batch}",
        "onnx": "what the engine was made of; it was not measured",
    }
    return {"engine": told}


def _others(jobs: Mapping[str, Job], shipped: Candidate, result: Path) -> dict[str, Any]:
    """What a certificate tells of the files for devices that take another one, by device."""
    found = {}
    for key, there in jobs.items():
        path = (result / graph_name(STEM, key)).with_suffix(there.profiler.suffix)
        found[key] = file_facts(there, shipped.files[key], path)
    return found


def _measured(m: Measurement) -> dict[str, Any]:
    return {
        "latency_ms": m.latency_us / 1000,
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
    measurement: Mapping[str, Measurement],
    test: float,
) -> dict[str, Any]:
    result = run.result(result_name(job, limits))
    model, engine = result / graph_name(STEM, OWN), shipped_file(job, result)
    others = {key: x for key, x in jobs_of(job, values_of(limits)).items() if key != OWN}
    architecture = Architecture(finalist.genes)
    ops = job.space.lower(architecture)
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": values_of(limits),
        "upper": finalist.upper,
        "holds": _limits_hold(values_of(limits), measurement, shipped.own.path),
        "predicted": {
            "latency_ms": finalist.latency_ms,
            "upper_latency_ms": finalist.upper_latency_ms,
            "coverage": job.model.coverage,
        },
        **_told(measurement),
        "protocol": job.recipe.protocol.to_dict(),
        "trained_on": run.trained_on(),
        "accuracy": {
            "search_val": shipped.own.search_val,
            "search_val_shared_weights": finalist.search_val,
            "test": test,
        },
        "agreement": asdict(shipped.own.agreement),
        "architecture": job.space.describe(architecture),
        "counts": {
            "params": total("params", ops),
            "macs": total("macs", ops),
            **bitops(job.space, architecture),
            "peak_activation_bytes": peak_activation_bytes(ops),
            "size_bytes": model.stat().st_size,
        },
        **_engine(job, result),
        **({"files": _others(others, shipped, result)} if others else {}),
        "input": "float32 (batch, channels, height, width), image bytes / 255",
        "hashes": {
            "model": certificates.sha256(model),
            **({"engine": certificates.sha256(engine)} if engine != model else {}),
            "table": certificates.sha256(run.table),
            "code": certificates.code_version(),
        },
        "host": asdict(job.profiler.host()),
        "run": run.config.model_dump(),
    }
