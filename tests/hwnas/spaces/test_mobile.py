from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.costs.feasible import reachable
from hwnas.costs.limits import counted_cost
from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from hwnas.spaces.mobile import Stage, mobile, mobile_224, mobile_tiny
from latency_tables.ops import OpSpec, Tensor
from quant.errors import InvalidInput
from quant.precision import Precision

Chain = tuple[str, ...]


def physical_chains(
    stages: Sequence[Stage],
    *,
    kernels: Sequence[int],
    expansions: Sequence[int],
    precisions: Sequence[str],
    skip: bool = True,
) -> set[Chain]:
    """Every op chain that can be built, however many ways there are to say it.

    An independent enumeration: no states, no genes, no canonical form. A block may be left out
    where its stride is 1 and the incoming width is one of its stage's.
    """
    blocks = [(s, s.stride if i == 0 else 1, i == 0) for s in stages for i in range(s.blocks)]

    def grow(number: int, tensor: Tensor) -> Iterator[Chain]:
        if number == len(blocks):
            for p in precisions:
                yield (classifier(tensor, 128, 4, precision=Precision(p)).key,)
            return
        stage, stride, first = blocks[number]
        if skip and stride == 1 and tensor.channels in stage.widths:
            yield from grow(number + 1, tensor)
        for width in stage.widths if first else (tensor.channels,):
            for kernel in kernels:
                for expansion in expansions:
                    for p in precisions:
                        op = inverted_residual(
                            tensor,
                            width,
                            kernel=kernel,
                            expansion=expansion,
                            stride=stride,
                            precision=Precision(p),
                            activation=stage.activation,
                            squeeze=stage.squeeze,
                        )
                        for rest in grow(number + 1, op.output):
                            yield (op.key, *rest)

    stem = conv_norm_activation(
        Tensor(3, 16, 16), 16, kernel=3, stride=2, precision=Precision("fp32")
    )
    return {(stem.key, *rest) for rest in grow(0, stem.output)}


def build(stages: Sequence[Stage], **options: Any) -> SearchSpace:
    return mobile("t", stages, classes=4, size=16, **options)


def assert_architectures_are_the_physical_networks(stages: Sequence[Stage], **options: Any) -> None:
    space = build(stages, **options)
    listed = list(space.enumerate())
    chains = [tuple(op.key for op in space.lower(a)) for a in listed]
    expected = physical_chains(stages, **options)
    assert set(chains) == expected, "some network cannot be said, or an illegal one can"
    assert len(set(listed)) == len(listed)
    assert len(set(chains)) == len(chains), "one network is two architectures"
    assert space.count == len(expected)


SMALL = {"kernels": (3,), "expansions": (3,), "precisions": ("fp32",)}
TWO_BITS = {**SMALL, "precisions": ("fp32", "w8a8")}


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        pytest.param((Stage(1, 2, (24,)),), SMALL, id="one block, nothing to choose"),
        pytest.param((Stage(1, 1, (16,)),), SMALL, id="one block or none"),
        pytest.param((Stage(3, 1, (16,)),), TWO_BITS, id="three alike"),
        pytest.param((Stage(2, 1, (16, 24)), Stage(1, 2, (32,))), TWO_BITS, id="then a stride"),
        pytest.param(
            (Stage(2, 1, (16, 24)), Stage(2, 1, (16, 24)), Stage(1, 2, (32,))),
            TWO_BITS,
            id="adjacent stages with the same widths",
        ),
        pytest.param(
            (Stage(2, 1, (16, 24)), Stage(1, 1, (16, 32)), Stage(2, 1, (16, 24, 32))),
            TWO_BITS,
            id="adjacent stages with overlapping widths",
        ),
        pytest.param(
            (Stage(2, 1, (16, 24)), Stage(1, 1, (32,)), Stage(2, 1, (24, 32))),
            TWO_BITS,
            id="a stage between that cannot be skipped at every width",
        ),
        pytest.param(
            (Stage(1, 1, (16, 24)), Stage(1, 1, (16,), squeeze=4), Stage(2, 1, (16, 24))),
            {**SMALL, "kernels": (3, 5)},
            id="squeeze in one stage between two without",
        ),
        pytest.param(
            (
                Stage(1, 1, (16, 24)),
                Stage(2, 1, (16, 24), squeeze=4),
                Stage(2, 1, (16, 24)),
                Stage(1, 2, (24, 32)),
            ),
            SMALL,
            id="squeeze in a longer chain",
        ),
        pytest.param(
            (Stage(2, 1, (16, 24)), Stage(2, 1, (16, 24), activation="relu6")),
            TWO_BITS,
            id="stages that differ in their activation",
        ),
        pytest.param(
            (Stage(2, 1, (16, 24)), Stage(1, 2, (24, 32))),
            {**TWO_BITS, "skip": False},
            id="no skips",
        ),
        pytest.param(
            (Stage(1, 1, (16, 24)), Stage(1, 2, (32,))),
            {"kernels": (3, 5), "expansions": (1, 6), "precisions": ("fp32", "w8a8", "w4a4")},
            id="every kind of choice",
        ),
        pytest.param(
            tuple(Stage(1, 1, (16, 24)) for _ in range(5)),
            SMALL,
            id="five stages of stride 1 with the same widths",
        ),
    ],
)
def test_architectures_are_the_physical_networks(
    stages: Sequence[Stage], options: dict[str, Any]
) -> None:
    assert_architectures_are_the_physical_networks(stages, **options)


def test_four_stages_of_stride_1_whose_widths_overlap_in_part_are_refused() -> None:
    """16 -> 24 -> 32 could stand in stages 0 and 1, or in 2 and 3, and in no step between."""
    stages = tuple(Stage(1, 1, widths) for widths in ((16, 24), (16, 32), (24, 32), (32,)))
    with pytest.raises(InvalidInput, match="four stages in a row"):
        build(stages, **SMALL)
    build(stages, **SMALL, skip=False)


stage = st.builds(
    Stage,
    blocks=st.integers(1, 2),
    stride=st.sampled_from((1, 1, 2)),
    widths=st.sets(st.sampled_from((16, 24, 32)), min_size=1).map(sorted).map(tuple),
    squeeze=st.sampled_from((0, 0, 4)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(stages=st.lists(stage, min_size=1, max_size=3))
def test_architectures_of_any_three_stages_are_the_physical_networks(stages: list[Stage]) -> None:
    assert_architectures_are_the_physical_networks(stages, **SMALL)


@pytest.fixture(scope="module")
def skipping() -> SearchSpace:
    stages = (Stage(2, 1, (16, 24)), Stage(2, 1, (16, 24), squeeze=4), Stage(2, 2, (32,)))
    return build(stages, **TWO_BITS)


def test_the_other_genes_of_a_skipped_block_are_zero(skipping: SearchSpace) -> None:
    names = [gene.name for gene in skipping.genes]
    skips = 0
    for architecture in skipping.enumerate():
        told = skipping.describe(architecture)
        placed = {item.position for item in skipping.walk(architecture)}
        for position in skipping.positions:
            skipped = told.get(f"{position.name}.block") == "skip"
            assert skipped == (position.name not in placed)
            if skipped:
                skips += 1
                others = [n for n in names if n.startswith(f"{position.name}.")][1:]
                assert all(architecture.genes[names.index(n)] == 0 for n in others)
    assert skips > 0


def test_a_block_with_a_stride_has_no_skip(skipping: SearchSpace) -> None:
    choices = {gene.name: gene.choices for gene in skipping.genes}
    assert [("skip" in choices[f"block{i}.block"]) for i in range(4)] == [True] * 4
    assert "block4.block" not in choices, "one kernel, one expansion and no skip: no gene"
    assert "skip" in choices["block5.block"]


def test_what_is_described_is_what_is_built(tiny: SearchSpace) -> None:
    told = {
        "block0.block": "k7e6",
        "block0.precision": "w8a8",
        "block0.width": "32",
        "block1.block": "k5e3",
        "block1.precision": "fp32",
        "block1.width": "48",
        "block2.block": "skip",
        "block2.precision": "fp32",
        "block3.block": "k3e6",
        "block3.precision": "w8a8",
        "block3.width": "64",
        "block4.block": "k3e3",
        "block4.precision": "w8a8",
        "block5.block": "skip",
        "block5.precision": "fp32",
        "head.precision": "w8a8",
    }
    walked = tiny.walk(tiny.parse(told))
    assert [p.position for p in walked] == ["stem", "block0", "block1", "block3", "block4", "head"]
    assert [p.op.precision.name for p in walked] == ["fp32", "w8a8", "fp32", "w8a8", "w8a8", "w8a8"]
    assert [p.op.output.channels for p in walked] == [16, 32, 48, 64, 64, 10]
    assert [p.op.output.height for p in walked] == [16, 16, 8, 4, 4, 1]
    assert [p.group for p in walked] == ["", "k7e6", "k5e3", "k3e6", "k3e3", ""]
    depthwise = [layer.kernel for p in walked for layer in p.op.layers if layer.groups > 1]
    assert depthwise == [7, 5, 3, 3]


def test_the_preset_follows_its_arguments() -> None:
    space = mobile_tiny(classes=7, image_channels=3, size=48)
    ops = space.lower(next(space.enumerate()))
    assert ops[0].inputs == (Tensor(3, 48, 48),)
    assert ops[-1].output.channels == space.classes == 7
    assert ops[-1].logits
    assert not any(op.logits for op in ops[:-1])


def test_the_head_precisions_are_the_blocks_unless_given() -> None:
    stages = (Stage(1, 2, (16,)),)
    usual = build(stages, precisions=("fp32", "w8a8"))
    given_ = build(stages, precisions=("fp32", "w8a8"), head_precisions=("fp16",))
    assert [g.choices for g in usual.genes if g.name == "head.precision"] == [("fp32", "w8a8")]
    assert not any(g.name == "head.precision" for g in given_.genes)
    assert given_.lower(next(given_.enumerate()))[-1].precision == Precision("fp16")


# ---- the presets

STAGES_TINY = (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48)), Stage(3, 2, (64, 96)))
STAGES_224 = (
    Stage(1, 1, (16,)),
    Stage(3, 2, (16, 32, 48)),
    Stage(4, 2, (32, 48, 64), squeeze=4),
    Stage(4, 2, (64, 80, 96)),
    Stage(3, 1, (96, 112, 128), squeeze=4),
    Stage(3, 2, (128, 160, 192), squeeze=4),
)
"""Written again on purpose: what the presets are meant to be."""


def physical_count(stages: Sequence[Stage], image: Tensor, head: int, classes: int) -> int:
    """How many op chains can be built, as `physical_chains` does, counted and not listed.

    Chains that can be built in several ways are one: a set of places in the network stands for all
    ways to have built what is there so far (the subset construction of automata theory).
    """
    blocks = [(s, s.stride if i == 0 else 1, i == 0) for s in stages for i in range(s.blocks)]
    precisions = [Precision("fp32"), Precision("w8a8")]
    Place = tuple[int, Tensor]  # noqa: N806 (a type)

    @cache
    def block(number: int, tensor: Tensor) -> dict[str, Place]:
        stage, stride, first = blocks[number]
        ops = [
            inverted_residual(
                tensor,
                width,
                kernel=kernel,
                expansion=expansion,
                stride=stride,
                precision=precision,
                activation=stage.activation,
                squeeze=stage.squeeze,
            )
            for width in (stage.widths if first else (tensor.channels,))
            for kernel in (3, 5, 7)
            for expansion in (3, 6)
            for precision in precisions
        ]
        return {op.key: (number + 1, op.output) for op in ops}

    @cache
    def ways(places: frozenset[Place]) -> int:
        after: dict[str, set[Place]] = {}
        heads: set[str] = set()
        for start, tensor in places:
            for number in range(start, len(blocks) + 1):
                if number == len(blocks):
                    heads |= {
                        classifier(tensor, head, classes, precision=p).key for p in precisions
                    }
                    break
                for key, place in block(number, tensor).items():
                    after.setdefault(key, set()).add(place)
                stage, stride, _ = blocks[number]
                if stride > 1 or tensor.channels not in stage.widths:
                    break
        return len(heads) + sum(ways(frozenset(places)) for places in after.values())

    stem = conv_norm_activation(image, 16, kernel=3, stride=2, precision=Precision("fp32"))
    return ways(frozenset({(0, stem.output)}))


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_presets_architectures_are_the_physical_networks_each_once(classes: int) -> None:
    """Far too many to list: counted by an automaton that knows no genes and no canonical form."""
    tiny = mobile_tiny(classes=classes)
    assert tiny.count == physical_count(STAGES_TINY, Tensor(1, 32, 32), 128, classes)
    space = mobile_224(classes=classes)
    assert space.count == physical_count(STAGES_224, Tensor(3, 224, 224), 960, classes)
    assert space.count > 1e22


def test_the_counting_automaton_counts_what_the_list_holds() -> None:
    stages = (Stage(1, 1, (16, 24)), Stage(1, 1, (16, 24), squeeze=4), Stage(1, 1, (16,)))
    space = mobile("t", stages, classes=4, size=16)
    chains = {tuple(op.key for op in space.lower(a)) for a in space.enumerate()}
    assert physical_count(stages, Tensor(3, 16, 16), 128, 4) == len(chains) == space.count


@pytest.fixture(scope="module")
def photos() -> SearchSpace:
    return mobile_224(classes=1000)


def stage_of(position: str) -> int:
    starts = np.cumsum([stage.blocks for stage in STAGES_224])
    return int(np.searchsorted(starts, int(position.removeprefix("block")), side="right"))


def test_the_preset_for_photos_has_18_blocks_and_few_rows(photos: SearchSpace) -> None:
    names = [position.name for position in photos.positions]
    assert names == ["stem", *(f"block{number}" for number in range(18)), "head"]
    keys = {step.op.key for level in photos.lattice.levels for step in level.steps if step.op}
    assert 1000 < len(keys) == len(photos.lattice.ops) <= 2500


def test_squeeze_excite_stands_in_its_three_stages_and_in_no_other(photos: SearchSpace) -> None:
    squeezing = set()
    for position, level in zip(photos.positions, photos.lattice.levels, strict=True):
        gated = {
            any(layer.kind == "mul" for layer in step.op.layers) for step in level.steps if step.op
        }
        assert len(gated) == 1
        if gated == {True}:
            squeezing.add(stage_of(position.name))
    assert squeezing == {2, 4, 5}
    widths = {
        (layer.channels, step.op.layers[0].channels)
        for position, level in zip(photos.positions[1:-1], photos.lattice.levels[1:-1], strict=True)
        for step in level.steps
        if step.op
        for layer in step.op.layers
        if layer.role == "squeeze"
    }
    assert widths
    assert all(squeezed == hidden // 4 for squeezed, hidden in widths)


def test_each_stage_has_its_resolution_and_its_widths(photos: SearchSpace) -> None:
    sides = [112, 56, 28, 14, 14, 7]  # of 224, halved by the stem and by four stages
    for position, level in zip(photos.positions[1:-1], photos.lattice.levels[1:-1], strict=True):
        stage = stage_of(position.name)
        outputs = {step.op.output for step in level.steps if step.op}
        assert {(output.height, output.width) for output in outputs} == {(sides[stage],) * 2}
        assert {output.channels for output in outputs} == set(STAGES_224[stage].widths)
        chooses_width = any(gene.name.endswith(".width") for gene in position.genes)
        can_skip = any(step.op is None for step in level.steps)
        assert can_skip == (STAGES_224[stage].stride == 1 or not chooses_width)


def test_the_preset_reaches_below_and_above_the_published_network(photos: SearchSpace) -> None:
    """MobileNetV3-Large 1.0: 219 million MACs, 5.4 million parameters (Howard et al. 2019, table 3)
    at 224 x 224 and 1,000 classes.
    """
    macs = reachable(photos, counted_cost(photos, "macs"))
    params = reachable(photos, counted_cost(photos, "params"))
    assert macs.smallest < 219e6 / 3 < 3 * 219e6 < macs.largest
    assert params.smallest < 5.4e6 < params.largest
    assert macs.smallest > 1e7
    assert macs.largest < 1e9


def depth_of(ops: Sequence[OpSpec]) -> int:
    return len(ops) - 2


def test_random_networks_of_the_preset_are_canonical_and_chain_up(photos: SearchSpace) -> None:
    sampler, rng = UniformSampler(photos), np.random.default_rng(0)
    depths = set()
    for _ in range(200):
        architecture = sampler.sample(rng)
        assert photos.architecture(architecture.genes) == architecture
        assert photos.parse(photos.describe(architecture)) == architecture
        ops = photos.lower(architecture)
        tensor = photos.input
        for op in ops:
            assert op.inputs == (tensor,)
            tensor = op.output
        assert (tensor.channels, tensor.height) == (1000, 1)
        depths.add(depth_of(ops))
    assert len(depths) > 5
    assert max(depths) <= 18
