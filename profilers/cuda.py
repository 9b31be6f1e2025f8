"""The little of CUDA that the GPU backends need: the card, memory, one stream, events, graphs.

What card there is, its driver says (through ctypes), so that it can be told without any package.
Memory, stream and events are PyTorch's where it was built with CUDA, else PyCUDA's in the card's
primary context. PyCUDA has no graphs: there the driver captures them.
"""

import ctypes
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from profilers.base import Array
from profilers.measure import Protocol, Samples, time_replays
from quant.errors import InvalidInput, MissingDependency

DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_MANAGEMENT_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")

_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

WITHOUT = "use --device cpu, or name a compute capability: hwnas export --format tensorrt " \
    "--compute-capability sm89"  # fmt: skip
"""What still works where there is no GPU."""

Launch = Callable[[], None]
"""Puts work on the stream, and returns at once."""

SHORT_US, TARGET_US, COPIES = 20.0, 1000.0, (20, 100)
"""What is shorter than the first is timed in a graph of so many copies that they take about the
second, but no fewer and no more than the third says."""


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU, as its driver tells it; `capability` is its compute capability."""

    name: str
    capability: tuple[int, int]
    driver: str
    memory_bytes: int

    @property
    def sm(self) -> str:
        """The compute capability as tools write it.

        >>> Card("GeForce RTX 4090", (8, 9), "580.1", 0).sm
        'sm89'
        """
        return "sm{}{}".format(*self.capability)


CHAINS = (2, 4, 8)
"""On a GPU an op's cost is the slope over chains of so many copies: their ends cost apart."""


class Buffer:
    """Memory on the card for an array of a shape and a type, at `address`; `held` owns it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], address: int, held: object):
        self.shape = shape
        self.dtype = dtype
        self.address = address
        self.held = held


class Cuda(ABC):
    """Memory, one stream of its own, events and graphs; `name` tells whose they are."""

    name: str
    stream: int
    """The handle of the stream."""

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """New memory; raises InvalidInput where the card has no more."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        with self.enough():
            held, address = self._allocate(size)
        return Buffer(shape, dtype, address, held)

    @contextmanager
    def enough(self) -> Iterator[None]:
        """Turn the card's refusal of more memory into one sentence."""
        try:
            yield
        except self._refusals() as error:
            raise out_of_memory() from error

    @abstractmethod
    def put(self, buffer: Buffer, values: Array) -> None:
        """Copy values to the card, behind what the stream does."""

    @abstractmethod
    def get(self, buffer: Buffer) -> Array:
        """Copy values from the card, once the stream is done."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the stream is done."""

    @abstractmethod
    def captured(self, launch: Launch) -> Launch:
        """A graph of what `launch` puts on the stream, as something to launch."""

    @abstractmethod
    def elapsed_us(self, launch: Launch) -> float:
        """What a launch takes between an event before and one after it, in us; it is over then."""

    @abstractmethod
    def _allocate(self, size: int) -> tuple[object, int]: ...

    @abstractmethod
    def _refusals(self) -> tuple[type[BaseException], ...]: ...


class TorchCuda(Cuda):
    """PyTorch's CUDA."""

    def __init__(self) -> None:
        self.name = f"PyTorch {torch.__version__}"
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = int(self._stream.cuda_stream)
        self._before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def current(self) -> AbstractContextManager[Any]:
        """Run PyTorch's own work on the stream, for as long as the block lasts."""
        return torch.cuda.stream(self._stream)

    def put(self, buffer: Buffer, values: Array) -> None:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with self.current():
            self._tensor(buffer).copy_(torch.from_numpy(flat))

    def get(self, buffer: Buffer) -> Array:
        self.wait()
        values: Array = self._tensor(buffer).cpu().numpy().view(buffer.dtype)
        return values.reshape(buffer.shape)

    def wait(self) -> None:
        self._stream.synchronize()

    def captured(self, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            launch()

        def replay() -> None:
            with self.current():
                graph.replay()

        return replay

    def elapsed_us(self, launch: Launch) -> float:
        self._before.record(self._stream)
        launch()
        self._after.record(self._stream)
        self._after.synchronize()
        return 1000 * float(self._before.elapsed_time(self._after))

    def _tensor(self, buffer: Buffer) -> torch.Tensor:
        assert isinstance(buffer.held, torch.Tensor)
        return buffer.held

    def _allocate(self, size: int) -> tuple[object, int]:
        held = torch.empty(size, dtype=torch.uint8, device="cuda")
        return held, held.data_ptr()

    def _refusals(self) -> tuple[type[BaseException], ...]:
        return (torch.cuda.OutOfMemoryError,)


class PyCuda(Cuda):
    """PyCUDA's, in the primary context, which it shares with whatever else the process runs."""

    def __init__(self, pycuda: ModuleType, driver: ctypes.CDLL) -> None:
        importlib.import_module("pycuda.autoprimaryctx")
        self._driver: Any = importlib.import_module("pycuda.driver")
        self._library = driver
        self.name = f"PyCUDA {pycuda.VERSION_TEXT}"
        self._stream = self._driver.Stream()
        self.stream = int(self._stream.handle)
        self._before, self._after = self._driver.Event(), self._driver.Event()

    def put(self, buffer: Buffer, values: Array) -> None:
        self._driver.memcpy_htod_async(
            buffer.address, np.ascontiguousarray(values), stream=self._stream
        )
        self.wait()

    def get(self, buffer: Buffer) -> Array:
        self.wait()
        values = np.empty(buffer.shape, buffer.dtype)
        self._driver.memcpy_dtoh(values, buffer.address)
        return values

    def wait(self) -> None:
        self._stream.synchronize()

    def captured(self, launch: Launch) -> Launch:
        stream, graph, ready = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, ctypes.c_int(2))  # relaxed
        try:
            launch()
        finally:
            self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        return lambda: self._call("cuGraphLaunch", ready, stream)

    def elapsed_us(self, launch: Launch) -> float:
        self._before.record(self._stream)
        launch()
        self._after.record(self._stream)
        self._after.synchronize()
        return 1000 * float(self._before.time_till(self._after))

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            raise RuntimeError(f"{function} failed with CUDA error {code}")

    def _allocate(self, size: int) -> tuple[object, int]:
        held = self._driver.mem_alloc(size)
        return held, int(held)

    def _refusals(self) -> tuple[type[BaseException], ...]:
        return (self._driver.MemoryError,)


class GraphTimer:
    """Times a launch as a CUDA graph: of a short one many copies in a graph, since two events and
    the gap between two launches take some microseconds themselves.
    """

    def __init__(self, cuda: Cuda, launch: Launch) -> None:
        launch()
        cuda.wait()
        self._cuda, self.copies = cuda, 1
        self._replay = cuda.captured(launch)
        once_us = min(cuda.elapsed_us(self._replay) for _ in range(10))
        if once_us < SHORT_US:
            self.copies = int(np.clip(TARGET_US / max(once_us, 1e-3), *COPIES))
            self._replay = cuda.captured(self._many(launch))

    def block(self, protocol: Protocol) -> Samples:
        """One block, (runs, 2), as `time_replays` has it; a replay's copies share its time."""
        return time_replays(lambda: self._cuda.elapsed_us(self._replay) / self.copies, protocol)

    def _many(self, launch: Launch) -> Launch:
        def launches() -> None:
            for _ in range(self.copies):
                launch()

        return launches


@functools.cache
def card() -> Card:
    """This machine's first NVIDIA GPU; raises MissingDependency where there is none."""
    driver = _driver()
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _ask(driver, "cuDeviceGetName", name, len(name), device)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    major, minor = capability
    return Card(name.value.decode(), (major, minor), _driver_version(driver), memory.value)


@functools.cache
def open_cuda() -> Cuda:
    """The first memory layer that works on this machine's GPU, one for the whole process.

    Raises MissingDependency where there is no GPU, or neither PyTorch nor PyCUDA reaches it.
    """
    driver, gpu = _driver(), card()
    if torch.version.cuda and torch.cuda.is_available():
        return TorchCuda()
    try:
        return PyCuda(importlib.import_module("pycuda"), driver)
    except ImportError as error:
        raise MissingDependency(
            f"Nothing here reaches the memory of the {gpu.name}: PyTorch {torch.__version__} is "
            "built without CUDA, or for another driver, and PyCUDA cannot be imported "
            f"({error}).",
            accepted="a CUDA build of PyTorch, or PyCUDA",
            next_step="make setup DEVICE=gpu",
        ) from error


def out_of_memory() -> InvalidInput:
    """The error for a card that has no more memory."""
    gpu = card()
    return InvalidInput(
        f"The {gpu.name} has not enough free memory ({gpu.memory_bytes / 1e9:.3g} GB in all).",
        next_step="name a smaller --batch, or stop what else uses the card (nvidia-smi lists it)",
    )


def _driver() -> ctypes.CDLL:
    """The driver's library, ready; raises MissingDependency where there is none, or no GPU."""
    library = _library(DRIVER_LIBRARIES)
    if library is None:
        raise MissingDependency(
            f"No NVIDIA driver is on this machine: {DRIVER_LIBRARIES[0]} was not found.",
            accepted="an NVIDIA GPU with its driver",
            next_step=WITHOUT,
        )
    _ask(library, "cuInit", 0)
    return library


def _ask(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    """Call the driver; raises MissingDependency where it refuses."""
    code = getattr(driver, function)(*arguments)
    if code:
        reason = "sees no GPU" if code == _NO_DEVICE else f"fails: {function} gives {code}"
        raise MissingDependency(
            f"The NVIDIA driver of this machine {reason}.",
            accepted="an NVIDIA GPU that nvidia-smi lists",
            next_step=WITHOUT,
        )


def _driver_version(driver: ctypes.CDLL) -> str:
    """The driver's own version, or the newest CUDA that it runs."""
    management = _library(_MANAGEMENT_LIBRARIES)
    text = ctypes.create_string_buffer(96)
    if management is not None and not management.nvmlInit_v2():
        try:
            if not management.nvmlSystemGetDriverVersion(text, len(text)):
                return text.value.decode()
        finally:
            management.nvmlShutdown()
    newest = ctypes.c_int()
    _ask(driver, "cuDriverGetVersion", ctypes.byref(newest))
    return f"CUDA {newest.value // 1000}.{newest.value % 1000 // 10}"


def _library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
