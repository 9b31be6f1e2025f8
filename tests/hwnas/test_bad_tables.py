"""Tables that a user brings, broken by hand: each is refused with the row or field at fault and the
reason, by every command that reads one. Damaged files are in test_bad_input.py.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hwnas.job import Job, Request
from latency_tables.table import LatencyTable

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke", "--json")
TABLE = "tables/simulated-simulated-t1-b1.parquet"
Commands = Callable[..., Any]
Damage = Callable[[pd.DataFrame, dict[str, Any]], pd.DataFrame | None]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, hwnas_in: Commands, timed_here: Callable[..., Any]
) -> Iterator[Path]:
    """A folder with a whole table, an architecture, and how its last op is keyed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.calibration.measure_models", timed_here)
        assert hwnas_in(folder, "profile", *SMALL).code == 0
        space = Job(Request(SPACE)).space
        architecture = next(iter(space.enumerate()))
        (folder / "a.json").write_text(json.dumps(space.describe(architecture)))
        (folder / "key").write_text(space.lower(architecture)[-1].key)
        yield folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def broken(path: Path, damage: Damage, key: str) -> None:
    """The table as a user's own program would write it back."""
    data = pq.read_table(path)
    meta = json.loads(data.schema.metadata[b"hwnas"])
    frame = data.to_pandas()
    frame.attrs["at"] = frame.index[frame["key"] == key][0]
    changed = damage(frame, meta)
    frame = frame if changed is None else changed
    frame.attrs = {}
    table = pa.table({name: pa.array(frame[name].tolist()) for name in frame.columns})
    pq.write_table(table.replace_schema_metadata({b"hwnas": json.dumps(meta)}), path)


def cell(column: str, value: Any) -> Damage:
    def damage(frame: pd.DataFrame, _: dict[str, Any]) -> None:
        frame[column] = frame[column].astype(object)
        frame.loc[frame.attrs["at"], column] = value
        if value is not None:
            frame[column] = frame[column].astype(float)

    return damage


def in_milliseconds(frame: pd.DataFrame, _: dict[str, Any]) -> pd.DataFrame:
    frame["median_us"] /= 1000
    return frame.rename(columns={"median_us": "median_ms"})


def without(column: str) -> Damage:
    return lambda frame, _: frame.drop(columns=column)


def meta(path: str, value: Any) -> Damage:
    def damage(_: pd.DataFrame, content: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for name in outer:
            content = content[name]
        content[last] = value

    return damage


KEY = object()
"""Stands for the key of the damaged row."""

BROKEN: dict[str, tuple[Damage, list[Any]]] = {
    "zero": (cell("median_us", 0.0), [KEY, "median_us = 0.0"]),
    "negative": (cell("low_us", -3.0), [KEY, "low_us = -3.0"]),
    "NaN": (cell("high_us", float("nan")), [KEY, "high_us = nan"]),
    "infinite": (cell("p95_us", float("inf")), [KEY, "p95_us = inf"]),
    "missing cell": (cell("median_us", None), [KEY, "empty cells", "the column 'median_us'"]),
    "missing cell of text": (cell("ops", None), [KEY, "empty cells", "the column 'ops'"]),
    "another unit": (in_milliseconds, ["lacks the column 'median_us'", "'median_ms' is another"]),
    "missing column": (without("low_us"), ["lacks the column 'low_us'"]),
    "no pace": (meta("pace_us", 0.0), ["pace_us is 0.0"]),
    "negative pace": (meta("pace_us", -2), ["pace_us is -2"]),
    "pace is no number": (meta("pace_us", "quick"), ["does not read as a table"]),
    "repeats are no numbers": (meta("protocol.repeats", "many"), ["does not read as a table"]),
    "no protocol": (meta("protocol", 5), ["does not read as a table"]),
    "another version": (meta("format_version", 1), ["format version 1"]),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "predict": ("predict", "a.json", "--space", SPACE, "--table", TABLE, "--json"),
    "search": ("search", "--latency-ms", "0.05", *SMALL),
    "profile": ("profile", *SMALL),
    "check": ("tables", "check", *SMALL),
    "diff": ("tables", "diff", TABLE, TABLE, "--json"),
    "merge": ("tables", "merge", TABLE, TABLE, "--into", "both.parquet", "--json"),
    "export": ("tables", "export", TABLE, "--csv", "rows.csv", "--json"),
}


def assert_refused(answer: Any, *words: str) -> str:
    """One sentence with these words, exit code 2; what it says to do next."""
    assert answer.code == answer.content["exit_code"] == 2, answer.told
    what: str = answer.content["error"]["what"]
    for word in words:
        assert word in what
    assert "\n" not in what
    assert answer.told.splitlines()[-1].startswith(f"error: {what}")
    assert "Traceback" not in answer.told
    return str(answer.content["error"]["next"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_is_refused_with_what_is_wrong_and_where(
    kind: str, command: str, folder: Path, hwnas_in: Commands
) -> None:
    damage, words = BROKEN[kind]
    key = (folder / "key").read_text()
    broken(folder / TABLE, damage, key)
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    answer = hwnas_in(folder, *COMMANDS[command])
    told = [key if word is KEY else word for word in words]
    assert assert_refused(answer, TABLE, *told), "it says what to do next"
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before
    assert not (folder / "rows.csv").exists()
    assert not (folder / "runs").exists()


def test_a_table_without_a_row_is_refused_with_the_row_and_the_nearest(
    folder: Path, hwnas_in: Commands
) -> None:
    key = (folder / "key").read_text()
    whole = (folder / TABLE).read_bytes()
    broken(folder / TABLE, lambda frame, _: frame[frame["key"] != key], key)
    answer = hwnas_in(folder, *COMMANDS["predict"])
    assert "hwnas profile" in assert_refused(answer, "no row for", key)
    assert answer.content["error"]["accepted"].startswith(key[:4])
    next_step = assert_refused(hwnas_in(folder, *COMMANDS["check"]), "does not hold all of plain")
    assert "hwnas profile" in next_step
    assert hwnas_in(folder, *COMMANDS["profile"]).code == 0, "the row is measured again"
    (folder / "whole.parquet").write_bytes(whole)
    found, known = (LatencyTable.load(folder / name) for name in (TABLE, "whole.parquet"))
    assert found.rows == known.rows
    assert hwnas_in(folder, *COMMANDS["predict"]).code == 0


@pytest.mark.parametrize("command", ["search", "profile"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu", "another"), ("flags", "avx2"), ("runtime_version", "0"), ("threads", 8), ("batch", 2)],
)
def test_a_table_of_another_host_is_refused_and_its_field_named(
    field: str, value: Any, command: str, folder: Path, hwnas_in: Commands
) -> None:
    broken(folder / TABLE, meta(f"host.{field}", value), (folder / "key").read_text())
    answer = hwnas_in(folder, *COMMANDS[command])
    next_step = assert_refused(answer, TABLE, "another host", f"({field}: {value} against ")
    assert "--tables" in next_step


def test_a_named_table_of_another_host_predicts_all_the_same(
    folder: Path, hwnas_in: Commands
) -> None:
    before = hwnas_in(folder, *COMMANDS["predict"]).content
    broken(folder / TABLE, meta("host.cpu", "another"), (folder / "key").read_text())
    assert hwnas_in(folder, *COMMANDS["predict"]).content == before


def test_a_table_of_another_protocol_is_refused_by_search(folder: Path, hwnas_in: Commands) -> None:
    broken(folder / TABLE, meta("protocol.tolerance", 0.5), (folder / "key").read_text())
    for command in ("search", "profile"):
        assert_refused(hwnas_in(folder, *COMMANDS[command]), TABLE, "another protocol")


def test_a_latency_model_that_is_not_there_is_named_with_those_that_are(
    folder: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, *COMMANDS["predict"], "--calibration", "mine")
    assert_refused(answer, "no latency model 'mine'")
    assert answer.content["error"]["accepted"].startswith("plain ")
