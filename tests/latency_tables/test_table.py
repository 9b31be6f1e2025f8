"""Tables: what is stored comes back, what is broken is refused by name, conditions never mix."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.spaces.blocks import inverted_residual
from latency_tables.boundaries import chain_key
from latency_tables.host import Host
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import FORMAT_VERSION, LatencyTable, Row
from quant.errors import TableError
from quant.precision import Precision

HOST = Host(
    device="cpu",
    runtime="onnxruntime",
    runtime_version="1.23.0",
    cpu="a CPU",
    flags="avx2 avx512_vnni",
    threads=2,
    governor="performance",
    hostname="here",
)
PROTOCOL = {"blocks": 5, "warm_up_ms": 20.0}
MODEL = LatencyModel(
    scales={"fp32": 0.9, "w8a8": 1 / 3},
    per_op_us=-1.5,
    offset_us=3.25,
    upper_ratio=1.07,
    coverage=0.99,
    quality=Quality(100, 0.01, 0.06, 0.98, 1.0, 0.95, 0.99, 0.99),
)


REPORT = {"networks": 3, "mean_error": 0.1, "names": ["a", "b"]}


def _op(kernel: int = 3, channels: int = 8, precision: str = "fp32") -> OpSpec:
    return inverted_residual(
        Tensor(8, 12, 12), channels, kernel=kernel, expansion=3, precision=Precision(precision)
    )


def _row(*ops: OpSpec, median_us: float = 12.5) -> Row:
    return Row(
        key=chain_key(ops),
        ops=json.dumps([op.to_json() for op in ops]),
        precision=ops[-1].precision.name,
        median_us=median_us,
        low_us=median_us * 0.98,
        high_us=median_us * 1.01,
        min_us=median_us * 0.9,
        p95_us=median_us * 1.2,
        spread=0.01,
        runs=100,
        stable=True,
    )


def _table(*ops: OpSpec, host: Host = HOST) -> LatencyTable:
    """Rows of the ops, and of the chain of the first and each other that follows it."""
    rows = {op.key: _row(op, median_us=10.0 + i) for i, op in enumerate(ops)}
    pairs = [(ops[0], op) for op in ops[1:] if op.inputs == (ops[0].output,)]
    chains = {chain_key(pair): _row(*pair, median_us=18.0 + i) for i, pair in enumerate(pairs)}
    return LatencyTable(host, dict(PROTOCOL), rows, {"mobile": MODEL}, chains, 42.5, {"m": REPORT})


def _rewrite(path: Path, change: dict[str, Any]) -> None:
    """Replace parts of a saved table's metadata, as another program would."""
    data = pq.read_table(path)
    meta = json.loads(data.schema.metadata[b"hwnas"]) | change
    pq.write_table(data.replace_schema_metadata({b"hwnas": json.dumps(meta)}), path)


# ---- rows


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["median_us", "low_us", "high_us", "min_us", "p95_us"])
def test_a_row_that_is_no_time_is_refused_by_its_key(name: str, value: float) -> None:
    with pytest.raises(TableError) as caught:
        replace(_row(_op()), **{name: value})
    assert _op().key in str(caught.value)
    assert f"{name} = {value}" in str(caught.value)


def test_a_row_tells_its_ops_again() -> None:
    assert _row(_op(3)).chain == (_op(3),)
    assert _row(_op(3), _op(5), _op(3)).chain == (_op(3), _op(5), _op(3))


def test_a_row_at_another_pace_has_all_its_times_multiplied_and_nothing_else() -> None:
    row, slower = _row(_op()), _row(_op()).scaled(4.0)
    times = ("median_us", "low_us", "high_us", "min_us", "p95_us")
    for item in fields(Row):
        before, after = getattr(row, item.name), getattr(slower, item.name)
        assert after == (4 * before if item.name in times else before)


# ---- save and load


times = st.floats(min_value=1e-6, max_value=1e9)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.builds(
            Row,
            key=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            ops=st.lists(
                st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3
            ).map(json.dumps),
            precision=st.sampled_from(["fp32", "w8a8"]),
            median_us=times,
            low_us=times,
            high_us=times,
            min_us=times,
            p95_us=times,
            spread=st.floats(0, 10),
            runs=st.integers(1, 10**12),
            stable=st.booleans(),
        ),
        max_size=5,
        unique_by=lambda row: row.key,
    ),
    models=st.dictionaries(st.text("ab-", max_size=3), st.just(MODEL), max_size=2),
    pace_us=times,
    reports=st.dictionaries(st.text("ab-", max_size=3), st.just(REPORT), max_size=2),
)
def test_a_saved_table_loads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    models: dict[str, LatencyModel],
    pace_us: float,
    reports: dict[str, dict[str, Any]],
) -> None:
    """What holds one op is a row, what holds several a chain."""
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    alone, chains = (
        {row.key: row for row in rows if (len(json.loads(row.ops)) == 1) is single}
        for single in (True, False)
    )
    table = LatencyTable(HOST, dict(PROTOCOL), alone, models, chains, pace_us, reports)
    table.save(path)
    assert LatencyTable.load(path) == table
    assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]


def test_a_loaded_model_computes_as_before_saving(tmp_path: Path) -> None:
    _table(_op()).save(tmp_path / "t.parquet")
    model = LatencyTable.load(tmp_path / "t.parquet").models["mobile"]
    assert isinstance(model.quality, Quality)
    assert model.upper_ms(1234.5) == MODEL.upper_ms(1234.5)
    assert model.budget_us(2.5) == MODEL.budget_us(2.5)


def test_any_parquet_reader_sees_the_rows(tmp_path: Path) -> None:
    table = _table(_op(3), _op(5))
    table.save(tmp_path / "t.parquet")
    assert len(table.chains) == 1
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [
        asdict(row) for row in (*table.rows.values(), *table.chains.values())
    ]


def test_the_file_is_of_version_two_and_a_loaded_table_prices_as_before(tmp_path: Path) -> None:
    path, ops = tmp_path / "t.parquet", [_op(3), _op(5), _op(7)]
    table = _table(*ops)
    table.save(path)
    meta = json.loads(pq.read_table(path).schema.metadata[b"hwnas"])
    assert meta["format_version"] == FORMAT_VERSION == 2
    assert (meta["pace_us"], meta["reports"]) == (42.5, {"m": REPORT})
    loaded = LatencyTable.load(path)
    assert (loaded.pace_us, loaded.reports) == (42.5, {"m": REPORT})
    assert set(loaded.chains) == {chain_key((ops[0], op)) for op in ops[1:]}
    assert loaded.savings_us() == table.savings_us() != {}
    assert loaded.in_network_us(ops) == table.in_network_us(ops)


def test_columns_that_another_program_added_do_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    data = pq.read_table(path)
    pq.write_table(data.append_column("note", pa.array(["x"])), path)
    assert LatencyTable.load(path) == _table(_op())


# ---- what is refused


@pytest.mark.parametrize("value", [0.0, -3.5, math.nan])
def test_a_stored_row_that_is_no_time_is_refused_with_file_and_key(
    value: float, tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    _table(_op(3), _op(5)).save(path)
    data = pq.read_table(path)
    index = data.column_names.index("median_us")
    pq.write_table(data.set_column(index, "median_us", pa.array([10.0, value, 18.0])), path)
    with pytest.raises(TableError) as caught:
        LatencyTable.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert _op(5).key in message
    assert _op(3).key not in message
    assert f"median_us = {value}" in message


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(share: float, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op(3), _op(5)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(TableError, match=r"t\.parquet is not a latency table"):
        LatencyTable.load(path)


def test_another_parquet_file_and_another_file_are_no_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("key,median_us\n")
    (tmp_path / "folder.parquet").mkdir()
    for name in ("other", "text", "folder"):
        with pytest.raises(TableError, match=rf"{name}\.parquet is not a latency table"):
            LatencyTable.load(tmp_path / f"{name}.parquet")


def test_a_table_that_is_not_there_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"There is no table .*gone\.parquet.*hwnas profile"):
        LatencyTable.load(tmp_path / "gone.parquet")


@pytest.mark.parametrize("name", [item.name for item in fields(Row)])
def test_a_missing_column_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    with pytest.raises(TableError, match=rf"t\.parquet lacks the column '{name}'"):
        LatencyTable.load(path)


@pytest.mark.parametrize("name", ["key", "median_us", "runs", "stable"])
def test_empty_cells_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op(3), _op(5)).save(path)
    data = pq.read_table(path)
    index, column = data.column_names.index(name), data[name]
    emptied = pa.array([column[0].as_py(), None, column[2].as_py()], column.type)
    pq.write_table(data.set_column(index, name, emptied), path)
    with pytest.raises(TableError, match=r"t\.parquet.* has empty cells"):
        LatencyTable.load(path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    data = pq.read_table(path)
    index = data.column_names.index("median_us")
    pq.write_table(data.set_column(index, "median_us", pa.array(["fast"])), path)
    with pytest.raises(TableError, match=r"t\.parquet"):
        LatencyTable.load(path)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, str(FORMAT_VERSION), None])
def test_another_format_version_is_refused_with_both_versions(
    version: object, tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    _rewrite(path, {"format_version": version})
    with pytest.raises(TableError, match=rf"format version {version}\..*version {FORMAT_VERSION}"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"host": {"device": "cpu"}},
        {"host": asdict(HOST) | {"colour": "red"}},
        {"host": [1]},
        {"models": {"mobile": {"scales": {}}}},
        {"models": {"mobile": MODEL.to_dict() | {"quality": {}}}},
        {"models": []},
        {"pace_us": None},
        {"pace_us": "slow"},
        {"models": {"mobile": "good"}},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_metadata_that_does_not_read_is_refused_by_the_files_name(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    _rewrite(path, change)
    with pytest.raises(TableError, match=r"t\.parquet"):
        LatencyTable.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "null", "{}"])
def test_metadata_that_is_no_object_is_refused_by_the_files_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    _table(_op()).save(path)
    data = pq.read_table(path)
    pq.write_table(data.replace_schema_metadata({b"hwnas": text}), path)
    with pytest.raises(TableError, match=r"t\.parquet"):
        LatencyTable.load(path)


# ---- merge


def test_merging_keeps_the_rows_of_both_and_prefers_the_others(tmp_path: Path) -> None:
    ours, theirs = _table(_op(3), _op(5)), _table(_op(5), _op(7))
    theirs.models = {"tiny": MODEL}
    merged = ours.merge(theirs)
    assert merged.rows == ours.rows | theirs.rows
    assert merged.rows[_op(5).key].median_us == 10.0 != ours.rows[_op(5).key].median_us
    assert merged.chains == ours.chains | theirs.chains
    assert set(merged.models) == {"mobile", "tiny"}
    assert (merged.host, merged.protocol) == (ours.host, ours.protocol)
    assert (merged.pace_us, merged.reports) == (42.5, {"m": REPORT})
    assert len(ours.rows) == len(theirs.rows) == 2


def test_merging_tells_the_others_times_at_our_pace() -> None:
    """On a machine of twice the speed every row took half as long."""
    ours, theirs = _table(_op(3), _op(5)), _table(_op(5), _op(7))
    theirs.pace_us = ours.pace_us / 2
    theirs.reports = {"theirs": REPORT}
    merged = ours.merge(theirs)
    assert merged.pace_us == ours.pace_us
    assert merged.rows[_op(3).key] == ours.rows[_op(3).key]
    for key, row in theirs.rows.items():
        assert merged.rows[key] == row.scaled(2.0)
    (ours_only,), (theirs_only,) = ours.chains, theirs.chains
    assert merged.chains[ours_only] == ours.chains[ours_only]
    assert merged.chains[theirs_only] == theirs.chains[theirs_only].scaled(2.0)
    assert set(merged.reports) == {"m", "theirs"}


def test_a_model_that_came_from_another_pace_bounds_the_same_latencies() -> None:
    """What a user waits was observed there; only the rows under the model are told anew."""
    ours, theirs = _table(_op(3)), _table(_op(5), _op(7))
    theirs.pace_us, theirs.models = ours.pace_us / 2, {"theirs": MODEL}
    merged = ours.merge(theirs)
    ops = [_op(5), _op(7)]

    def told(table: LatencyTable) -> tuple[float, float]:
        model = table.models["theirs"]
        additive = sum(model.op_cost_us("fp32", us) for us in table.in_network_us(ops))
        return model.predict_ms(additive), model.upper_ms(additive)

    (before, bound_before), (after, bound_after) = told(theirs), told(merged)
    assert after == pytest.approx(2 * before, rel=1e-12), "at our slower pace"
    assert bound_after == pytest.approx(bound_before, rel=1e-12)
    assert merged.models["mobile"] == MODEL
    assert merged.models["theirs"].quality == MODEL.quality
    assert merged.models["theirs"].coverage == MODEL.coverage


CONDITIONS = {
    "device": "gpu",
    "runtime": "tensorrt",
    "runtime_version": "1.24.0",
    "cpu": "another CPU",
    "flags": "avx2",
    "threads": 4,
    "batch": 8,
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_rows_of_another_condition_are_not_merged_and_the_field_is_named(name: str) -> None:
    other = replace(HOST, **{name: CONDITIONS[name]})
    with pytest.raises(TableError) as caught:
        _table(_op(3)).merge(_table(_op(5), host=other))
    told = f"({name}: {getattr(HOST, name)} against {CONDITIONS[name]})"
    assert told in str(caught.value)


def test_every_field_of_a_host_is_a_condition_but_hostname_and_governor() -> None:
    assert {item.name for item in fields(Host)} == {*CONDITIONS, "hostname", "governor"}
    other = replace(HOST, hostname="elsewhere", governor="powersave")
    assert HOST.difference(other) == ""
    merged = _table(_op(3)).merge(_table(_op(5), host=other))
    assert set(merged.rows) == {_op(3).key, _op(5).key}


def test_rows_of_another_protocol_are_not_merged() -> None:
    """The field that differs is named, also where one of the two lacks it."""
    other = _table(_op(5))
    other.protocol["blocks"] = 6
    with pytest.raises(TableError, match=r"different protocols \(blocks: 5 against 6\)"):
        _table(_op(3)).merge(other)
    del other.protocol["blocks"]
    with pytest.raises(TableError, match=r"\(blocks: 5 against None\)"):
        _table(_op(3)).merge(other)
    other.protocol |= {"blocks": 5, "tolerance": 0.1}
    with pytest.raises(TableError, match=r"\(tolerance: None against 0\.1\)"):
        _table(_op(3)).merge(other)


def test_long_values_are_cut_in_the_sentence() -> None:
    other = replace(HOST, flags="avx2 " * 200)
    assert len(HOST.difference(other)) < 160


def test_hosts_of_other_conditions_write_other_files() -> None:
    others = [HOST, *(replace(HOST, **{n: CONDITIONS[n]}) for n in ("device", "threads", "batch"))]
    assert len({host.file_name for host in others}) == len(others)
    assert HOST.file_name == "cpu-onnxruntime-t2-b1.parquet"


# ---- lookup


def test_lookup_finds_the_row_of_the_same_layers() -> None:
    table = _table(_op(3), _op(5), _op(3, precision="w8a8"))
    for op in (_op(3), _op(5), _op(3, precision="w8a8")):
        assert table.lookup(op) is table.rows[op.key]


@pytest.mark.parametrize("name", ["w4a8", "w2a8", "pact-w1a8"])
def test_ops_that_run_alike_share_a_row(name: str) -> None:
    table = _table(_op(3), _op(3, precision="w8a8"))
    op = _op(3, precision=name)
    assert op.executed == _op(3, precision="w8a8")
    assert table.lookup(op) is table.lookup(op.executed) is table.rows[op.executed.key]
    assert table.missing([op]) == []
    assert table.in_network_us([op]) == table.in_network_us([op.executed])
    assert LatencyTable(HOST, {}).missing([op, op.executed]) == [op.executed]


def test_activations_of_fewer_bits_have_a_row_of_their_own() -> None:
    """They run a Clip more, and hand on another format."""
    table = _table(_op(3, precision="w8a8"))
    low, shared = _op(3, precision="w8a4"), _op(3, precision="w2a4")
    assert table.missing([low, shared]) == [low]
    with pytest.raises(TableError, match=re.escape(repr(low.key))):
        table.lookup(shared)


def test_a_miss_names_the_three_nearest_keys_nearest_first() -> None:
    near = [_op(5, 24), _op(7, 24), _op(5, 16)]
    far = [
        inverted_residual(
            Tensor(3, 224, 224), c, kernel=5, expansion=1, stride=2, precision=Precision("w8a8")
        )
        for c in (96, 112, 128)
    ]
    with pytest.raises(TableError) as caught:
        _table(*far, *near).lookup(_op(3, 24))
    message = str(caught.value)
    assert f"no row for {_op(3, 24).key!r}" in message
    places = [message.find(op.key) for op in near]
    assert -1 < places[0] < places[2]
    assert -1 < places[1] < places[2]
    assert not any(op.key in message for op in far)


def test_a_miss_in_an_empty_table_says_so() -> None:
    with pytest.raises(TableError, match="the table is empty"):
        LatencyTable(HOST, {}).lookup(_op())


def test_missing_ops_are_told_once_and_in_order() -> None:
    table = _table(_op(3))
    asked = [_op(7), _op(3), _op(5), _op(7)]
    assert [op.key for op in table.missing(asked)] == [_op(7).key, _op(5).key]
    assert table.missing([_op(3), _op(3)]) == []
