"""Tables are built once, survive interruptions, and refuse to mix conditions.

The simulated device states what each row must be; one small build runs on ONNX Runtime.
"""

import errno
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import onnx
import pytest

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.boundaries import chain_key
from latency_tables.host import Host
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import LatencyTable
from profilers.base import Profiler, WrongKernels
from profilers.build import (
    build_rows,
    file_hash,
    forget,
    journalled,
    measure_models,
    minutes,
    missing_chains,
    open_table,
    row_model,
    table_lock,
)
from profilers.graphs import emit, random_parameters, read_ops
from profilers.measure import Protocol, Samples
from profilers.ort import OrtProfiler
from profilers.simulated import CALL_US, SimulatedProfiler, SimulatedSession, op_us
from quant.errors import HwnasError, InvalidInput, TableError
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
PROTOCOL = Protocol(rounds=3, max_rounds=15, warmup_ms=0.5, block_ms=1.0, min_runs=4, max_runs=20)
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

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        return WatchedSession(onnx.load(model) if isinstance(model, Path) else model, self)

    def check(self, model: onnx.ModelProto) -> None:
        key = chain_key(read_ops(model))
        if key in self.wrong:
            raise WrongKernels(key)
        self.checked.append(key)


class WatchedSession(SimulatedSession):
    def __init__(self, model: onnx.ModelProto, profiler: Watched) -> None:
        super().__init__(model, profiler.batch)
        self.profiler = profiler
        self.key = chain_key(read_ops(model))
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


def turns(measured: Sequence[str], size: int = len(OPS)) -> list[list[str]]:
    """What was measured, cut into turns of so many."""
    return [list(measured[start : start + size]) for start in range(0, len(measured), size)]


# ---- rows


def test_rows_hold_what_was_measured(path: Path) -> None:
    table = build_rows(SimulatedProfiler(), OPS, path, PROTOCOL)
    assert list(table.rows) == [op.key for op in OPS]
    for op in OPS:
        row = table.lookup(op)
        wanted = pytest.approx(CALL_US + op_us(op), abs=JOURNALLED_US)
        assert row.median_us == row.min_us == row.p95_us == wanted
        assert row.low_us == row.high_us == wanted
        assert (row.spread, row.stable, row.runs) == (0.0, True, 3 * 4)
        assert row.precision == op.precision.name
        assert row.chain == (op,)
    assert table.pace_us == 1.0, "the simulated device's"


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
    keys = sorted(op.key for op in OPS)
    assert [sorted(turn) for turn in turns(profiler.measured)] == [keys] * PROTOCOL.rounds


def test_every_round_has_an_order_of_its_own(path: Path) -> None:
    """So that a drift within the rounds hits other rows in each; the same in every build."""
    ops = [conv(channels) for channels in range(4, 16)]
    protocol = replace(PROTOCOL, rounds=6, min_runs=1)
    profiler, again = Watched(), Watched()
    build_rows(profiler, ops, path, protocol)
    build_rows(again, ops[::-1], path.with_name("again.parquet"), protocol)
    orders = turns(profiler.measured, len(ops))
    assert len(orders) == 6
    assert len({tuple(order) for order in orders}) == 6
    assert sorted(op.key for op in ops) not in orders
    places = np.array([[order.index(op.key) for op in ops] for order in orders])
    assert len(set(places.T.ravel().tolist())) == len(ops)
    assert (np.ptp(places, axis=0) > 2).all(), "no row is always early, or always late"
    assert again.measured == profiler.measured


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
    first, again = (
        row_model((op,), profiler) for op in (OPS[0], OpSpec.from_json(OPS[0].to_json()))
    )
    assert first.SerializeToString() == again.SerializeToString()
    assert read_ops(first) == [OPS[0]]
    constants = [row_model((op,), profiler).graph.initializer for op in OPS]
    weights = [max((item.raw_data for item in each), key=len)[:64] for each in constants]
    assert len(set(weights)) == len(OPS), "each op has random numbers of its own"


# ---- chains

CHAINED = [
    conv(8),
    inverted_residual(conv(8).output, 8, kernel=3, expansion=2, precision=W8A8),
    inverted_residual(conv(8).output, 8, kernel=3, expansion=2, precision=FP32),
    conv_norm_activation(
        Tensor(8, 7, 7, Format.parse("a8")), 12, kernel=1, precision=FP32
    ),
    classifier(Tensor(12, 7, 7, Format.parse("fp32+")), 8, 4, precision=W8A8),
]  # fmt: skip
"""Positions of a network; codes come out of a residual block alone, whose producer is the stem."""


def test_the_chains_that_tell_what_boundaries_save_are_measured_with_the_rows(path: Path) -> None:
    stem, coded, floating, after, last = CHAINED
    profiler = Watched()
    table = build_rows(profiler, CHAINED, path, PROTOCOL)
    chains = [(stem, coded), (stem, floating), (stem, coded, after), (after, last)]
    assert set(table.chains) == {chain_key(chain) for chain in chains}
    assert list(table.rows) == [op.key for op in CHAINED]
    keys = sorted([*table.rows, *table.chains])
    orders = turns(profiler.measured, len(keys))
    assert [sorted(turn) for turn in orders] == [keys] * PROTOCOL.rounds
    for chain in chains:
        row = table.chains[chain_key(chain)]
        assert row.chain == chain
        assert row.precision == chain[-1].precision.name
        wanted = CALL_US + sum(map(op_us, chain))
        assert row.median_us == pytest.approx(wanted, abs=JOURNALLED_US)
    assert LatencyTable.load(path) == table


def test_inside_a_network_of_the_simulated_device_only_the_first_op_pays_for_the_call(
    path: Path,
) -> None:
    table = build_rows(SimulatedProfiler(), CHAINED, path, PROTOCOL)
    saved = table.savings_us()
    assert saved.keys() == {op.boundary for op in CHAINED[1:]}
    assert list(saved.values()) == pytest.approx([CALL_US] * 4, abs=4 * JOURNALLED_US)
    wanted = [op_us(op) + CALL_US * (place == 0) for place, op in enumerate(CHAINED)]
    assert table.in_network_us(CHAINED) == pytest.approx(wanted, abs=5 * JOURNALLED_US)


def test_only_boundaries_that_no_chain_crosses_yet_are_measured_later(path: Path) -> None:
    stem, coded, floating, after, last = CHAINED
    table = build_rows(Watched(), [after, last], path, PROTOCOL)
    assert set(table.chains) == {chain_key((after, last))}
    more = conv_norm_activation(after.output, 2, kernel=1, precision=W8A8)
    assert more.boundary == last.boundary
    assert more.macs < last.macs, "it would have been the end of the chain"
    second = Watched()
    build_rows(second, [stem, after, last, more], path, PROTOCOL)
    assert set(second.measured) == {stem.key, more.key}, "the boundary before `more` is known"
    third = Watched()
    table = build_rows(third, CHAINED, path, PROTOCOL)
    assert set(third.measured) == {
        coded.key, floating.key,
        *map(chain_key, [(stem, coded), (stem, floating), (stem, coded, after)]),
    }  # fmt: skip
    assert missing_chains(table, CHAINED) == []


def test_a_chain_that_is_there_is_the_head_of_a_longer_one_without_being_measured_again(
    path: Path,
) -> None:
    stem, coded, _, after, _ = CHAINED
    build_rows(Watched(), [stem, coded], path, PROTOCOL)
    profiler = Watched()
    table = build_rows(profiler, [stem, coded, after], path, PROTOCOL)
    assert set(profiler.measured) == {after.key, chain_key((stem, coded, after))}
    assert table.savings_us().keys() == {coded.boundary, after.boundary}


def test_what_is_missing_is_ops_first_then_chains_each_behind_its_head(path: Path) -> None:
    stem, coded, floating, after, last = CHAINED
    table = open_table(Watched(), path, PROTOCOL)
    missing = missing_chains(table, [*CHAINED, stem])
    assert missing[:5] == [(op,) for op in CHAINED]
    assert sorted(missing[5:], key=chain_key) == sorted(
        [(stem, coded), (stem, floating), (stem, coded, after), (after, last)], key=chain_key
    )
    assert missing.index((stem, coded)) < missing.index((stem, coded, after))


# ---- more rounds for noisy rows


class Noisy(Watched):
    """The simulated device where block n of a key in `noise` takes that many times its time.

    `before` counts the blocks of earlier processes. `drift` is how much longer each further block
    of any key takes than the first did, with its pace.
    """

    def __init__(
        self,
        noise: Mapping[str, Callable[[int], float]],
        *,
        patience: int | None = None,
        before: Sequence[str] = (),
        drift: float = 0.0,
    ) -> None:
        super().__init__(patience=patience)
        self.noise = noise
        self.count = Counter(before)
        self.drift = drift

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        return NoisySession(onnx.load(model) if isinstance(model, Path) else model, self)


class NoisySession(WatchedSession):
    profiler: Noisy

    def _block(self, protocol: Protocol) -> Samples:
        speed = 1 + self.profiler.drift * len(self.profiler.measured)
        samples = super()._block(protocol)
        number = self.profiler.count[self.key]
        self.profiler.count[self.key] += 1
        factor = self.profiler.noise.get(self.key, lambda _: 1.0)(number)
        return samples * [speed * factor, speed]


NOISY, CALMING = OPS[0].key, OPS[2].key
SWINGS = {NOISY: lambda n: 1.5 if n % 2 else 1.0}
CALMS_DOWN = {CALMING: lambda n: (1.0, 1.2, 0.8, 1.0)[min(n, 3)]}
NETWORK_US = 100.0
"""Its rows may be 0.4 us wide: the swings are some 4 us, other rows have no width."""


def blocks_of(profiler: Watched) -> dict[str, int]:
    return dict(Counter(profiler.measured))


@pytest.mark.parametrize("most", [3, 4, 9])
def test_a_row_that_stays_wide_is_measured_in_all_rounds_and_is_unstable(
    path: Path, most: int
) -> None:
    protocol = replace(PROTOCOL, max_rounds=most, max_spread=10.0)
    profiler = Noisy(SWINGS)
    table = build_rows(profiler, OPS, path, protocol, network_us=NETWORK_US)
    quiet = {op.key: PROTOCOL.rounds for op in OPS}
    assert blocks_of(profiler) == quiet | {NOISY: most}
    for key, row in table.rows.items():
        assert row.stable is (key != NOISY)
        assert row.runs == PROTOCOL.min_runs * (most if key == NOISY else PROTOCOL.rounds)
    noisy = table.rows[NOISY]
    us = CALL_US + op_us(OPS[0])
    assert (noisy.low_us, noisy.high_us) == pytest.approx((us, 1.5 * us), abs=JOURNALLED_US)


def test_a_row_is_measured_until_it_is_narrow_and_not_longer(path: Path) -> None:
    """Blocks of 1, 1.2, 0.8, 1, 1, ...: with eight the interval leaves one out on each side."""
    profiler = Noisy(CALMS_DOWN)
    protocol = replace(PROTOCOL, max_rounds=15)
    table = build_rows(profiler, OPS, path, protocol, network_us=NETWORK_US)
    assert blocks_of(profiler) == {op.key: 3 for op in OPS} | {CALMING: 8}
    assert all(row.stable for row in table.rows.values())


def test_rows_are_wide_or_not_against_the_network(path: Path) -> None:
    us = CALL_US + op_us(OPS[0])
    for number, (network_us, rounds) in enumerate(
        [
            (math.inf, 3),
            (1.01 * 0.5 * us / (2 * PROTOCOL.tolerance), 3),
            (0.99 * 0.5 * us / (2 * PROTOCOL.tolerance), 15),
        ]
    ):
        profiler = Noisy(SWINGS)
        table = build_rows(
            profiler, OPS, path.with_name(f"{number}.parquet"), PROTOCOL, network_us=network_us
        )
        assert blocks_of(profiler)[NOISY] == rounds
        assert not table.rows[NOISY].stable, "its blocks are further apart than the protocol has it"


def test_a_build_that_is_not_told_of_a_network_takes_the_rounds_alone(path: Path) -> None:
    profiler = Noisy(SWINGS)
    build_rows(profiler, OPS, path, PROTOCOL)
    assert set(blocks_of(profiler).values()) == {PROTOCOL.rounds}


def test_rounds_are_taken_also_where_there_are_more_than_the_most_for_noisy_rows(
    path: Path,
) -> None:
    """A recipe that asks for many rounds need not say both."""
    protocol = replace(PROTOCOL, rounds=5, max_rounds=4)
    profiler = Noisy(SWINGS)
    build_rows(profiler, OPS, path, protocol, network_us=NETWORK_US)
    assert blocks_of(profiler) == {op.key: 5 for op in OPS}


def test_only_the_wide_rows_are_in_the_extra_rounds_each_in_an_order_of_its_own(
    path: Path,
) -> None:
    ops = [conv(channels) for channels in range(4, 12)]
    noisy = {op.key: SWINGS[NOISY] for op in ops[:6]}
    profiler = Noisy(noisy)
    told: list[tuple[str, int, int]] = []
    build_rows(
        profiler, ops, path, PROTOCOL, lambda *item: told.append(item), network_us=NETWORK_US
    )
    regular = len(ops) * PROTOCOL.rounds
    extra = turns(profiler.measured[regular:], 6)
    assert len(extra) == PROTOCOL.max_rounds - PROTOCOL.rounds
    assert [sorted(turn) for turn in extra] == [sorted(noisy)] * len(extra)
    assert len({tuple(turn) for turn in extra}) == len(extra)
    again = [(done, of) for label, done, of in told if label == "timing noisy ops again"]
    assert again == [(done, 6) for done in range(1, 7)] * len(extra)
    assert [done for label, done, _ in told if label == "timing ops"] == [*range(1, regular + 1)]


@pytest.mark.parametrize("blocks", [14, 15, 16, 18, 22])
def test_an_interruption_in_the_extra_rounds_measures_nothing_twice(
    path: Path, blocks: int
) -> None:
    noise = SWINGS | CALMS_DOWN
    whole = Noisy(noise)
    other = path.with_name("whole.parquet")
    wanted = build_rows(whole, OPS, other, PROTOCOL, network_us=NETWORK_US)
    stopped = Noisy(noise, patience=blocks)
    with pytest.raises(KeyboardInterrupt):
        build_rows(stopped, OPS, path, PROTOCOL, network_us=NETWORK_US)
    assert len(stopped.measured) == blocks < len(whole.measured) == 15 + 12 + 5
    resumed = Noisy(noise, before=stopped.measured)
    table = build_rows(resumed, OPS, path, PROTOCOL, network_us=NETWORK_US)
    assert stopped.measured + resumed.measured == whole.measured
    assert table == wanted
    assert not journal(path).exists()


# ---- a machine whose speed changes


def test_rows_of_a_machine_that_gets_slower_are_those_of_a_steady_one_at_its_median_pace(
    path: Path,
) -> None:
    """By 2 % with every block, 15 blocks: the eighth has the median pace."""
    protocol = replace(PROTOCOL, max_rounds=PROTOCOL.rounds)
    steady = build_rows(Watched(), OPS, path, protocol, network_us=NETWORK_US)
    other = path.with_name("slower.parquet")
    slower = build_rows(Noisy({}, drift=0.02), OPS, other, protocol, network_us=NETWORK_US)
    assert slower.pace_us == pytest.approx(1 + 7 * 0.02)
    for key, row in slower.rows.items():
        wanted = steady.rows[key].scaled(slower.pace_us)
        assert row.median_us == pytest.approx(wanted.median_us, abs=0.02)
        assert row.high_us - row.low_us < 0.02, "at one pace, blocks of any speed are alike"
        assert row.stable


def test_rows_that_are_added_on_another_day_are_told_at_the_tables_pace(path: Path) -> None:
    class Half(Noisy):
        """The machine at half its speed."""

        def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
            session = super().prepare(model)
            block = session.block
            session.block = lambda protocol: 2.0 * block(protocol)  # type: ignore[method-assign]
            return session

    first = build_rows(Watched(), OPS[:2], path, PROTOCOL)
    table = build_rows(Half({}), OPS, path, PROTOCOL)
    whole = build_rows(Watched(), OPS, path.with_name("whole.parquet"), PROTOCOL)
    assert table.pace_us == first.pace_us == 1.0
    for key, row in whole.rows.items():
        assert table.rows[key].median_us == pytest.approx(row.median_us, abs=JOURNALLED_US)


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
    last, whole = Watched(), Watched()
    build_rows(last, OPS, path, PROTOCOL)
    build_rows(whole, OPS, path.with_name("whole.parquet"), PROTOCOL)
    assert measured + last.measured == whole.measured
    assert len(whole.measured) == len(OPS) * PROTOCOL.rounds


def test_an_interrupted_extension_leaves_the_table_as_it_was(path: Path) -> None:
    build_rows(Watched(), OPS[:2], path, PROTOCOL)
    before = path.read_bytes()
    interrupt(path, 4)
    assert path.read_bytes() == before
    assert len(build_rows(Watched(), OPS, path, PROTOCOL).rows) == len(OPS)


def test_ops_with_journalled_blocks_are_not_checked_again(path: Path) -> None:
    stopped = interrupt(path, 2)
    resumed = Watched()
    build_rows(resumed, OPS, path, PROTOCOL)
    assert resumed.checked == [op.key for op in OPS if op.key not in stopped.measured]
    assert len(resumed.checked) == len(OPS) - 2


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_last_line_that_was_cut_short_is_measured_again(path: Path, cut: int) -> None:
    stopped = interrupt(path, 4)
    text = journal(path).read_bytes()
    journal(path).write_bytes(text[:-cut])
    resumed = Watched()
    table = build_rows(resumed, OPS, path, PROTOCOL)
    assert len(resumed.measured) == len(OPS) * PROTOCOL.rounds - 3
    assert resumed.measured[0] == stopped.measured[3]
    assert table.rows[stopped.measured[3]].runs == 3 * 4


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
    first, second = interrupt(path, 2).measured
    lines = [json.loads(line) for line in journal(path).read_text().splitlines()]
    assert [key for key, _ in lines[1:]] == [first, second]
    mark = [[us, 1.0] for us in (123.0, 124.0, 125.0, 126.0)]
    marked = [mark if key == second else samples for key, samples in lines[1:]]
    text = [lines[0], *([key, s] for (key, _), s in zip(lines[1:], marked, strict=True))]
    journal(path).write_text("".join(json.dumps(item) + "\n" for item in text))
    table = build_rows(Watched(), OPS, path, PROTOCOL)
    assert table.rows[second].p95_us > 120
    assert table.rows[first].p95_us < 20


def test_a_disk_that_is_full_for_one_line_loses_nothing_before_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(path, 4)
    before = journal(path).read_bytes()

    class Full(Watched):
        """The disk takes half a line more."""

        def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
            with journal(path).open("ab") as file:
                file.write(b'["half a')
            monkeypatch.setattr(Path, "open", refuse)
            return super().prepare(model)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InvalidInput, match="No space left on device") as caught:
        build_rows(Full(), OPS, path, PROTOCOL)
    assert journal(path).name in str(caught.value)
    monkeypatch.undo()
    assert journal(path).read_bytes().startswith(before)
    resumed = Watched()
    build_rows(resumed, OPS, path, PROTOCOL)
    assert len(resumed.measured) == len(OPS) * PROTOCOL.rounds - 4


@pytest.mark.parametrize("asked", [OPS, OPS[:2]], ids=["the same ops", "other ops"])
def test_a_kill_between_saving_and_forgetting_leaves_nothing_for_long(
    path: Path, asked: list[OpSpec]
) -> None:
    interrupt(path, 14)
    left = journal(path).read_bytes()
    table = build_rows(Watched(), OPS, path, PROTOCOL)
    journal(path).write_bytes(left)
    again = Watched()
    assert build_rows(again, asked, path, PROTOCOL) == table
    assert again.measured == []
    assert not journal(path).exists()


def test_a_table_that_lacks_nothing_is_not_refused_for_a_foreign_journal(path: Path) -> None:
    table = build_rows(Watched(), OPS, path, PROTOCOL)
    journal(path).write_text('"of something else"\n')
    assert build_rows(Watched(), OPS, path, PROTOCOL) == table
    with pytest.raises(TableError, match=journal(path).name):
        build_rows(Watched(), [*OPS, conv(7)], path, PROTOCOL)


def test_one_process_measures_a_table_at_a_time(path: Path) -> None:
    mine = table_lock(path)
    with mine, pytest.raises(InvalidInput, match=f"{path} is in use by process"), table_lock(path):
        pass
    with table_lock(path), table_lock(path.with_name("other.parquet")):
        pass


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
    stopped = interrupt(path, 4)
    elsewhere, asked = Elsewhere(), [op for op in OPS if op.key in stopped.measured]
    build_rows(elsewhere, asked, path, PROTOCOL)
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


def measured(*asked: Any, **keywords: Any) -> list[list[list[list[float]]]]:
    """What `measure_models` gives, as lists that compare."""
    return [[block.tolist() for block in each] for each in measure_models(*asked, **keywords)]


def networks(folder: Path, count: int) -> list[Path]:
    return [write(network(4 * (n + 1)), folder / f"{n}.onnx") for n in range(count)]


class Seen(subprocess.Popen):  # type: ignore[type-arg]
    """A measuring process, with the names of the models that it was asked for."""

    worker: ClassVar[list[str]] = []
    started: ClassVar[list["Seen"]] = []

    def __init__(self, command: list[str], *, stdin: IO[str], **keywords: Any) -> None:
        self.models = [Path(model).stem for model in json.load(stdin)["models"]]
        stdin.seek(0)
        super().__init__([sys.executable, *(self.worker or command[1:])], stdin=stdin, **keywords)
        self.started.append(self)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The measuring processes that were started."""
    found: list[Seen] = []
    monkeypatch.setattr(Seen, "started", found)
    monkeypatch.setattr("profilers.build.subprocess.Popen", Seen)
    return found


@pytest.fixture
def quick(started: list[Seen], monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The same, with a worker that starts at once: it gives a file's bytes as its microseconds."""
    code = """
import json, os, sys
job = json.load(sys.stdin)
for path in job["models"]:
    print([[os.path.getsize(path), 1.0]] * job["protocol"]["min_runs"], flush=True)
"""
    monkeypatch.setattr(Seen, "worker", ["-c", code])
    return started


def test_networks_are_measured_in_as_many_processes_as_asked_for(
    tmp_path: Path, started: list[Seen]
) -> None:
    files = networks(tmp_path, 3)
    told: list[tuple[int, int]] = []
    found = measure_models(
        SimulatedProfiler(batch=2),
        files,
        PROTOCOL,
        lambda _, done, of: told.append((done, of)),
        processes=2,
    )
    assert told == [(done, 6) for done in (1, 2, 3, 4, 5, 6)]
    assert [sorted(process.models) for process in started] == [["0", "1", "2"]] * 2
    assert all(process.returncode is not None for process in started)
    for number, blocks in enumerate(found):
        wanted = CALL_US + 2 * sum(map(op_us, network(4 * (number + 1))))
        assert [block.shape for block in blocks] == [(PROTOCOL.min_runs, 2)] * 2
        for block in blocks:
            assert block.tolist() == [[pytest.approx(wanted, abs=JOURNALLED_US), 1.0]] * len(block)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{n}.onnx" for n in range(3)]


def test_each_process_times_the_networks_in_an_order_of_its_own(
    tmp_path: Path, quick: list[Seen]
) -> None:
    files = networks(tmp_path, 6)
    for _ in range(2):
        measure_models(SimulatedProfiler(), files, PROTOCOL, processes=5)
    orders = [tuple(process.models) for process in quick]
    assert orders[:5] == orders[5:]
    assert len(set(orders)) == 5
    assert {tuple(sorted(order)) for order in orders} == {tuple(map(str, range(6)))}


def test_a_measuring_process_that_fails_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "broken.onnx"
    model.write_bytes(b"\xff not a model")
    with pytest.raises(HwnasError, match=r"measuring process failed: .*Error") as caught:
        measure_models(SimulatedProfiler(), [model], PROTOCOL)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is HwnasError
    assert caught.value.next_step


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.onnx cannot be read"):
        measure_models(SimulatedProfiler(), [tmp_path / "absent.onnx"], PROTOCOL)


def test_nothing_to_measure_is_nothing(quick: list[Seen]) -> None:
    assert measure_models(SimulatedProfiler(), [], PROTOCOL) == []
    assert quick == []


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        ("print([[1.0, 2.0]])", "it ended without a message"),
        ("import os; print([[1.0, 2.0]], flush=True); os.kill(os.getpid(), 9)", "it ended without"),
        ("print('[1.0,', end='')", "it ended without a message"),
        ("print('hello')", "it ended without a message"),
        ("pass", "it ended without a message"),
        ("import sys; sys.exit('no\\nmemory')", "memory"),
        ("import os; os.write(1, b'\\xff\\n')", "it ended without a message"),
        ("import sys; sys.stderr.write('x' * 10**6); raise MemoryError", "MemoryError"),
    ],
)
def test_a_measuring_process_that_ends_early_is_told_and_what_it_measured_is_kept(
    worker: str, told: str, tmp_path: Path, quick: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, kept = networks(tmp_path, 2), tmp_path / "kept.journal"
    with monkeypatch.context() as patch:
        patch.setattr(Seen, "worker", ["-c", worker])
        with pytest.raises(HwnasError, match=f"measuring process failed: .*{told}"):
            measure_models(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    whole = "[[1.0, 2.0]]" in worker
    assert len(lines(kept)) == whole
    found = measured(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    first, second = quick[0].models
    for name, blocks in zip(("0", "1"), found, strict=True):
        assert ([[1.0, 2.0]] in blocks) is (whole and name == first)
    assert quick[1].models == ([second] if whole else [first, second])
    assert [sorted(process.models) for process in quick[2:]] == [["0", "1"]] * 2


class Enough(Exception):
    """A caller's own reason to stop."""


@pytest.mark.parametrize(
    ("device", "reason"), [(SimulatedProfiler, Enough), (OrtProfiler, KeyboardInterrupt)]
)
def test_an_error_in_the_caller_ends_the_measuring_process(
    device: type[Profiler],
    reason: type[BaseException],
    tmp_path: Path,
    started: list[Seen],
) -> None:
    files, kept = networks(tmp_path, 3), tmp_path / "kept.journal"

    def stop(_: str, done: int, __: int) -> None:
        if done == 1:
            raise reason

    with pytest.raises(reason):
        measure_models(device(), files, PROTOCOL, stop, journal=kept)
    (process,) = started
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    assert len(lines(kept)) == 1


# ---- networks, interrupted


def stopping_after(blocks: int) -> Callable[[str, int, int], None]:
    seen = itertools.count(1)

    def progress(*_: object) -> None:
        if next(seen) == blocks:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("blocks", [1, 3, 4, 8])
def test_interrupted_networks_go_on_with_the_missing_blocks(
    blocks: int, tmp_path: Path, quick: list[Seen]
) -> None:
    files, kept = networks(tmp_path, 3), tmp_path / "kept.journal"
    wanted = measured(SimulatedProfiler(), files, PROTOCOL)
    order = [name for process in quick for name in process.models]
    assert len(order) == 3 * PROTOCOL.rounds
    quick.clear()
    with pytest.raises(KeyboardInterrupt):
        measure_models(SimulatedProfiler(), files, PROTOCOL, stopping_after(blocks), journal=kept)
    before = kept.read_bytes()
    quick.clear()
    told: list[int] = []
    found = measured(
        SimulatedProfiler(), files, PROTOCOL, lambda _, done, __: told.append(done), journal=kept
    )
    assert found == wanted
    assert told == list(range(blocks, 10)), "what is there already is told first"
    assert [name for process in quick for name in process.models] == order[blocks:]
    assert kept.read_bytes().startswith(before)
    quick.clear()
    assert measured(SimulatedProfiler(), files, PROTOCOL, journal=kept) == wanted
    assert quick == [], "nothing is missing, so no process is started"


class Compiling(SimulatedProfiler):
    """A device that runs a file of its own, in a folder that goes with it."""

    suffix = ".plan"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.made: list[str] = []

    def compiled(self, model: Path) -> Path:
        self.made.append(model.stem)
        plan = Path(self.folder.name) / f"{model.stem}.plan"
        plan.write_bytes(model.read_bytes())
        return plan


def test_only_what_is_missing_is_compiled_and_only_once(tmp_path: Path, quick: list[Seen]) -> None:
    """A journal that holds all makes no engine; one that holds some makes the others'."""
    files, kept = networks(tmp_path, 3), tmp_path / "kept.journal"
    wanted = measured(SimulatedProfiler(), files, PROTOCOL)
    order = [name for process in quick for name in process.models]
    for blocks, left in ((1, order[1:]), (4, order[4:]), (8, order[8:])):
        kept.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            measure_models(Compiling(), files, PROTOCOL, stopping_after(blocks), journal=kept)
        profiler = Compiling()
        assert measured(profiler, files, PROTOCOL, journal=kept) == wanted
        assert sorted(profiler.made) == sorted(set(left))
    again = Compiling()
    assert measured(again, files, PROTOCOL, journal=kept) == wanted
    assert again.made == []


def test_a_journal_tells_which_models_it_holds(tmp_path: Path, quick: list[Seen]) -> None:
    files, kept = networks(tmp_path, 3), tmp_path / "kept.journal"
    assert journalled(SimulatedProfiler(), PROTOCOL, kept) == set()
    measure_models(SimulatedProfiler(), files[:2], PROTOCOL, journal=kept)
    hashes = [file_hash(file.read_bytes()) for file in files]
    assert journalled(SimulatedProfiler(), PROTOCOL, kept) == set(hashes[:2])
    with pytest.raises(TableError, match="another host"):
        journalled(SimulatedProfiler(batch=2), PROTOCOL, kept)


@pytest.mark.usefixtures("quick")
def test_a_journal_gives_what_it_holds_and_not_more(tmp_path: Path) -> None:
    """Fewer processes afterwards: the first blocks, as an undisturbed run would have taken."""
    files, kept = networks(tmp_path, 2), tmp_path / "kept.journal"
    measure_models(SimulatedProfiler(), files, PROTOCOL, processes=3, journal=kept)
    before = kept.read_bytes()
    found = measure_models(SimulatedProfiler(), files, PROTOCOL, processes=2, journal=kept)
    assert [len(blocks) for blocks in found] == [2] * 2
    found = measure_models(SimulatedProfiler(), files, PROTOCOL, processes=4, journal=kept)
    assert [len(blocks) for blocks in found] == [4] * 2
    assert kept.read_bytes().startswith(before)


def test_blocks_are_kept_by_the_models_bytes(tmp_path: Path, quick: list[Seen]) -> None:
    """Another order, other names and further models: only what is new is measured."""
    first, second, third = networks(tmp_path, 3)
    kept = tmp_path / "kept.journal"
    wanted = measured(SimulatedProfiler(), [first, second], PROTOCOL, journal=kept)
    moved = first.rename(tmp_path / "moved.onnx")
    quick.clear()
    found = measured(SimulatedProfiler(), [third, second, moved], PROTOCOL, journal=kept)
    assert [found[2], found[1]] == wanted
    assert [process.models for process in quick] == [["2"]] * PROTOCOL.rounds
    write(network(20), second)
    quick.clear()
    measure_models(SimulatedProfiler(), [second], PROTOCOL, journal=kept)
    assert [process.models for process in quick] == [["1"]] * PROTOCOL.rounds


def test_a_model_that_is_asked_for_twice_is_measured_twice(
    tmp_path: Path, quick: list[Seen]
) -> None:
    (file,) = networks(tmp_path, 1)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    kept = tmp_path / "kept.journal"
    for _ in range(2):
        assert len(measure_models(SimulatedProfiler(), [file, copy], PROTOCOL, journal=kept)) == 2
    assert [sorted(process.models) for process in quick] == [["0", "copy"]] * PROTOCOL.rounds


@pytest.mark.usefixtures("quick")
def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    files, kept = networks(tmp_path, 2), tmp_path / "kept.journal"
    wanted = measured(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    whole = kept.read_bytes()
    for cut in (1, 20, len(whole) - 5):
        kept.write_bytes(whole[:-cut])
        assert measured(SimulatedProfiler(), files, PROTOCOL, journal=kept) == wanted
        assert kept.read_bytes() == whole


def test_a_journal_of_networks_of_another_condition_is_refused_and_kept(
    tmp_path: Path, path: Path, quick: list[Seen]
) -> None:
    files, kept = networks(tmp_path, 1), tmp_path / "kept.journal"
    measure_models(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    before = kept.read_bytes()
    quick.clear()
    for profiler, protocol in (
        (SimulatedProfiler(threads=2), PROTOCOL),
        (SimulatedProfiler(batch=2), PROTOCOL),
        (Newer(), PROTOCOL),
        (SimulatedProfiler(), replace(PROTOCOL, min_runs=5)),
    ):
        with pytest.raises(TableError, match="another host, protocol or kind") as caught:
            measure_models(profiler, files, protocol, journal=kept)
        assert caught.value.next_step
    measure_models(Elsewhere(), files, PROTOCOL, journal=kept)
    kept.write_bytes(before + b"no JSON\n")
    with pytest.raises(TableError, match="damaged"):
        measure_models(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    assert quick == []
    path.parent.mkdir()
    journal(path).write_bytes(before)
    with pytest.raises(TableError, match="another host, protocol or kind"):
        build_rows(Watched(), OPS, path, PROTOCOL)
    assert journal(path).read_bytes() == before


@pytest.mark.usefixtures("quick")
def test_a_journal_is_forgotten_when_its_result_is_kept(tmp_path: Path) -> None:
    files, kept = networks(tmp_path, 1), tmp_path / "folder" / "kept.journal"
    measure_models(SimulatedProfiler(), files, PROTOCOL, journal=kept)
    forget(kept)
    assert list(kept.parent.iterdir()) == []
    forget(kept)  # once more does no harm


# ---- killed: a real process, and SIGKILL inside the progress that it tells

KILLED = """
import os, pathlib, pickle, signal, sys
from profilers.build import build_rows, measure_models
from profilers.simulated import SimulatedProfiler

what, path, ops, files, protocol, label, after = pickle.load(sys.stdin.buffer)

def progress(told, done, total):
    if told.startswith(label) and done == after:
        os.kill(os.getpid(), signal.SIGKILL)

if what == "rows":
    build_rows(SimulatedProfiler(), ops, path, protocol, progress)
else:
    measure_models(SimulatedProfiler(), files, protocol, progress, journal=path)
"""


def killed(
    what: str, path: Path, files: Sequence[Path], protocol: Protocol, label: str, after: int
) -> None:
    told = pickle.dumps((what, path, OPS, files, protocol, label, after))
    answer = subprocess.run([sys.executable, "-c", KILLED], input=told, capture_output=True)
    assert answer.returncode == -signal.SIGKILL, answer.stderr.decode()


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()[1:] if file.exists() else []


def test_rows_that_were_killed_again_and_again_end_as_an_undisturbed_build(path: Path) -> None:
    wanted = build_rows(SimulatedProfiler(), OPS, path.with_name("whole.parquet"), PROTOCOL)
    before: list[str] = []
    for label, after in (("checking", 3), ("timing", 1), ("timing", 7), ("timing", 15)):
        killed("rows", path, [], PROTOCOL, label, after)
        assert not path.exists()
        found = lines(journal(path))
        assert found[: len(before)] == before
        assert len(found) == (after if label == "timing" else 0)
        before = found
    last = Watched()
    table = build_rows(last, OPS, path, PROTOCOL)
    assert table == wanted == LatencyTable.load(path)
    assert last.measured == [], "the last kill came after the last block"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "whole.parquet"]


def test_networks_that_were_killed_again_and_again_end_as_undisturbed_ones(tmp_path: Path) -> None:
    files, kept = networks(tmp_path, 3), tmp_path / "kept.journal"
    protocol = replace(PROTOCOL, rounds=2)
    wanted = measured(SimulatedProfiler(), files, protocol)
    before: list[str] = []
    for after in (1, 5):
        killed("networks", kept, files, protocol, "timing", after)
        found = lines(kept)
        assert found[: len(before)] == before
        assert len(found) == after
        before = found
    assert measured(SimulatedProfiler(), files, protocol, journal=kept) == wanted
    assert lines(kept)[:5] == before, "what was there was not measured again"
    counted = Counter(json.loads(line)[0] for line in lines(kept))
    assert list(counted.values()) == [2, 2, 2]


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
    assert table.pace_us > 1
    assert table.lookup(large).median_us > 3 * table.lookup(small).median_us
    for row in table.rows.values():
        assert 0 < row.min_us <= row.low_us <= row.median_us <= row.high_us
        assert 3 * protocol.min_runs <= row.runs <= 3 * protocol.max_runs
    assert LatencyTable.load(path).host == OrtProfiler().host()


def test_a_session_is_closed_where_its_block_is_interrupted(path: Path) -> None:
    assert interrupt(path, 2).open_sessions == 0
