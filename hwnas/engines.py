"""TensorRT engines of a certified result: for other cards than its own, and kernel by kernel."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.export import certificate as certificates
from hwnas.export.onnx_file import write_engine, write_onnx
from hwnas.export.requantise import Requantised, rescored
from hwnas.files import OWN, graph_name
from hwnas.job import Job
from hwnas.retrain import accuracy_on, load_weights
from hwnas.ship import STEM, is_shipped, shipped_file
from latency_tables.files import read_object, write_bytes
from profilers.base import Profiler
from profilers.build import measure_models
from profilers.cuda import card
from profilers.devices import open_profiler, protocol_of
from profilers.graphs import check_kernels, emit
from profilers.measure import summarise
from profilers.modules import Network
from profilers.trt import PLAN, TrtSession
from profilers.trt_build import Kernel, build, named_targets, version, wrong_kernels
from quant.errors import HwnasError, InvalidInput
from quant.precision import TENSORRT

MODEL = graph_name(STEM, OWN)

_OP = re.compile(r"op(\d+)\.")
"""How the names of an op's nodes begin."""


def export_engine(job: Job, result: Path, targets: Sequence[str]) -> dict[str, Any]:
    """Build the TensorRT engine of a certified result, in a folder of its own with its graph and a
    certificate; the answer is that certificate, with `folder`.

    With `targets`, compute capabilities such as sm89, no GPU is needed, and none times the engine.
    Without them it is built for this machine's card, and measured. A network that was trained for
    another runtime is requantised and scored anew.
    """
    targets = named_targets(targets)
    source = certificates.read_certificate(result / "certificate.json")
    if not is_shipped(result, source):
        raise InvalidInput(
            f"{result} is not what its certificate describes.", next_step="run hwnas verify"
        )
    network = _network(job, result)
    check_kernels(network.ops, TENSORRT)
    profiler = None if targets else open_profiler("gpu", batch=job.request.batch)
    found = rescored(network, TENSORRT, job.splits)
    folder = result / "-".join(["tensorrt", *targets])
    told = (
        _built_for(job, found, folder, targets)
        if profiler is None
        else _built_here(job, found, folder, profiler)
    )
    with job.splits.final() as images:
        test = accuracy_on(found.network, images)
    content = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **told,
        "accuracy": {
            "of": "the network in PyTorch, on TensorRT's grid",
            "search_val": found.search_val,
            "search_val_before": found.trained_search_val,
            "test": test,
        },
        "architecture": source["architecture"],
        "input": source.get("input", ""),
        "hashes": {
            "model": certificates.sha256(folder / MODEL),
            "engine": certificates.sha256(folder / told["engine"]["file"]),
            "source": source["hashes"]["model"],
            "code": certificates.code_version(),
        },
        "source": {
            "result": result.name,
            "runtime": source["host"]["runtime"],
            "limits": source["limits"],
        },
    }
    certificates.write_certificate(folder / "certificate.json", content)
    return {**content, "folder": str(folder)}


def _network(job: Job, result: Path) -> Network:
    """The network that a result shipped."""
    architecture = job.space.parse(read_object(result / "architecture.json"))
    network = Network(job.space.lower(architecture), job.profiler.runtime)
    load_weights(network, result / "weights.pt")
    return network


def _built_for(
    job: Job, found: Requantised, folder: Path, targets: Sequence[str]
) -> dict[str, Any]:
    """An engine for named compute capabilities, and what its certificate tells of it."""
    ops = found.network.ops
    model = emit(ops, found.network.parameters_for_graph(), TENSORRT)
    engine = build(model, batch=job.request.batch, targets=targets)
    if wrong := wrong_kernels(ops, engine.kernels):
        raise HwnasError(f"{version()} does not run this network as declared: {wrong}.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {MODEL: model.SerializeToString(), f"model{PLAN}": engine.plan}
    for name, content in files.items():
        write_bytes(folder / name, content)
    return {
        "engine": {
            **_engine(f"model{PLAN}", len(engine.plan), targets, job.request.batch),
            "kernels": len(engine.kernels),
            "integer_kernels": sum("Int8" in kernel.inputs for kernel in engine.kernels),
        },
        "measured": None,
        "latency": f"not measured: built for {', '.join(targets)}, on no card",
    }


def _built_here(job: Job, found: Requantised, folder: Path, profiler: Profiler) -> dict[str, Any]:
    """An engine for this machine's card, measured, and what its certificate tells of it."""
    protocol = protocol_of("gpu")
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx(found.network, profiler, folder / MODEL)
    plan = write_engine(profiler, folder / MODEL)
    blocks = measure_models(
        profiler, [plan], protocol, job.progress, processes=job.recipe.processes
    )
    return {
        "engine": _engine(plan.name, plan.stat().st_size, [card().sm], profiler.batch),
        "measured": asdict(summarise(blocks[0], protocol, percentile=job.percentile)),
        "host": asdict(profiler.host()),
    }


def _engine(file: str, size: int, targets: Sequence[str], batch: int) -> dict[str, Any]:
    return {
        "file": file,
        "size_bytes": size,
        "runtime": version(),
        "compute_capabilities": list(targets),
        "batch": batch,
    }


def engine_rows(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An engine's certificate as (what, value) lines for people."""
    engine, accuracy, measured = content["engine"], content["accuracy"], content["measured"]
    return [
        ("engine", f"{content['folder']}/{engine['file']}"),
        ("bytes", f"{engine['size_bytes']:,}"),
        ("runs on", f"{', '.join(engine['compute_capabilities'])}, under {engine['runtime']}, in "
                    f"batches of {engine['batch']}"),
        ("latency", f"{measured['latency_us'] / 1000:.4g} ms" if measured else content["latency"]),
        ("accuracy on SEARCH-VAL", f"{accuracy['search_val']:.2%}, where "
                                   f"{accuracy['search_val_before']:.2%} was trained"),
        ("accuracy on TEST", f"{accuracy['test']:.2%} ({accuracy['of']})"),
    ]  # fmt: skip


# ---- kernel by kernel


@dataclass(frozen=True)
class LayerTime:
    """The kernels that run one op: how many, what they take alone, and as a share of the engine.

    `op` is the position in the network, "" for what belongs to none; `rescaled_us` are parts of
    the engine's own latency.
    """

    op: str
    kernels: int
    alone_us: float
    rescaled_us: float


def engine_of(job: Job, result: Path) -> Path:
    """The TensorRT engine of a result; raises InvalidInput where it is of another kind."""
    file = shipped_file(job, result)
    if file.suffix != PLAN:
        raise InvalidInput(
            f"--layers tells the kernels of a TensorRT engine, and {file} is none.",
            accepted="a result of --device gpu",
            next_step="drop --layers",
        )
    return file


def layer_times(job: Job, result: Path) -> list[LayerTime]:
    """Where an engine's time goes, op by op: a diagnostic, never a table's row.

    Each kernel is waited for, so their sum exceeds the engine's latency; that is what it is
    rescaled to. Raises InvalidInput where the result is no TensorRT engine.
    """
    file = engine_of(job, result)
    architecture = job.space.parse(read_object(result / "architecture.json"))
    positions = [placed.position for placed in job.space.walk(architecture)]
    with job.profiler.prepare(file) as session:
        assert isinstance(session, TrtSession)
        whole_us = float(np.median(session.block(job.recipe.protocol)[:, 0]))
        return attributed(session.kernel_us(), session.kernels(), positions, whole_us)


def attributed(
    times_us: Mapping[str, float],
    kernels: Sequence[Kernel],
    positions: Sequence[str],
    whole_us: float,
) -> list[LayerTime]:
    """Kernels by the op that they run, in the network's order: a fused kernel belongs to the op
    that it is named after, else to that of its first node.
    """
    owners = {kernel.name: _owner(kernel, positions) for kernel in kernels}
    total = sum(times_us.values())
    found: dict[str, list[float]] = {position: [] for position in (*positions, "")}
    for name, alone_us in times_us.items():
        found[owners.get(name, "")].append(alone_us)
    return [
        LayerTime(op, len(each), sum(each), sum(each) * whole_us / total)
        for op, each in found.items()
        if each
    ]


def _owner(kernel: Kernel, positions: Sequence[str]) -> str:
    for name in (kernel.name, *kernel.nodes):
        if named := _OP.match(name):
            return positions[int(named[1])]
    return ""
