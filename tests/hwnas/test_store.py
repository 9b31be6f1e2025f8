"""Run directories, their lock, their log, and the search history."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from hwnas.store import History, Proposal, Run, RunConfig, open_run, read_run
from quant.errors import InvalidInput

CONFIG = RunConfig(
    space="mobile-tiny",
    space_fingerprint="00ff",
    data="fashion-mnist:/some/where",
    data_fingerprint="11ee",
    device="cpu",
    threads=1,
    batch=1,
    method="spos",
    recipe="quick",
    seed=0,
)
CHANGES = {
    "space": "mobile",
    "space_fingerprint": "22",
    "data": "digits",
    "data_fingerprint": "33",
    "device": "gpu",
    "threads": 2,
    "batch": 8,
    "method": "fairnas",
    "recipe": "smoke",
    "seed": 1,
}


def changed(field: str) -> RunConfig:
    return CONFIG.model_copy(update={field: CHANGES[field]})


# ---- identity


def test_every_field_belongs_to_the_identity_and_is_named_with_both_values() -> None:
    assert set(CHANGES) == set(RunConfig.model_fields)
    assert CONFIG.difference(CONFIG) == ""
    for field, value in CHANGES.items():
        told = CONFIG.difference(changed(field))
        assert told == f"{field}: {getattr(CONFIG, field)} against {value}"


def test_a_new_run_is_made_where_asked_and_read_back_the_same(tmp_path: Path) -> None:
    made = open_run(CONFIG, tmp_path / "deep" / "run")
    assert read_run(made.path).config == CONFIG
    assert yaml.safe_load((made.path / "config.yaml").read_text()) == CONFIG.model_dump()
    again = open_run(CONFIG, made.path)
    assert (again.path, again.config) == (made.path, CONFIG)


@pytest.mark.parametrize("field", CHANGES)
def test_a_contradiction_is_refused_and_names_the_field(field: str, tmp_path: Path) -> None:
    open_run(CONFIG, tmp_path / "run")
    with pytest.raises(InvalidInput, match="contradict") as caught:
        open_run(changed(field), tmp_path / "run")
    assert f"({field}: " in caught.value.what
    assert str(CHANGES[field]) in caught.value.what
    assert str(tmp_path / "run") in caught.value.what
    assert "--run" in caught.value.next_step
    assert read_run(tmp_path / "run").config == CONFIG


def age(run: Run, seconds: int) -> None:
    stamp = 1_700_000_000 - seconds
    os.utime(run.path / "config.yaml", (stamp, stamp))


def test_without_a_path_the_newest_matching_run_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = {name: open_run(CONFIG, root / name) for name in ("a", "b", "c")}
    other = open_run(changed("seed"), root / "other")
    for name, seconds in (("a", 30), ("b", 10), ("c", 20)):
        age(runs[name], seconds)
    age(other, 0)
    assert open_run(CONFIG, None, root).path == root / "b"
    age(runs["c"], 5)
    assert open_run(CONFIG, None, root).path == root / "c"
    assert open_run(changed("seed"), None, root).path == root / "other"
    assert len(list(root.iterdir())) == 4


def test_new_runs_get_names_that_tell_what_they_are_of_and_are_never_taken(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    names = []
    for seed in range(3):
        config = CONFIG.model_copy(update={"seed": seed})
        names.append(open_run(config, None, root).path.name)
    assert names == [f"mobile-tiny-fashion-mnist-cpu-{number}" for number in (1, 2, 3)]
    assert open_run(changed("device"), None, root).path.name == "mobile-tiny-fashion-mnist-gpu-1"
    for file in (root / names[0]).iterdir():
        file.unlink()
    (root / names[0]).rmdir()
    config = CONFIG.model_copy(update={"seed": 9})
    assert open_run(config, None, root).path.name == "mobile-tiny-fashion-mnist-cpu-4"
    assert open_run(CONFIG.model_copy(update={"seed": 2}), None, root).path.name == names[2]


def test_a_folder_in_the_way_without_a_config_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "mobile-tiny-fashion-mnist-cpu-1").mkdir(parents=True)
    run = open_run(CONFIG, None, root)
    assert run.path.name == "mobile-tiny-fashion-mnist-cpu-2"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"threads": "many"}, "threads"),
        ({"seed": 1.5}, "seed"),
        ({"space": None}, "space"),
        ({"colour": "red"}, "colour"),
        ({"batch": [1]}, "batch"),
    ],
)
def test_a_wrong_field_of_config_yaml_is_refused_with_its_path(
    change: dict[str, object], field: str, tmp_path: Path
) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    file = run.path / "config.yaml"
    file.write_text(yaml.safe_dump({**CONFIG.model_dump(), **change}))
    with pytest.raises(InvalidInput) as caught:
        read_run(run.path)
    assert caught.value.what.startswith(f"{file}: {field}: ")


def test_a_field_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    content = CONFIG.model_dump()
    del content["recipe"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidInput, match=r"config\.yaml: recipe: "):
        read_run(run.path)


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n- b\n", b"space: [unclosed", b"just text", b"\xff\xfe\x00binary"],
    ids=["empty", "list", "not YAML", "text", "binary"],
)
def test_a_config_yaml_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"config\.yaml"):
        read_run(run.path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a run"):
        read_run(tmp_path)


# ---- inside a run


def test_the_newest_result_is_the_one_last_pointed_to(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with pytest.raises(InvalidInput, match="no result yet"):
        run.best()
    for limits in ("latency_ms=0.2", "latency_ms=0.1"):
        run.point_to(run.result(limits))
        assert run.best() == run.path / "results" / limits
    run.path.rename(tmp_path / "moved")  # the pointer is relative, so that a run can be moved
    assert read_run(tmp_path / "moved").best() == tmp_path / "moved/results/latency_ms=0.1"


def test_every_line_of_the_log_is_json_with_time_event_and_fields(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    run.log("train", steps=3, start=0)
    run.log("note", text='two\nlines, "quoted", ünïcode', nothing=None)
    open_run(CONFIG, tmp_path / "run").log("search", accuracy=0.5)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["train", "note", "search"]
    assert (lines[0]["steps"], lines[0]["start"]) == (3, 0)
    assert lines[1]["text"] == 'two\nlines, "quoted", ünïcode'
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None


TRY_TO_LOCK = """
import sys
from pathlib import Path
from hwnas.store import read_run
from quant.errors import InvalidInput
try:
    with read_run(Path(sys.argv[1])).locked():
        print("held", flush=True)
        if len(sys.argv) > 2:
            sys.stdin.read()
except InvalidInput as error:
    print(error.what)
    print(error.next_step)
"""


def try_to_lock(run: Run) -> list[str]:
    told = subprocess.run(
        [sys.executable, "-c", TRY_TO_LOCK, str(run.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return told.stdout.splitlines()


def test_a_second_process_is_told_who_holds_the_run_and_gets_it_afterwards(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with run.locked():
        what, next_step = try_to_lock(run)
        assert what == f"{run.path} is in use by process {os.getpid()}."
        assert "--run" in next_step
        assert try_to_lock(run)[0] == what  # being refused does not change who is named
    assert try_to_lock(run) == ["held"]


def test_a_killed_process_releases_the_run(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", TRY_TO_LOCK, str(run.path), "wait"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InvalidInput, match=f"in use by process {holder.pid}"), run.locked():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run.locked():
        pass


def test_an_error_inside_releases_the_run(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked():
        pass


# ---- the history

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
