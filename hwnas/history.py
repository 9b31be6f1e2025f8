"""The history of a run's searches: every proposal and every score, in SQLite."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency_tables.files import explained
from quant.errors import InvalidInput


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
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

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
        counted = self._rows("SELECT COUNT(*) FROM generations WHERE search = ?", search)
        found: list[list[tuple[int, ...]]] = [[] for _ in range(counted[0][0])]
        rows = self._rows(
            "SELECT generation, place, genes FROM proposals WHERE search = ? "
            "ORDER BY generation, place",
            search,
        )
        for generation, _, genes in rows:
            found[generation].append(tuple(json.loads(genes)))
        return found

    def rejected(self, search: str) -> int:
        """How many proposals of a search were rejected unscored."""
        query = "SELECT COALESCE(SUM(rejected), 0) FROM generations WHERE search = ?"
        return int(self._rows(query, search)[0][0])

    def score(self, genes: tuple[int, ...]) -> tuple[float, float] | None:
        """An architecture's accuracy and loss, if it was scored."""
        query = "SELECT accuracy, loss FROM scores WHERE genes = ?"
        rows = self._rows(query, json.dumps(genes))
        return (float(rows[0][0]), float(rows[0][1])) if rows else None

    def add_score(self, genes: tuple[int, ...], accuracy: float, loss: float) -> None:
        """Write a score."""
        row = (json.dumps(genes), accuracy, loss)
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", row)

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

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
                raise self._unwritable(error) from error
            if type(error) is sqlite3.DatabaseError:  # not its kinds for a mistake of ours
                raise self._damaged(error) from error
            raise

    def _damaged(self, error: sqlite3.DatabaseError) -> InvalidInput:
        return InvalidInput(
            f"{self._path} is not a search history: {error}.",
            next_step="remove it; the search then starts again from the trained supernet",
        )

    def _unwritable(self, error: sqlite3.OperationalError) -> InvalidInput:
        return InvalidInput(
            f"{self._path} cannot be written: {error}.",
            next_step="free some space; the same command then goes on",
        )
