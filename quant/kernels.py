"""Element-wise kernels: run as written at first, compiled once they have done so much that it pays.

Both give the same bits, so when a kernel is compiled changes no result. On CUDA that needs a
compiler that can be told to divide as IEEE 754 has it; one that cannot compiles nothing there. A
process that trains for less than some minutes never compiles. `HWNAS_COMPILE=1` compiles at the
first large tensor, `HWNAS_COMPILE=0` never. Without a compiler everything runs as written, which
one line of the log says.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**15
"""Fewer values than this are as quick as written: calling a compiled kernel takes some 30 us."""

PAYS_AFTER = 2**31
"""Values after which a kernel is compiled: the time that compiling them would have saved by then is
about the time that compiling takes (3 ns a value for LSQ's gradients; 5 to 10 s on one core)."""

APART_SMALLEST = 2**20
APART_PAYS_AFTER = 2**36
"""The same on a device apart, reckoned from its memory's speed, not measured: as written, LSQ's
gradients move some 80 bytes a value more than compiled, at 1 to 3 TB/s; for fewer values launching
a few kernels as written is as quick as one call of a compiled one."""

DIVISION = "eager_numerics.division_rounding"
"""The compiler's option for quotients that are rounded as they are in eager code."""

SWITCH = "HWNAS_COMPILE"

_log = logging.getLogger("hwnas")


class Kernel:
    """A function of 1-d tensors of equal length, and of numbers or 0-d tensors.

    Compiled, numbers become tensors: so there is one graph for all lengths and all bit-widths.

    >>> double = Kernel(lambda value, factor: value * factor)
    >>> double(torch.tensor([1.0, 2.0]), 2.0)
    tensor([2., 4.])
    """

    possible = True
    """Whether compiling has not failed yet in this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.values = 0

    def __call__(self, value: Tensor, *rest: Tensor | float) -> Any:
        if not self._compiles(value):
            return self.function(value, *rest)
        tensors = [x if isinstance(x, Tensor) else _tensor(float(x), value.device) for x in rest]
        try:
            return self.compiled(value, *tensors)
        except Exception as error:  # whatever a compiler, or its absence, may raise
            Kernel.possible = False
            reason = str(error).strip().partition("\n")[0]
            _log.warning(
                "quantisers run uncompiled, which takes longer: %s (%s)",
                reason,
                type(error).__name__,
            )
            return self.function(value, *rest)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The compiled function; compiling happens at its first call."""
        options: dict[str, str | int | bool | Callable[..., Any]] = {DIVISION: True}
        return torch.compile(
            self.function, dynamic=True, fullgraph=True, options=options if divides() else None
        )

    def _compiles(self, value: Tensor) -> bool:
        apart, wish = is_apart(value), os.environ.get(SWITCH, "")
        smallest = APART_SMALLEST if apart else SMALLEST
        if not Kernel.possible or wish == "0" or value.numel() < smallest:
            return False
        self.values += value.numel()
        pays = self.values > (APART_PAYS_AFTER if apart else PAYS_AFTER)
        return (wish == "1" or pays) and (not apart or divides())


def is_apart(value: Tensor) -> bool:
    """Whether a tensor is on no CPU. There sums have no stated order, so one may be compiled too,
    and a division by a number of the host is a multiplication by its reciprocal.
    """
    return value.device.type != "cpu"


@functools.cache
def divides() -> bool:
    """Whether this compiler can be told to round quotients as eager code does."""
    return DIVISION in torch._inductor.list_options()


@functools.cache
def _tensor(number: float, device: torch.device) -> Tensor:
    return torch.full((), number, device=device)
