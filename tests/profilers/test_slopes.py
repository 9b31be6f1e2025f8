"""Rows of a profiler that repeats ops: what is measured, once, and what that tells.

The device is the simulated one with ends: a graph also pays for what enters and what leaves it, as
engines of GPUs do.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.boundaries import Chain, chain_key, probes, with_heads
from latency_tables.ops import OpSpec, Tensor
from latency_tables.slopes import hosted, repeated
from latency_tables.table import LatencyTable
from profilers.build import (
    build_rows,
    empty_table,
    minutes,
    missing_chains,
    open_table,
    row_minutes,
    row_model,
)
from profilers.graphs import read_ops
from profilers.measure import Protocol, Samples
from profilers.ort import OrtProfiler
from profilers.simulated import CALL_US, SimulatedProfiler, SimulatedSession, op_us
from quant.errors import TableError
from quant.precision import TENSORRT, Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
PROTOCOL = Protocol(rounds=3, max_rounds=3, warmup_ms=0.5, block_ms=1.0, min_runs=4, max_runs=20)
JOURNALLED_US = 1e-3
"""The journal writes microseconds with three decimals."""


def conv(tensor: Tensor, channels: int, kernel: int, precision: Precision) -> OpSpec:
    return conv_norm_activation(
        tensor, channels, kernel=kernel, precision=precision, activation="hard_swish"
    )


def residual(tensor: Tensor, precision: Precision) -> OpSpec:
    return inverted_residual(tensor, tensor.channels, kernel=3, expansion=2, precision=precision)


STEM = conv(Tensor(3, 7, 7), 8, 3, FP32)
FLOATS, CODES = STEM.output, Tensor(8, 7, 7, Format.parse("a8"))
COPIED = [residual(FLOATS, FP32), residual(CODES, W8A8), conv(FLOATS, 8, 5, FP32)]
HOSTED = [
    residual(FLOATS, W8A8),
    conv(CODES, 12, 1, FP32),
    conv(FLOATS, 12, 1, FP32),
    classifier(Tensor(12, 7, 7), 8, 4, precision=W8A8),
]
OPS = [STEM, HOSTED[0], *COPIED, *HOSTED[1:]]
NETWORKS = [
    [STEM, COPIED[0], COPIED[0], HOSTED[0], COPIED[1], HOSTED[1], HOSTED[3]],
    [STEM, COPIED[2], COPIED[0], HOSTED[2], HOSTED[3]],
    [STEM, HOSTED[0], HOSTED[1], HOSTED[3]],
]


class Engines(SimulatedProfiler):
    """The simulated device as one that repeats ops, with ends: `end_us` each, and `element_us` for
    each value that enters or leaves. It lists whose blocks were measured; after `patience` of them
    comes Ctrl-C.
    """

    repeats = (2, 4, 8)

    def __init__(
        self, *, end_us: float = 20.0, element_us: float = 0.0, patience: int | None = None
    ) -> None:
        super().__init__()
        self.end_us, self.element_us, self.patience = end_us, element_us, patience
        self.measured: list[str] = []

    def graph_us(self, ops: Sequence[OpSpec]) -> float:
        """What a whole graph of the ops takes."""
        elements = ops[0].inputs[0].elements + ops[-1].output.elements
        return CALL_US + 2 * self.end_us + self.element_us * elements + sum(map(op_us, ops))

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        return EngineSession(onnx.load(model) if isinstance(model, Path) else model, self)


class EngineSession(SimulatedSession):
    def __init__(self, model: onnx.ModelProto, profiler: Engines) -> None:
        super().__init__(model, profiler.batch)
        self.profiler, ops = profiler, read_ops(model)
        self.key, self._latency_us = chain_key(ops), profiler.graph_us(ops)

    def _block(self, protocol: Protocol) -> Samples:
        if len(self.profiler.measured) == self.profiler.patience:
            raise KeyboardInterrupt
        self.profiler.measured.append(self.key)
        return super()._block(protocol)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tables" / "device.parquet"


def keys(chains: Sequence[Chain]) -> list[str]:
    return list(map(chain_key, chains))


# ---- what is measured


def test_ops_that_follow_themselves_are_repeated_and_the_others_stand_behind_hosts() -> None:
    """Every op of the example is one or the other, but for the first."""
    assert {chain[0] for chain in repeated(OPS, Engines.repeats)} == set(COPIED)
    assert [chain[-1] for chain in hosted(OPS)] == HOSTED


def test_what_is_missing_is_ops_then_chains_behind_their_heads_then_copies() -> None:
    missing = missing_chains(empty_table(Engines(), PROTOCOL), OPS)
    assert missing[: len(OPS)] == [(op,) for op in OPS]
    assert len(set(keys(missing))) == len(missing)
    assert set(missing[len(OPS) :]) == {
        *with_heads(probes(OPS).values()), *with_heads(hosted(OPS)),
        *((op,) * k for op in COPIED for k in (2, 4, 8)),
    }  # fmt: skip
    for chain in hosted(OPS):
        assert missing.index(chain[:-1]) < missing.index(chain)


def test_a_profiler_that_repeats_nothing_measures_ops_and_boundaries() -> None:
    table = empty_table(SimulatedProfiler(), PROTOCOL)
    assert table.protocol == PROTOCOL.to_dict()
    assert missing_chains(table, OPS) == [
        *((op,) for op in OPS), *with_heads(probes(OPS).values())
    ]  # fmt: skip


def test_what_is_missing_is_measured_each_chain_once_a_round(path: Path) -> None:
    profiler = Engines()
    missing = missing_chains(empty_table(profiler, PROTOCOL), OPS)
    table = build_rows(profiler, OPS, path, PROTOCOL)
    assert Counter(profiler.measured) == dict.fromkeys(keys(missing), PROTOCOL.rounds)
    assert set(table.rows) | set(table.chains) == set(keys(missing))
    assert missing_chains(table, OPS) == []
    again = Engines()
    assert build_rows(again, OPS, path, PROTOCOL) == table == LatencyTable.load(path)
    assert again.measured == []


def test_ops_that_come_later_share_the_chains_that_are_there(path: Path) -> None:
    """And whatever was measured first, the table prices alike."""
    build_rows(Engines(), OPS[:4], path, PROTOCOL)
    later = Engines()
    table = build_rows(later, OPS, path, PROTOCOL)
    whole = build_rows(Engines(), OPS, path.with_name("whole.parquet"), PROTOCOL)
    assert missing_chains(table, OPS) == []
    known = set(keys(missing_chains(empty_table(Engines(), PROTOCOL), OPS[:4])))
    assert known.isdisjoint(later.measured)
    assert table.in_network_us(OPS) == pytest.approx(
        whole.in_network_us(OPS), abs=4 * JOURNALLED_US
    )


def test_an_op_that_stood_behind_a_host_needs_no_other(path: Path) -> None:
    costly, end = conv(Tensor(3, 7, 7), 8, 7, FP32), HOSTED[2]
    build_rows(Engines(), [costly, end], path, PROTOCOL)
    later = Engines()
    build_rows(later, [STEM, end], path, PROTOCOL)
    assert set(later.measured) == {STEM.key}, "a cheaper host, but one is known"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_an_interrupted_build_goes_on_and_measures_nothing_twice(path: Path, share: float) -> None:
    undisturbed = Engines()
    whole = build_rows(undisturbed, OPS, path.with_name("whole.parquet"), PROTOCOL)
    stopped = Engines(patience=int(share * len(undisturbed.measured)))
    with pytest.raises(KeyboardInterrupt):
        build_rows(stopped, OPS, path, PROTOCOL)
    assert not path.exists()
    resumed = Engines()
    table = build_rows(resumed, OPS, path, PROTOCOL)
    assert stopped.measured + resumed.measured == undisturbed.measured
    assert table == whole


# ---- what it tells


def test_slopes_and_hosts_tell_what_the_device_states(path: Path) -> None:
    """Its conversions too; the first op of a network pays for the call and the ends."""
    profiler = Engines()
    table = build_rows(profiler, OPS, path, PROTOCOL)
    found = table.inside(OPS)
    ways = ["slope" if op in COPIED else "host" if op in HOSTED else "alone" for op in OPS]
    assert [cost.way for cost in found] == ways
    wanted = [op_us(op) for op in OPS]
    wanted[0] = profiler.graph_us([STEM])
    assert [cost.us for cost in found] == pytest.approx(wanted, abs=2 * JOURNALLED_US)
    assert max(cost.error_us for cost in found) < JOURNALLED_US
    assert all(row.stable for row in table.rows.values())


@pytest.mark.parametrize("element_us", [0.0, 0.001])
def test_costs_inside_add_up_to_whole_networks(path: Path, element_us: float) -> None:
    """Ends that hang on the tensor cancel along a network, and slopes are free of them. No two of
    them differ here by what an op costs: that would leave a host no positive difference.
    """
    profiler = Engines(element_us=element_us)
    table = build_rows(profiler, OPS, path, PROTOCOL)
    for network in NETWORKS:
        assert all(o.inputs == (before.output,) for before, o in itertools.pairwise(network))
        total = sum(table.in_network_us(network))
        assert total == pytest.approx(profiler.graph_us(network), abs=len(network) * 2e-3)
    inside = table.in_network_us(COPIED)
    assert inside == pytest.approx([op_us(op) for op in COPIED], abs=2 * JOURNALLED_US)


class Flat(Engines):
    """A device on which longer chains of `COPIED[0]` take no longer, as in a noisy hour."""

    def graph_us(self, ops: Sequence[OpSpec]) -> float:
        copies = len(ops) > 1 and set(ops) == {COPIED[0]}
        return super().graph_us(ops[:2] if copies else ops) - copies * 1e-2 * len(ops)


def test_an_op_whose_slope_is_not_positive_has_an_unstable_row(path: Path) -> None:
    table = build_rows(Flat(), OPS, path, PROTOCOL)
    assert {key for key, row in table.rows.items() if not row.stable} == {COPIED[0].key}
    assert all(row.stable for row in table.chains.values())
    (flat,) = table.inside(COPIED[:1])
    assert flat.way == "boundary"
    assert flat.us > 0
    assert table.inside(COPIED[1:])[0].way == "slope"
    assert LatencyTable.load(path) == table
    again = Engines()
    assert build_rows(again, OPS, path, PROTOCOL) == table
    assert again.measured == []


# ---- its condition


@pytest.mark.parametrize("repeats", [(), (2, 4, 16)])
def test_a_table_of_other_repeats_is_refused(
    path: Path, repeats: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_rows(Engines(), OPS[:2], path, PROTOCOL)
    monkeypatch.setattr(Engines, "repeats", repeats)
    with pytest.raises(TableError, match="measured by another protocol"):
        open_table(Engines(), path, PROTOCOL)


# ---- the estimate


def test_the_minutes_of_copies_grow_with_their_length() -> None:
    """Preparing a chain of eight takes longer than preparing an op, and so may timing it."""
    profiler, op = Engines(), COPIED[0]
    told = [
        row_minutes(profiler, [(op,) * k], PROTOCOL, op_ms=op_ms)
        for op_ms in (0.0, 100.0)
        for k in (1, 2, 4, 8)
    ]
    assert told == sorted(set(told))
    assert told[3] == minutes(profiler, 1, PROTOCOL, ops=8)
    assert told[7] == minutes(profiler, 1, PROTOCOL, each_ms=800.0, ops=8)
    chains = [(op,), (op,) * 8, (op,), (op,) * 2]
    parts = [row_minutes(profiler, [chain], PROTOCOL, op_ms=1.0) for chain in chains]
    assert row_minutes(profiler, chains, PROTOCOL, op_ms=1.0) == pytest.approx(sum(parts))
    assert row_minutes(profiler, [], PROTOCOL, op_ms=1.0) == 0


def test_the_minutes_of_boundaries_are_those_of_as_many_ops() -> None:
    profiler, chains = SimulatedProfiler(), missing_chains(empty_table(Engines(), PROTOCOL), OPS)
    wanted = minutes(profiler, len(chains), PROTOCOL, each_ms=2.0)
    assert row_minutes(profiler, chains, PROTOCOL, op_ms=2.0) == wanted


# ---- the graphs of copies


def weights(model: onnx.ModelProto) -> list[bytes]:
    """The large constants of a graph."""
    raw = [item.raw_data for item in model.graph.initializer]
    return [data for data in raw if len(data) >= 64]


def test_every_copy_has_weights_of_its_own_and_the_first_those_of_the_op_alone() -> None:
    """A runtime that keeps equal constants once must find none, as in a network."""
    profiler = SimulatedProfiler()
    alone, eight = (weights(row_model(chain, profiler)) for chain in (COPIED[:1], COPIED[:1] * 8))
    assert len(alone) > 1
    assert len(set(eight)) == len(eight) == 8 * len(alone)
    assert eight[: len(alone)] == alone
    stem, two, mixed = (
        set(weights(row_model(chain, profiler)))
        for chain in ((STEM,), COPIED[:1] * 2, (STEM, *COPIED[:1] * 2))
    )
    assert mixed == stem | two
    assert two < set(eight)


@pytest.mark.parametrize("op", COPIED, ids=lambda op: op.key[:5])
def test_chains_of_copies_run_in_their_declared_kernels(op: OpSpec) -> None:
    """In ONNX Runtime for real; and TensorRT's graph of them is whole."""
    profiler = OrtProfiler()
    profiler.check(row_model((op,) * 8, profiler))
    profiler.runtime = TENSORRT
    engine = row_model((op,) * 8, profiler)
    onnx.checker.check_model(engine, full_check=True)
    assert read_ops(engine) == [op] * 8


def test_rows_of_a_real_runtime_have_slopes(path: Path) -> None:
    """On this machine's CPU, which wants none: positive, and less than an op and its call."""

    class Repeating(OrtProfiler):
        repeats = (2, 4, 8)

    large = conv(Tensor(16, 24, 24), 16, 3, FP32)
    protocol = replace(PROTOCOL, rounds=2, warmup_ms=1.0, block_ms=2.0)
    table = build_rows(Repeating(), [large], path, protocol)
    (cost,) = table.inside([large])
    assert cost.way == "slope"
    assert 0 < cost.us < 2 * table.lookup(large).median_us
    assert cost.error_us >= 0
