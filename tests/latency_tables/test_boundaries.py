"""Boundaries: which chains are measured, and that they tell what ops save inside a network.

The oracle is a device whose costs are stated: what each op takes alone, less what each boundary
between two ops saves.
"""

import itertools
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from hwnas.spaces.mobile import mobile_tiny
from latency_tables.boundaries import (
    LEAST_SHARE,
    Chain,
    chain_key,
    probes,
    savings_us,
    with_heads,
)
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import Host, LatencyTable, Row
from profilers.simulated import CALL_US, op_us
from quant.errors import TableError
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
IMAGE = Tensor(3, 16, 16)
HOST = Host("made up", "none", "1", "c", "f")


def conv(
    source: Tensor | OpSpec, channels: int, kernel: int = 3, precision: Precision = FP32
) -> OpSpec:
    tensor = source.output if isinstance(source, OpSpec) else source
    return conv_norm_activation(
        tensor, channels, kernel=kernel, precision=precision, activation="hard_swish"
    )


def residual(source: Tensor | OpSpec, precision: Precision = FP32, kernel: int = 3) -> OpSpec:
    tensor = source.output if isinstance(source, OpSpec) else source
    op = inverted_residual(tensor, tensor.channels, kernel=kernel, expansion=2, precision=precision)
    assert op.adds(0)
    return op


def head(source: OpSpec, precision: Precision = FP32) -> OpSpec:
    return classifier(source.output, 8, 4, precision=precision)


@pytest.fixture(scope="module")
def tiny() -> SearchSpace:
    return mobile_tiny(classes=10)


# ---- what a boundary is


def test_a_boundary_is_the_tensor_whether_it_is_added_and_the_precision() -> None:
    stem = conv(IMAGE, 8)
    assert conv(stem, 8).boundary == conv(stem, 16, kernel=5).boundary == "fp32:8x16x16 > fp32"
    assert head(stem).boundary == conv(stem, 8).boundary
    assert residual(stem).boundary == "fp32:8x16x16 added > fp32"
    assert residual(stem, kernel=7).boundary == residual(stem).boundary
    others = [
        conv(stem, 8),
        residual(stem),
        conv(stem, 8, precision=W8A8),
        residual(stem, W8A8),
        conv(conv(IMAGE, 16), 8),
        conv(conv(IMAGE, 8, precision=W8A8), 8),
        conv(Tensor(8, 16, 16, Format.parse("fp32+")), 8),
        conv(Tensor(8, 15, 16), 8),
    ]
    assert len({op.boundary for op in others}) == len(others)


# ---- probes


def test_the_cheapest_producer_is_the_head_and_the_cheapest_op_the_end() -> None:
    large, small = conv(IMAGE, 8, kernel=7), conv(IMAGE, 8, kernel=1)
    costly, cheap = conv(large, 32), conv(large, 16)
    for ops in ([large, small, costly, cheap], [small, large, cheap, costly]):
        assert probes(ops) == {cheap.boundary: (small, cheap)}


def test_an_op_on_the_image_has_no_probe() -> None:
    assert probes([conv(IMAGE, 8), conv(IMAGE, 16)]) == {}
    assert probes([]) == {}


def test_a_head_that_adds_its_input_stands_behind_a_producer_of_its_own() -> None:
    """Only the residual block hands on codes of 8 channels: three ops are the shortest chain."""
    stem = conv(IMAGE, 8)
    block = residual(stem, W8A8)
    after = conv(block, 16, precision=W8A8)
    assert probes([stem, block, after]) == {
        block.boundary: (stem, block),
        after.boundary: (stem, block, after),
    }


def test_the_shortest_head_is_taken_whatever_it_costs() -> None:
    stem = conv(IMAGE, 8, kernel=1)
    block = residual(stem, W8A8)
    straight = conv(IMAGE, 8, kernel=7, precision=W8A8)
    assert straight.output == block.output
    assert straight.macs > stem.macs + block.macs
    after = conv(block, 16, precision=W8A8)
    for ops in ([stem, block, straight, after], [straight, stem, block, after]):
        assert probes(ops)[after.boundary] == (straight, after)


def test_residual_blocks_stand_on_each_other_where_nothing_shorter_makes_the_tensor() -> None:
    """The second makes what the stem does, too, so that what follows it needs the stem alone."""
    stem = conv(IMAGE, 8)
    first = residual(stem, W8A8)
    second = residual(first, FP32)
    assert second.output == stem.output
    last = head(second, W8A8)
    found = probes([stem, first, second, last])
    assert found[second.boundary] == (stem, first, second)
    assert found[last.boundary] == (stem, last)


def test_a_residual_block_on_the_image_is_no_head() -> None:
    """First in a graph it does not run as it does inside a network; so nothing can follow it."""
    block = residual(Tensor(8, 16, 16))
    after = conv(block, 16)
    assert after.inputs == block.inputs
    assert probes([block, after]) == {}
    stem = conv(IMAGE, 8)
    assert probes([block, stem, after]) == {
        block.boundary: (stem, block), after.boundary: (stem, after),
    }  # fmt: skip


def test_every_boundary_inside_a_network_of_a_space_has_a_probe(tiny: SearchSpace) -> None:
    """And each probe is a chain: every op takes what the one before it hands on."""
    found = probes(tiny.lattice.ops)
    assert found.keys() == {op.boundary for op in tiny.lattice.ops} - {"fp32:1x32x32 > fp32"}
    for boundary, chain in found.items():
        assert chain[-1].boundary == boundary
        assert 2 <= len(chain) <= 3
        assert not chain[0].adds(0)
        assert all(op.inputs == (before.output,) for before, op in itertools.pairwise(chain))
        assert set(chain) <= set(tiny.lattice.ops)
    assert probes(tiny.lattice.ops) == found


def test_what_must_be_measured_is_each_chain_and_its_head_once() -> None:
    a, b, c = conv(IMAGE, 8), conv(conv(IMAGE, 8), 16), head(conv(IMAGE, 16))
    assert with_heads([(a, b, c), (a, b)]) == [(a, b), (a, b, c)]
    assert with_heads([(a, b), (a, b)]) == [(a, b)], "an op alone is a row"
    assert with_heads([]) == with_heads([(a,)]) == []


def test_a_chains_key_is_that_of_its_ops_in_order() -> None:
    a, b = conv(IMAGE, 8), conv(conv(IMAGE, 8), 16)
    assert chain_key((a,)) == a.key
    assert len({chain_key(chain) for chain in ((a,), (b,), (a, b), (b, a), (a, a, b))}) == 5


# ---- savings on a device of stated costs


class Stated:
    """A device on which ops cost alone what is drawn for each, and each boundary saves what is
    drawn for it; `most` of the least that an op of the boundary costs alone.
    """

    def __init__(self, ops: Iterable[OpSpec], seed: int = 0, most: float = 0.8) -> None:
        rng = np.random.default_rng(seed)
        self.alone = {op.key: float(rng.uniform(5, 200)) for op in ops}
        self.saved: dict[str, float] = {}
        least: dict[str, float] = {}
        for op in ops:
            least[op.boundary] = min(least.get(op.boundary, np.inf), self.alone[op.key])
        for boundary, us in least.items():
            self.saved[boundary] = float(rng.uniform(-0.3, most)) * us

    def us(self, chain: Sequence[OpSpec]) -> float:
        alone = sum(self.alone[op.key] for op in chain)
        return alone - sum(self.saved[op.boundary] for op in chain[1:])

    def table(self, ops: Iterable[OpSpec], chains: Iterable[Chain]) -> LatencyTable:
        found = LatencyTable(HOST, {})
        for chain in [*((op,) for op in ops), *chains]:
            texts = json.dumps([op.to_json() for op in chain])
            row = Row(
                chain_key(chain), texts, chain[-1].precision.name, *[self.us(chain)] * 5,
                0.0, 9, True,
            )  # fmt: skip
            (found.rows if len(chain) == 1 else found.chains)[row.key] = row
        return found


@pytest.mark.parametrize("seed", range(3))
def test_the_savings_of_a_device_of_stated_costs_are_found(tiny: SearchSpace, seed: int) -> None:
    """Also those that are losses, and those behind chains of three."""
    ops = tiny.lattice.ops
    device = Stated(ops, seed)
    chains = probes(ops)
    assert {len(chain) for chain in chains.values()} == {2, 3}
    table = device.table(ops, with_heads(chains.values()))
    wanted = {boundary: device.saved[boundary] for boundary in chains}
    assert min(wanted.values()) < 0 < max(wanted.values())
    assert table.savings_us() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_the_costs_of_ops_inside_a_network_sum_to_what_the_network_takes(
    tiny: SearchSpace,
) -> None:
    ops = tiny.lattice.ops
    device = Stated(ops)
    table = device.table(ops, with_heads(probes(ops).values()))
    sampler, rng = UniformSampler(tiny), np.random.default_rng(0)
    for _ in range(30):
        network = tiny.lower(sampler.sample(rng))
        inside = table.in_network_us(network)
        assert sum(inside) == pytest.approx(device.us(network), rel=1e-9)
        assert inside[0] == device.alone[network[0].key], "nothing stands before the first"
    assert inside == [table.in_network_us([op])[0] for op in network], "each has one price"


def test_an_op_inside_a_network_costs_at_least_a_share_of_what_it_costs_alone() -> None:
    """Where a row was measured too short against its boundary, a price is still positive."""
    stem, small = conv(IMAGE, 8), conv(conv(IMAGE, 8), 16)
    large = conv(stem, 32)
    device = Stated([stem, small, large])
    device.alone |= {small.key: 100.0, large.key: 10.0}
    device.saved[small.boundary] = 60.0
    table = device.table([stem, small, large], [(stem, small)])
    assert table.in_network_us([small, large]) == pytest.approx([40.0, LEAST_SHARE * 10.0])


def test_the_saving_of_a_boundary_is_the_median_over_its_chains() -> None:
    stem = conv(IMAGE, 8)
    ends = [conv(stem, channels) for channels in (16, 32, 48)]
    device = Stated([stem, *ends])
    costs = {chain_key(c): device.us(c) for c in [(stem,), *((end,) for end in ends)]}
    for end, saved in zip(ends, (7.0, 90.0, 4.0), strict=True):
        costs[chain_key((stem, end))] = costs[stem.key] + costs[end.key] - saved
    pairs = [(stem, end) for end in ends]
    assert savings_us(costs, pairs) == {ends[0].boundary: pytest.approx(7.0)}
    assert savings_us(costs, pairs[:2]) == {ends[0].boundary: pytest.approx(48.5)}


def test_a_chain_tells_nothing_until_its_head_and_its_end_are_measured() -> None:
    stem = conv(IMAGE, 8)
    block = residual(stem, W8A8)
    after = conv(block, 16, precision=W8A8)
    ops, device = [stem, block, after], Stated([stem, block, after])
    whole = device.table(ops, [(stem, block), (stem, block, after)])
    assert whole.savings_us().keys() == {block.boundary, after.boundary}
    headless = device.table(ops, [(stem, block, after)])
    assert headless.savings_us() == {}
    endless = device.table([stem, block], [(stem, block), (stem, block, after)])
    assert endless.savings_us().keys() == {block.boundary}
    with pytest.raises(TableError, match="no row for"):
        endless.in_network_us(ops)


def test_the_simulated_device_saves_its_call_at_every_boundary(tiny: SearchSpace) -> None:
    ops = tiny.lattice.ops
    chains = probes(ops)
    costs = {
        chain_key(chain): CALL_US + sum(map(op_us, chain))
        for chain in [*((op,) for op in ops), *with_heads(chains.values())]
    }
    found = savings_us(costs, chains.values())
    assert found.keys() == chains.keys()
    assert list(found.values()) == pytest.approx([CALL_US] * len(chains), rel=1e-12)
