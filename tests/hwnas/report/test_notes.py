"""What is said of a search's precisions, against costs that are set by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from hwnas.costs.limits import AdditiveCost
from hwnas.report.notes import notes
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.ops import OpSpec
from profilers.sizes import file_bytes
from quant.precision import Precision

PRECISIONS = ("fp32", "w8a8", "w4a8", "w2a8", "w5a8", "w8a4")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return mobile(
        "noted", (Stage(3, 2, (16,)),), classes=4, size=16, kernels=(3,), expansions=(3, 6),
        precisions=PRECISIONS,
    )  # fmt: skip


def network(space: SearchSpace, *precisions: str) -> Architecture:
    """Three blocks and the head at the given precisions, the stem in fp32."""
    places = ("block0", "block1", "block2", "head")
    chosen = {f"{place}.precision": p for place, p in zip(places, precisions, strict=True)}
    return space.parse({gene.name: gene.choices[0] for gene in space.genes} | chosen)


def priced(space: SearchSpace, price: Callable[[OpSpec], float]) -> AdditiveCost:
    per_op = np.array([price(op.executed) for op in space.lattice.ops])
    return AdditiveCost("latency_ms", per_op, float, float, float)


def by_kernel(op: OpSpec) -> float:
    """Integer kernels twice as fast; fewer bits of activations cost a little."""
    if not op.precision.is_integer:
        return 10.0
    return 5.0 if op.precision.activation_bits == 8 else 5.5


def test_nothing_is_said_where_every_precision_is_faster(space: SearchSpace) -> None:
    cost = priced(space, by_kernel)
    assert notes(space, network(space, "w8a8", "w8a8", "w8a8", "w8a8"), cost) == []
    assert notes(space, network(space, "fp32", "w8a8", "fp32", "fp32"), cost) == []


def test_a_precision_that_runs_as_another_buys_bytes_and_no_time(space: SearchSpace) -> None:
    architecture = network(space, "w4a8", "w8a8", "w4a8", "w2a8")
    placed = {each.position: each.op for each in space.walk(architecture)}

    def saved(*places: str) -> int:
        ops = [placed[place] for place in places]
        return sum(file_bytes(op.executed) - file_bytes(op) for op in ops)

    found = notes(space, architecture, priced(space, by_kernel))
    assert found == [
        f"w4a8 buys bytes ({saved('block0', 'block2'):,}), not time: "
        "2 ops run in the kernels of w8a8 (block0, block2).",
        f"w2a8 buys bytes ({saved('head'):,}), not time: 1 op runs in the kernels of w8a8 (head).",
    ]
    assert saved("head") > 900


def test_five_bits_are_stored_in_eight_and_buy_nothing(space: SearchSpace) -> None:
    architecture = network(space, "w8a8", "w8a8", "w8a8", "w5a8")
    assert notes(space, architecture, priced(space, by_kernel)) == [
        "w5a8 buys neither bytes nor time: 1 op runs in the kernels of w8a8 (head)."
    ]


def test_integer_kernels_that_are_no_faster_are_told_with_their_places(
    space: SearchSpace,
) -> None:
    """Where the input is float, an integer row is dear here. block2 has such an input too, but
    spares the head after it one. Low-bit weights are as their row."""

    def price(op: OpSpec) -> float:
        entered = not op.inputs[0].format.is_quantised and op.precision.is_integer
        return by_kernel(op) + (6.0 if entered else 0.0)

    architecture = network(space, "w4a8", "fp32", "w8a8", "w8a8")
    found = notes(space, architecture, priced(space, price))
    assert found[1:] == ["By the table, int8 is no faster than fp32 here: block0."]
    assert "w4a8 buys bytes" in found[0]
    found = notes(space, network(space, "w8a8", "fp32", "w8a8", "fp32"), priced(space, price))
    assert found == ["By the table, int8 is no faster than fp32 here: block0, block2."]


def test_a_change_is_priced_in_the_whole_network(space: SearchSpace) -> None:
    """A block that is no faster itself but saves its successor a conversion is there for speed."""

    def price(op: OpSpec) -> float:
        entered = not op.inputs[0].format.is_quantised and op.precision.is_integer
        return 10.0 + (1.0 if entered else 0.0)

    cost = priced(space, price)
    between = network(space, "w8a8", "w8a8", "w8a8", "fp32")
    assert notes(space, between, cost) == [
        "By the table, int8 is no faster than fp32 here: block0, block2."
    ], "block1 in fp32 would cost block2 a conversion"


def test_fewer_bits_of_activations_are_held_against_eight(space: SearchSpace) -> None:
    found = notes(space, network(space, "w8a4", "w8a8", "w8a8", "w8a8"), priced(space, by_kernel))
    assert found == ["By the table, w8a4 is no faster than w8a8 here: block0."]


def test_a_change_of_more_than_the_precision_says_nothing_of_it(space: SearchSpace) -> None:
    """Networks at larger expansions cost nothing here; they are no answer to the question."""

    def price(op: OpSpec) -> float:
        wide = max(layer.groups for layer in op.layers) > 3 * op.inputs[0].channels
        return 0.0 if wide else by_kernel(op)

    assert notes(space, network(space, *["w8a8"] * 4), priced(space, price)) == []


def test_precisions_are_those_of_the_space(space: SearchSpace) -> None:
    """Without fp32 among a place's choices, nothing can be said of it."""
    integer = mobile(
        "integer", (Stage(3, 2, (16,)),), classes=4, size=16, kernels=(3,), expansions=(3,),
        precisions=("w8a8", "w4a8"),
    )  # fmt: skip
    assert {op.precision for op in integer.lattice.ops} >= {Precision("w8a8")}
    chosen = integer.architecture([0] * len(integer.genes))
    assert notes(integer, chosen, priced(integer, lambda op: 1.0)) == []
