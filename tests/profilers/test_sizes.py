"""The predicted size of a model file is never below the real one, and hardly above it.

The oracle is the file: the length of what `emit` serialises.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from hwnas.spaces.registry import load_space
from hwnas.spaces.resnet import Stage as Stages
from hwnas.spaces.resnet import resnet, resnet_tiny
from hwnas.spaces.shufflenet import shufflenet_tiny
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from profilers.graphs import OpParameters, emit, random_parameters
from profilers.sizes import BASE_BYTES, file_bytes
from quant.errors import InvalidInput
from quant.integer import FloatWeights, IntegerWeights
from quant.precision import Format, Precision

BOTH = ("fp32", "w8a8")
FP32, W8A8, W4A8, W2A4 = map(Precision, (*BOTH, "w4a8", "w2a4"))
EXAMPLES = Path(__file__).parents[2] / "examples"
SLACK = 33
"""What `BASE_BYTES` may be too large by: it covers larger images and files too."""


def squeezed(*, classes: int) -> SearchSpace:
    """Squeeze and excitation, hard swish, and a head in either precision."""
    return mobile(
        "squeezed",
        (Stage(2, 2, (8, 16), squeeze=4, activation="hard_swish"), Stage(2, 1, (16, 24))),
        classes=classes,
        size=28,
        image_channels=1,
    )


def low_bits(*precisions: str) -> SearchSpace:
    """The stages of mobile-tiny and a squeezed one at other precisions, the stem's too."""
    stages = (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48), squeeze=4), Stage(3, 2, (64, 96)))
    return mobile(
        "low", stages, classes=10, size=32, image_channels=1,
        precisions=precisions, stem_precisions=precisions,
    )  # fmt: skip


SPACES = {
    "mobile-tiny": lambda: mobile_tiny(classes=10),
    "mobile-tiny, 1000 classes": lambda: mobile_tiny(classes=1000, image_channels=3, size=224),
    "squeezed": lambda: squeezed(classes=4),
    "low bits": lambda: low_bits("w4a8", "w2a8", "w3a4", "w5a8", "pact-w1a2", "fp32"),
    "shufflenet-tiny": lambda: shufflenet_tiny(classes=10),
    "resnet-tiny": lambda: resnet_tiny(classes=10, precisions=BOTH),
    "pooled resnet": lambda: resnet(
        "pooled",
        (Stages(1, 16, 1), Stages(1, 32)),
        classes=10,
        size=32,
        stem_channels=16,
        precisions=BOTH,
        stem_precisions=BOTH,
        head_precisions=BOTH,
    ),
    "own space": lambda: load_space(
        f"{EXAMPLES / 'own_space.py'}:space", classes=10, image_channels=1, size=28
    ),
    "own block": lambda: load_space(
        f"{EXAMPLES / 'own_block.py'}:space", classes=10, image_channels=3, size=32
    ),
}


def real_bytes(ops: list[OpSpec], seed: int = 0) -> int:
    rng = np.random.default_rng(seed)
    parameters = [random_parameters(op, rng) for op in ops]
    for numbers in parameters:
        numbers.limits = {index: float(rng.uniform(0.5, 8)) for index in numbers.limits}
    return len(emit(ops, parameters).SerializeToString())


def bound(ops: list[OpSpec]) -> int:
    return BASE_BYTES + sum(map(file_bytes, ops))


@pytest.mark.parametrize("space", SPACES.values(), ids=list(SPACES))
def test_a_random_networks_file_is_just_below_its_predicted_size(space) -> None:
    built = space()
    sampler, rng = UniformSampler(built), np.random.default_rng(3)
    for seed in range(25):
        ops = list(built.lower(sampler.sample(rng)))
        size = real_bytes(ops, seed)
        assert size <= bound(ops) <= size + SLACK
        assert bound(ops) <= 1.005 * size


def test_every_op_of_a_space_adds_what_was_predicted_wherever_it_stands() -> None:
    """Exactly: the file grows by the op's bytes, from the second place to the last; by one more
    where the graph's length then takes a third byte."""
    spec = Tensor(8, 10, 10)
    blocks = [
        inverted_residual(
            Tensor(8, 10, 10, Format.parse(kind)), 8, kernel=3, expansion=2,
            precision=precision, squeeze=squeeze, activation=function,
        )
        for kind, precision, squeeze, function in itertools.product(
            ("fp32", "a8"), (FP32, W8A8, W4A8, W2A4), (0, 4), ("relu", "hard_swish")
        )
    ]  # fmt: skip
    before = {
        "fp32": conv_norm_activation(spec, 8, kernel=3, precision=FP32, activation="hard_swish"),
        "a8": conv_norm_activation(spec, 8, kernel=3, precision=W8A8, activation="hard_swish"),
    }
    for op in blocks:
        stem = before[op.inputs[0].format.type]
        head = classifier(op.output, 16, 4, precision=FP32)
        plain = classifier(stem.output, 16, 4, precision=FP32)
        change = real_bytes([stem, op, head]) - real_bytes([stem, plain])
        assert change - (file_bytes(op) + file_bytes(head) - file_bytes(plain)) in (0, 1)
    many = [op for op in blocks if op.output.format == op.inputs[0].format == Format("a8")]
    for op in many:
        stem, head = before["a8"], classifier(op.output, 16, 4, precision=W8A8)
        for times in (8, 98):
            chains = ([stem, *[op] * (times + more), head] for more in (0, 1))
            before_it, after_it = map(real_bytes, chains)
            assert after_it - before_it == file_bytes(op), "the names grow no longer with numbers"


@pytest.mark.parametrize("kind", ["fp32", "fp32+", "a8", "a8+"])
@pytest.mark.parametrize("precision", [FP32, W8A8, W2A4], ids=str)
@pytest.mark.parametrize("write", [
    lambda op: op.relu(0),
    lambda op: op.add(0, op.conv(0, 8, kernel=3, role="conv")),
    lambda op: op.mul(0, op.activation(op.pool(0), "sigmoid")),
    lambda op: op.add(op.conv(0, 8, role="left"), op.conv(0, 8, role="right")),
    lambda op: op.conv(op.conv(0, 128, role="left"), 8, role="right"),
    lambda op: op.concat(op.half(0, "odd"), op.conv(op.half(0, "even"), 6, role="conv")),
    lambda op: op.max_pool(op.relu(op.conv(0, 8, role="conv")), kernel=3, stride=2),
    lambda op: op.conv(op.conv(0, 8, role="r" * 90), 8, role="long names", norm=False),
])  # fmt: skip
def test_ops_of_any_shape_and_input_format_add_what_was_predicted(write, precision, kind) -> None:
    spec = Tensor(8, 6, 6, Format.parse(kind))
    builder = OpBuilder(precision, spec)
    write(builder)
    op = builder.build()
    producer = W8A8 if spec.format.is_quantised else FP32
    function = "hard_swish" if spec.format.signed else "relu"
    stem = conv_norm_activation(
        Tensor(1, 6, 6), 8, kernel=3, precision=producer, activation=function
    )
    assert stem.output == spec
    head = classifier(op.output, 16, 4, precision=W8A8)
    for ops in ([stem, op], [stem, op, head]):
        assert real_bytes(ops) <= bound(ops) <= real_bytes(ops) + SLACK
    difference = real_bytes([stem, op, head]) - bound([stem, op, head])
    plain = [stem, classifier(stem.output, 16, 4, precision=W8A8)]
    assert difference == real_bytes(plain) - bound(plain)


def integer_weights(shape: tuple[int, ...], top: int, bias: np.ndarray) -> IntegerWeights:
    return IntegerWeights(
        np.full(shape, top, np.int8), np.full(len(bias), 1e-20, np.float32), bias, top
    )


def test_parameters_do_not_change_the_size() -> None:
    """Neither do the smallest and largest numbers, nor biases off their channel's grid."""
    for precision in (FP32, W8A8, W4A8, W2A4):
        op = conv_norm_activation(Tensor(30, 8, 8), 5, kernel=3, precision=precision)
        (shape,) = op.weight_shapes.values()
        sizes = set()
        for value in (0.0, 1e-30, 1.0, 3e38):
            bias = np.full(5, value, np.float32)
            weights = (
                integer_weights(shape, precision.weight_top, bias)
                if precision.is_integer
                else FloatWeights(np.full(shape, value, np.float32), bias)
            )
            for limit in (1e-6, 4.0, 1e6):
                limits = dict.fromkeys(op.quantisers, limit)
                model = emit([op], [OpParameters({0: weights}, limits)])
                sizes.add(len(model.SerializeToString()))
        assert len(sizes) == 1


def test_most_bytes_of_a_large_op_are_its_weights() -> None:
    for precision in (FP32, W8A8, W4A8, Precision("w2a8")):
        op = conv_norm_activation(Tensor(256, 8, 8), 256, kernel=3, precision=precision)
        assert op.weight_bytes < file_bytes(op) < 1.03 * op.weight_bytes


def test_large_files_and_images_are_covered() -> None:
    """The lengths that stand before the graph and the metadata take more bytes there."""
    stem = conv_norm_activation(Tensor(3, 2_000_000, 2_000_000), 900, kernel=3, precision=FP32)
    wide = conv_norm_activation(stem.output, 900, kernel=3, precision=FP32)
    assert file_bytes(wide) > 2**24
    ops = [stem, *[wide] * 2]
    assert real_bytes(ops) <= bound(ops) <= real_bytes(ops) + SLACK
    relu = OpBuilder(FP32, Tensor(2_000_000, 2_000_000, 2_000_000))
    relu.relu(0)
    for count in (1, 10, 1000):
        ops = [relu.build()] * count
        assert real_bytes(ops) <= bound(ops) <= real_bytes(ops) + SLACK


def test_what_the_runtime_cannot_run_has_no_size() -> None:
    with pytest.raises(InvalidInput, match="fp16"):
        file_bytes(conv_norm_activation(Tensor(3, 8, 8), 8, kernel=3, precision=Precision("fp16")))


# ---- fewer bits, fewer bytes


def test_files_of_low_bit_networks_shrink_nearly_as_their_weights_do() -> None:
    """mobile-tiny's stages at their widest: what packing saves of the bytes that codes take at
    eight bits, against what their bits say. The rest are two or three nodes and a table a layer."""
    files, codes = {}, {}
    for name in ("w8a8", "w4a8", "w2a8"):
        space = low_bits(name)
        widest = {gene.name: gene.choices[-1] for gene in space.genes if "width" in gene.name}
        blocks = {g.name: "k7e6" for g in space.genes if g.name.endswith(".block")}
        ops = list(space.lower(space.parse(widest | blocks)))
        files[name] = real_bytes(ops)
        assert abs(bound(ops) / files[name] - 1) < 0.01
        codes[name] = sum(int(np.prod(s)) for op in ops for s in op.weight_shapes.values())
    for name, share in (("w4a8", 1 / 2), ("w2a8", 3 / 4)):
        saved = (files["w8a8"] - files[name]) / (share * codes[name])
        assert 0.95 < saved < 1


def test_packing_never_makes_a_file_larger() -> None:
    """Where a layer is too small to gain from it, its codes are plain bytes."""
    for channels, kernel, role in itertools.product((1, 4, 16, 48, 96), (1, 3), ("r", "r" * 90)):
        sizes = {}
        for name in ("w8a8", "w5a8", "w4a8", "w2a8", "pact-w1a8", "pact-w3a8", "pact-w4a8"):
            builder = OpBuilder(Precision(name), Tensor(channels, 8, 8))
            builder.conv(0, channels, kernel=kernel, role=role)
            sizes[name] = file_bytes(builder.build()) - len(name)
        assert sizes["w4a8"] <= sizes["w5a8"] == sizes["w8a8"]
        assert sizes["w2a8"] <= sizes["w4a8"]
        assert sizes["pact-w1a8"] == sizes["w2a8"]
        assert sizes["pact-w3a8"] == sizes["w4a8"]
        assert sizes["pact-w4a8"] == sizes["w8a8"]
