"""The search history: written at once, seen whole or not at all, whatever ends the process."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.history import History, Proposal
from quant.errors import InvalidInput

LIMITS = {"latency_ms": 1.0, "params": 5000.0}


def proposals(*genes: tuple[int, ...]) -> list[Proposal]:
    return [Proposal(g, {"latency_ms": 0.5 + i, "params": 100.0 * i}) for i, g in enumerate(genes)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "search.sqlite"


def test_proposals_and_scores_survive_closing(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, proposals((2, 1), (0, 0), (1, 2)), LIMITS, 4)
    history.add_score((2, 1), 0.625, 1.25)
    history.close()
    again = History(path)
    assert again.generations("spos") == [[(2, 1), (0, 0), (1, 2)]]
    assert again.score((2, 1)) == (0.625, 1.25)
    assert again.score((0, 0)) is None
    assert again.rejected("spos") == 4
    again.close()


def test_a_score_is_on_disk_as_soon_as_it_is_added(path: Path) -> None:
    writer, reader = History(path), History(path)
    writer.add_generation("spos", 0, proposals((1,), (2,)), LIMITS, 0)
    writer.add_score((1,), 0.5, 2.0)
    assert reader.generations("spos") == [[(1,), (2,)]]
    assert reader.score((1,)) == (0.5, 2.0)
    writer.close()
    reader.close()


def test_generations_come_back_in_order_an_empty_one_included(path: Path) -> None:
    history = History(path)
    many = [(n,) for n in range(15)]  # more than ten: places are numbers, not text
    written = [many, [(7, 7), (3, 3)], [], [(5, 5)]]
    for number, genes in enumerate(written):
        history.add_generation("spos", number, proposals(*genes), LIMITS, 10**number)
    history.add_generation("random", 0, proposals((9, 9)), LIMITS, 5)
    assert history.generations("spos") == written
    assert history.generations("random") == [[(9, 9)]]
    assert history.generations("nobody") == []
    assert history.rejected("spos") == 1111
    assert history.rejected("random") == 5
    assert history.rejected("nobody") == 0
    history.close()


def test_scores_belong_to_the_architecture_and_the_last_one_counts(path: Path) -> None:
    history = History(path)
    history.add_score((1, 2), 0.1, 3.0)
    history.add_score((1, 2), 0.2, 2.0)
    history.add_score((12,), 0.3, 1.0)
    assert history.score((1, 2)) == (0.2, 2.0)
    assert history.score((12,)) == (0.3, 1.0)
    history.close()


def test_a_row_tells_each_limit_and_the_bound_of_each_proposal(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, proposals((1,), (2,)), LIMITS, 0)
    history.close()
    with sqlite3.connect(path) as db:
        rows = db.execute(
            "SELECT place, cost, limit_value, upper FROM bounds ORDER BY place, cost"
        ).fetchall()
    db.close()
    assert rows == [
        (0, "latency_ms", 1.0, 0.5),
        (0, "params", 5000.0, 0.0),
        (1, "latency_ms", 1.0, 1.5),
        (1, "params", 5000.0, 100.0),
    ]


def test_proposals_survive_where_there_is_no_limit(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, [Proposal((1, 2), {})], {}, 0)
    assert history.generations("spos") == [[(1, 2)]]


def test_a_generation_that_fails_half_way_leaves_nothing(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, proposals((1,)), LIMITS, 2)
    good, without_bound = proposals((3,), (4,))
    broken = [good, Proposal(without_bound.genes, {"latency_ms": 0.5})]
    with pytest.raises(KeyError):
        history.add_generation("spos", 1, broken, LIMITS, 100)
    assert history.generations("spos") == [[(1,)]]
    assert history.rejected("spos") == 2
    with pytest.raises(sqlite3.IntegrityError):  # numbered as one that is there
        history.add_generation("spos", 0, proposals((5,)), LIMITS, 100)
    assert history.generations("spos") == [[(1,)]]
    history.add_generation("spos", 1, proposals((3,), (4,)), LIMITS, 0)  # still works
    assert history.generations("spos") == [[(1,)], [(3,), (4,)]]
    history.close()


def test_a_failure_of_the_database_itself_is_rolled_back(path: Path) -> None:
    """The second row of proposals breaks a key; the first and the generation must go too."""
    history = History(path)
    history.close()
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO proposals VALUES ('spos', 0, 1, '[]')")
    db.close()
    history = History(path)
    with pytest.raises(sqlite3.IntegrityError):
        history.add_generation("spos", 0, proposals((1,), (2,)), LIMITS, 7)
    assert history.rejected("spos") == 0
    history.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM proposals").fetchone() == (1,)
    db.close()


@pytest.mark.parametrize("content", [b"not a database, but long enough to look at" * 50, b"short"])
def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a search history") as caught:
        History(path)
    assert str(path) in caught.value.what
    assert "remove it" in caught.value.next_step
    assert path.read_bytes() == content


def test_a_history_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match="cannot be written"):
        History(tmp_path / "file" / "search.sqlite")


def test_a_full_disk_is_one_sentence_and_loses_nothing(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, proposals((1,)), LIMITS, 0)
    history.add_score((1,), 0.5, 1.0)
    (pages,) = history._db.execute("PRAGMA page_count").fetchone()
    history._db.execute(f"PRAGMA max_page_count = {pages}")

    def fill_with_scores() -> None:
        for number in range(2000):
            history.add_score((number, 7), 0.5, 1.0)

    def fill_with_generations() -> None:
        for number in range(1, 200):
            history.add_generation("spos", number, proposals(*[(n,) for n in range(50)]), LIMITS, 0)

    with pytest.raises(InvalidInput, match="disk is full"):
        fill_with_scores()
    with pytest.raises(InvalidInput, match="disk is full"):
        fill_with_generations()
    history._db.execute("PRAGMA max_page_count = 100000")
    assert history.score((1,)) == (0.5, 1.0)
    assert history.generations("spos")[0] == [(1,)]
    history.add_score((9, 9), 0.25, 2.0)
    assert history.score((9, 9)) == (0.25, 2.0)


def test_a_full_disk_while_the_history_is_made_is_one_sentence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite reports what the system refuses in its own words."""
    connect = sqlite3.connect

    class Full(sqlite3.Connection):
        def executescript(self, script: str) -> sqlite3.Cursor:
            self.execute("PRAGMA max_page_count = 1")
            return super().executescript(script)

    def full(*arguments: object, **options: object) -> sqlite3.Connection:
        return connect(*arguments, **options, factory=Full)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(InvalidInput) as caught:
        History(path)
    assert caught.value.what == f"{path} cannot be written: database or disk is full."
    assert "free some space" in caught.value.next_step


def test_a_history_that_may_only_be_read_is_read_and_refuses_to_grow(path: Path) -> None:
    history = History(path)
    history.add_generation("spos", 0, proposals((1,), (2,)), LIMITS, 3)
    history.add_score((1,), 0.5, 1.0)
    history._db.execute("PRAGMA query_only = ON")
    for write in (
        lambda: history.add_score((2,), 0.25, 2.0),
        lambda: history.add_generation("spos", 1, proposals((3,)), LIMITS, 0),
    ):
        with pytest.raises(InvalidInput) as caught:
            write()
        assert caught.value.what.startswith(
            f"{path} cannot be written: attempt to write a readonly"
        )
        assert caught.value.what.endswith(".")
    assert history.generations("spos") == [[(1,), (2,)]]
    assert history.score((1,)) == (0.5, 1.0)
    assert history.score((2,)) is None
    history.close()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_file_without_permission_to_write_is_refused(path: Path) -> None:
    History(path).close()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        history = History(path)
        with pytest.raises(InvalidInput, match="cannot be written"):
            history.add_score((2,), 0.25, 2.0)
        history.close()
    finally:
        path.parent.chmod(0o755)


def test_a_directory_in_its_place_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(InvalidInput, match="cannot be written: unable to open database file"):
        History(path)


def test_a_history_that_is_damaged_further_in_is_refused_when_it_is_read(path: Path) -> None:
    """The first page is whole, so that opening it tells nothing."""
    history = History(path)
    for number in range(20):
        history.add_generation("spos", number, proposals(*[(n,) for n in range(50)]), LIMITS, 0)
        history.add_score((number,), 0.5, 1.0)
    history.close()
    content = bytearray(path.read_bytes())
    page = int.from_bytes(content[16:18], "big")
    content[page:] = b"\x5a" * (len(content) - page)
    path.write_bytes(content)
    history = History(path)
    for read in (
        lambda: history.generations("spos"),
        lambda: history.rejected("spos"),
        lambda: history.score((1,)),
        lambda: history.add_score((99,), 0.5, 1.0),
    ):
        with pytest.raises(InvalidInput) as caught:
            read()
        assert caught.value.what.startswith(f"{path} is not a search history: ")
        assert "remove it" in caught.value.next_step
    history.close()


def test_a_mistake_of_ours_is_no_damage(path: Path) -> None:
    """An error of another kind is not told as the user's."""
    history = History(path)
    with pytest.raises(sqlite3.Error) as caught:
        history.add_score((1,), [1], 0.5)  # type: ignore[arg-type]
    assert not isinstance(caught.value, InvalidInput)
    history.close()


# ---- a process that ends in the middle

KILLED_INSIDE = """
import os, signal, sys
from hwnas.history import History, Proposal
from pathlib import Path

class Killing(dict):
    "Bounds that end the process when they are read: the proposals are in the transaction by then."
    def __getitem__(self, name):
        os.kill(os.getpid(), signal.SIGKILL)

history = History(Path(sys.argv[1]))
history.add_generation("spos", 0, [Proposal((1,), {"latency_ms": 1.0})], {"latency_ms": 2.0}, 5)
history.add_score((1,), 0.5, 1.0)
history._db.execute("PRAGMA cache_size = 5")  # so that half of it is on the disk already
many = [Proposal(tuple(range(n, n + 20)), {"latency_ms": 1.0}) for n in range(3000)]
print("before", flush=True)
history.add_generation("spos", 1, [*many, Proposal((7,), Killing())], {"latency_ms": 2.0}, 100)
print("after", flush=True)
"""


def test_a_generation_of_a_killed_process_is_never_seen_in_part(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_INSIDE, str(path)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "before\n"
    # The negative control: part of it reached the file, and SQLite's journal takes it back.
    assert path.with_name("search.sqlite-journal").exists()
    assert path.stat().st_size > 100_000
    history = History(path)
    assert history.generations("spos") == [[(1,)]]
    assert history.rejected("spos") == 5
    assert history.score((1,)) == (0.5, 1.0)
    history.add_generation("spos", 1, proposals((3,), (4,)), LIMITS, 0)
    assert history.generations("spos") == [[(1,)], [(3,), (4,)]]
    history.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM proposals").fetchone() == (3,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


SCORES_UNTIL_KILLED = """
import sys
from hwnas.history import History
from pathlib import Path
history = History(Path(sys.argv[1]))
for number in range(10**6):
    history.add_score((number, 1), number / 10**6, 1.0)
    print(number, flush=True)
"""


def test_every_score_that_was_told_survives_a_kill(path: Path) -> None:
    """At any moment: a process that scores without an end is killed after it told thirty."""
    with subprocess.Popen(
        [sys.executable, "-c", SCORES_UNTIL_KILLED, str(path)], stdout=subprocess.PIPE, text=True
    ) as scoring:
        assert scoring.stdout is not None
        told = [int(scoring.stdout.readline()) for _ in range(30)]
        scoring.kill()
        told += [int(line) for line in scoring.stdout.read().split("\n")[:-1] if line]
    history = History(path)
    assert told == list(range(len(told)))
    for number in told:
        assert history.score((number, 1)) == (number / 10**6, 1.0)
    assert history.score((len(told) + 1, 1)) is None
    history.close()
