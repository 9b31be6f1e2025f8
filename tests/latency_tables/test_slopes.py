"""Slopes: which chains are measured, and that they tell what ops cost inside a network.

The oracle is a device whose costs are stated: each op has its own inside a network, and a graph
pays for the call and for bringing what enters it and what leaves it into another layout.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from hwnas.spaces.mobile import mobile_tiny
from latency_tables.boundaries import LEAST_SHARE, Chain, chain_key, probes, savings_us, with_heads
from latency_tables.host import Host
from latency_tables.ops import OpSpec, Tensor
from latency_tables.slopes import Inside, across_boundary, by_chains, hosted, repeated, slope
from latency_tables.table import LatencyTable, Row
from quant.errors import TableError
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
IMAGE = Tensor(3, 16, 16)
INSIDE = Tensor(8, 16, 16)
CODES = Tensor(8, 16, 16, Format.parse("a8"))
REPEATS = (2, 4, 8)


def conv(tensor: Tensor, channels: int = 8, kernel: int = 3, precision: Precision = FP32) -> OpSpec:
    return conv_norm_activation(
        tensor, channels, kernel=kernel, precision=precision, activation="hard_swish"
    )


def residual(tensor: Tensor, precision: Precision = FP32) -> OpSpec:
    op = inverted_residual(tensor, tensor.channels, kernel=3, expansion=2, precision=precision)
    assert op.adds(0)
    return op


def lengths(chains: Iterable[Chain]) -> dict[str, list[int]]:
    """How long the chains of each op are that hold it alone."""
    found: dict[str, list[int]] = {}
    for chain in chains:
        assert len({op.key for op in chain}) == 1
        found.setdefault(chain[0].key, []).append(len(chain))
    return found


@pytest.fixture(scope="module")
def tiny() -> SearchSpace:
    return mobile_tiny(classes=10)


# ---- which chains


def test_an_op_that_hands_on_what_it_takes_is_repeated() -> None:
    again = [conv(INSIDE), residual(INSIDE), residual(CODES, W8A8)]
    assert lengths(repeated([conv(IMAGE), *again], REPEATS)) == {
        op.key: list(REPEATS) for op in again
    }
    assert repeated(again, ()) == []


@pytest.mark.parametrize(
    "op",
    [
        conv(INSIDE, 16),
        residual(INSIDE, W8A8),
        conv(CODES),
        conv_norm_activation(INSIDE, 8, kernel=3, precision=FP32),
        inverted_residual(INSIDE, 8, kernel=3, expansion=2, stride=2, precision=FP32),
        classifier(Tensor(10, 1, 1), 10, 10, precision=FP32),
    ],
    ids=["channels", "to codes", "from codes", "sign", "stride", "logits"],
)
def test_an_op_that_hands_on_anything_else_stands_behind_a_host(op: OpSpec) -> None:
    assert repeated([op], REPEATS) == []
    host = conv_norm_activation(
        IMAGE, op.inputs[0].channels, kernel=1, precision=FP32, activation="hard_swish"
    )
    known = {host.output: host, conv(IMAGE, precision=W8A8).output: conv(IMAGE, precision=W8A8)}
    before = known.get(op.inputs[0]) or replace(host, inputs=(Tensor(3, 1, 1),))
    assert hosted([before, op]) == [(before, op)]


def test_the_host_is_the_cheapest_op_that_makes_the_tensor() -> None:
    costly, cheap = conv(IMAGE, kernel=7), conv(IMAGE, kernel=1)
    ends = [conv(INSIDE, 16), conv(INSIDE, 24, kernel=5)]
    for hosts in ([costly, cheap], [cheap, costly]):
        assert hosted([*hosts, *ends]) == [(cheap, end) for end in ends]


def test_an_op_on_the_image_has_no_host() -> None:
    assert hosted([conv(IMAGE), conv(IMAGE, 16)]) == []
    assert hosted([]) == repeated([], REPEATS) == []


def test_a_host_that_adds_its_input_stands_behind_a_producer_of_its_own() -> None:
    stem = conv(IMAGE)
    block = residual(stem.output, W8A8)
    after = conv(block.output, 16, precision=W8A8)
    assert hosted([stem, block, after]) == [(stem, block), (stem, block, after)]


def test_ops_that_run_alike_are_measured_once() -> None:
    """As they are executed: weights of four bits run in the kernels of eight."""
    some = [residual(CODES, Precision(name)) for name in ("w4a8", "w8a8", "w2a8")]
    assert repeated(some, REPEATS) == repeated([residual(CODES, W8A8)], REPEATS)
    stem = conv(IMAGE)
    ends = [conv(INSIDE, 16, precision=Precision(name)) for name in ("w2a8", "w8a8")]
    assert hosted([stem, *ends]) == [(stem, ends[1])]


def test_every_op_of_a_space_is_repeated_or_hosted_or_stands_on_the_image(
    tiny: SearchSpace,
) -> None:
    """The hosts against every op of the space that makes the tensor, one by one."""
    ops = tiny.lattice.ops
    again = lengths(repeated(ops, REPEATS))
    behind = {chain[-1].key: chain for chain in hosted(ops)}
    for op in ops:
        hosts = [o for o in ops if o.output == op.inputs[0] and not o.adds(0)]
        assert (op.key in again) == (op.output == op.inputs[0])
        if op.key in again or op.inputs[0] == tiny.lattice.ops[0].inputs[0]:
            assert op.key not in behind
        elif hosts:
            host, last = behind[op.key]
            assert last == op
            assert host.macs == min(o.macs for o in hosts)
        else:
            assert len(behind[op.key]) == 3
    assert len(again) > 10
    assert len(behind) > 10


# ---- slopes


@pytest.mark.parametrize("seed", range(10))
def test_a_slope_is_the_line_of_least_squares_with_its_standard_error(seed: int) -> None:
    """Against NumPy's polynomials and SciPy's regression."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice(np.arange(1, 17), int(rng.integers(3, 8)), replace=False)
    costs = rng.uniform(-5, 50) * lengths + rng.normal(40, 10, len(lengths))
    found = slope(lengths.tolist(), costs.tolist())
    assert found.us == pytest.approx(np.polyfit(lengths, costs, 1)[0], rel=1e-9)
    assert found.error_us == pytest.approx(stats.linregress(lengths, costs).stderr, rel=1e-9)
    assert found.way == "slope"


def test_the_standard_error_is_how_far_slopes_scatter() -> None:
    """Over many chains whose noise is the same and known."""
    rng = np.random.default_rng(0)
    found = [slope(REPEATS, 7.0 * np.array(REPEATS) + rng.normal(3, 0.2, 3)) for _ in range(4000)]
    scatter = np.std([one.us for one in found])
    assert np.mean([one.us for one in found]) == pytest.approx(7.0, abs=4 * scatter / 4000**0.5)
    assert np.sqrt(np.mean([one.error_us**2 for one in found])) == pytest.approx(scatter, rel=0.05)


def test_the_order_of_the_lengths_makes_no_difference_and_the_ends_are_none_of_the_slope() -> None:
    one = slope([2, 4, 8], [13.0, 21.0, 38.0])
    other = slope([8, 2, 4], [1038.0, 1013.0, 1021.0])
    assert (one.us, one.error_us) == pytest.approx((other.us, other.error_us), rel=1e-9)
    assert one.error_us > 0.01


def test_copies_tell_a_slope_from_three_lengths_on() -> None:
    op = conv(INSIDE)
    costs = {chain_key((op,) * k): 5.0 + 3.0 * k + (k == 1) for k in (1, 2, 4, 8)}
    copies = repeated([op], REPEATS)
    assert by_chains(costs, copies) == {op.key: Inside(3.0, "slope", pytest.approx(0, abs=1e-9))}
    assert by_chains(costs, copies[:2]) == {op.key: Inside(pytest.approx(2.0), "host")}, (
        "one copy behind another, alone"
    )
    assert by_chains(costs, copies[1:]) == {}


def test_a_host_tells_the_difference_that_an_op_makes_at_the_end_of_its_chain() -> None:
    stem = conv(IMAGE)
    block = residual(stem.output, W8A8)
    after = conv(block.output, 16, precision=W8A8)
    chains = [(stem, block), (stem, block, after)]
    costs = {stem.key: 10.0, chain_key(chains[0]): 14.0, chain_key(chains[1]): 21.5}
    assert by_chains(costs, chains) == {
        block.key: Inside(4.0, "host"), after.key: Inside(7.5, "host"),
    }  # fmt: skip
    assert by_chains(costs, chains[1:]).keys() == {after.key}
    del costs[chain_key(chains[0])]
    assert by_chains(costs, chains[1:]) == {}, "its head was not measured"


def test_of_several_hosts_the_middle_difference_counts() -> None:
    hosts, end = [conv(IMAGE, kernel=kernel) for kernel in (1, 3, 5)], conv(INSIDE, 16)
    costs = {host.key: 10.0 * n for n, host in enumerate(hosts, 1)}
    chains = [(host, end) for host in hosts]
    for chain, us in zip(chains, (7.0, 90.0, 4.0), strict=True):
        costs[chain_key(chain)] = costs[chain[0].key] + us
    assert by_chains(costs, chains) == {end.key: Inside(7.0, "host")}


# ---- tables of a device of stated costs


class Engines:
    """A device whose graphs pay for the call and for both ends, by what enters and leaves; with
    `even` ends all tensors enter and leave alike. A residual block costs more where it is first.
    """

    CALL_US = 11.0
    FIRST_US = 3.0

    def __init__(self, ops: Iterable[OpSpec], *, even: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.inside = {op.key: float(rng.uniform(1, 50)) for op in ops}
        tensors = sorted({str(tensor) for op in ops for tensor in (op.inputs[0], op.output)})
        ends = np.full((len(tensors), 2), 7.0) if even else rng.uniform(7, 8, (len(tensors), 2))
        self.enter, self.leave = (dict(zip(tensors, e, strict=True)) for e in ends.T.tolist())

    def us(self, chain: Chain) -> float:
        ends = self.enter[str(chain[0].inputs[0])] + self.leave[str(chain[-1].output)]
        first = self.FIRST_US * chain[0].adds(0)
        return self.CALL_US + ends + first + sum(self.inside[op.key] for op in chain)

    def table(self, ops: Iterable[OpSpec], *, repeats: tuple[int, ...] = REPEATS) -> LatencyTable:
        """With all that is measured of the ops."""
        ops = list(ops)
        chains = with_heads([*probes(ops).values(), *hosted(ops)])
        told = {"repeats": list(repeats)} if repeats else {}
        found = LatencyTable(Host("made up", "none", "1", "c", "f"), told)
        for chain in [*((op,) for op in ops), *chains, *repeated(ops, REPEATS)]:
            texts = json.dumps([op.to_json() for op in chain])
            row = Row(
                chain_key(chain), texts, chain[-1].precision.name, *[self.us(chain)] * 5,
                0.0, 9, True,
            )  # fmt: skip
            (found.rows if len(chain) == 1 else found.chains)[row.key] = row
        return found


def entering(tiny: SearchSpace) -> set[str]:
    """The ops on the image."""
    image = tiny.lattice.ops[0].inputs
    return {op.key for op in tiny.lattice.ops if op.inputs == image}


@pytest.mark.parametrize("seed", range(3))
def test_slopes_and_hosts_recover_what_ops_cost_inside_a_network(
    tiny: SearchSpace, seed: int
) -> None:
    ops = tiny.lattice.ops
    device = Engines(ops, even=True, seed=seed)
    found = dict(zip([op.key for op in ops], device.table(ops).inside(ops), strict=True))
    first = entering(tiny)
    assert {found[key].way for key in first} == {"alone"}
    assert {cost.way for key, cost in found.items() if key not in first} == {"slope", "host"}
    for key, cost in found.items():
        ends_us = 25.0 if key in first else 0.0
        assert cost.us == pytest.approx(device.inside[key] + ends_us, rel=1e-9)
        assert cost.error_us == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_costs_inside_add_up_to_networks_whatever_their_ends_cost(
    tiny: SearchSpace, seed: int
) -> None:
    """Ends that hang on the tensor: slopes have none, and those of hosts cancel along a network.
    Boundaries alone miss it here, by what a residual block costs more where it is first.
    """
    ops = tiny.lattice.ops
    device = Engines(ops, seed=seed)
    table = device.table(ops)
    without = device.table(ops, repeats=())
    sampler, rng = UniformSampler(tiny), np.random.default_rng(seed)
    away = 0.0
    for _ in range(30):
        network = tiny.lower(sampler.sample(rng))
        assert sum(table.in_network_us(network)) == pytest.approx(device.us(network), rel=1e-9)
        away = max(away, abs(sum(without.in_network_us(network)) - device.us(network)))
        for op, cost in zip(network, table.inside(network), strict=True):
            if cost.way == "slope":
                assert cost.us == pytest.approx(device.inside[op.key], rel=1e-9)
    assert away > Engines.FIRST_US / 3


def test_a_table_without_repeats_prices_by_boundaries_to_the_digit(tiny: SearchSpace) -> None:
    """Whatever chains it holds: the same chains with repeats price otherwise."""
    ops = tiny.lattice.ops
    with_repeats = Engines(ops).table(ops)
    table = replace(with_repeats, protocol={})
    assert table.by_chains() == {}
    costs = {key: row.median_us for key, row in (table.rows | table.chains).items()}
    saved = savings_us(costs, [row.chain for row in table.chains.values()])
    assert table.in_network_us(ops) == [
        max(costs[op.key] - saved.get(op.boundary, 0.0), LEAST_SHARE * costs[op.key]) for op in ops
    ]
    assert {cost.way for cost in table.inside(ops)} == {"boundary", "alone"}
    assert table.in_network_us(ops) != with_repeats.in_network_us(ops)


def changed(table: LatencyTable, costs_us: Mapping[str, float]) -> LatencyTable:
    """The table with other medians of some chains."""
    chains = {
        key: replace(row, median_us=costs_us.get(key, row.median_us))
        for key, row in table.chains.items()
    }
    return replace(table, chains=chains)


@pytest.mark.parametrize("last_us", [20.0, 60.0])
def test_a_slope_that_is_not_positive_leaves_the_op_to_its_boundary(last_us: float) -> None:
    stem, op, end = conv(IMAGE), conv(INSIDE), conv(INSIDE, 16)
    device = Engines([stem, op, end], even=True)
    flat = {chain_key((op,) * k): 60.0 + (last_us - 60.0) * (k == 8) for k in REPEATS}
    table = changed(device.table([stem, op, end]), flat)
    assert table.by_chains()[op.key].us <= 0
    by_slope, by_host = table.inside([op, end])
    assert by_slope == across_boundary(table.lookup(op).median_us, table.savings_us()[op.boundary])
    assert by_slope.way == "boundary"
    assert by_slope.us > 0
    assert by_host == Inside(pytest.approx(device.inside[end.key]), "host")


def test_a_host_that_costs_more_alone_leaves_the_op_to_its_boundary() -> None:
    stem, end = conv(IMAGE), conv(INSIDE, 16)
    table = Engines([stem, end]).table([stem, end])
    least = changed(table, {chain_key((stem, end)): table.lookup(stem).median_us / 2})
    alone_us = least.lookup(end).median_us
    assert least.inside([end]) == [Inside(pytest.approx(LEAST_SHARE * alone_us), "boundary")]


def test_an_op_without_a_row_has_no_price_though_its_copies_have_a_slope() -> None:
    stem, op = conv(IMAGE), conv(INSIDE)
    table = Engines([stem, op]).table([stem, op])
    del table.rows[op.key]
    with pytest.raises(TableError, match="no row for"):
        table.inside([op])


def test_ops_that_run_alike_have_one_price() -> None:
    stem, block = conv(IMAGE, precision=W8A8), residual(CODES, W8A8)
    table = Engines([stem, block]).table([stem, block])
    low = residual(CODES, Precision("w4a8"))
    assert table.inside([low]) == table.inside([block])
    assert table.inside([low])[0].way == "slope"


def test_what_slopes_tell_comes_back_from_the_file(tiny: SearchSpace, tmp_path: Path) -> None:
    ops = tiny.lattice.ops
    table = Engines(ops).table(ops)
    table.save(tmp_path / "table.parquet")
    loaded = LatencyTable.load(tmp_path / "table.parquet")
    assert loaded.repeats == REPEATS
    assert loaded == table
    assert loaded.inside(ops) == table.inside(ops)


def test_merged_tables_price_the_ops_of_both_at_the_pace_of_the_first(tiny: SearchSpace) -> None:
    ops = tiny.lattice.ops
    device = Engines(ops)
    whole = device.table(ops)
    some = {op.key for op in ops[::2]}
    first, second = whole, replace(device.table(ops), pace_us=0.5)
    for table, dropped in ((first, False), (second, True)):
        table.rows = {k: r for k, r in table.rows.items() if (k in some) != dropped}
        table.chains = {
            k: r for k, r in table.chains.items() if (r.chain[-1].key in some) != dropped
        }
    merged = first.merge(second)
    assert merged.repeats == REPEATS
    found = dict(zip([op.key for op in ops], merged.inside(ops), strict=True))
    assert any(found[key].way == "slope" for key in found.keys() - some)
    for op in ops:
        if found[op.key].way == "slope":
            scale = 1.0 if op.key in some else 2.0
            assert found[op.key].us == pytest.approx(scale * device.inside[op.key], rel=1e-9)


def test_a_table_of_other_repeats_is_another_condition() -> None:
    stem, op = conv(IMAGE), conv(INSIDE)
    ours = Engines([stem, op]).table([stem, op])
    for protocol in ({}, {"repeats": [2, 4]}):
        with pytest.raises(TableError, match="different protocols"):
            ours.merge(replace(ours, protocol=protocol))
