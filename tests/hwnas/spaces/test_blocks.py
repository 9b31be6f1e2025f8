import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import Tensor
from quant.precision import Precision

FP32 = Precision("fp32")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 24),
    width=st.integers(1, 24),
    kernel=st.sampled_from((1, 3, 5, 7)),
    expansion=st.integers(1, 6),
    stride=st.integers(1, 2),
    size=st.integers(1, 17),
    squeeze=st.sampled_from((0, 1)),
)
def test_an_inverted_residual_counts_what_its_formula_says(
    channels: int, width: int, kernel: int, expansion: int, stride: int, size: int, squeeze: int
) -> None:
    op = inverted_residual(
        Tensor(channels, size, size),
        width,
        kernel=kernel,
        expansion=expansion,
        stride=stride,
        precision=FP32,
        squeeze=squeeze,
    )
    hidden, after = channels * expansion, -(-size // stride)
    macs = hidden * after**2 * kernel**2 + hidden * width * after**2
    parameters = hidden * kernel**2 + hidden * width + 2 * hidden + 2 * width
    if expansion > 1:
        macs += channels * hidden * size**2
        parameters += channels * hidden + 2 * hidden
    if squeeze:
        macs += 2 * hidden**2
        parameters += 2 * (hidden**2 + hidden)
    assert (op.macs, op.parameters) == (macs, parameters)
    assert (op.output.channels, op.output.height, op.output.width) == (width, after, after)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [16, 24])
def test_the_sum_is_there_only_where_the_shapes_allow_it(width: int, stride: int) -> None:
    op = inverted_residual(
        Tensor(16, 8, 8), width, kernel=3, expansion=3, stride=stride, precision=FP32
    )
    adds = [layer for layer in op.layers if layer.kind == "add"]
    assert len(adds) == (stride == 1 and width == 16)
    assert all(0 in layer.inputs and layer is op.layers[-1] for layer in adds)


def test_roles_in_a_block_are_told_once_each() -> None:
    op = inverted_residual(Tensor(16, 8, 8), 16, kernel=3, expansion=3, precision=FP32, squeeze=4)
    roles = [layer.role for layer in op.layers if layer.has_weights]
    assert roles == ["expand", "depthwise", "squeeze", "excite", "project"]
    plain = inverted_residual(Tensor(16, 8, 8), 16, kernel=3, expansion=1, precision=FP32)
    assert [layer.role for layer in plain.layers if layer.has_weights] == ["depthwise", "project"]


def test_a_squeeze_narrows_the_hidden_width_by_its_factor() -> None:
    op = inverted_residual(Tensor(16, 8, 8), 24, kernel=3, expansion=3, precision=FP32, squeeze=4)
    widths = {layer.role: layer.channels for layer in op.layers if layer.has_weights}
    assert (widths["squeeze"], widths["excite"]) == (12, 48)
    gate = next(layer for layer in op.layers if layer.kind == "mul")
    assert str(op.values[gate.inputs[1]]) == "fp32+:48x1x1"


@pytest.mark.parametrize("activation", ["relu", "relu6", "hard_swish"])
def test_the_activation_follows_expand_and_depthwise_but_not_project(activation: str) -> None:
    op = inverted_residual(
        Tensor(16, 8, 8), 24, kernel=3, expansion=3, precision=FP32, activation=activation
    )
    kinds = [layer.function or layer.role for layer in op.layers]
    assert kinds == ["expand", activation, "depthwise", activation, "project"]


def test_a_plain_convolution_and_a_classifier_count_what_their_formulas_say() -> None:
    stem = conv_norm_activation(Tensor(3, 15, 15), 16, kernel=5, stride=2, precision=FP32)
    assert stem.macs == 3 * 16 * 25 * 8 * 8
    assert stem.parameters == 3 * 16 * 25 + 2 * 16
    head = classifier(Tensor(24, 4, 4), 128, 10, precision=FP32)
    assert head.macs == 24 * 128 * 16 + 128 * 10
    assert head.parameters == 24 * 128 + 2 * 128 + 128 * 10 + 10
    assert head.logits
    assert (head.output.channels, head.output.height) == (10, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8", "w4a8"])
def test_every_layer_of_a_block_has_the_precision_asked_for(precision: str) -> None:
    op = inverted_residual(
        Tensor(16, 8, 8), 16, kernel=3, expansion=3, precision=Precision(precision), squeeze=4
    )
    assert op.precision == Precision(precision)
    assert op.output.format == Precision(precision).format(signed=True)
