"""What several spaces are made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hwnas.spaces.base import Choice, Position, State
from latency_tables.ops import OpSpec, Tensor
from quant.precision import Precision


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
