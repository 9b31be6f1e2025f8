"""Element-wise kernels: run as written at first, compiled once they have done so much that it pays.

Both give the same bits, so when a kernel is compiled changes no result. A process that trains for
less than some minutes never compiles. `HWNAS_COMPILE=1` compiles at the first large tensor,
`HWNAS_COMPILE=0` never. Without a C++ compiler everything runs as written, which one line of the
log says.
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

SWITCH = "HWNAS_COMPILE"

_log = logging.getLogger("hwnas")


class Kernel:
    """A function of 1-d tensors of equal length, and of numbers or 0-d tensors.

    Compiled, numbers become tensors: so there is one graph for all lengths and all bit-widths.
    Only tensors on a CPU meet compiled code: elsewhere it divides by other rules.

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
        tensors = [x if isinstance(x, Tensor) else _tensor(float(x)) for x in rest]
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
        return torch.compile(self.function, dynamic=True, fullgraph=True)

    def _compiles(self, value: Tensor) -> bool:
        if not Kernel.possible or value.device.type != "cpu" or value.numel() < SMALLEST:
            return False
        self.values += value.numel()
        wish = os.environ.get(SWITCH, "")
        return wish == "1" or (wish != "0" and self.values > PAYS_AFTER)


@functools.cache
def _tensor(number: float) -> Tensor:
    return torch.tensor(number)
