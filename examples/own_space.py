"""A space of your own, in one file, from the blocks that are there.

    hwnas search --space examples/own_space.py:space --limit-fraction 0.5

A chain of plain convolutions. Each chooses its kernel and precision; the widths are sampled too.
Options whose combinations build the same op are one architecture: nothing needs to be said of it.
"""

from collections.abc import Mapping
from typing import Any

from hwnas import Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, conv_norm_activation
from latency_tables.ops import Tensor
from quant.precision import Precision


def space(*, classes: int, image_channels: int, size: int) -> SearchSpace:
    """Three convolutions, kernel 3 or 5, two widths each, fp32 or w8a8."""

    def conv(state: State, values: Mapping[str, Any]) -> Choice:
        op = conv_norm_activation(
            state.tensor,
            values["width"],
            kernel=values["kernel"],
            stride=2,
            precision=Precision(values["precision"]),
        )
        return Choice(op, State(op.output), group=f"k{values['kernel']}")

    def head(state: State, values: Mapping[str, Any]) -> Choice:
        op = classifier(state.tensor, 64, classes, precision=Precision(values["precision"]))
        return Choice(op, State(op.output))

    def options(*widths: int) -> dict[str, list[Any]]:
        return {"kernel": [3, 5], "precision": ["fp32", "w8a8"], "width": list(widths)}

    return SearchSpace(
        "plain",
        Tensor(image_channels, size, size),
        (
            Position("conv0", {**options(8, 16), "precision": ["fp32"]}, conv),
            Position("conv1", options(16, 32), conv),
            Position("conv2", options(32, 64), conv),
            Position("head", {"precision": ["fp32", "w8a8"]}, head),
        ),
    )
