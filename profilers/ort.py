"""CPUs under ONNX Runtime."""

import platform
from collections import Counter
from pathlib import Path

import onnx

from latency_tables.host import Host
from profilers.base import Array, Profiler, Session, WrongKernels
from profilers.graphs import expected_operators, read_ops
from profilers.host import cpu_flags, saturates
from profilers.measure import Protocol, Samples
from profilers.ort_session import (
    executed_operators,
    open_session,
    provenance,
    timed,
    wrong_operators,
)
from quant.precision import ONNXRUNTIME


class OrtSession(Session):
    """A model in ONNX Runtime on the CPU, from its bytes or the path of its file."""

    def __init__(self, model: bytes | str, *, threads: int, batch: int) -> None:
        super().__init__()
        self._session = open_session(model, threads)
        self._batch = batch

    def _run(self, *inputs: Array) -> Array:
        names = [item.name for item in self._session.get_inputs()]
        output: Array = self._session.run(None, dict(zip(names, inputs, strict=True)))[0]
        return output

    def _block(self, protocol: Protocol) -> Samples:
        return timed(self._session, self._batch, protocol)

    def close(self) -> None:
        super().close()
        self._session = None


class OrtProfiler(Profiler):
    """Times graphs with ONNX Runtime on this machine's CPU; its files are portable where this CPU
    needs them so.
    """

    runtime = ONNXRUNTIME
    seconds_per_row = 0.02

    def __init__(self, *, threads: int = 1, batch: int = 1, portable: bool = False) -> None:
        here = saturates(cpu_flags(), platform.machine())
        super().__init__(threads=threads, batch=batch, portable=portable or here)

    def host(self) -> Host:
        return Host(**provenance(self.threads, self.batch))

    def prepare(self, model: onnx.ModelProto | Path) -> OrtSession:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return OrtSession(source, threads=self.threads, batch=self.batch)

    def check(self, model: onnx.ModelProto) -> None:
        wrong = wrong_operators(
            expected_operators(read_ops(model)), optimised_operators(model, self.threads)
        )
        if wrong:
            raise WrongKernels(
                f"ONNX Runtime does not run this graph as declared: {wrong}"
                f"; ops: {'; '.join(op.key for op in read_ops(model))}"
            )


def optimised_operators(model: onnx.ModelProto, threads: int = 1) -> Counter[str]:
    """How often each operator stands in the graph that ONNX Runtime really executes."""
    return executed_operators(model.SerializeToString(), threads)
