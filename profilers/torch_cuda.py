"""NVIDIA GPUs under PyTorch: the emitted graph as a module, channels-last, timed as a CUDA graph.

For cards that TensorRT is not installed for, or does not run on. Its tables and certificates are
PyTorch's own, and what it ships is the module that was timed (`torch.export`). PyTorch has no
integer convolution on a GPU, so it runs fp32, tf32, fp16 and bf16.
"""

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from latency_tables.files import write_bytes
from latency_tables.host import Host
from latency_tables.ops import OpSpec
from profilers.base import Array, Profiler, Session
from profilers.cuda import CHAINS, GraphTimer, TorchCuda, card, open_cuda
from profilers.graph_module import GraphModule
from profilers.graphs import OPS_METADATA, check_kernels, read_ops, runs_tf32
from profilers.measure import Protocol, Samples, time_block
from quant.errors import InvalidInput, MissingDependency
from quant.precision import TORCH

PROGRAM = ".pt2"
"""The suffix of an exported program's file."""


class TorchSession(Session):
    """A module on a device for a fixed batch; `tf32` says what fp32 convolutions run as.

    On a card all its work is on one stream, that of the process's CUDA.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[Tensor], place: torch.device, *, tf32: bool
    ) -> None:
        super().__init__()
        self._cuda = _torch_cuda() if place.type == "cuda" else None
        self._place, self._tf32 = place, tf32
        self._types = [each.dtype for each in inputs]
        with self._working():
            self._module = module.to(place)
            self._inputs = [_placed(each, place) for each in inputs]
        self._timer: GraphTimer | None = None

    def _run(self, *inputs: Array) -> Array:
        with self._working():
            given = [
                _placed(torch.from_numpy(np.ascontiguousarray(values)).to(kind), self._place)
                for values, kind in zip(inputs, self._types, strict=True)
            ]
            output: Array = self._module(*given).float().cpu().numpy()
        return output

    def _block(self, protocol: Protocol) -> Samples:
        with self._working(choosing=True):
            if self._cuda is None:
                return time_block(self._call, protocol)
            self._timer = self._timer or GraphTimer(self._cuda, self._launch)
            return self._timer.block(protocol)

    def close(self) -> None:
        """Release the graph, the module that it runs, and their memory, in this order."""
        super().close()
        if self._cuda is not None:
            self._cuda.wait()
        self._timer = None
        self._module, self._inputs = nn.Identity(), []

    def _call(self) -> Tensor:
        output: Tensor = self._module(*self._inputs)
        return output

    def _launch(self) -> None:
        """A call; in a graph, that keeps its output's memory."""
        self._call()

    @contextmanager
    def _working(self, *, choosing: bool = False) -> Iterator[None]:
        """Work as it is declared, on the card's stream; `choosing`, with the quickest of cuDNN's
        convolutions, which are tried where their shapes are new.
        """
        with ExitStack() as entered:
            entered.enter_context(_arithmetic(tf32=self._tf32, choosing=choosing))
            if self._cuda is not None:
                entered.enter_context(self._cuda.enough())
                entered.enter_context(self._cuda.current())
            yield


def _torch_cuda() -> TorchCuda:
    """PyTorch's CUDA; raises MissingDependency where PyTorch does not reach the card."""
    cuda = open_cuda()
    if not isinstance(cuda, TorchCuda):
        raise MissingDependency(
            f"PyTorch {torch.__version__} cannot use the {card().name}.",
            accepted="a build of PyTorch for CUDA, as new as the driver takes",
            next_step="make setup DEVICE=gpu",
        )
    return cuda


class TorchProfiler(Profiler):
    """Times graphs with PyTorch on this machine's first NVIDIA GPU."""

    runtime = TORCH
    suffix = PROGRAM
    repeats = CHAINS
    seconds_per_row = 0.5
    place = torch.device("cuda")

    def __init__(self, *, threads: int = 1, batch: int = 1, portable: bool = False) -> None:
        super().__init__(threads=threads, batch=batch, portable=portable)
        self._programs = tempfile.TemporaryDirectory(prefix="hwnas-programs-")
        self._cuda = _torch_cuda() if self.place.type == "cuda" else None

    def host(self) -> Host:
        return card().host(
            "gpu-torch", TORCH.name, torch.__version__, threads=self.threads, batch=self.batch,
            library=f"cudnn {cudnn_version()}",
        )  # fmt: skip

    @property
    def memory_layer(self) -> str:
        return open_cuda().name if self.place.type == "cuda" else ""

    def compiled(self, model: Path) -> Path:
        if model.suffix == PROGRAM:
            return model
        content = model.read_bytes()
        path = Path(self._programs.name) / f"{hashlib.sha256(content).hexdigest()}{PROGRAM}"
        if not path.exists():
            save_program(onnx.load_from_string(content), path, batch=self.batch)
        return path

    def prepare(self, model: onnx.ModelProto | Path) -> TorchSession:
        if isinstance(model, Path):
            with self._cuda.enough() if self._cuda else nullcontext():
                module, ops = load_program(self.compiled(model), self.place)
        else:
            module, ops = GraphModule(model), read_ops(model)
        inputs = inputs_of(ops, self.batch)
        return TorchSession(module, inputs, self.place, tf32=runs_tf32(ops))

    def check(self, model: onnx.ModelProto) -> None:
        check_kernels(read_ops(model), TORCH)
        GraphModule(model)


def save_program(model: onnx.ModelProto, path: Path, *, batch: int) -> None:
    """Write an emitted graph as an exported program, for any batch."""
    ops = read_ops(model)
    example = tuple(inputs_of(ops, max(2, batch)))  # of one image it would hold for one alone
    batches = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            GraphModule(model),
            example,
            dynamic_shapes={"inputs": tuple({0: batches} for _ in example)},
        )
    told = {OPS_METADATA: json.dumps([op.to_json() for op in ops])}
    held = io.BytesIO()
    torch.export.save(program, held, extra_files=told)
    write_bytes(path, held.getbuffer())


def load_program(path: Path, place: torch.device) -> tuple[nn.Module, list[OpSpec]]:
    """The module on a device, and the ops, of what `save_program` wrote; raises InvalidInput for
    another file.

    A program asserts the device that it was exported on wherever a type changes, so it is moved as
    a program, not as a module.
    """
    told = {OPS_METADATA: ""}
    try:
        with _unlogged("torch.export"):
            program = torch.export.load(path, extra_files=told)
        ops = [OpSpec.from_json(text) for text in json.loads(told[OPS_METADATA])]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InvalidInput(
            f"{path} is not a whole program that hwnas exported ({type(error).__name__}).",
            next_step="export it again",
        ) from error
    module: nn.Module = move_to_device_pass(program, place).module()
    return module, ops


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger silent: PyTorch logs a traceback before it raises what that says."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def inputs_of(ops: Sequence[OpSpec], batch: int) -> list[Tensor]:
    """Random inputs of a chain of ops, in the types of its graph."""
    rng = np.random.default_rng(0)
    found = []
    for tensor in ops[0].inputs:
        shape = (batch, tensor.channels, tensor.height, tensor.width)
        values = torch.from_numpy(rng.random(shape, np.float32))
        found.append(values.to(_TYPES.get(tensor.format.type, torch.float32)))
    return found


def cudnn_version() -> int:
    """The version of cuDNN, whose convolutions run."""
    return int(torch.backends.cudnn.version() or 0)  # type: ignore[no-untyped-call]


_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""PyTorch's type of a tensor between two ops, where it is not fp32."""


def _placed(values: Tensor, place: torch.device) -> Tensor:
    return values.to(place).contiguous(memory_format=torch.channels_last)


@contextmanager
def _arithmetic(*, tf32: bool, choosing: bool) -> Iterator[None]:
    """No gradients, fp32 as it is declared, cuDNN's convolutions tried or taken as they come."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    cudnn.benchmark = choosing
    try:
        with torch.no_grad():
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
