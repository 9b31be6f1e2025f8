"""The `shufflenet` space of SPOS (Guo et al. 2019, section 4): blocks and channels of ShuffleNetV2.

As its authors released it: 20 choice blocks, each of four kinds, and a width between its two
1 x 1 convolutions; and, as in all spaces here, a precision.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hwnas.spaces.base import Build, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, shuffle_unit, xception_unit
from hwnas.spaces.parts import Stage, conv_stem, float_precisions, one_op, rounded_widths
from latency_tables.ops import OpSpec, Tensor
from quant.precision import Precision

KERNELS = {"k3": 3, "k5": 5, "k7": 7}
DEEP = "xception"
KINDS = (*KERNELS, DEEP)
"""The choices, in the order of the released architectures' numbers."""

MULTIPLIERS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
"""The middle widths of the channel search, as multiples of half the block's output width."""


def shufflenet(
    name: str,
    stages: Sequence[Stage],
    *,
    classes: int,
    size: int,
    image_channels: int = 3,
    stem_channels: int = 16,
    stem_stride: int = 2,
    head_channels: int = 1024,
    kinds: Sequence[str] = KINDS,
    multipliers: Sequence[float] = MULTIPLIERS,
    multiple: int = 4,
    precisions: Sequence[str] = ("fp32", "w8a8"),
    stem_precisions: Sequence[str] | None = None,
    head_precisions: Sequence[str] | None = None,
) -> SearchSpace:
    """A chain stem, blocks stage by stage, head, for `size` x `size` images.

    Each block chooses its kind, its middle width (in multiples of `multiple`) and its precision.
    With `multipliers=(1.0,)` and one precision it is the search for blocks alone.
    """
    positions = [
        conv_stem(stem_channels, stem_stride, stem_precisions or float_precisions(precisions))
    ]
    for stage in stages:
        widths = rounded_widths(stage.channels // 2, multipliers, multiple)
        for index in range(stage.blocks):
            options: dict[str, Sequence[Any]] = {
                "block": list(kinds),
                "precision": list(precisions),
                "width": widths,
            }
            build = _block(stage.channels, 1 if index else stage.stride)
            positions.append(Position(f"block{len(positions) - 1}", options, build))
    positions.append(
        one_op(
            "head",
            head_precisions or precisions,
            lambda tensor, precision: classifier(
                tensor, head_channels, classes, precision=precision, bias=False
            ),
        )
    )
    return SearchSpace(name, Tensor(image_channels, size, size), tuple(positions), classes)


def shufflenet_224(
    *,
    classes: int,
    image_channels: int = 3,
    size: int = 224,
    multipliers: Sequence[float] = MULTIPLIERS,
    precisions: Sequence[str] = ("fp32", "w8a8"),
) -> SearchSpace:
    """The published space, for photos: 20 blocks, 64 to 640 channels."""
    return shufflenet(
        "shufflenet",
        (Stage(4, 64), Stage(4, 160), Stage(8, 320), Stage(4, 640)),
        classes=classes,
        size=size,
        image_channels=image_channels,
        multipliers=multipliers,
        precisions=precisions,
    )


def shufflenet_tiny(
    *,
    classes: int,
    image_channels: int = 1,
    size: int = 32,
    precisions: Sequence[str] = ("fp32", "w8a8"),
) -> SearchSpace:
    """The preset for small images: six blocks, 32 and 64 channels."""
    return shufflenet(
        "shufflenet-tiny",
        (Stage(2, 32), Stage(4, 64)),
        classes=classes,
        size=size,
        image_channels=image_channels,
        head_channels=128,
        multipliers=(0.5, 1.0, 1.5),
        precisions=precisions,
    )


def _block(channels: int, stride: int) -> Build:
    def build(state: State, values: Mapping[str, Any]) -> Choice:
        kind, precision = values["block"], Precision(values["precision"])
        shape = {"middle": values["width"], "stride": stride}
        op: OpSpec
        if kind == DEEP:
            op = xception_unit(state.tensor, channels, **shape, precision=precision)
        else:
            kernel = KERNELS[kind]
            op = shuffle_unit(state.tensor, channels, kernel=kernel, **shape, precision=precision)
        return Choice(op, State(op.output), kind)

    return build
