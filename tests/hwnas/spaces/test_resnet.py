"""Residual networks of mixed precision: torchvision's counts, SPOS's BitOPs, brute force."""

import itertools
from typing import Any

import pytest

from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import basic_block, conv_norm_activation, pooled_classifier
from hwnas.spaces.resnet import PRECISIONS, Stage, resnet, resnet18, resnet34, resnet_tiny
from latency_tables.ops import Tensor, total
from quant.precision import Precision

PLAIN: dict[str, Any] = {"classes": 1000, "multipliers": (1.0,)}
SPACES = {"resnet18": resnet18, "resnet34": resnet34}
PUBLISHED = {
    "resnet18": (11_689_512, "1.814", "1.6955"),
    "resnet34": (21_797_672, "3.664", "3.5452"),
}
"""Parameters, and 10^9 MACs at 224 pixels: of all layers, and of all convolutions but the first."""

BITOPS = {
    "resnet18": {2: "6.78", 3: "15.26", 4: "27.13"},
    "resnet34": {2: "14.18", 3: "31.91", 4: "56.72"},
}
"""10^9 BitOPs of the layers between stem and classifier, at as many bits for weights and
activations."""


@pytest.mark.parametrize("name", SPACES)
def test_networks_count_as_the_published_ones(name: str) -> None:
    space = SPACES[name](**PLAIN, precisions=("fp32",))
    ops = space.lower(space.architecture(()))
    params, macs, between = PUBLISHED[name]
    assert total("params", ops) == params
    assert f"{total('macs', ops) / 1e9:.3f}" == macs
    assert f"{total('macs', ops[1:-1]) / 1e9:.4f}" == between
    assert len(ops) - 2 == {"resnet18": 8, "resnet34": 16}[name]
    assert (ops[0].output.height, ops[-2].output.height) == (56, 7)


@pytest.mark.parametrize("name", SPACES)
def test_bitops_of_the_searched_layers_are_those_of_uniform_bits(name: str) -> None:
    bits = (2, 3, 4)
    space = SPACES[name](**PLAIN, precisions=tuple(f"pact-w{b}a{b}" for b in bits))
    for index, b in enumerate(bits):
        architecture = space.architecture([index] * len(space.genes))
        searched = total("bitops", space.searched(architecture))
        assert f"{searched / 1e9:.2f}" == BITOPS[name][b]
        assert searched == b * b * total("macs", space.searched(architecture))
        stem, *_, head = space.lower(architecture)
        every = total("bitops", space.lower(architecture))
        assert every == searched + 1024 * (stem.macs + head.macs)


def test_what_is_searched_is_what_has_a_precision_to_choose() -> None:
    one = resnet18(**PLAIN, precisions=("w8a8",))
    assert one.searched(one.architecture(())) == ()
    whole = resnet(
        "r", (Stage(1, 16, 1),), classes=4, size=8, stem_channels=16,
        precisions=("fp32",), stem_precisions=("fp32", "w8a8"), head_precisions=("fp32", "w8a8"),
    )  # fmt: skip
    architecture = whole.architecture([0] * len(whole.genes))
    stem, _, head = whole.lower(architecture)
    assert whole.searched(architecture) == (stem, head)


def test_every_block_chooses_among_spos_bits_and_three_widths() -> None:
    for space, blocks in ((resnet18(classes=1000), 8), (resnet34(classes=1000), 16)):
        assert space.count == (6 * 3) ** blocks
        genes = {gene.name: gene.choices for gene in space.genes}
        assert len(genes) == 2 * blocks
        assert genes["block1.precision"] == PRECISIONS
        assert genes["block0.width"] == ("32", "48", "64")
        assert genes[f"block{blocks - 1}.width"] == ("256", "384", "512")
        for architecture in ([0] * 2 * blocks, [5, 2] * blocks):
            stem, *_, head = space.lower(space.architecture(architecture))
            assert stem.precision == head.precision == Precision("fp32")
    bits = {(Precision(p).weight_bits, Precision(p).activation_bits) for p in PRECISIONS}
    assert bits == {(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)}
    assert all(Precision(p).is_pact for p in PRECISIONS)


def test_a_convolution_reads_the_bits_that_the_block_before_it_handed_on() -> None:
    space = resnet_tiny(classes=10, precisions=("pact-w1a2", "pact-w4a4"))
    told = {gene.name: gene.choices[-1] for gene in space.genes}
    told["block0.precision"] = "pact-w1a2"
    first, second = space.searched(space.parse(told))[:2]
    assert str(first.output) == "a2+:16x32x32"
    (conv, other) = (macs for macs in second.layer_macs if macs)
    assert second.bitops == conv * 4 * 2 + other * 4 * 4


def test_the_input_is_projected_only_where_the_shape_changes() -> None:
    space: SearchSpace = resnet34(**PLAIN, precisions=("fp32",))
    projected = [
        placed.position
        for placed in space.walk(space.architecture(()))
        if any(layer.role == "bypass" for layer in placed.op.layers)
    ]
    assert projected == ["block3", "block7", "block13"]


def test_architectures_are_the_physical_networks_each_once() -> None:
    """Of the inner widths of the first stage two are one after rounding."""
    precisions = ("fp32", "w8a8", "pact-w2a4")
    space = resnet(
        "t", (Stage(1, 16, 1), Stage(1, 32)), classes=4, size=8, pooled=False, stem_channels=16,
        precisions=precisions, multipliers=(0.5, 1.0, 2.0),
    )  # fmt: skip
    fp32 = Precision("fp32")
    stem = conv_norm_activation(Tensor(3, 8, 8), 16, kernel=3, precision=fp32)
    expected = set()
    for p, w, q, v in itertools.product(precisions, (16, 32), precisions, (16, 32, 64)):
        first = basic_block(stem.output, 16, inner=w, precision=Precision(p))
        second = basic_block(first.output, 32, inner=v, stride=2, precision=Precision(q))
        head = pooled_classifier(second.output, 4, precision=fp32)
        expected.add(tuple(op.key for op in (stem, first, second, head)))
    listed = list(space.enumerate())
    chains = [tuple(op.key for op in space.lower(a)) for a in listed]
    assert set(chains) == expected
    assert len(chains) == len(set(chains)) == space.count == 9 * 6


def test_the_small_preset_is_the_papers_network_of_fourteen_layers() -> None:
    """Section 4.2 with n = 2: 6n + 2 layers, of sides 32, 16 and 8; weights added up by hand."""
    space = resnet_tiny(classes=10, image_channels=3, precisions=("fp32",))
    ops = space.lower(space.architecture([0] * len(space.genes)))
    weighted = [x for op in ops for x in op.layers if x.has_weights and x.role != "bypass"]
    assert len(weighted) == 14
    assert [op.output.height for op in ops[1:-1]] == [32, 32, 16, 16, 8, 8]
    weights = 9 * (3 * 16 + 4 * 16 * 16)
    weights += 9 * (16 * 32 + 3 * 32 * 32) + 16 * 32
    weights += 9 * (32 * 64 + 3 * 64 * 64) + 32 * 64
    norms = 2 * (5 * 16 + 5 * 32 + 5 * 64)
    assert total("params", ops) == weights + norms + 65 * 10
