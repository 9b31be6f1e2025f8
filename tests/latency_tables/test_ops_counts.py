"""What is counted from ops: published totals, PyTorch's own counters, and sums done by hand."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hwnas.spaces.blocks import (
    basic_block,
    classifier,
    conv_norm_activation,
    inverted_residual,
    pooled_classifier,
    pooled_stem,
    shuffle_unit,
    xception_unit,
)
from latency_tables.ops import COUNTS, OpBuilder, OpSpec, Tensor, peak_activation_bytes, total
from profilers.modules import Network
from quant.precision import Format, Precision

CHANNELS = [32] * 2 + [40] * 4 + [80] * 4 + [96] * 4 + [192] * 4 + [320]
STRIDES = [2, 1] + [2, 1, 1, 1] * 2 + [1, 1, 1, 1] + [2, 1, 1, 1] + [1]
FAIRNAS = {
    "A": "37 33 37 63 67 33 33 67 67 35 63 35 35 63 63 67 63 67 65",
    "B": "35 33 35 33 63 35 37 33 63 35 33 63 37 33 67 65 67 63 65",
    "C": "35 33 37 33 33 33 33 33 33 63 33 33 33 33 67 67 63 63 65",
    "all (3,3)": " ".join(["33"] * 19),
    "all (6,7)": " ".join(["67"] * 19),
}
PUBLISHED = {
    "A": ("388.12", "4.651"),
    "B": ("345.30", "4.506"),
    "C": ("321.02", "4.398"),
    "all (3,3)": ("247.13", "3.189"),
    "all (6,7)": ("557.41", "5.090"),
}


def fairnas(name: str, precision: str = "fp32") -> list[OpSpec]:
    """A network of FairNAS (Chu et al. 2021, table 1): 19 blocks told as expansion and kernel."""
    kind = Precision(precision)
    ops = [
        conv_norm_activation(
            Tensor(3, 224, 224), 32, kernel=3, stride=2, precision=kind, activation="relu6"
        )
    ]
    blocks = [("13", 16, 1), *zip(FAIRNAS[name].split(), CHANNELS, STRIDES, strict=True)]
    for (expansion, kernel), channels, stride in blocks:
        ops.append(
            inverted_residual(
                ops[-1].output,
                channels,
                kernel=int(kernel),
                expansion=int(expansion),
                stride=stride,
                precision=kind,
                activation="relu6",
            )
        )
    ops.append(classifier(ops[-1].output, 1280, 1000, precision=kind, activation="relu6"))
    return ops


def _pytorch(ops: Sequence[OpSpec]) -> tuple[int, int]:
    """MACs and parameters as PyTorch counts them on the network's modules, without computing."""
    tensor = ops[0].inputs[0]
    with torch.device("meta"):
        network = Network(ops).eval()
        images = torch.empty(1, tensor.channels, tensor.height, tensor.width)
        with FlopCounterMode(display=False) as counter:
            network(images)
    return counter.get_total_flops() // 2, sum(p.numel() for p in network.parameters())


# ---- MACs and parameters


@pytest.mark.parametrize("name", FAIRNAS)
def test_fairnas_networks_have_the_macs_and_parameters_of_the_paper(name: str) -> None:
    ops = fairnas(name)
    found = (f"{total('macs', ops) / 1e6:.2f}", f"{total('params', ops) / 1e6:.3f}")
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", FAIRNAS)
def test_fairnas_networks_count_as_pytorch_counts_their_modules(name: str) -> None:
    ops = fairnas(name)
    assert (total("macs", ops), total("params", ops)) == _pytorch(ops)


@pytest.mark.parametrize("stride", [1, 2])
def test_networks_of_moved_and_joined_values_count_as_pytorch_counts_their_modules(
    stride: int,
) -> None:
    kind = Precision("fp32")
    ops = [pooled_stem(Tensor(3, 37, 37), 6, precision=kind)]
    ops.append(shuffle_unit(ops[-1].output, 14, kernel=5, middle=7, stride=stride, precision=kind))
    ops.append(xception_unit(ops[-1].output, 22, middle=3, stride=stride, precision=kind))
    ops.append(basic_block(ops[-1].output, 9, inner=5, stride=stride, precision=kind))
    ops.append(pooled_classifier(ops[-1].output, 4, precision=kind, bias=stride == 1))
    assert (total("macs", ops), total("params", ops)) == _pytorch(ops)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 6),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 11),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    expansion=st.integers(1, 4),
    squeeze=st.booleans(),
)
def test_small_networks_count_as_pytorch_counts_their_modules(
    channels: int,
    widths: tuple[int, int],
    size: int,
    kernel: int,
    stride: int,
    expansion: int,
    squeeze: bool,
) -> None:
    kind = Precision("fp32")
    stem = conv_norm_activation(
        Tensor(channels, size, size + 1), widths[0], kernel=kernel, stride=stride, precision=kind
    )
    block = inverted_residual(
        stem.output,
        widths[1],
        kernel=kernel,
        stride=stride,
        expansion=expansion,
        precision=kind,
        squeeze=int(squeeze),
    )
    ops = [stem, block, classifier(block.output, 7, 3, precision=kind)]
    assert (total("macs", ops), total("params", ops)) == _pytorch(ops)


def test_a_linear_layer_flattens_what_it_reads() -> None:
    op = OpBuilder(Precision("fp32"), Tensor(4, 3, 2))
    op.linear(0, 10, role="linear")
    assert (op.build().macs, op.build().parameters) == (240, 250)


def test_macs_of_each_layer_stand_in_the_order_of_layers() -> None:
    op = inverted_residual(
        Tensor(4, 6, 6), 8, kernel=3, expansion=3, stride=2, precision=Precision("fp32")
    )
    assert op.layer_macs == (4 * 12 * 36, 0, 12 * 9 * 9, 0, 12 * 8 * 9)
    assert op.macs == sum(op.layer_macs)


# ---- BitOPs


def _block(precision: str, fmt: str) -> OpSpec:
    return inverted_residual(
        Tensor(4, 6, 6, Format.parse(fmt)), 8, kernel=3, expansion=3, precision=Precision(precision)
    )


EXPAND, DEPTHWISE, PROJECT = 4 * 12 * 36, 12 * 9 * 36, 12 * 8 * 36


@pytest.mark.parametrize(
    ("precision", "fmt", "pairs"),
    [
        ("fp32", "fp32", (32 * 32, 32 * 32)),
        ("fp32", "a8+", (32 * 32, 32 * 32)),
        ("tf32", "fp32", (32 * 32, 32 * 32)),
        ("fp16", "fp32", (16 * 16, 16 * 16)),
        ("fp8", "fp16", (8 * 8, 8 * 8)),
        ("w8a8", "fp32", (8 * 8, 8 * 8)),
        ("w8a8", "a8", (8 * 8, 8 * 8)),
        ("w4a8", "a8", (4 * 8, 4 * 8)),
        ("w4a4", "fp32", (4 * 4, 4 * 4)),
        ("w4a4", "a8", (4 * 8, 4 * 4)),
        ("w8a8", "a4+", (8 * 4, 8 * 8)),
        ("w2a3", "fp16+", (2 * 3, 2 * 3)),
    ],
)
def test_bitops_use_the_bits_that_each_layers_input_really_has(
    precision: str, fmt: str, pairs: tuple[int, int]
) -> None:
    """The first layer reads what comes in; the others read what the op itself quantised."""
    outer, inner = pairs
    assert _block(precision, fmt).bitops == outer * EXPAND + inner * (DEPTHWISE + PROJECT)


def test_bitops_of_fp32_are_1024_times_the_macs_of_a_whole_network() -> None:
    ops = fairnas("C")
    assert total("bitops", ops) == 1024 * total("macs", ops)
    assert total("bitops", fairnas("C", "w8a8")) == 64 * total("macs", ops)


def test_a_w4a4_block_after_a_w8a8_block_pays_eight_bits_once() -> None:
    first = _block("w8a8", "fp32")
    second = inverted_residual(first.output, 8, kernel=3, expansion=1, precision=Precision("w4a4"))
    assert second.bitops == 8 * 9 * 36 * (4 * 8) + 8 * 8 * 36 * (4 * 4)


# ---- bytes


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", 432 * 4 + 16 * 4),
        ("fp16", 432 * 2 + 16 * 4),
        ("fp8", 432 + 4 + 16 * 8),
        ("w8a8", 432 + 16 * 12),
        ("w4a8", 216 + 16 * 12),
        ("w3a8", 162 + 16 * 12),
    ],
)
def test_weight_bytes_are_codes_and_what_turns_them_into_values(
    precision: str, expected: int
) -> None:
    """Of an integer layer a bias and two scales a channel; of an fp8 one the norm's factor too."""
    op = conv_norm_activation(Tensor(3, 8, 8), 16, kernel=3, precision=Precision(precision))
    assert op.weight_bytes == expected


def test_a_started_byte_counts_whole() -> None:
    op = OpBuilder(Precision("w3a8"), Tensor(3, 1, 1))
    op.linear(0, 1, role="linear")
    assert op.build().weight_bytes == 2 + 12  # 9 bits of codes


def test_a_float_network_without_norms_ships_four_bytes_a_parameter() -> None:
    op = OpBuilder(Precision("fp32"), Tensor(3, 8, 8))
    op.linear(op.pool(op.conv(0, 16, kernel=3, role="a", norm=False)), 5, role="b")
    assert op.build().weight_bytes == 4 * op.build().parameters


# ---- activations


def test_the_peak_of_a_residual_block_by_hand() -> None:
    """4 x 6 x 6 in, 12 x 6 x 6 inside: at an activation, both sides of it and the block's input."""
    inside, outside = 12 * 36, 4 * 36

    def block(precision: str, fmt: str, channels: int) -> OpSpec:
        return inverted_residual(
            Tensor(4, 6, 6, Format.parse(fmt)),
            channels,
            kernel=3,
            expansion=3,
            precision=Precision(precision),
            activation="relu6",
        )

    assert block("fp32", "fp32", 4).peak_activation_bytes == 4 * (2 * inside + outside)
    assert block("fp32", "fp32", 5).peak_activation_bytes == 4 * 2 * inside
    assert block("w8a8", "a8", 4).peak_activation_bytes == 2 * inside + outside
    assert block("w4a4", "a8", 4).peak_activation_bytes == inside + outside
    assert block("fp16", "a8", 4).peak_activation_bytes == 2 * 2 * inside + outside


def test_a_single_layer_has_its_input_and_its_output_alive() -> None:
    op = OpBuilder(Precision("fp32"), Tensor(4, 6, 6, Format("a8")))
    op.pool(0)
    assert op.build().peak_activation_bytes == 4 * 36 + 4 * 4


@st.composite
def _dags(draw: st.DrawFn) -> OpSpec:
    """Random graphs of sums and activations over values of one shape."""
    op = OpBuilder(
        Precision(draw(st.sampled_from(["fp32", "fp16", "w4a8"]))),
        *[Tensor(2, 3, 3, Format(draw(st.sampled_from(["fp32", "a8"])))) for _ in range(2)],
    )
    for count in range(2, 2 + draw(st.integers(1, 6))):
        value = draw(st.integers(0, count - 1))
        if draw(st.booleans()):
            op.add(value, draw(st.integers(0, count - 1)))
        else:
            op.activation(value, draw(st.sampled_from(["relu6", "sigmoid"])))
    return op.build()


@settings(max_examples=150, deadline=None)
@given(op=_dags())
def test_the_peak_is_that_of_an_allocator_that_frees_after_the_last_reader(op: OpSpec) -> None:
    inputs = len(op.inputs)
    last = {i: t for t, layer in enumerate(op.layers) for i in layer.inputs}
    held = {i: op.values[i].size_bytes for i in range(inputs) if i in last}
    peak = 0.0
    for time in range(len(op.layers)):
        output = inputs + time
        held[output] = op.values[output].size_bytes
        peak = max(peak, sum(held.values()))
        held = {i: size for i, size in held.items() if last.get(i, -1) > time}
    assert op.peak_activation_bytes == peak


def test_a_network_peaks_where_its_hungriest_op_does_and_its_costs_add_up() -> None:
    ops = fairnas("A")
    assert peak_activation_bytes(ops) == max(op.peak_activation_bytes for op in ops)
    assert set(COUNTS) == {"params", "macs", "bitops", "weight_bytes"}
    for cost in COUNTS:
        assert total(cost, ops) == total(cost, ops[:7]) + total(cost, ops[7:]) > 0
    assert total("weight_bytes", ops) == sum(op.weight_bytes for op in ops)


def test_a_tensor_counts_bytes_by_its_bits() -> None:
    for fmt, size in [("fp32", 96.0), ("bf16", 48.0), ("a8", 24.0), ("a4+", 12.0), ("a3", 9.0)]:
        assert Tensor(2, 3, 4, Format.parse(fmt)).size_bytes == size
