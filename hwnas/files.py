"""The files of one network: for the device that it was searched on, and for each other device that
it is limited on and that takes another file, requantised and scored there.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hwnas.conditions import condition
from hwnas.export import certificate as certificates
from hwnas.export.onnx_file import Agreement, accuracy, agreement, write_engine, write_onnx
from hwnas.export.requantise import requantised
from hwnas.job import Job
from profilers.base import GRAPH
from profilers.modules import Network
from quant.errors import HwnasError

OWN = ""
"""The key of the file for the job's own device, and for all that take the same file."""


@dataclass(frozen=True)
class DeviceFile:
    """The file that a device runs, beside the graph that it was made of, and what it does on
    SEARCH-VAL.
    """

    path: Path
    search_val: float
    agreement: Agreement

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path.with_suffix(GRAPH)


def key_of(job: Job, name: str) -> str:
    """Which file a latency is about: `OWN`, or the device whose runtime is another."""
    there = job.under(name)
    return OWN if there.profiler.runtime == job.profiler.runtime else there.request.device


def jobs_of(job: Job, names: Iterable[str]) -> dict[str, Job]:
    """The jobs whose files a network under limits of these names needs, by key; the own first."""
    latencies = [name for name in names if condition(name) is not None]
    return {OWN: job} | {
        key: job.under(name) for name in latencies if (key := key_of(job, name)) != OWN
    }


def graph_name(stem: str, key: str) -> str:
    """The name of the graph of a key's file.

    >>> graph_name("model", OWN), graph_name("model", "gpu")
    ('model.onnx', 'model.gpu.onnx')
    """
    return f"{stem}.{key}{GRAPH}" if key else f"{stem}{GRAPH}"


def write_file(there: Job, network: Network, graph: Path) -> DeviceFile:
    """Write a network as the files of a job's device, and hold what the device runs against it.

    A network of another runtime is requantised. Raises HwnasError where the file answers otherwise.
    """
    runtime = there.profiler.runtime
    mine = network if network.runtime == runtime else requantised(network, runtime)
    write_onnx(mine, there.profiler, graph)
    path = write_engine(there.profiler, graph)
    images = there.splits.search_val
    with there.profiler.prepare(path) as session:
        agreed = agreement(mine, session, images.first(1000))
        right = accuracy(session, images)
    if agreed.same_class < there.recipe.least_agreement:
        raise HwnasError(
            f"{path} answers as its PyTorch network on {agreed.same_class:.1%} of the images "
            f"only, so it is not shipped.",
            next_step="train longer: an untrained network's answers hang on rounding",
        )
    return DeviceFile(path, right, agreed)


def accuracy_on_test(there: Job, path: Path) -> float:
    """What a file that a device runs scores on TEST."""
    with there.profiler.prepare(path) as session, there.splits.final() as images:
        return accuracy(session, images)


def file_facts(there: Job, file: DeviceFile, shipped: Path) -> dict[str, Any]:
    """What a certificate tells of a file for another device."""
    host = there.profiler.host()
    return {
        "file": shipped.name,
        "graph": shipped.with_suffix(GRAPH).name,
        "size_bytes": shipped.stat().st_size,
        "runtime": f"{host.runtime} {host.runtime_version}",
        "accuracy": {"search_val": file.search_val, "test": accuracy_on_test(there, shipped)},
        "agreement": asdict(file.agreement),
        "hashes": {
            "file": certificates.sha256(shipped),
            "graph": certificates.sha256(shipped.with_suffix(GRAPH)),
        },
        "host": asdict(host),
    }
