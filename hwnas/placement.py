"""Where weights are trained and scored, and what that device wants.

The rest asks a `Placement`, and looks at no device itself.

| | cpu | cuda |
|---|---|---|
| convolutions of a training step | fp32 | bf16 by autocast, weights in fp32 |
| scoring | fp32 | fp32, without TF32 |
| images of a split | bytes in memory | bytes on the device, where they fit |
| layout of batches and weights | as a file has them | channels-last |
| optimiser | tensor by tensor | fused |
"""

import ctypes
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.errors import InvalidInput, MissingDependency

NAMES = ("cpu", "cuda")

SHARE_OF_MEMORY = 0.5
"""A split is kept on a device where it takes at most this share of the memory that is free."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt, as its malloc.h numbers them."""


@dataclass(frozen=True)
class Placement:
    """A device of PyTorch."""

    device: torch.device

    @property
    def is_apart(self) -> bool:
        """Whether the device has memory of its own, and works while the host goes on."""
        return self.device.type != "cpu"

    @property
    def text(self) -> str:
        """The device for people and for a certificate: `cpu`, or `cuda (NVIDIA L4)`."""
        if not self.is_apart:
            return self.device.type
        return f"{self.device.type} ({torch.cuda.get_device_name(self.device)})"

    @property
    def memory_format(self) -> torch.memory_format:
        """How the four axes of batches and weights lie in memory."""
        return torch.channels_last if self.is_apart else torch.contiguous_format

    @property
    def optimiser_options(self) -> dict[str, Any]:
        """The options of an optimiser that hang on the device."""
        return {"fused": True if self.is_apart else None}

    def training(self) -> torch.autocast:
        """The context of a training step's forward pass and loss."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_apart)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """The context of all that has to be exact: fp32 throughout, and no gradients."""
        switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = False
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                switch.allow_tf32 = allowed

    def move(self, module: nn.Module) -> None:
        """Bring a module's weights here, in the layout that is fastest here."""
        if self.is_apart:
            module.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        else:
            module.to(self.device)

    def holds(self, array: npt.NDArray[Any]) -> bool:
        """Whether an array is kept on the device: there is room, or nothing has to be moved."""
        if not self.is_apart:
            return True
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return array.nbytes <= SHARE_OF_MEMORY * free_bytes

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device, for good; on a CPU it shares the array's memory."""
        return _tensor(array).to(self.device)

    def send(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device, for one step: copied from pinned memory while the host goes on.

        The copy is ordered before whatever the device is asked to do next.
        """
        if not self.is_apart:
            return _tensor(array)
        return _tensor(array).pin_memory().to(self.device, non_blocking=True)

    def keep_memory(self) -> None:
        """From here on, let this process keep the memory that tensors free, for those to come.

        glibc hands pieces of over 32 MB back to the system at once, and gets them anew page by
        page: a third or more of a step on images of 128 x 128. What is kept lies in pieces: a
        process takes up to half as much memory again. Other C libraries are left alone, and so are
        devices apart.
        """
        if not self.is_apart:
            _keep_freed_memory()

    def finish(self) -> None:
        """Wait until the device has done all that it was asked to: before a clock is read."""
        if self.is_apart:
            torch.cuda.synchronize(self.device)


HOST = Placement(torch.device("cpu"))


def placement_of(module: nn.Module) -> Placement:
    """Where a module's weights are."""
    parameter = next(module.parameters(), None)
    return HOST if parameter is None else Placement(parameter.device)


def total(parts: Sequence[Tensor]) -> float:
    """The sum of numbers that lie on a device, added in their order on the host; one wait for all.

    >>> total([torch.tensor(2), torch.tensor(3)])
    5
    """
    found = 0
    for part in torch.stack(list(parts)).tolist():
        found += part
    return found


@functools.cache
def placement(name: str | None) -> Placement:
    """The placement of a name; without one, cuda where PyTorch can use it, else cpu.

    Raises InvalidInput for another name, MissingDependency where cuda cannot be used.
    """
    if name not in (None, *NAMES):
        raise InvalidInput(f"--train-on is {name!r}.", accepted=", ".join(NAMES))
    fault = "" if name == "cpu" else cuda_fault()
    if name == "cuda" and fault:
        raise MissingDependency(
            f"PyTorch cannot compute on CUDA here: {fault}.",
            accepted="cpu, on which all of hwnas trains and scores, only slower",
            next_step="drop --train-on cuda, or install the driver and the build of torch for it",
        )
    return HOST if name == "cpu" or fault else Placement(torch.device("cuda", 0))


@functools.cache
def cuda_fault() -> str:
    """Why PyTorch cannot compute on CUDA here, found out by a small convolution in bf16; empty
    where it can.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is in the error that follows
            kinds: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
            ones, weight = torch.ones(2, 8, 4, 4, **kinds), torch.ones(8, 8, 1, 1, **kinds)
            total = float(functional.conv2d(ones, weight).float().sum())
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return "" if total == 2 * 8 * 16 * 8 else "a convolution of ones is wrong there"


@functools.cache
def _keep_freed_memory() -> None:
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # no mallopt; no such way to open one's own process
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        set_option(option, value)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """The array as a tensor, copied only where it does not lie in one piece or may not be written
    to, which PyTorch has no word for.
    """
    dense = np.ascontiguousarray(array)
    return torch.from_numpy(dense if dense.flags.writeable else dense.copy())
