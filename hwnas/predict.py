"""The latency that a table predicts for one network, op by op."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hwnas.job import Job
from hwnas.loop import read_architecture
from hwnas.store import RUN_TABLE
from latency_tables.ops import OpSpec
from latency_tables.percentiles import MEDIAN
from latency_tables.table import LatencyTable
from profilers.graphs import emit, random_parameters, read_ops, written_for
from quant.errors import InvalidInput, TableError


@dataclass(frozen=True)
class OpCost:
    """One op of a network: its table key, its row, and its share of the prediction, in us."""

    key: str
    row_us: float
    cost_us: float


@dataclass(frozen=True)
class Prediction:
    """A network's predicted latency and its upper bound, which holds with `coverage`."""

    latency_ms: float
    upper_latency_ms: float
    coverage: float
    table: str
    calibration: str
    ops: tuple[OpCost, ...]


def predict_file(
    path: Path, job: Job, table_path: Path | None, calibration: str | None
) -> Prediction:
    """The prediction for an exported ONNX file, or for an architecture.json of the job's space.

    The table is the one that is named, else the one of the job's device and condition; a file that
    lies in a run is predicted by the run's own latency model where the table has it.
    """
    if path.suffix == ".onnx":
        ops = ops_of_onnx(path)
    elif path.suffix == ".json":
        ops = ops_of_architecture(path, job)
    else:
        raise InvalidInput(
            f"{path} is neither an ONNX file nor an architecture.",
            accepted="a model.onnx or an architecture.json of a result",
        )
    known = job.request.run and job.request.run / RUN_TABLE
    source = table_path or (known if known and known.exists() else job.table_path)
    table = LatencyTable.load(source)
    if calibration is None and job.request.run is not None and job.model_name in table.models:
        calibration = job.model_name
    return predict(ops, table, calibration_of(table, calibration), str(source))


def predict(
    ops: Sequence[OpSpec], table: LatencyTable, calibration: str, source: str
) -> Prediction:
    """Look every op up; raises TableError that names the nearest known ops where one is missing, or
    the precision that the latency model was not calibrated for.
    """
    model = table.models[calibration].at(MEDIAN)
    costs = []
    for op, inside_us in zip(ops, table.in_network_us(ops), strict=True):
        precision = op.executed.precision
        if precision.name not in model.scales:
            raise TableError(
                f"The latency model {calibration!r} knows no {precision}.",
                accepted=", ".join(model.scales),
                next_step="name another with --calibration",
            )
        cost = model.op_cost_us(precision.name, inside_us)
        costs.append(OpCost(op.key, table.lookup(op).median_us, cost))
    additive = sum(cost.cost_us for cost in costs)
    return Prediction(
        model.predict_ms(additive),
        model.upper_ms(additive),
        model.coverage,
        source,
        calibration,
        tuple(costs),
    )


def ops_of_onnx(path: Path) -> list[OpSpec]:
    """The ops of an exported file; raises InvalidInput with the first node that no op matches."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's kinds for what is not one, and the system's
        raise InvalidInput(
            f"{path} is not a readable ONNX file: {error}.", accepted="a model that hwnas exported"
        ) from error
    found = _nodes(model.graph)
    try:
        ops = read_ops(model)
        rng = np.random.default_rng(0)
        numbers = [random_parameters(op, rng) for op in ops]
        ours = _nodes(emit(ops, numbers, written_for(model)).graph)
    except Exception as error:  # whatever metadata that we did not write leads to
        first = f"{found[0][0]} {found[0][1]!r}" if found else "none, it is empty"
        raise InvalidInput(
            f"{path} was not exported by hwnas: its first node, {first}, matches no op.",
            accepted="a model that hwnas exported, which carries its ops",
        ) from error
    for node, mine in itertools.zip_longest(found, ours, fillvalue=None):
        if node != mine:
            kind, name, *_ = node or mine or ("", "")
            raise InvalidInput(
                f"{path} was changed after its export: its node {kind} {name!r} "
                f"{'matches no op of those' if node else 'is gone, which belongs to an op'} "
                "that it names.",
                accepted="the file as hwnas exported it",
            )
    return ops


def _nodes(graph: onnx.GraphProto) -> list[tuple[str, str, bytes, list[Any]]]:
    """Each node: its operator, its name, all of it as bytes, and the form of its constants."""
    constants = {c.name: (c.name, c.data_type, list(c.dims)) for c in graph.initializer}
    return [
        (
            node.op_type,
            node.name,
            node.SerializeToString(deterministic=True),
            [constants[name] for name in node.input if name in constants],
        )
        for node in graph.node
    ]


def ops_of_architecture(path: Path, job: Job) -> list[OpSpec]:
    """The ops of an architecture.json in the job's space."""
    return list(job.space.lower(job.space.parse(read_architecture(path))))


def calibration_of(table: LatencyTable, wanted: str | None) -> str:
    """The latency model to use: the one that is named, else the only one.

    Raises TableError where it is not there, or not clear.
    """
    if wanted is not None and wanted in table.models:
        return wanted
    if wanted is None and len(table.models) == 1:
        return next(iter(table.models))
    raise TableError(
        f"The table has no latency model {wanted!r}."
        if wanted
        else f"The table holds {len(table.models)} latency models.",
        accepted="; ".join(table.models) or "none yet",
        next_step="name one with --calibration" if table.models else "run hwnas profile",
    )


def run_of(path: Path) -> Path | None:
    """The run that a file lies in, if it lies in one."""
    for folder in path.resolve().parents:
        if (folder / "config.yaml").exists() and (folder / "results").is_dir():
            return folder
    return None
