"""Whether a table still matches the machine: rows that got slower, and a pace alone that did."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from hwnas.spaces.blocks import inverted_residual
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import LatencyTable
from profilers.build import build_rows
from profilers.graphs import read_ops
from profilers.measure import Protocol, Samples
from profilers.recheck import BLOCKS, PROBED, Drift, drift
from profilers.simulated import SimulatedProfiler, SimulatedSession
from quant.precision import Precision

PROTOCOL = Protocol()
OPS = [
    inverted_residual(
        Tensor(width, side, side), width, kernel=3, expansion=3, precision=Precision("fp32")
    )
    for width in (8, 16, 32)
    for side in (4, 8, 12, 16)
]


class Machine(SimulatedProfiler):
    """The simulated device, with its ops or its pace slower by a factor, and one odd op slower."""

    def __init__(self, ops: float = 1.0, pace: float = 1.0, odd: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.ops, self.pace, self.odd = ops, pace, odd
        self.timed: list[str] = []

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        session, machine = super().prepare(model), self
        (op,) = read_ops(model) if isinstance(model, onnx.ModelProto) else [None]

        class Slowed(SimulatedSession):
            def _block(self, protocol: Protocol) -> Samples:
                assert op is not None
                machine.timed.append(op.key)
                slower = machine.ops * (5.0 if op.key in machine.odd else 1.0)
                return session.block(protocol) * [slower * machine.pace, machine.pace]

        assert isinstance(model, onnx.ModelProto)
        return Slowed(model, self.batch)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    return build_rows(SimulatedProfiler(), OPS, path, PROTOCOL, boundaries=False)


def found_on(machine: Machine, table: LatencyTable, ops: list[OpSpec] = OPS) -> Drift:
    return drift(machine, table, ops, PROTOCOL)


def test_the_machine_that_measured_a_table_matches_it(table: LatencyTable) -> None:
    found = found_on(Machine(), table)
    assert found.rows == pytest.approx(1.0, rel=1e-4)
    assert found.pace == 1.0
    assert found.matches


@pytest.mark.parametrize(
    ("factor", "matches"), [(1.3, False), (0.7, False), (1.11, False), (1.09, True), (0.91, True)]
)
def test_rows_that_take_another_time_at_the_same_pace_do_not_match(
    factor: float, matches: bool, table: LatencyTable
) -> None:
    found = found_on(Machine(ops=factor), table)
    assert found.rows == pytest.approx(factor, rel=1e-4)
    assert found.pace == 1.0
    assert found.matches is matches


@pytest.mark.parametrize("pace", [1.3, 0.5])
def test_a_machine_whose_pace_alone_changed_matches_and_is_said_to_be_slower(
    pace: float, table: LatencyTable
) -> None:
    found = found_on(Machine(pace=pace), table)
    assert found.rows == pytest.approx(1.0, rel=1e-4)
    assert found.pace == pytest.approx(pace)
    assert found.matches


def test_rows_and_pace_are_told_apart(table: LatencyTable) -> None:
    found = found_on(Machine(ops=1.25, pace=1.6), table)
    assert (found.rows, found.pace) == (pytest.approx(1.25, rel=1e-4), pytest.approx(1.6))


def test_a_few_odd_rows_do_not_make_a_table_another_machines(table: LatencyTable) -> None:
    ranked = sorted(OPS, key=lambda op: table.lookup(op).median_us)
    odd = (ranked[0].key, ranked[-1].key)
    assert found_on(Machine(odd=odd), table).matches
    every = tuple(op.key for op in OPS)
    assert not found_on(Machine(odd=every), table).matches


def test_rows_from_the_quickest_to_the_slowest_are_timed_in_turns(table: LatencyTable) -> None:
    machine = Machine()
    found_on(machine, table)
    ranked = [op.key for op in sorted(OPS, key=lambda op: table.lookup(op).median_us)]
    probed = machine.timed[:PROBED]
    assert len(set(probed)) == PROBED < len(OPS)
    assert {ranked[0], ranked[-1]} <= set(probed)
    assert machine.timed == probed * BLOCKS, "a drift meanwhile hits all alike"


def test_a_space_of_fewer_ops_is_probed_whole(table: LatencyTable) -> None:
    machine = Machine(ops=1.3)
    assert not found_on(machine, table, OPS[:3]).matches
    assert Counter(machine.timed) == {op.key: BLOCKS for op in OPS[:3]}
