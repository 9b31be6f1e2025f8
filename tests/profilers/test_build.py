"""Tables are built once, survive interruptions, and refuse to mix conditions.

The simulated device states what each row must be; one small build runs on ONNX Runtime.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import Host, LatencyTable
from profilers.base import WrongKernels
from profilers.build import build_rows, measure_models, minutes, open_table, row_model
from profilers.graphs import emit, random_parameters, read_ops
from profilers.measure import Protocol, Samples
from profilers.ort import OrtProfiler
from profilers.simulated import CALL_US, SimulatedProfiler, SimulatedSession, op_us
from quant.errors import HwnasError, InvalidInput, TableError
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
PROTOCOL = Protocol(rounds=3, warmup_ms=0.5, block_ms=1.0, min_runs=4, max_runs=20)
JOURNALLED_US = 1e-3
"""The journal and the measuring processes write microseconds with three decimals."""


def conv(channels: int, precision: Precision = FP32, kind: str = "fp32") -> OpSpec:
    spec = Tensor(3, 7, 7, Format.parse(kind))
    return conv_norm_activation(spec, channels, kernel=3, precision=precision)


OPS = [conv(4), conv(5), conv(4, W8A8), conv(4, W8A8, "a8"), conv(6)]


class Watched(SimulatedProfiler):
    """The simulated device, with a list of the ops whose blocks were measured.

    `patience` blocks are measured, then Ctrl-C comes; a check of an op in `wrong` fails.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        batch: int = 1,
        patience: int | None = None,
        wrong: Sequence[OpSpec] = (),
    ) -> None:
        super().__init__(threads=threads, batch=batch)
        self.patience = patience
        self.wrong = {op.key for op in wrong}
        self.measured: list[str] = []
        self.checked: list[str] = []
        self.open_sessions = 0

    def prepare(self, model: onnx.ModelProto) -> SimulatedSession:
        return WatchedSession(model, self)

    def check(self, model: onnx.ModelProto) -> None:
        (op,) = read_ops(model)
        if op.key in self.wrong:
            raise WrongKernels(op.key)
        self.checked.append(op.key)


class WatchedSession(SimulatedSession):
    def __init__(self, model: onnx.ModelProto, profiler: Watched) -> None:
        super().__init__(model, profiler.batch)
        self.profiler = profiler
        self.key = read_ops(model)[0].key
        profiler.open_sessions += 1
        assert profiler.open_sessions == 1, "one session at a time"

    def _block(self, protocol: Protocol) -> Samples:
        if len(self.profiler.measured) == self.profiler.patience:
            raise KeyboardInterrupt
        self.profiler.measured.append(self.key)
        return super()._block(protocol)

    def close(self) -> None:
        super().close()
        self.profiler.open_sessions -= 1


class Elsewhere(Watched):
    """The same device in another network, or with another governor."""

    def host(self) -> Host:
        return replace(super().host(), hostname="elsewhere", governor="powersave")


class Newer(Watched):
    """The same device with another runtime."""

    def host(self) -> Host:
        return replace(super().host(), runtime_version="2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tables" / "device.parquet"


def interrupt(path: Path, blocks: int, ops: Sequence[OpSpec] = OPS) -> Watched:
    profiler = Watched(patience=blocks)
    with pytest.raises(KeyboardInterrupt):
        build_rows(profiler, ops, path, PROTOCOL)
    return profiler


def journal(path: Path) -> Path:
    return path.with_suffix(".journal")


# ---- rows


def test_rows_hold_what_was_measured(path: Path) -> None:
    table = build_rows(SimulatedProfiler(), OPS, path, PROTOCOL)
    assert list(table.rows) == [op.key for op in OPS]
    for op in OPS:
        row = table.lookup(op)
        wanted = pytest.approx(CALL_US + op_us(op), abs=JOURNALLED_US)
        assert row.median_us == row.min_us == row.p95_us == wanted
        assert (row.spread, row.stable, row.runs) == (0.0, True, 3 * 4)
        assert row.precision == op.precision.name
        assert OpSpec.from_json(row.op) == op


def test_the_table_on_disk_is_the_one_returned(path: Path) -> None:
    table = build_rows(SimulatedProfiler(threads=2), OPS, path, PROTOCOL)
    assert LatencyTable.load(path) == table
    assert table.host == SimulatedProfiler(threads=2).host()
    assert table.protocol == PROTOCOL.to_dict()
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left behind"


def test_only_what_is_missing_is_measured(path: Path) -> None:
    first = build_rows(Watched(), OPS[:2], path, PROTOCOL)
    profiler = Watched()
    table = build_rows(profiler, OPS, path, PROTOCOL)
    assert set(profiler.measured) == set(profiler.checked) == {op.key for op in OPS[2:]}
    assert {key: table.rows[key] for key in first.rows} == first.rows
    again = Watched()
    assert build_rows(again, OPS, path, PROTOCOL) == table
    assert again.measured == again.checked == []


def test_an_op_that_is_asked_for_twice_is_measured_once(path: Path) -> None:
    profiler = Watched()
    build_rows(profiler, [OPS[0], OPS[1], OPS[0]], path, PROTOCOL)
    assert sorted(profiler.measured) == sorted([OPS[0].key, OPS[1].key] * PROTOCOL.rounds)


def test_blocks_are_taken_in_rounds_over_all_rows(path: Path) -> None:
    """So that a drift of the machine hits all rows alike."""
    profiler = Watched()
    build_rows(profiler, OPS, path, PROTOCOL)
    assert profiler.measured == [op.key for op in OPS] * PROTOCOL.rounds


def test_progress_counts_up_to_all_of_it(path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build_rows(Watched(), OPS, path, PROTOCOL, lambda *item: told.append(item))
    for _, items in itertools.groupby(told, key=lambda item: item[0]):
        counts = [(done, of) for _, done, of in items]
        assert counts == [(i + 1, len(counts)) for i in range(len(counts))]
    assert {len(OPS), len(OPS) * PROTOCOL.rounds} == {of for _, _, of in told}


def test_an_op_in_wrong_kernels_stops_the_build_before_anything_is_timed(path: Path) -> None:
    profiler = Watched(wrong=OPS[3:4])
    with pytest.raises(WrongKernels):
        build_rows(profiler, OPS, path, PROTOCOL)
    assert profiler.measured == []
    assert not path.exists()


def test_the_graph_of_a_row_depends_on_its_op_alone() -> None:
    profiler = SimulatedProfiler()
    first, again = (row_model(op, profiler) for op in (OPS[0], OpSpec.from_json(OPS[0].to_json())))
    assert first.SerializeToString() == again.SerializeToString()
    assert read_ops(first) == [OPS[0]]
    constants = [row_model(op, profiler).graph.initializer for op in OPS]
    weights = [max((item.raw_data for item in each), key=len)[:64] for each in constants]
    assert len(set(weights)) == len(OPS), "each op has random numbers of its own"


# ---- interruption


@pytest.mark.parametrize("blocks", [0, 1, 4, 5, 7, 14])
def test_an_interrupted_build_goes_on_where_it_stopped(path: Path, blocks: int) -> None:
    stopped = interrupt(path, blocks)
    assert not path.exists()
    resumed = Watched()
    table = build_rows(resumed, OPS, path, PROTOCOL)
    whole = Watched()
    wanted = build_rows(whole, OPS, path.with_name("whole.parquet"), PROTOCOL)
    assert stopped.measured + resumed.measured == whole.measured
    assert table == wanted
    assert not journal(path).exists()


def test_a_build_can_be_interrupted_again_and_again(path: Path) -> None:
    measured: list[str] = []
    for blocks in (3, 2, 6):
        measured += interrupt(path, blocks).measured
    last = Watched()
    build_rows(last, OPS, path, PROTOCOL)
    assert measured + last.measured == [op.key for op in OPS] * PROTOCOL.rounds


def test_an_interrupted_extension_leaves_the_table_as_it_was(path: Path) -> None:
    build_rows(Watched(), OPS[:2], path, PROTOCOL)
    before = path.read_bytes()
    interrupt(path, 4)
    assert path.read_bytes() == before
    assert len(build_rows(Watched(), OPS, path, PROTOCOL).rows) == len(OPS)


def test_ops_with_journalled_blocks_are_not_checked_again(path: Path) -> None:
    interrupt(path, 2)
    resumed = Watched()
    build_rows(resumed, OPS, path, PROTOCOL)
    assert resumed.checked == [op.key for op in OPS[2:]]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_last_line_that_was_cut_short_is_measured_again(path: Path, cut: int) -> None:
    interrupt(path, 4)
    text = journal(path).read_bytes()
    journal(path).write_bytes(text[:-cut])
    resumed = Watched()
    table = build_rows(resumed, OPS, path, PROTOCOL)
    assert len(resumed.measured) == len(OPS) * PROTOCOL.rounds - 3
    assert resumed.measured[0] == OPS[3].key
    assert table.lookup(OPS[3]).runs == 3 * 4


def test_a_cut_journal_can_be_interrupted_and_resumed_again(path: Path) -> None:
    """The half line must be gone before the next line is written behind it."""
    interrupt(path, 4)
    journal(path).write_bytes(journal(path).read_bytes()[:-10])
    interrupt(path, 1)
    resumed = Watched()
    build_rows(resumed, OPS, path, PROTOCOL)
    assert len(resumed.measured) == len(OPS) * PROTOCOL.rounds - 4


@pytest.mark.parametrize("kept", [0, 5])
def test_a_journal_cut_inside_its_first_line_starts_anew(path: Path, kept: int) -> None:
    interrupt(path, 4)
    journal(path).write_bytes(journal(path).read_bytes()[:kept])
    resumed = Watched()
    build_rows(resumed, OPS, path, PROTOCOL)
    assert len(resumed.measured) == len(OPS) * PROTOCOL.rounds


def test_measured_samples_come_back_from_the_journal(path: Path) -> None:
    interrupt(path, 2)
    lines = [json.loads(line) for line in journal(path).read_text().splitlines()]
    assert [key for key, _ in lines[1:]] == [op.key for op in OPS[:2]]
    marked = [[123.0, 124.0, 125.0, 126.0] if i == 1 else s for i, (_, s) in enumerate(lines[1:])]
    text = [lines[0], *([key, s] for (key, _), s in zip(lines[1:], marked, strict=True))]
    journal(path).write_text("".join(json.dumps(item) + "\n" for item in text))
    table = build_rows(Watched(), OPS, path, PROTOCOL)
    assert table.lookup(OPS[1]).p95_us > 120
    assert table.lookup(OPS[0]).p95_us < 20


# ---- other conditions


def test_a_journal_of_another_condition_is_refused_and_kept(path: Path) -> None:
    interrupt(path, 4)
    before = journal(path).read_bytes()
    for profiler, protocol in (
        (Watched(threads=2), PROTOCOL),
        (Watched(batch=2), PROTOCOL),
        (Newer(), PROTOCOL),
        (Watched(), replace(PROTOCOL, rounds=4)),
    ):
        with pytest.raises(TableError, match=journal(path).name) as caught:
            build_rows(profiler, OPS, path, protocol)
        assert caught.value.next_step
        assert profiler.measured == []
        assert journal(path).read_bytes() == before
    assert len(build_rows(Watched(), OPS, path, PROTOCOL).rows) == len(OPS)


def test_a_table_of_another_condition_is_refused_and_kept(path: Path) -> None:
    build_rows(Watched(), OPS[:1], path, PROTOCOL)
    before = path.read_bytes()
    for profiler, field in ((Watched(threads=2), "threads"), (Newer(), "runtime_version")):
        for refuse in (
            lambda p=profiler: open_table(p, path, PROTOCOL),
            lambda p=profiler: build_rows(p, OPS, path, PROTOCOL),
        ):
            with pytest.raises(TableError, match=field) as caught:
                refuse()
            assert caught.value.next_step
        assert profiler.measured == []
    with pytest.raises(TableError, match="protocol"):
        open_table(Watched(), path, replace(PROTOCOL, block_ms=2.0))
    assert path.read_bytes() == before


def test_the_network_name_and_the_governor_are_recorded_but_not_compared(path: Path) -> None:
    interrupt(path, 4)
    elsewhere = Elsewhere()
    build_rows(elsewhere, OPS[:4], path, PROTOCOL)
    assert len(elsewhere.measured) == 4 * PROTOCOL.rounds - 4
    assert len(build_rows(Watched(), OPS, path, PROTOCOL).rows) == len(OPS)
    assert LatencyTable.load(path).host.hostname == "elsewhere"


def test_no_table_opens_as_an_empty_one(path: Path) -> None:
    table = open_table(Watched(), path, PROTOCOL)
    assert table.rows == {}
    assert table.host == Watched().host()
    assert table.protocol == PROTOCOL.to_dict()
    assert not path.exists()


def test_a_corrupt_table_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not parquet")
    with pytest.raises(TableError, match="not a latency table"):
        build_rows(Watched(), OPS, path, PROTOCOL)
    assert path.read_bytes() == b"not parquet"


def test_a_place_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"):
        build_rows(Watched(), OPS, tmp_path / "file" / "device.parquet", PROTOCOL)


# ---- the estimate


def test_the_estimate_grows_with_rows_and_rounds() -> None:
    profiler = SimulatedProfiler()
    counts = [minutes(profiler, rows, PROTOCOL) for rows in (0, 1, 10, 100)]
    assert counts[0] == 0
    assert counts == sorted(set(counts))
    assert counts[3] == pytest.approx(100 * counts[1])
    assert minutes(profiler, 10, replace(PROTOCOL, rounds=6)) > counts[2]
    assert minutes(OrtProfiler(), 10, PROTOCOL) > counts[2], "a real row takes longer to prepare"


def test_the_estimate_is_in_minutes_and_not_below_the_counted_time() -> None:
    protocol = Protocol(rounds=5, warmup_ms=20, block_ms=80)
    counted = 60 * 5 * (20 + 80) / 1000 / 60
    assert counted < minutes(SimulatedProfiler(), 60, protocol) < 2 * counted


# ---- whole networks in fresh processes


def network(width: int) -> list[OpSpec]:
    body = inverted_residual(Tensor(3, 8, 8), width, kernel=3, expansion=2, precision=W8A8)
    return [body, classifier(body.output, 8, 4, precision=FP32)]


def write(ops: list[OpSpec], path: Path) -> Path:
    rng = np.random.default_rng(0)
    path.write_bytes(emit(ops, [random_parameters(op, rng) for op in ops]).SerializeToString())
    return path


def test_networks_are_measured_in_as_many_processes_as_asked_for(tmp_path: Path) -> None:
    networks = [network(width) for width in (4, 8)]
    files = [write(ops, tmp_path / f"{number}.onnx") for number, ops in enumerate(networks)]
    told: list[tuple[int, int]] = []
    measured = measure_models(
        SimulatedProfiler(batch=2),
        files,
        PROTOCOL,
        lambda _, done, of: told.append((done, of)),
        processes=2,
    )
    assert told == [(1, 2), (2, 2)]
    for ops, found in zip(networks, measured, strict=True):
        wanted = CALL_US + 2 * sum(map(op_us, ops))
        assert found.median_us == pytest.approx(wanted, abs=JOURNALLED_US)
        assert found.runs == 2 * PROTOCOL.min_runs
        assert found.stable


def test_a_measuring_process_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HwnasError, match="measuring process failed") as caught:
        measure_models(SimulatedProfiler(), [tmp_path / "absent.onnx"], PROTOCOL)
    assert "\n" not in str(caught.value)
    assert "absent.onnx" in str(caught.value)
    assert type(caught.value) is HwnasError


# ---- the real thing


def test_a_small_table_on_onnx_runtime(path: Path) -> None:
    small, large = (
        conv_norm_activation(Tensor(channels, side, side), channels, kernel=3, precision=FP32)
        for channels, side in ((4, 4), (64, 32))
    )
    integer = conv(8, W8A8, "a8")
    protocol = replace(PROTOCOL, max_spread=10.0)
    table = build_rows(OrtProfiler(), [small, large, integer], path, protocol)
    assert len(table.rows) == 3
    assert table.lookup(large).median_us > 3 * table.lookup(small).median_us
    for row in table.rows.values():
        assert 0 < row.min_us <= row.median_us
        assert 3 * protocol.min_runs <= row.runs <= 3 * protocol.max_runs
    assert LatencyTable.load(path).host == OrtProfiler().host()


def test_a_session_is_closed_where_its_block_is_interrupted(path: Path) -> None:
    assert interrupt(path, 2).open_sessions == 0
