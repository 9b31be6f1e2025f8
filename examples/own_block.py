"""A block of your own, in one file: profiled, trained, searched and exported like any other.

    hwnas search --space examples/own_block.py:space --limit-fraction 0.5

The block is EfficientNetV2's fused inverted residual (Tan and Le 2021, figure 2): one dense
convolution in place of the expand and depthwise pair.
"""

from collections.abc import Mapping
from typing import Any

from hwnas import Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from quant.precision import Precision


def fused_inverted_residual(
    tensor: Tensor, channels: int, *, expansion: int, stride: int, precision: Precision
) -> OpSpec:
    """Expand by a dense 3 x 3 convolution, project back; a residual where shapes allow it."""
    op = OpBuilder(precision, tensor)
    hidden = op.relu(
        op.conv(0, tensor.channels * expansion, kernel=3, stride=stride, role="expand")
    )
    value = op.conv(hidden, channels, role="project")
    if stride == 1 and channels == tensor.channels:
        op.add(value, 0)
    return op.build()


def space(*, classes: int, image_channels: int, size: int) -> SearchSpace:
    """Three blocks, each fused or not, at fp32 or w8a8."""

    def stem(state: State, values: Mapping[str, Any]) -> Choice:
        op = conv_norm_activation(state.tensor, 16, kernel=3, stride=2, precision=Precision("fp32"))
        return Choice(op, State(op.output))

    def block(stride: int, channels: int) -> Any:
        def build(state: State, values: Mapping[str, Any]) -> Choice:
            precision = Precision(values["precision"])
            if values["block"] == "fused":
                op = fused_inverted_residual(
                    state.tensor, channels, expansion=4, stride=stride, precision=precision
                )
            else:
                op = inverted_residual(
                    state.tensor,
                    channels,
                    kernel=3,
                    expansion=4,
                    stride=stride,
                    precision=precision,
                )
            return Choice(op, State(op.output), group=values["block"])

        return build

    def head(state: State, values: Mapping[str, Any]) -> Choice:
        op = classifier(state.tensor, 64, classes, precision=Precision("fp32"))
        return Choice(op, State(op.output))

    options = {"block": ["plain", "fused"], "precision": ["fp32", "w8a8"]}
    return SearchSpace(
        "fused",
        Tensor(image_channels, size, size),
        (
            Position("stem", {}, stem),
            Position("block0", options, block(2, 32)),
            Position("block1", options, block(1, 32)),
            Position("block2", options, block(2, 48)),
            Position("head", {}, head),
        ),
    )
