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
    bias: bool = True,
) -> OpSpec:
    """The head: a 1 x 1 convolution, the global average, and a linear layer to the logits."""
    op = OpBuilder(precision, tensor)
    value = op.activation(op.conv(0, channels, role="conv"), activation)
    op.linear(op.pool(value), classes, role="linear", bias=bias)
    return op.build(logits=True)


def pooled_classifier(
    tensor: Tensor, classes: int, *, precision: Precision, bias: bool = True
) -> OpSpec:
    """The head of a residual network: the global average and a linear layer to the logits."""
    op = OpBuilder(precision, tensor)
    op.linear(op.pool(0), classes, role="linear", bias=bias)
    return op.build(logits=True)


def pooled_stem(tensor: Tensor, channels: int, *, precision: Precision) -> OpSpec:
    """ResNet's stem for photos (He et al. 2015, table 1): 7 x 7 and a 3 x 3 max pool, each of
    stride 2.
    """
    op = OpBuilder(precision, tensor)
    value = op.relu(op.conv(0, channels, kernel=7, stride=2, role="conv"))
    op.max_pool(value, kernel=3, stride=2)
    return op.build()


def basic_block(
    tensor: Tensor, channels: int, *, inner: int, stride: int = 1, precision: Precision
) -> OpSpec:
    """ResNet's block of two 3 x 3 convolutions, `inner` wide between them (He et al. 2015, figure
    2). Where the shape changes the input is projected (option B of section 3.3).
    """
    op = OpBuilder(precision, tensor)
    value = op.relu(op.conv(0, inner, kernel=3, stride=stride, role="conv3x3a"))
    value = op.conv(value, channels, kernel=3, role="conv3x3b")
    given = 0
    if stride > 1 or channels != tensor.channels:
        given = op.conv(0, channels, stride=stride, role="bypass")
    op.relu(op.add(value, given))
    return op.build()


def shuffle_unit(
    tensor: Tensor, channels: int, *, kernel: int, middle: int, stride: int = 1,
    precision: Precision,
) -> OpSpec:  # fmt: skip
    """ShuffleNetV2's unit (Ma et al. 2018, figure 3c and d) with its own kernel, as SPOS has it.

    At stride 1 the even channels are handed on and the odd ones go through 1 x 1, depthwise and
    1 x 1; at stride 2 all channels go through that and through depthwise and 1 x 1. `middle` is the
    width of the depthwise layer. Raises ValueError where no channels are left for the main branch.
    """
    op = OpBuilder(precision, tensor)
    kept, value, width = _branches(op, tensor, channels, kernel, stride)
    value = op.relu(op.conv(value, middle, role="expand"))
    value = op.conv(value, middle, kernel=kernel, stride=stride, groups=middle, role="depthwise")
    op.concat(kept, op.relu(op.conv(value, width, role="project")))
    return op.build()


def xception_unit(
    tensor: Tensor, channels: int, *, middle: int, stride: int = 1, precision: Precision
) -> OpSpec:
    """SPOS's deep choice (Guo et al. 2019, section 4): three separable 3 x 3 convolutions in the
    main branch of `shuffle_unit`, after Xception (Chollet 2017).
    """
    op = OpBuilder(precision, tensor)
    kept, value, width = _branches(op, tensor, channels, 3, stride)
    value = op.conv(
        value, op.channels(value), kernel=3, stride=stride, groups=op.channels(value),
        role="depthwise",
    )  # fmt: skip
    value = op.relu(op.conv(value, middle, role="expand"))
    value = op.conv(value, middle, kernel=3, groups=middle, role="depthwise2")
    value = op.relu(op.conv(value, middle, role="blend"))
    value = op.conv(value, middle, kernel=3, groups=middle, role="depthwise3")
    op.concat(kept, op.relu(op.conv(value, width, role="project")))
    return op.build()


def _branches(
    op: OpBuilder, tensor: Tensor, channels: int, kernel: int, stride: int
) -> tuple[int, int, int]:
    """What a shuffle unit hands on beside its main branch, what that reads, how wide that ends."""
    if stride == 1:
        return op.half(0, "even"), op.half(0, "odd"), channels - tensor.channels // 2
    value = op.conv(
        0, tensor.channels, kernel=kernel, stride=stride, groups=tensor.channels,
        role="bypass_depthwise",
    )  # fmt: skip
    kept = op.relu(op.conv(value, tensor.channels, role="bypass"))
    return kept, 0, channels - tensor.channels
