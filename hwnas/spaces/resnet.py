"""The `resnet18` and `resnet34` spaces: residual networks (He et al. 2015) of mixed precision.

After the third experiment of SPOS (Guo et al. 2019, section 4): the first and the last layer stay
in fp32, and every block chooses the bits of its weights and activations, and its inner width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hwnas.spaces.base import Build, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import basic_block, conv_norm_activation, pooled_classifier, pooled_stem
from hwnas.spaces.parts import Stage, float_precisions, one_op, rounded_widths
from latency_tables.ops import OpSpec, Tensor
from quant.precision import Precision

PRECISIONS = ("pact-w4a4", "pact-w3a4", "pact-w2a4", "pact-w1a4", "pact-w2a2", "pact-w1a2")
"""The bits that SPOS chose from, with its quantisers; the most bits first, since a supernet's
training begins with the first."""

MULTIPLIERS = (0.5, 0.75, 1.0)
"""Inner widths, as multiples of the block's output width."""


def resnet(
    name: str,
    stages: Sequence[Stage],
    *,
    classes: int,
    size: int,
    image_channels: int = 3,
    pooled: bool = True,
    stem_channels: int = 64,
    multipliers: Sequence[float] = MULTIPLIERS,
    multiple: int = 16,
    precisions: Sequence[str] = PRECISIONS,
    stem_precisions: Sequence[str] | None = None,
    head_precisions: Sequence[str] | None = None,
) -> SearchSpace:
    """A chain stem, basic blocks stage by stage, head, for `size` x `size` images.

    The stem is that of photos, with its max pool, or a 3 x 3 convolution of stride 1. Each block
    chooses its precision and its inner width, in multiples of `multiple`.
    """

    def stem(tensor: Tensor, precision: Precision) -> OpSpec:
        if pooled:
            return pooled_stem(tensor, stem_channels, precision=precision)
        return conv_norm_activation(tensor, stem_channels, kernel=3, precision=precision)

    def head(tensor: Tensor, precision: Precision) -> OpSpec:
        return pooled_classifier(tensor, classes, precision=precision)

    floats = float_precisions(precisions)
    positions = [one_op("stem", stem_precisions or floats, stem)]
    for stage in stages:
        widths = rounded_widths(stage.channels, multipliers, multiple)
        for index in range(stage.blocks):
            options: dict[str, Sequence[Any]] = {"precision": list(precisions), "width": widths}
            build = _block(stage.channels, 1 if index else stage.stride)
            positions.append(Position(f"block{len(positions) - 1}", options, build))
    positions.append(one_op("head", head_precisions or floats, head))
    return SearchSpace(name, Tensor(image_channels, size, size), tuple(positions), classes)


def resnet18(
    *, classes: int, image_channels: int = 3, size: int = 224, **options: Any
) -> SearchSpace:
    """ResNet-18: two blocks in each of four stages of 64 to 512 channels; options of `resnet`."""
    stages = _photo_stages(2, 2, 2, 2)
    return resnet(
        "resnet18", stages, classes=classes, size=size, image_channels=image_channels, **options
    )


def resnet34(
    *, classes: int, image_channels: int = 3, size: int = 224, **options: Any
) -> SearchSpace:
    """ResNet-34: 3, 4, 6 and 3 blocks in stages of 64 to 512 channels; options of `resnet`."""
    stages = _photo_stages(3, 4, 6, 3)
    return resnet(
        "resnet34", stages, classes=classes, size=size, image_channels=image_channels, **options
    )


def resnet_tiny(
    *,
    classes: int,
    image_channels: int = 1,
    size: int = 32,
    precisions: Sequence[str] = PRECISIONS,
) -> SearchSpace:
    """The preset for small images: six blocks of 16 to 64 channels, as in section 4.2 of the paper
    with n = 2.
    """
    return resnet(
        "resnet-tiny",
        (Stage(2, 16, 1), Stage(2, 32), Stage(2, 64)),
        classes=classes,
        size=size,
        image_channels=image_channels,
        pooled=False,
        stem_channels=16,
        multipliers=(1.0, 2.0),
        precisions=precisions,
    )


def _photo_stages(*blocks: int) -> tuple[Stage, ...]:
    strides, channels = (1, 2, 2, 2), (64, 128, 256, 512)
    return tuple(map(Stage, blocks, channels, strides))


def _block(channels: int, stride: int) -> Build:
    def build(state: State, values: Mapping[str, Any]) -> Choice:
        op = basic_block(
            state.tensor,
            channels,
            inner=values["width"],
            stride=stride,
            precision=Precision(values["precision"]),
        )
        return Choice(op, State(op.output))

    return build
