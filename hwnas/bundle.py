"""Profiling other machines: a folder that measures there, and its result as a table here."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hwnas import __version__
from hwnas.calibration import calibration_networks, fitted, measured_networks, network_models
from hwnas.costs.feasible import Range, reachable
from hwnas.costs.limits import latency_cost
from hwnas.job import Job
from latency_tables.boundaries import chain_key
from latency_tables.model import LatencyModel
from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable
from profilers.build import add_rows, missing_chains, row_model, table_lock
from profilers.bundle import Graph, Identity, keys_hash, read_result, write_bundle
from profilers.bundle_runner import RESULT
from profilers.graphs import expected_operators
from quant.errors import InvalidInput, TableError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Written:
    """A bundle: its graphs, its size, and the command that takes its result."""

    bundle: str
    rows: int
    networks: int
    size_bytes: int
    runner: str
    import_command: str


@dataclass(frozen=True)
class Imported:
    """A table of another machine, its latency model of the job's space, and what that reaches."""

    path: Path
    table: LatencyTable
    model: LatencyModel
    range: Range


class Graphs:
    """What is timed for a job's space: ops, chains of them and whole networks, by their keys."""

    def __init__(self, job: Job) -> None:
        if job.request.device != "cpu":
            raise InvalidInput(
                f"A bundle is timed by ONNX Runtime on a CPU, not on {job.request.device!r}.",
                accepted="--device cpu",
            )
        self.job = job
        nothing = LatencyTable(job.profiler.host(), {})
        chains = missing_chains(nothing, job.space.lattice.ops)
        self.chains = {chain_key(chain): chain for chain in chains}

    @cached_property
    def whole(self) -> dict[str, list[OpSpec]]:
        """The ops of the calibration networks."""
        space, counts = self.job.space, self.job.recipe.calibration
        chosen = calibration_networks(space, counts)
        return {f"network {n}": list(space.lower(a)) for n, a in enumerate(chosen)}

    @property
    def identity(self) -> Identity:
        """What a result must have been measured for."""
        job = self.job
        return Identity(
            hwnas=__version__,
            space=job.space.name,
            fingerprint=job.space.fingerprint,
            threads=job.request.threads,
            batch=job.request.batch,
            protocol=job.recipe.protocol.to_dict(),
            processes=job.recipe.processes,
            rows=keys_hash(self.chains),
            networks=keys_hash(map(chain_key, self.whole.values())),
        )

    def rows(self) -> Iterator[Graph]:
        """The graph of each row, checked to run in the kernels that it declares."""
        for number, (key, chain) in enumerate(self.chains.items()):
            model = row_model(chain, self.job.profiler)
            self.job.profiler.check(model)
            yield Graph(key, model.SerializeToString(), expected_operators(chain))
            self.job.progress(
                "checking that every op runs in its declared kernels", number + 1, len(self.chains)
            )

    def networks(self) -> Iterator[Graph]:
        """The graph of each calibration network, checked too."""
        chains = list(self.whole.values())
        models = network_models(chains, self.job.profiler, self.job.progress)
        for (key, ops), model in zip(self.whole.items(), models, strict=True):
            yield Graph(key, model.SerializeToString(), expected_operators(ops))


def write(job: Job, folder: Path) -> Written:
    """Write the bundle of a job's space and condition as `folder`, which is new or empty."""
    graphs = Graphs(job)
    command = _import_command(job)
    runtime = job.profiler.host().runtime_version
    readme = _README.format(space=job.space.name, runtime=runtime, command=command)
    size = write_bundle(folder, graphs.identity, graphs.rows(), graphs.networks(), readme)
    return Written(
        str(folder), len(graphs.chains), len(graphs.whole), size, f"python {folder / 'run.py'}",
        command,
    )  # fmt: skip


def take(job: Job, source: Path, name: str) -> Imported:
    """The result of the job's bundle as the table `name-...` in the folder of tables, calibrated.

    Rows that such a table holds already, of another space, stay as they are. Raises InvalidInput
    for a name that is none, TableError for a result that is not the bundle's, and where the table
    is of another machine or protocol or holds another measurement of this space.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"--name is {name!r}.", accepted="letters, digits, '.', '_' and '-', such as pi5"
        )
    graphs = Graphs(job)
    result = read_result(source, graphs.identity, graphs.chains, graphs.whole)
    recipe, blocks = job.recipe, result.blocks
    table = LatencyTable(result.host, recipe.protocol.to_dict())
    add_rows(table, graphs.chains, blocks, recipe.protocol)
    path = job.request.tables / f"{name}-{result.host.file_name}"
    with table_lock(path):
        table = _merged(table, path, job)
        whole = graphs.whole
        networks = measured_networks(
            list(whole.values()), [blocks[key] for key in whole], table, recipe
        )
        model = fitted(networks, recipe.calibration)
        table.models[job.model_name] = model
        table.save(path)
    return Imported(path, table, model, reachable(job.space, latency_cost(job.space, table, model)))


def _merged(table: LatencyTable, path: Path, job: Job) -> LatencyTable:
    """The rows of a result with those that the table at `path` holds already."""
    if not path.exists():
        return table
    known = LatencyTable.load(path)
    try:
        merged = known.merge(table).merge(known)  # at the pace, and with the rows, of the known one
    except TableError as error:
        raise TableError(
            f"{path} is there already, and the result is of another machine or protocol: "
            f"{error.what}",
            next_step="give another --name, or remove the file",
        ) from error
    if job.model_name in known.models and known.rows | table.rows != known.rows:
        raise TableError(
            f"{path} holds another measurement of this space.",
            next_step="give another --name, or remove the file",
        )
    return merged


def _import_command(job: Job) -> str:
    """What takes the result here, with the flags of the job."""
    request = job.request
    flags = {
        "space": request.space,
        "data": request.data,
        "image-size": request.image_size,
        "threads": request.threads,
        "batch": request.batch,
        "recipe": request.recipe if isinstance(request.recipe, str) else None,
    }
    words = ["hwnas", "profile", "--from-bundle", RESULT, "--name", "NAME"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)] if value is not None else []
    if isinstance(request.recipe, Mapping):
        words += ["--config", "FILE"]
    return shlex.join(words)


_README = """\
The graphs of hwnas's space {space}, to be timed on another machine.

1. Copy this folder to the machine. It needs Python 3.9 or newer, numpy and onnxruntime, of
   which {runtime} is known to run these graphs as they should:
     python -m pip install numpy onnxruntime
2. Let nothing else run there, and start
     python run.py
   It may be stopped at any time, however hard; the same command goes on.
3. Carry result.jsonl back, and make it a table (NAME is yours to choose, FILE the same file):
     {command}
"""
