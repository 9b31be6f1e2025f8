"""The `mobile` space: inverted residuals, with blocks, widths and precisions chosen together."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hwnas.spaces.base import Build, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, inverted_residual
from hwnas.spaces.parts import conv_stem, float_precisions, one_op
from latency_tables.ops import Tensor
from quant.errors import InvalidInput
from quant.precision import Precision

SKIP = "skip"
PRECISIONS = ("fp32", "w8a8")
"""What is searched unless another choice is named."""


@dataclass(frozen=True)
class Stage:
    """Blocks of one output width; the first has the stride. `squeeze` as in inverted_residual."""

    blocks: int
    stride: int
    widths: tuple[int, ...]
    squeeze: int = 0
    activation: str = "relu"


def mobile(
    name: str,
    stages: Sequence[Stage],
    *,
    classes: int,
    size: int,
    image_channels: int = 3,
    stem_channels: int = 16,
    stem_stride: int = 2,
    head_channels: int = 128,
    kernels: Sequence[int] = (3, 5, 7),
    expansions: Sequence[int] = (3, 6),
    precisions: Sequence[str] = PRECISIONS,
    stem_precisions: Sequence[str] | None = None,
    head_precisions: Sequence[str] | None = None,
    skip: bool = True,
) -> SearchSpace:
    """A chain stem, blocks stage by stage, head, for `size` x `size` images.

    Each block chooses its kernel and expansion, or a skip where the stage's widths and the stride
    allow it, and its precision; the first block of a stage chooses the stage's width. The head
    chooses its precision.
    """
    kinds = [(kernel, expansion) for kernel in kernels for expansion in expansions]
    blocks = {f"k{kernel}e{expansion}": (kernel, expansion) for kernel, expansion in kinds}
    if skip:
        _refuse_ambiguous(name, stages)
    positions = [
        conv_stem(stem_channels, stem_stride, stem_precisions or float_precisions(precisions))
    ]
    number = 0
    for stage in stages:
        for index in range(stage.blocks):
            first = index == 0
            options: dict[str, Sequence[Any]] = {
                "block": [*blocks, *([SKIP] if skip and (stage.stride == 1 or not first) else [])],
                "precision": list(precisions),
            }
            if first:
                options["width"] = list(stage.widths)
            positions.append(
                Position(
                    f"block{number}", options, _block(stage, stage.stride if first else 1, blocks)
                )
            )
            number += 1
    positions.append(
        one_op(
            "head",
            head_precisions or precisions,
            lambda tensor, precision: classifier(
                tensor, head_channels, classes, precision=precision
            ),
        )
    )
    return SearchSpace(name, Tensor(image_channels, size, size), tuple(positions), classes)


def mobile_tiny(
    *,
    classes: int,
    image_channels: int = 1,
    size: int = 32,
    precisions: Sequence[str] = PRECISIONS,
) -> SearchSpace:
    """The preset for small images: six blocks, 16 to 96 channels, in multiples of 16."""
    return mobile(
        "mobile-tiny",
        (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48)), Stage(3, 2, (64, 96))),
        classes=classes,
        size=size,
        image_channels=image_channels,
        precisions=precisions,
    )


def mobile_224(
    *,
    classes: int,
    image_channels: int = 3,
    size: int = 224,
    precisions: Sequence[str] = PRECISIONS,
) -> SearchSpace:
    """The preset for photos: 18 blocks, 16 to 192 channels, squeeze-excite in three of six stages.

    After MobileNetV3-Large's depth and strides (Howard et al. 2019, table 1), with relu throughout:
    ONNX Runtime has no integer kernel for h-swish. Widths are near its own, in multiples of 16:
    vector units take 16 channels at once, so that 24 cost them what 32 do.
    """
    return mobile(
        "mobile",
        (
            Stage(1, 1, (16,)),
            Stage(3, 2, (16, 32, 48)),
            Stage(4, 2, (32, 48, 64), squeeze=4),
            Stage(4, 2, (64, 80, 96)),
            Stage(3, 1, (96, 112, 128), squeeze=4),
            Stage(3, 2, (128, 160, 192), squeeze=4),
        ),
        classes=classes,
        size=size,
        image_channels=image_channels,
        head_channels=960,
        precisions=precisions,
    )


def _refuse_ambiguous(name: str, stages: Sequence[Stage]) -> None:
    """Four stages in a row without a stride, with widths that overlap in part, could spell one
    network in two ways that moving a single block does not show.
    """
    run: list[set[int]] = []
    for stage in stages:
        run = [*run, set(stage.widths)] if stage.stride == 1 else [set(stage.widths)]
        partly = any(a != b and a & b for a, b in itertools.combinations(run, 2))
        if len(run) > 3 and partly:
            raise InvalidInput(
                f"The space {name} has four stages in a row without a stride whose widths overlap "
                "in part, so that one network would be several architectures.",
                accepted="at most three such stages, equal widths, or skip=False",
            )


def _block(stage: Stage, stride: int, blocks: Mapping[str, tuple[int, int]]) -> Build:
    kind = f"{stage.activation} squeeze {stage.squeeze}"

    def build(state: State, values: Mapping[str, Any]) -> Choice | None:
        tensor = state.tensor
        if values["block"] == SKIP:
            if stride > 1 or tensor.channels not in stage.widths:
                return None
            here = stage.widths if "width" in values else (tensor.channels,)
            movable = {(k, width) for k, width in state.skipped if width in stage.widths}
            return Choice(None, State(tensor, frozenset(movable | {(kind, w) for w in here})))
        channels = values.get("width", tensor.channels)
        if stride == 1 and (kind, channels) in state.skipped:
            return None
        kernel, expansion = blocks[values["block"]]
        op = inverted_residual(
            tensor,
            channels,
            kernel=kernel,
            expansion=expansion,
            stride=stride,
            precision=Precision(values["precision"]),
            activation=stage.activation,
            squeeze=stage.squeeze,
        )
        return Choice(op, State(op.output), values["block"])

    return build
