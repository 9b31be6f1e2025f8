"""The contract of a profiler: it takes an emitted graph and gives a session that times it.

Every backend passes the one conformance suite in `tests/profilers/test_conformance.py`. Public
methods check the state; a backend writes the methods that begin with an underscore.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx

from latency_tables.host import Host
from profilers.measure import Protocol, Samples
from quant.precision import Runtime

Array = npt.NDArray[np.generic]


GRAPH = ".onnx"
"""The suffix of an emitted graph's file."""


class Session(ABC):
    """A loaded model. Use it in a `with` block; once closed it refuses to work."""

    def __init__(self) -> None:
        self._closed = False

    def run(self, *inputs: Array) -> Array:
        """The model's output for the inputs, each (batch, channels, height, width)."""
        self._check_open()
        return self._run(*inputs)

    def block(self, protocol: Protocol) -> Samples:
        """Microseconds of each call of one timed block, on inputs of the condition's batch."""
        self._check_open()
        return self._block(protocol)

    def close(self) -> None:
        """Release the model."""
        self._closed = True

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed; prepare the model again")

    @abstractmethod
    def _run(self, *inputs: Array) -> Array: ...

    @abstractmethod
    def _block(self, protocol: Protocol) -> Samples: ...


class Profiler(ABC):
    """A device in one condition: `threads` and `batch`.

    `runtime` names the kernels, the activation grid and the codes of weights, those of `portable`
    files where they are asked for; `suffix` is that of the file that the device runs;
    `seconds_per_row` is how long one row takes beside its counted runs (emitting, checking,
    opening), for the estimate told beforehand. `repeats` are how many copies of an op are timed in
    a chain, three numbers or more, where the slope over them tells what an op costs inside a
    network (`latency_tables.slopes`); without them, rows and boundaries tell it
    (`latency_tables.boundaries`).
    """

    runtime: Runtime
    suffix: str = GRAPH
    seconds_per_row: float
    repeats: tuple[int, ...] = ()

    def __init__(self, *, threads: int = 1, batch: int = 1, portable: bool = False) -> None:
        self.threads = threads
        self.batch = batch
        if portable:
            self.runtime = self.runtime.portable

    @property
    def memory_layer(self) -> str:
        """Whose memory and streams are in use, where the device has memory of its own."""
        return ""

    @abstractmethod
    def host(self) -> Host:
        """The provenance of what this profiler measures."""

    def compiled(self, model: Path) -> Path:
        """The file that the device runs, from the file of an emitted graph or of such a one: the
        same file where it runs graphs, else one that is there as long as this profiler is.
        """
        return model

    @abstractmethod
    def prepare(self, model: onnx.ModelProto | Path) -> Session:
        """Load a model, or the file of one, compiled or not; one session at a time."""

    @abstractmethod
    def check(self, model: onnx.ModelProto) -> None:
        """Raise `WrongKernels` unless the runtime executes the model as its ops declare."""


class WrongKernels(RuntimeError):
    """A graph does not run in the kernels that its ops declare, so its time would mislead."""
