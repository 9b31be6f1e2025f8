"""The blocks: each a function from an input tensor to an `OpSpec`, written over layers.

A new block is a new function like these; nothing else needs to know of it.
"""

from latency_tables.ops import OpBuilder, OpSpec, Tensor
from quant.precision import Precision


def conv_norm_activation(
    tensor: Tensor,
    channels: int,
    *,
    kernel: int,
    stride: int = 1,
    precision: Precision,
    activation: str = "relu",
) -> OpSpec:
    """A convolution, batch norm and an activation."""
    op = OpBuilder(precision, tensor)
    op.activation(op.conv(0, channels, kernel=kernel, stride=stride, role="conv"), activation)
    return op.build()


def inverted_residual(
    tensor: Tensor,
    channels: int,
    *,
    kernel: int,
    expansion: int,
    stride: int = 1,
    precision: Precision,
    activation: str = "relu",
    squeeze: int = 0,
) -> OpSpec:
    """MobileNetV2's block (Sandler et al. 2018, figure 3): expand, depthwise, project.

    The sum with the input is there where stride and widths allow it. `squeeze` > 0 adds a
    squeeze-excite with a sigmoid gate after the depthwise activation, `squeeze` times narrower than
    the hidden width (Hu et al. 2018, section 3). An expansion of 1 leaves the expand layer out.
    """
    op = OpBuilder(precision, tensor)
    hidden = tensor.channels * expansion
    value = 0
    if expansion > 1:
        value = op.activation(op.conv(value, hidden, role="expand"), activation)
    value = op.conv(value, hidden, kernel=kernel, stride=stride, groups=hidden, role="depthwise")
    value = op.activation(value, activation)
    if squeeze:
        value = squeeze_excite(op, value, hidden, hidden // squeeze)
    value = op.conv(value, channels, role="project")
    if stride == 1 and channels == tensor.channels:
        op.add(value, 0)
    return op.build()


def squeeze_excite(op: OpBuilder, value: int, channels: int, squeezed: int) -> int:
    """Scale each channel by a gate in (0, 1) computed from all channels' means."""
    gate = op.relu(op.conv(op.pool(value), squeezed, norm=False, role="squeeze"))
    gate = op.activation(op.conv(gate, channels, norm=False, role="excite"), "sigmoid")
    return op.mul(value, gate)


def classifier(
    tensor: Tensor,
    channels: int,
    classes: int,
    *,
    precision: Precision,
    activation: str = "relu",
) -> OpSpec:
    """The head: a 1 x 1 convolution, the global average, and a linear layer to the logits."""
    op = OpBuilder(precision, tensor)
    value = op.activation(op.conv(0, channels, role="conv"), activation)
    op.linear(op.pool(value), classes, role="linear")
    return op.build(logits=True)
