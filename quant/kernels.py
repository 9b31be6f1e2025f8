"""Element-wise kernels: run as written at first, compiled once they have done so much that it pays.

Both give the same bits, so when a kernel is compiled changes no result; sums are taken in a stated
order (`Sums`). On CUDA that needs a compiler that can be told to divide as IEEE 754 has it; one
that cannot compiles nothing there. A process that trains for less than some minutes never
compiles. `HWNAS_COMPILE=1` compiles at the first large tensor, `HWNAS_COMPILE=0` never. Without a
compiler everything runs as written, which one line of the log says.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**15
"""Fewer values than this are as quick as written: calling a compiled kernel takes some 30 us."""

PAYS_AFTER = 2**31
"""Values after which a kernel is compiled: the time that compiling them would have saved by then is
about the time that compiling takes (3 to 4 ns a value for gradients; 5 to 10 s on one core)."""

APART_SMALLEST = 2**20
APART_PAYS_AFTER = 2**36
"""The same on a device apart, reckoned from its memory's speed, not measured: as written, LSQ's
gradients move some 80 bytes a value more than compiled, at 1 to 3 TB/s; for fewer values launching
a few kernels as written is as quick as one call of a compiled one."""

DIVISION = "eager_numerics.division_rounding"
"""The compiler's option for quotients that are rounded as they are in eager code."""

CUTS = "max_pointwise_cat_inputs"
"""The compiler's option that, at 0, has it write each part of a whole where it belongs."""

GROUP = 8
"""So many values are added up where they are computed; what is left to add is an eighth."""

SWITCH = "HWNAS_COMPILE"

_log = logging.getLogger("hwnas")


class Kernel:
    """A function of tensors, the first of them the largest, and of numbers.

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
            return self.as_written(value, *rest)
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
            return self.as_written(value, *rest)

    def as_written(self, *arguments: Tensor | float) -> Any:
        """The results, uncompiled."""
        return self.function(*arguments)

    def to_compile(self) -> Callable[..., Any]:
        """The function in the form that is compiled."""
        return self.function

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The compiled function; compiling happens at its first call."""
        options: dict[str, str | int | bool | Callable[..., Any]] = {CUTS: 0}
        if divides():
            options[DIVISION] = True
        return torch.compile(self.to_compile(), dynamic=True, fullgraph=True, options=options)

    def _compiles(self, value: Tensor) -> bool:
        apart, wish = is_apart(value), os.environ.get(SWITCH, "")
        smallest = APART_SMALLEST if apart else SMALLEST
        if not Kernel.possible or wish == "0" or value.numel() < smallest:
            return False
        self.values += value.numel()
        pays = self.values > (APART_PAYS_AFTER if apart else PAYS_AFTER)
        return (wish == "1" or pays) and (not apart or divides())


class Sums(Kernel):
    """A kernel over values (groups, `GROUP`, width); its results after the first are added up over
    each group, one after the other: what it returns of them is (groups, width).

    Tensors of three dimensions are cut into groups, others are not. Compiled, what is added up is
    written to no memory, and the order of adding stays as it is.

    >>> squares = Sums(lambda value: (value, value**2))
    >>> squares(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))[1]
    tensor([[ 5.],
            [25.]])
    """

    def as_written(self, *arguments: Tensor | float) -> Any:
        """The values, and the sums of all else."""
        values, *terms = self.function(*arguments)
        return values, *(_in_order(term.unbind(1)) for term in terms)

    def to_compile(self) -> Callable[..., Any]:
        """The function, slice by slice of the groups: one loop then holds all."""
        function = self.function

        def sliced(*arguments: Tensor) -> tuple[Tensor, ...]:
            values, *terms = zip(
                *(
                    function(*(x[:, place] if x.ndim == 3 else x for x in arguments))
                    for place in range(arguments[0].shape[1])
                ),
                strict=True,
            )
            return torch.stack(values, 1), *(_in_order(parts) for parts in terms)

        return sliced


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def is_apart(value: Tensor) -> bool:
    """Whether a tensor is on no CPU. There a division by a number of the host is a multiplication
    by its reciprocal.
    """
    return value.device.type != "cpu"


def quotient(value: Tensor, number: float) -> Tensor:
    """The quotient of two numbers, rounded correctly on every device."""
    divisor = torch.full((), number, device=value.device) if is_apart(value) else number
    return value / divisor


# ---- how values lie in memory


def dense(value: Tensor) -> Tensor:
    """The values in one piece of memory; themselves, where they are."""
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value if channels_last or value.is_contiguous() else value.contiguous()


def as_lying(value: Tensor, *shape: int) -> Tensor:
    """Dense values in the order in which they lie in memory, in another shape; without one, in one
    dimension. No view, for a compiled kernel would be tied to its base.
    """
    shape = shape or (value.numel(),)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    storage, first = value.untyped_storage(), value.storage_offset()
    return value.detach().new_empty(0).set_(storage, first, shape, strides)


def in_groups(value: Tensor, width: int) -> Tensor:
    """Dense values as `Sums` takes them, (groups, `GROUP`, width); where so many rows of the width
    do not come out even, groups are of one row.
    """
    group = GROUP if value.numel() % (GROUP * width) == 0 else 1
    return as_lying(value, value.numel() // (group * width), group, width)


@functools.cache
def divides() -> bool:
    """Whether this compiler can be told to round quotients as eager code does."""
    return DIVISION in torch._inductor.list_options()


@functools.cache
def _tensor(number: float, device: torch.device) -> Tensor:
    return torch.full((), number, device=device)
