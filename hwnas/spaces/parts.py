"""What several spaces are made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwnas.spaces.base import Choice, Position, State
from hwnas.spaces.blocks import conv_norm_activation
from latency_tables.ops import OpSpec, Tensor
from quant.precision import Precision


@dataclass(frozen=True)
class Stage:
    """Blocks of one output width; the first has the stride. Multiples of 16 suit vector units best,
    of `channels` and of what a block makes of them, such as a half.
    """

    blocks: int
    channels: int
    stride: int = 2


def float_precisions(precisions: Sequence[str]) -> list[str]:
    """The floats of what is searched, or fp32 where there are none: what a stem chooses from.

    >>> float_precisions(("w8a8", "fp16")), float_precisions(("w8a8",))
    (['fp16'], ['fp32'])
    """
    return [name for name in precisions if not Precision(name).is_integer] or ["fp32"]


def conv_stem(channels: int, stride: int, precisions: Sequence[str]) -> Position:
    """A 3 x 3 convolution of the images, which chooses its precision."""

    def write(tensor: Tensor, precision: Precision) -> OpSpec:
        return conv_norm_activation(tensor, channels, kernel=3, stride=stride, precision=precision)

    return one_op("stem", precisions, write)


def one_op(
    name: str, precisions: Sequence[str], write: Callable[[Tensor, Precision], OpSpec]
) -> Position:
    """A position that chooses its precision alone: a stem or a head."""

    def build(state: State, values: Mapping[str, Any]) -> Choice:
        op = write(state.tensor, Precision(values["precision"]))
        return Choice(op, State(op.output))

    return Position(name, {"precision": list(precisions)}, build)


def rounded_widths(channels: int, multipliers: Iterable[float], multiple: int) -> list[int]:
    """The widths that are multipliers of `channels`, to the nearest multiple, smallest first.

    >>> rounded_widths(32, (0.2, 0.4, 1.0), 4), rounded_widths(16, (0.5, 1.0), 16)
    ([8, 12, 32], [16])
    """
    return sorted({max(1, round(channels * m / multiple)) * multiple for m in multipliers})
