"""A run: the directory that holds everything one search made, and the history in it.

config.yaml      what the run is of: its identity
table.parquet    the latency table that was used
supernet.pt      shared weights, with the optimiser, to go on from
search.sqlite    every proposal and every score, written at once
results/LIMITS/  one folder a set of limits: finalists, files, certificate.json
best             the newest result's folder
log.jsonl        what happened, a line each
"""

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from latency_tables.files import explained, write_text
from quant.errors import InvalidInput


class RunConfig(BaseModel):
    """A run's identity. Limits are not part of it: one run answers many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: str
    space_fingerprint: str
    data: str
    data_fingerprint: str
    device: str
    threads: int
    batch: int
    method: str
    recipe: str
    seed: int

    def difference(self, other: "RunConfig") -> str:
        """The first field in which two runs differ, with both values; empty if none does."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine} against {theirs}"
        return ""


class Run:
    """A run directory."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @property
    def table(self) -> Path:
        """The latency table used."""
        return self.path / "table.parquet"

    @property
    def supernet(self) -> Path:
        """The shared weights."""
        return self.path / "supernet.pt"

    @property
    def history(self) -> Path:
        """The search history."""
        return self.path / "search.sqlite"

    @property
    def report(self) -> Path:
        """The newest report."""
        return self.path / "report.html"

    def result(self, limits: str) -> Path:
        """The folder of one set of limits, such as `latency_ms=0.21`."""
        return self.path / "results" / limits

    def best(self) -> Path:
        """The newest finished or unfinished result; raises InvalidInput where there is none."""
        pointer = self.path / "best"
        if not pointer.exists():
            raise InvalidInput(
                f"{self.path} holds no result yet.", next_step="run hwnas search --latency-ms X"
            )
        return self.path / pointer.read_text().strip()

    def point_to(self, result: Path) -> None:
        """Make a result the newest."""
        write_text(self.path / "best", f"{result.relative_to(self.path)}\n")

    def log(self, event: str, **fields: Any) -> None:
        """Add a line to log.jsonl."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
        path = self.path / "log.jsonl"
        with explained(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; raises InvalidInput that names the process which has it."""
        path = self.path / ".lock"
        with explained(path):
            file = path.open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InvalidInput(
                    f"{self.path} is in use by process {file.read().strip() or 'unknown'}.",
                    next_step="wait for it, or name another --run",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def open_run(config: RunConfig, path: Path | None, root: Path = Path("runs")) -> Run:
    """The run of a configuration.

    With `path`, that directory (made if it is not there); raises InvalidInput where it holds a run
    of another configuration. Else the newest run under `root` that matches, else a new one there.
    """
    if path is not None:
        run = read_run(path) if (path / "config.yaml").exists() else _new(path, config)
        if difference := config.difference(run.config):
            raise InvalidInput(
                f"The flags contradict {path} ({difference}).",
                next_step="drop the flag, or name another --run",
            )
        return run
    found = sorted(root.glob("*/config.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
    for candidate in found:
        try:
            run = read_run(candidate.parent)
        except InvalidInput:  # a damaged run of something else is no reason to refuse this one
            continue
        if run.config == config:
            return run
    space = re.sub(r"[^A-Za-z0-9.]+", "-", Path(config.space).name)
    name = f"{space}-{config.data.partition(':')[0]}-{config.device}"
    number = sum(p.parent.name.startswith(name) for p in found) + 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return _new(root / f"{name}-{number}", config)


def read_run(path: Path) -> Run:
    """The run in a directory; raises InvalidInput with the path of the field at fault."""
    file = path / "config.yaml"
    try:
        return Run(path, RunConfig.model_validate(yaml.safe_load(file.read_text())))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"{path} is not a run.", accepted="a directory that hwnas search made"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(f"{file} is not readable YAML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(f"{file}: {where}: {first['msg']}.") from error


def _new(path: Path, config: RunConfig) -> Run:
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    write_text(path / "config.yaml", text)
    return Run(path, config)


@dataclass(frozen=True)
class Proposal:
    """A feasible architecture that a search asked to be scored."""

    genes: tuple[int, ...]
    bounds: dict[str, float]


class History:
    """Proposals of every search in a run, and the score of every architecture, in SQLite.

    A generation's proposals are written before the first is scored and each score at once, so that
    a search which stopped goes on with the same proposals.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(
                """
                CREATE TABLE IF NOT EXISTS scores (
                    genes TEXT PRIMARY KEY, accuracy REAL NOT NULL, loss REAL NOT NULL);
                CREATE TABLE IF NOT EXISTS generations (
                    search TEXT, number INTEGER, rejected INTEGER NOT NULL,
                    PRIMARY KEY (search, number));
                CREATE TABLE IF NOT EXISTS proposals (
                    search TEXT, generation INTEGER, place INTEGER, genes TEXT NOT NULL,
                    PRIMARY KEY (search, generation, place));
                CREATE TABLE IF NOT EXISTS bounds (
                    search TEXT, generation INTEGER, place INTEGER,
                    cost TEXT NOT NULL, limit_value REAL NOT NULL, upper REAL NOT NULL,
                    PRIMARY KEY (search, generation, place, cost));
                """
            )
        except sqlite3.DatabaseError as error:
            raise InvalidInput(
                f"{path} is not a search history: {error}.",
                next_step="remove it; the search then starts again from the trained supernet",
            ) from error

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def add_generation(
        self,
        search: str,
        number: int,
        proposals: Sequence[Proposal],
        limits: dict[str, float],
        rejected: int,
    ) -> None:
        """Write a generation's proposals and how many others were rejected unscored."""
        with self._transaction():
            self._db.execute("INSERT INTO generations VALUES (?, ?, ?)", (search, number, rejected))
            self._db.executemany(
                "INSERT INTO proposals VALUES (?, ?, ?, ?)",
                [(search, number, place, json.dumps(p.genes)) for place, p in enumerate(proposals)],
            )
            self._db.executemany(
                "INSERT INTO bounds VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (search, number, place, cost, limit, p.bounds[cost])
                    for place, p in enumerate(proposals)
                    for cost, limit in limits.items()
                ],
            )

    def generations(self, search: str) -> list[list[tuple[int, ...]]]:
        """The proposals of a search, generation by generation."""
        found: list[list[tuple[int, ...]]] = []
        for (count,) in self._db.execute(
            "SELECT COUNT(*) FROM generations WHERE search = ?", (search,)
        ):
            found = [[] for _ in range(count)]
        rows = self._db.execute(
            "SELECT generation, place, genes FROM proposals WHERE search = ? "
            "ORDER BY generation, place",
            (search,),
        )
        for generation, _, genes in rows:
            found[generation].append(tuple(json.loads(genes)))
        return found

    def rejected(self, search: str) -> int:
        """How many proposals of a search were rejected unscored."""
        query = "SELECT COALESCE(SUM(rejected), 0) FROM generations WHERE search = ?"
        return int(self._db.execute(query, (search,)).fetchone()[0])

    def score(self, genes: tuple[int, ...]) -> tuple[float, float] | None:
        """An architecture's accuracy and loss, if it was scored."""
        query = "SELECT accuracy, loss FROM scores WHERE genes = ?"
        row = self._db.execute(query, (json.dumps(genes),)).fetchone()
        return (float(row[0]), float(row[1])) if row else None

    def add_score(self, genes: tuple[int, ...], accuracy: float, loss: float) -> None:
        """Write a score."""
        row = (json.dumps(genes), accuracy, loss)
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise InvalidInput(
                    f"{self._path} cannot be written: {error}.",
                    next_step="free some space; the same command then goes on",
                ) from error
            raise
