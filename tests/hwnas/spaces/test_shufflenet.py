"""SPOS's space: the published counts, and every network that can be built."""

import itertools
from collections.abc import Iterator

import pytest

from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import classifier, conv_norm_activation, shuffle_unit, xception_unit
from hwnas.spaces.shufflenet import MULTIPLIERS, Stage, shufflenet, shufflenet_224, shufflenet_tiny
from latency_tables.ops import OpSpec, Tensor, total
from quant.precision import Precision

RELEASED = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
"""The architecture whose weights SPOS's authors released."""

PUBLISHED = {
    "all 0": ((0,) * 20, "295.84", "3.155"),
    "all 1": ((1,) * 20, "313.65", "3.212"),
    "all 2": ((2,) * 20, "340.37", "3.298"),
    "all 3": ((3,) * 20, "358.83", "3.871"),
    "released": (RELEASED, "322.92", "3.558"),
}
"""Millions of MACs and of parameters of the released code; its page rounds the last to 323 and
3.5."""


@pytest.fixture(scope="module")
def blocks_alone() -> SearchSpace:
    return shufflenet_224(classes=1000, multipliers=(1.0,), precisions=("fp32",))


@pytest.mark.parametrize(("genes", "macs", "params"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_networks_have_the_macs_and_parameters_of_the_released_code(
    blocks_alone: SearchSpace, genes: tuple[int, ...], macs: str, params: str
) -> None:
    ops = blocks_alone.lower(blocks_alone.architecture(genes))
    assert f"{total('macs', ops) / 1e6:.2f}" == macs
    assert f"{total('params', ops) / 1e6:.3f}" == params


def test_the_search_for_blocks_has_four_choices_for_each_of_twenty(
    blocks_alone: SearchSpace,
) -> None:
    assert blocks_alone.count == 4**20
    assert {gene.choices for gene in blocks_alone.genes} == {("k3", "k5", "k7", "xception")}


def test_blocks_widths_and_precisions_are_chosen_apart_from_each_other() -> None:
    """Eight distinct widths in every stage, and precisions of the blocks and of the head."""
    space = shufflenet_224(classes=1000)
    assert space.count == (4 * 8 * 2) ** 20 * 2
    widths = [gene.choices for gene in space.genes if gene.name.endswith(".width")]
    assert widths[0] == ("8", "12", "20", "24", "32", "40", "44", "52")
    assert widths[-1] == ("64", "128", "192", "256", "320", "384", "448", "512")
    assert len(widths) == 20
    for stage, half in zip((0, 4, 8, 16), (32, 80, 160, 320), strict=True):
        for choice, multiplier in zip(widths[stage], MULTIPLIERS, strict=True):
            assert abs(int(choice) - multiplier * half) <= 2
            assert int(choice) % 4 == 0


def test_a_width_changes_the_middle_of_a_block_and_nothing_else() -> None:
    space = shufflenet_224(classes=10, precisions=("fp32",))
    narrow, wide = (
        space.lower(space.architecture([0, width] * 20)) for width in (0, len(MULTIPLIERS) - 1)
    )
    assert [op.output for op in narrow] == [op.output for op in wide]
    for one, other in zip(narrow[1:-1], wide[1:-1], strict=True):
        assert one.macs < other.macs


def physical_chains(
    stages: tuple[Stage, ...], multipliers: tuple[float, ...], precisions: tuple[str, ...]
) -> set[tuple[str, ...]]:
    """Every op chain, grown without genes: widths are rounded to whole fours by hand."""
    strides = [(s, s.stride if i == 0 else 1) for s in stages for i in range(s.blocks)]

    def grow(number: int, tensor: Tensor) -> Iterator[tuple[str, ...]]:
        if number == len(strides):
            for p in precisions:
                yield (classifier(tensor, 16, 4, precision=Precision(p), bias=False).key,)
            return
        stage, stride = strides[number]
        for m, p, k in itertools.product(multipliers, precisions, (3, 5, 7, 0)):
            middle = max(4, int(m * stage.channels / 2 / 4 + 0.5) * 4)
            rest = {"middle": middle, "stride": stride, "precision": Precision(p)}
            op: OpSpec = (
                shuffle_unit(tensor, stage.channels, kernel=k, **rest)
                if k
                else xception_unit(tensor, stage.channels, **rest)
            )
            for tail in grow(number + 1, op.output):
                yield (op.key, *tail)

    stem = conv_norm_activation(
        Tensor(3, 16, 16), 8, kernel=3, stride=2, precision=Precision("fp32")
    )
    return {(stem.key, *tail) for tail in grow(0, stem.output)}


@pytest.mark.parametrize("stages", [(Stage(2, 16),), (Stage(1, 12, 1), Stage(1, 24))], ids=str)
def test_architectures_are_the_physical_networks_each_once(stages: tuple[Stage, ...]) -> None:
    """Of the multipliers two give one width in either stage."""
    multipliers, precisions = (0.2, 0.5, 0.6, 1.0), ("fp32", "w8a8")
    space = shufflenet(
        "t", stages, classes=4, size=16, stem_channels=8, head_channels=16,
        multipliers=multipliers, precisions=precisions,
    )  # fmt: skip
    listed = list(space.enumerate())
    chains = [tuple(op.key for op in space.lower(a)) for a in listed]
    assert set(chains) == physical_chains(stages, multipliers, precisions)
    assert len(chains) == len(set(chains)) == len(set(listed)) == space.count
    assert all(space.architecture(a.genes) == a for a in listed)


def test_what_is_described_is_what_is_built() -> None:
    space = shufflenet_tiny(classes=10)
    told = {gene.name: gene.choices[0] for gene in space.genes}
    told |= {"block1.block": "k7", "block1.width": "24", "block1.precision": "w8a8"}
    told |= {"block4.block": "xception", "block4.width": "48"}
    walked = space.walk(space.parse(told))
    assert [p.group for p in walked] == ["", "k3", "k7", "k3", "k3", "xception", "k3", ""]
    assert [p.op.output.channels for p in walked] == [16, 32, 32, 64, 64, 64, 64, 10]
    assert [p.op.output.height for p in walked] == [16, 8, 8, 4, 4, 4, 4, 1]
    kernels = [max(layer.kernel for layer in p.op.layers) for p in walked]
    assert kernels == [3, 3, 7, 3, 3, 3, 3, 1]
    middles = {
        p.position: layer.channels
        for p in walked
        for layer in p.op.layers
        if layer.groups > 1 and layer.stride == 1
    }
    assert (middles["block1"], middles["block4"]) == (24, 48)
    assert str(walked[2].op.output.format) == "a8+"
    assert walked[-1].op.key.endswith("linear(3) c10 no bias -> logits")


def test_a_block_that_leaves_its_main_branch_no_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        shuffle_unit(
            Tensor(16, 8, 8), 16, kernel=3, middle=8, stride=2, precision=Precision("fp32")
        )
