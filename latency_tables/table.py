"""Measured rows of one device in one condition, with everything needed to trust them.

One parquet file a condition: the rows of ops and of short chains of ops, and in the file's metadata
the host, the measuring protocol, the latency models (`latency_tables.model`) that were calibrated
on whole networks, and how each did on networks measured later.
"""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latency_tables.boundaries import Chain, savings_us
from latency_tables.files import write_atomically
from latency_tables.host import Host
from latency_tables.model import LatencyModel
from latency_tables.ops import OpSpec
from latency_tables.slopes import Inside, across_boundary, by_chains
from quant.errors import TableError

FORMAT_VERSION = 2
_META = b"hwnas"
_TIMES = ("median_us", "low_us", "high_us", "min_us", "p95_us")


@dataclass(frozen=True)
class Row:
    """The measurement of an op, or of a chain of them.

    `ops` is the JSON list of its ops. Times are at the table's pace. The median lies between
    `low_us` and `high_us` (`profilers.measure.interval`); `spread` is the interquartile range of
    the block medians over their median; `stable` tells whether they were narrow enough, and whether
    chains leave the op a positive cost inside a network.
    """

    key: str
    ops: str
    precision: str
    median_us: float
    low_us: float
    high_us: float
    min_us: float
    p95_us: float
    spread: float
    runs: int
    stable: bool

    def __post_init__(self) -> None:
        for name in _TIMES:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TableError(
                    f"The row {self.key!r} has {name} = {value}.",
                    accepted="a positive number of microseconds",
                    next_step="profile this op again",
                )

    def scaled(self, factor: float) -> "Row":
        """The row with all its times multiplied."""
        return replace(self, **{name: factor * getattr(self, name) for name in _TIMES})

    @property
    def chain(self) -> Chain:
        """The ops that were measured together."""
        return tuple(_op(text) for text in json.loads(self.ops))


@dataclass
class LatencyTable:
    """Rows by key, with their host, their protocol and the models fitted on them.

    `rows` are of single ops, `chains` of several. `pace_us` is how long the clock's fixed
    arithmetic took when the first rows were measured: the speed of the machine that all rows are
    told at (1 where a device has none). `reports` has what `hwnas tables check` found, by model.
    """

    host: Host
    protocol: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    models: dict[str, LatencyModel] = field(default_factory=dict)
    chains: dict[str, Row] = field(default_factory=dict)
    pace_us: float = 1.0
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many copies the chains have whose slopes tell costs (`profilers.base.Profiler`);
        none where rows and boundaries do.
        """
        return tuple(map(int, self.protocol.get("repeats", ())))

    def lookup(self, op: OpSpec) -> Row:
        """The row of an op, that of all ops which run alike (`OpSpec.executed`); raises TableError
        that names the nearest known keys.
        """
        key = op.executed.key
        row = self.rows.get(key)
        if row is None:
            near = difflib.get_close_matches(key, self.rows, n=3, cutoff=0)
            raise TableError(
                f"The table has no row for {key!r}.",
                accepted="; ".join(near) or "nothing yet, the table is empty",
                next_step="run hwnas profile for this space",
            )
        return row

    def savings_us(self) -> dict[str, float]:
        """What each boundary saves an op inside a network against the op alone, in us."""
        return savings_us(self._costs_us, self._measured_chains)

    def by_chains(self) -> dict[str, Inside]:
        """What slopes and hosts tell of ops inside a network, by key; nothing where the table has
        no `repeats`. A cost that is not positive is no cost (`inside`).
        """
        return by_chains(self._costs_us, self._measured_chains) if self.repeats else {}

    def inside(self, ops: Sequence[OpSpec]) -> list[Inside]:
        """What ops cost inside a network, and what tells it; raises TableError where a row is
        missing.

        A slope, or else the difference behind a host, where it is positive; else the row less what
        its boundary saves. An op whose boundary no chain crosses, such as a network's first, costs
        what it does alone.
        """
        alone = [(op, self.lookup(op).median_us) for op in ops]
        told = {key: inside for key, inside in self.by_chains().items() if inside.us > 0}
        saved = self.savings_us()
        return [
            told.get(op.executed.key) or across_boundary(us, saved.get(op.boundary))
            for op, us in alone
        ]

    def in_network_us(self, ops: Sequence[OpSpec]) -> list[float]:
        """What ops cost inside a network, in us, as `inside` tells it."""
        return [inside.us for inside in self.inside(ops)]

    @property
    def _costs_us(self) -> dict[str, float]:
        return {key: row.median_us for key, row in (self.rows | self.chains).items()}

    @property
    def _measured_chains(self) -> list[Chain]:
        return [row.chain for row in self.chains.values()]

    def missing(self, ops: Iterable[OpSpec]) -> list[OpSpec]:
        """What is to be measured of the ops, as it is executed, each key once."""
        executed = {op.executed.key: op.executed for op in ops}
        return [op for key, op in executed.items() if key not in self.rows]

    def protocol_difference(self, other: "LatencyTable") -> str:
        """The first field in which the protocols differ, with both values; empty if none does."""
        for name in self.protocol | other.protocol:
            mine, theirs = self.protocol.get(name), other.protocol.get(name)
            if mine != theirs:
                return f"{name}: {mine} against {theirs}"
        return ""

    def merge(self, other: "LatencyTable") -> "LatencyTable":
        """Both tables' rows, `other`'s first, and its models, at this table's pace; raises
        TableError where the conditions differ.
        """
        if difference := self.host.difference(other.host):
            raise TableError(f"The two tables were measured on different hosts ({difference}).")
        if difference := self.protocol_difference(other):
            raise TableError(f"The two tables were measured by different protocols ({difference}).")
        scale = self.pace_us / other.pace_us
        return LatencyTable(
            self.host,
            self.protocol,
            self.rows | {key: row.scaled(scale) for key, row in other.rows.items()},
            self.models | {name: model.at_pace(scale) for name, model in other.models.items()},
            self.chains | {key: row.scaled(scale) for key, row in other.chains.items()},
            self.pace_us,
            self.reports | other.reports,
        )

    def save(self, path: Path) -> None:
        """Write the parquet file atomically."""
        meta = {
            "format_version": FORMAT_VERSION,
            "host": asdict(self.host),
            "protocol": self.protocol,
            "pace_us": self.pace_us,
            "models": {name: model.to_dict() for name, model in self.models.items()},
            "reports": self.reports,
        }
        rows = [*self.rows.values(), *self.chains.values()]
        columns = {item.name: [getattr(row, item.name) for row in rows] for item in _ROW}
        data = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({_META: json.dumps(meta)})
        write_atomically(path, lambda temporary: pq.write_table(data, temporary))

    @classmethod
    def load(cls, path: Path) -> "LatencyTable":
        """Read a table; raises TableError where the file is not one, with the row at fault."""
        try:
            data = pq.read_table(path)
            meta = json.loads((data.schema.metadata or {})[_META])
            if not isinstance(meta, dict):
                raise ValueError("its metadata is not an object")
        except FileNotFoundError as error:
            raise TableError(f"There is no table {path}.", next_step="run hwnas profile") from error
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise TableError(
                f"{path} is not a latency table: {error}.",
                accepted="a parquet file that hwnas profile wrote",
                next_step="remove it and profile again",
            ) from error
        if meta.get("format_version") != FORMAT_VERSION:
            raise TableError(
                f"{path} has format version {meta.get('format_version')}.",
                accepted=f"version {FORMAT_VERSION}",
                next_step="profile again with this hwnas",
            )
        if absent := [item.name for item in _ROW if item.name not in data.column_names]:
            unit = absent[0].removesuffix("_us")
            others = [name for name in data.column_names if unit in name.split("_")]
            raise TableError(
                f"{path} lacks the column {absent[0]!r}"
                + (f"; {others[0]!r} is another unit or name." if others else "."),
                accepted="microseconds, in columns that end in _us",
                next_step="profile again",
            )
        try:
            if empty := _first_empty_cell(data):
                raise TableError(f"It has empty cells, the first {empty}.")
            rows = [Row(**record) for record in data.select([i.name for i in _ROW]).to_pylist()]
            models = {name: LatencyModel.from_dict(m) for name, m in meta["models"].items()}
            single = [len(json.loads(row.ops)) == 1 for row in rows]
            table = cls(
                Host(**meta["host"]),
                meta["protocol"],
                {row.key: row for row, alone in zip(rows, single, strict=True) if alone},
                models,
                {row.key: row for row, alone in zip(rows, single, strict=True) if not alone},
                _pace_us(meta["pace_us"]),
                meta["reports"],
            )
            _ = table.repeats
        except TableError as error:
            raise TableError(
                f"{path}: {error.what}",
                accepted=error.accepted,
                next_step=error.next_step or "profile again",
            ) from error
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise TableError(
                f"{path} does not read as a table of version {FORMAT_VERSION}: {error}.",
                next_step="profile again",
            ) from error
        return table


@cache
def _op(text: str) -> OpSpec:
    """An op from its JSON: one op is in many chains, and reading it takes a while."""
    return OpSpec.from_json(text)


def _pace_us(value: Any) -> float:
    if not (math.isfinite(pace := float(value)) and pace > 0):
        raise TableError(f"Its pace_us is {value}.", accepted="a positive number of microseconds")
    return pace


def _first_empty_cell(data: pa.Table) -> str:
    """Where a cell is empty: its column, and its row by key or by number; "" where none is."""
    for item in _ROW:
        if data[item.name].null_count:
            place = data[item.name].to_pylist().index(None)
            key = data["key"][place].as_py()
            row = f"number {place + 1}" if key is None else repr(key)
            return f"in the column {item.name!r} of the row {row}"
    return ""


_ROW = fields(Row)
_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    float: pa.float64(),
    int: pa.int64(),
    bool: pa.bool_(),
}
_SCHEMA = pa.schema([(item.name, _TYPES[item.type]) for item in _ROW])
