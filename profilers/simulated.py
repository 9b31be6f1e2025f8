"""A device that exists only as a stated cost model: for tests and tutorials, never for a claim.

A call costs `CALL_US`; every op costs `OP_US` plus its MACs at its kernel's rate, its activations
at one bandwidth, and a quantiser where its input changes format. There is no noise, and the pace
is always 1.
"""

import platform
from pathlib import Path

import numpy as np
import onnx

from latency_tables.host import Host
from latency_tables.ops import OpSpec
from profilers.base import Array, Profiler, Session
from profilers.graphs import read_ops
from profilers.measure import Protocol, Samples
from profilers.ort import OrtSession
from quant.precision import ONNXRUNTIME

CALL_US = 5.0
OP_US = 2.0
MACS_PER_US = {"fp32": 40_000.0, "int8": 120_000.0}
ELEMENTS_PER_US = 20_000.0
CONVERSIONS_PER_US = 4_000.0


def op_us(op: OpSpec) -> float:
    """What one op costs, in microseconds for one image."""
    moved = sum(tensor.elements for tensor in op.values)
    converted = sum(
        tensor.elements
        for tensor in op.inputs
        if tensor.format.is_quantised != op.precision.is_integer
    )
    return (
        OP_US
        + op.macs / MACS_PER_US[ONNXRUNTIME.kernel(op.precision)]
        + moved / ELEMENTS_PER_US
        + converted / CONVERSIONS_PER_US
    )


class SimulatedSession(Session):
    """Computes outputs with ONNX Runtime, and times by the cost model."""

    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        super().__init__()
        self._model = model
        self._latency_us = CALL_US + batch * sum(op_us(op) for op in read_ops(model))

    def _run(self, *inputs: Array) -> Array:
        with OrtSession(self._model.SerializeToString(), threads=1, batch=1) as session:
            return session.run(*inputs)

    def _block(self, protocol: Protocol) -> Samples:
        return np.column_stack(np.broadcast_arrays([self._latency_us] * protocol.min_runs, 1.0))


class SimulatedProfiler(Profiler):
    """The device `simulated`."""

    runtime = ONNXRUNTIME
    seconds_per_row = 0.002

    def host(self) -> Host:
        return Host(
            device="simulated",
            runtime="simulated",
            runtime_version="1",
            cpu="stated cost model",
            flags="",
            threads=self.threads,
            batch=self.batch,
            hostname=platform.node(),
        )

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        loaded = onnx.load(model) if isinstance(model, Path) else model
        return SimulatedSession(loaded, self.batch)

    def check(self, model: onnx.ModelProto) -> None:
        read_ops(model)
