"""Damaged, foreign and unwritable files: one sentence that names the file, exit code 2, and nothing
lost. Where the sentence says what to do, doing it ends in the undisturbed result.
"""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import hwnas.job
from hwnas import cli
from hwnas.screen import Screen
from latency_tables.table import LatencyTable

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())
FAILURE = jsonschema.Draft202012Validator({"$ref": "#/$defs/failure", "$defs": SCHEMA["$defs"]})
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke", "--json")
SEARCH = ("search", "--limit-fraction", "0.5", "--run", "run", *SMALL)
OTHER_LIMIT = ("search", "--latency-ms", "0.05", "--run", "run", *SMALL)
TRAIN = ("train", "--run", "run", *SMALL)
PROFILE = ("profile", *SMALL)
TABLE = "tables/simulated-simulated-t1-b1.parquet"
RESULT = "run/results/latency_ms=0.0378"


IN_PROCESSES = hwnas.job.measure
"""Measures whole networks in fresh processes, with a journal; `quick` does it in this one."""

pytestmark = pytest.mark.usefixtures("quick")
Answer = Any  # of conftest.py, as `hwnas_in` gives it
Commands = Callable[..., Answer]


def of_run(command: str) -> tuple[str, ...]:
    return (command, "--run", "run", "--json")


def assert_refused(answer: Answer, *words: str, code: int = 2) -> None:
    """One sentence with these words, as an object and as a line, and no traceback."""
    failure = json.loads(answer.out)
    assert answer.code == failure["exit_code"] == code, answer.told
    FAILURE.validate(failure)
    what = failure["error"]["what"]
    assert "\n" not in what
    for word in words:
        assert word in what
    assert answer.told.splitlines()[-1].startswith(f"error: {what}")
    assert "Traceback" not in answer.told


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, but for locks and the log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".jsonl") and path.name != ".lock"
    }


@dataclass(frozen=True)
class Finished:
    """A folder in which a search has finished, and what it printed."""

    folder: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    searched_as: Callable[[Path, str], Path],
    hwnas_in: Commands,
) -> Finished:
    folder = searched_as(tmp_path_factory.mktemp("finished"), "run")
    answer = hwnas_in(folder, *SEARCH)
    assert answer.code == 0, answer.told
    return Finished(folder, json.loads(answer.out))


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished folder, to be damaged."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def assert_finishes(finished: Finished, hwnas_in: Commands) -> Callable[[Path], None]:
    """The search ends as the undisturbed one, in the very files that are shipped."""

    def check(folder: Path) -> None:
        answer = hwnas_in(folder, *SEARCH)
        assert answer.code == 0, answer.told
        assert json.loads(answer.out) == finished.summary
        expected, found = files(finished.folder), files(folder)
        assert sorted(found) == sorted(expected)
        for name in (f"{RESULT}/model.onnx", f"{RESULT}/finalists.json", "run/config.yaml"):
            assert found[name] == expected[name], name
        tables = [as_profiled(place / TABLE) for place in (folder, finished.folder)]
        assert tables[0] == tables[1]

    return check


# ---- damage

Damage = Callable[[Path], None]


def cut(share: float) -> Damage:
    """Only the first part of the file is there."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def holding(text: str) -> Damage:
    """The file holds something else."""
    return lambda path: path.write_text(text) and None


def a_folder(path: Path) -> None:
    """A folder has the file's name."""
    path.unlink()
    path.mkdir()


def metadata(**changed: Any) -> Damage:
    """A table of another condition, by the metadata of its file."""

    def damage(path: Path) -> None:
        data = pq.read_table(path)
        meta = json.loads(data.schema.metadata[b"hwnas"])
        for name, value in changed.items():
            inner, _, field = name.partition("__")
            meta[inner][field] = value
        pq.write_table(data.replace_schema_metadata({b"hwnas": json.dumps(meta)}), path)

    return damage


def third_row(column: str, value: float) -> Damage:
    """A table in which one value is no time."""

    def damage(path: Path) -> None:
        data = pq.read_table(path)
        place = pc.equal(pa.array(range(len(data))), 2)
        values = pc.if_else(place, pa.scalar(value), data[column])
        data = data.set_column(data.column_names.index(column), column, values)
        pq.write_table(data, path)

    return damage


def of_another_space(path: Path) -> None:
    """A whole checkpoint, but of other weights."""
    state = torch.load(path, weights_only=True)
    torch.save({**state, "identity": "the space other 0123456789abcdef"}, path)


def other_weights(path: Path) -> None:
    """A whole file of weights, but of another network."""
    path.write_bytes((path.parent / "finalist-1.pt").read_bytes())


DAMAGED: list[tuple[str, Damage, tuple[str, ...], str]] = [
    (TABLE, cut(0.5), PROFILE, "is not a latency table"),
    (TABLE, cut(0.0), SEARCH, "is not a latency table"),
    (TABLE, cut(0.99), OTHER_LIMIT, "is not a latency table"),
    (TABLE, holding("PAR1 but no table"), ("tables", "show", TABLE, "--json"), "not a latency"),
    (TABLE, metadata(host__cpu="another processor"), PROFILE, "another host (cpu: another"),
    (TABLE, metadata(host__runtime_version="0"), SEARCH, "another host (runtime_version: 0"),
    (TABLE, metadata(protocol__rounds=1), OTHER_LIMIT, "another protocol"),
    (TABLE, third_row("median_us", 0.0), SEARCH, "has median_us = 0.0"),
    (TABLE, third_row("median_us", -1.5), PROFILE, "has median_us = -1.5"),
    (TABLE, third_row("min_us", float("nan")), SEARCH, "has min_us = nan"),
    (TABLE, third_row("p95_us", float("inf")), SEARCH, "has p95_us = inf"),
    ("run/table.parquet", cut(0.5), ("predict", f"{RESULT}/model.onnx", "--json"), "not a latency"),
    ("run/supernet.pt", cut(0.5), TRAIN, "is not a whole checkpoint"),
    ("run/supernet.pt", cut(0.0), OTHER_LIMIT, "is not a whole checkpoint"),
    ("run/supernet.pt", of_another_space, TRAIN, "holds the weights of something else"),
    ("run/supernet.pt", of_another_space, OTHER_LIMIT, "holds the weights of something else"),
    ("run/supernet.pt", holding("garbage"), OTHER_LIMIT, "is not a whole checkpoint"),
    ("run/supernet.pt", a_folder, OTHER_LIMIT, "is not a whole checkpoint"),
    ("run/search.sqlite", cut(0.5), OTHER_LIMIT, "is not a search history"),
    ("run/search.sqlite", cut(0.01), OTHER_LIMIT, "is not a search history"),
    ("run/search.sqlite", holding("garbage " * 1000), SEARCH, "is not a search history"),
    ("run/search.sqlite", a_folder, OTHER_LIMIT, "cannot be written"),
    (f"{RESULT}/finalists.json", cut(0.5), SEARCH, "is not whole"),
    (f"{RESULT}/finalists.json", cut(0.0), of_run("retrain"), "is not whole"),
    (f"{RESULT}/finalists.json", holding("[]"), SEARCH, "is not whole: it holds a list"),
    (f"{RESULT}/finalists.json", holding("{}"), of_run("retrain"), "is not whole"),
    (f"{RESULT}/finalists.json", holding('{"finalists": [{"genes": [1]}]}'), of_run("export"),
     "is not whole"),
    (f"{RESULT}/finalists.json", a_folder, of_run("export"), "is not whole"),
    (f"{RESULT}/certificate.json", cut(0.5), SEARCH, "is not a certificate"),
    (f"{RESULT}/certificate.json", cut(0.9), of_run("verify"), "is not a certificate"),
    (f"{RESULT}/certificate.json", holding("[]"), of_run("verify"), "is not a certificate"),
    (f"{RESULT}/model.onnx", cut(0.5), of_run("verify"), "is not the file that its certificate"),
    (f"{RESULT}/model.onnx", Path.unlink, of_run("verify"), "is not the file that its certificate"),
    (f"{RESULT}/model.onnx", cut(0.5), ("predict", f"{RESULT}/model.onnx", "--json"),
     "is not a readable ONNX file"),
    (f"{RESULT}/architecture.json", cut(0.5), ("predict", f"{RESULT}/architecture.json", "--json"),
     "is not an architecture"),
    (f"{RESULT}/finalist-0.pt", cut(0.5), of_run("retrain"), "is not a whole checkpoint"),
    (f"{RESULT}/finalist-0.pt", other_weights, of_run("export"), "is not a whole checkpoint"),
    ("run/config.yaml", cut(0.5), SEARCH, "run/config.yaml"),
    ("run/config.yaml", cut(0.0), of_run("verify"), "run/config.yaml"),
    ("run/config.yaml", holding("seed: soon"), of_run("train"), "run/config.yaml"),
    ("run/config.yaml", a_folder, of_run("verify"), "is not readable YAML"),
    ("run/best", holding("results/nowhere"), of_run("verify"), "has no finalists yet"),
    ("run/best", a_folder, of_run("verify"), "run/best"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "damage", "command", "words"),
    DAMAGED,
    ids=[f"{Path(file).name}, {words}, {command[0]}" for file, _, command, words in DAMAGED],
)
def test_a_damaged_file_is_named_in_one_sentence_and_nothing_is_lost(
    file: str,
    damage: Damage,
    command: tuple[str, ...],
    words: str,
    folder: Path,
    hwnas_in: Commands,
) -> None:
    damage(folder / file)
    before = files(folder)
    answer = hwnas_in(folder, *command)
    assert_refused(answer, words)
    told = json.loads(answer.out)["error"]["what"]
    assert file in told or file.startswith("run/best")
    assert files(folder) == before


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    [
        (TABLE, cut(0.5), SEARCH),
        ("run/supernet.pt", cut(0.5), TRAIN),
        ("run/search.sqlite", cut(0.5), OTHER_LIMIT),
        (f"{RESULT}/finalists.json", cut(0.5), SEARCH),
        (f"{RESULT}/certificate.json", cut(0.5), SEARCH),
        (f"{RESULT}/finalist-0.pt", cut(0.5), of_run("retrain")),
    ],
    ids=lambda value: Path(value).name if isinstance(value, str) else "",
)
def test_doing_what_the_sentence_says_ends_as_if_nothing_had_happened(
    file: str,
    damage: Damage,
    command: tuple[str, ...],
    folder: Path,
    finished: Finished,
    hwnas_in: Commands,
    assert_finishes: Callable[[Path], None],
) -> None:
    damage(folder / file)
    answer = hwnas_in(folder, *command)
    assert answer.code == 2
    assert "remove it" in json.loads(answer.out)["error"]["next"]
    (folder / file).unlink()
    again = hwnas_in(folder, *command)
    assert again.code == 0, again.told
    if file == "run/supernet.pt":
        made, known = (torch.load(x / file, weights_only=True) for x in (folder, finished.folder))
        assert all(torch.equal(made["weights"][name], w) for name, w in known["weights"].items())
    if file == TABLE:
        assert not (folder / TABLE).exists(), "the run's own copy of the table does"
        shutil.copy(folder / "run" / "table.parquet", folder / TABLE)
    if command == OTHER_LIMIT:
        return
    assert_finishes(folder)


def test_a_history_that_was_emptied_is_filled_again(
    folder: Path, finished: Finished, hwnas_in: Commands
) -> None:
    (folder / "run" / "search.sqlite").write_bytes(b"")
    answer = hwnas_in(folder, *OTHER_LIMIT)
    assert answer.code == 0, answer.told
    with contextlib.closing(sqlite3.connect(folder / "run" / "search.sqlite")) as db:
        rows = dict(db.execute("SELECT genes, accuracy FROM scores").fetchall())
    with contextlib.closing(sqlite3.connect(finished.folder / "run" / "search.sqlite")) as db:
        known = dict(db.execute("SELECT genes, accuracy FROM scores").fetchall())
    both = rows.keys() & known.keys()
    assert both
    assert all(rows[genes] == known[genes] for genes in both), "an architecture scores as before"


@pytest.mark.parametrize("how", ["no history", "an empty history"])
def test_a_finished_search_without_its_history_still_has_its_result(
    how: str, folder: Path, finished: Finished, hwnas_in: Commands
) -> None:
    path = folder / "run" / "search.sqlite"
    path.unlink()
    if how == "an empty history":
        path.write_bytes(b"")
    answer = hwnas_in(folder, *SEARCH)
    assert answer.code == 0, answer.told
    summary = json.loads(answer.out)
    assert summary["architecture"] == finished.summary["architecture"]
    assert summary["accuracy"] == finished.summary["accuracy"]


@pytest.mark.parametrize("content", ["{}", '{"limits": {}}'])
@pytest.mark.parametrize("command", [SEARCH, of_run("verify")], ids=["search", "verify"])
def test_a_certificate_without_its_fields_is_no_certificate(
    content: str, command: tuple[str, ...], folder: Path, hwnas_in: Commands
) -> None:
    (folder / RESULT / "certificate.json").write_text(content)
    assert_refused(hwnas_in(folder, *command), "certificate.json is not a certificate")


@pytest.mark.parametrize("damage", [cut(0.5), Path.unlink], ids=["damaged", "gone"])
def test_a_shipped_file_that_is_not_what_was_certified_is_not_told_as_a_result(
    damage: Damage, folder: Path, finished: Finished, hwnas_in: Commands
) -> None:
    damage(folder / RESULT / "model.onnx")
    answer = hwnas_in(folder, *SEARCH)
    whole = (finished.folder / RESULT / "model.onnx").read_bytes()
    healed = (folder / RESULT / "model.onnx").exists() and (
        folder / RESULT / "model.onnx"
    ).read_bytes() == whole
    assert healed if answer.code == 0 else answer.code == 2, answer.told


def test_an_exported_file_that_was_damaged_is_exported_again(
    folder: Path, finished: Finished, hwnas_in: Commands
) -> None:
    cut(0.5)(folder / RESULT / "finalist-0.onnx")
    assert hwnas_in(folder, *of_run("export")).code == 0
    name = f"{RESULT}/finalist-0.onnx"
    assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_a_damaged_run_beside_others_disturbs_only_itself(folder: Path, hwnas_in: Commands) -> None:
    (folder / "runs" / "torn").mkdir(parents=True)
    (folder / "runs" / "torn" / "config.yaml").write_text("a: [")
    shutil.copytree(folder / "run", folder / "runs" / "whole")
    answer = hwnas_in(folder, *[x for x in SEARCH if x not in ("--run", "run")])
    assert answer.code == 0, answer.told
    assert json.loads(answer.out)["run"] == "runs/whole"
    listed = json.loads(hwnas_in(folder, "runs", "--json").out)["runs"]
    assert [run["run"] for run in listed] == ["runs/whole"]


# ---- journals


@contextlib.contextmanager
def interrupted_at(stage: str, count: int) -> Iterator[None]:
    """Commands are interrupted at the nth time that they tell of a stage."""
    real, seen = Screen.progress, [0]

    @contextlib.contextmanager
    def progress(self: Screen) -> Iterator[Callable[[str, int, int], None]]:
        with real(self) as tell:

            def told(label: str, done: int, total: int) -> None:
                tell(label, done, total)
                seen[0] += label.startswith(stage)
                if seen[0] == count:
                    raise KeyboardInterrupt

            yield told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Screen, "progress", progress)
        yield


@pytest.fixture(scope="module", params=["timing ops", "timing whole networks"])
def half_measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hwnas_in: Commands
) -> tuple[Path, str]:
    """A folder with a table that is not finished, and the name of its journal."""
    folder = tmp_path_factory.mktemp("half")
    with interrupted_at(request.param, 30):
        assert hwnas_in(folder, *PROFILE).code == 130
    (journal,) = (folder / "tables").glob("*.journal")
    assert len(journal.read_text().splitlines()) == 31
    return folder, f"tables/{journal.name}"


def as_profiled(path: Path) -> LatencyTable:
    """A table before searches told it what they measured."""
    table = LatencyTable.load(path)
    table.models = {name: model.apart for name, model in table.models.items()}
    return table


@pytest.mark.parametrize("bytes_gone", [1, 60])
def test_a_journal_whose_last_line_was_cut_goes_on(
    half_measured: tuple[Path, str],
    bytes_gone: int,
    tmp_path: Path,
    finished: Finished,
    hwnas_in: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, journal = half_measured
    if is_of_networks(journal):
        monkeypatch.setattr("hwnas.job.measure", IN_PROCESSES)
    folder = Path(shutil.copytree(half, tmp_path / "copy"))
    (folder / journal).write_bytes((folder / journal).read_bytes()[:-bytes_gone])
    answer = hwnas_in(folder, *PROFILE)
    assert answer.code == 0, answer.told
    assert as_profiled(folder / TABLE) == as_profiled(finished.folder / TABLE)
    assert not (folder / journal).exists()


def is_of_networks(journal: str) -> bool:
    """Whether a journal holds whole networks, not ops: it has the space in its name."""
    return journal.removesuffix(".journal") != TABLE.removesuffix(".parquet")


def foreign_host(lines: list[Any]) -> None:
    lines[0]["host"]["cpu"] = "another processor"


def foreign_protocol(lines: list[Any]) -> None:
    lines[0]["protocol"]["rounds"] = 99


def foreign_kind(lines: list[Any]) -> None:
    lines[0]["kind"] = "pictures"


def no_samples(lines: list[Any]) -> None:
    lines[4][1] = "soon"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (foreign_host, "of another host, protocol or kind"),
        (foreign_protocol, "of another host, protocol or kind"),
        (foreign_kind, "of another host, protocol or kind"),
        (no_samples, "is damaged"),
    ],
)
def test_a_journal_of_something_else_is_refused_and_kept(
    half_measured: tuple[Path, str],
    change: Callable[[list[Any]], None],
    words: str,
    tmp_path: Path,
    finished: Finished,
    hwnas_in: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, journal = half_measured
    folder = Path(shutil.copytree(half, tmp_path / "copy"))
    lines = [json.loads(line) for line in (folder / journal).read_text().splitlines()]
    change(lines)
    (folder / journal).write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr("hwnas.job.measure", IN_PROCESSES)
        answer = hwnas_in(folder, *PROFILE)
    assert_refused(answer, journal, words)
    assert files(folder) == before
    assert "remove it" in json.loads(answer.out)["error"]["next"]
    (folder / journal).unlink()
    assert hwnas_in(folder, *PROFILE).code == 0
    assert as_profiled(folder / TABLE) == as_profiled(finished.folder / TABLE)


# ---- a full disk, at every kind of write

FULL = OSError(errno.ENOSPC, "No space left on device")

WRITES = {
    ".simulated-simulated-t1-b1.parquet.partial": TABLE,
    "tables": TABLE,
    ".config.yaml.partial": "run/config.yaml",
    "run": "run/config.yaml",
    ".supernet.pt.partial": "run/supernet.pt",
    ".table.parquet.partial": "run/table.parquet",
    ".finalists.json.partial": f"{RESULT}/finalists.json",
    "latency_ms=0.0378": f"{RESULT}/finalists.json",
    ".best.partial": "run/best",
    ".finalist-0.training.pt.partial": f"{RESULT}/finalist-0.training.pt",
    ".finalist-0.pt.partial": f"{RESULT}/finalist-0.pt",
    ".finalist-1.training.pt.partial": f"{RESULT}/finalist-1.training.pt",
    ".finalist-1.pt.partial": f"{RESULT}/finalist-1.pt",
    ".finalist-0.onnx.partial": f"{RESULT}/finalist-0.onnx",
    ".finalist-1.onnx.partial": f"{RESULT}/finalist-1.onnx",
    ".weights.pt.partial": f"{RESULT}/weights.pt",
    ".model.onnx.partial": f"{RESULT}/model.onnx",
    ".architecture.json.partial": f"{RESULT}/architecture.json",
    ".certificate.json.partial": f"{RESULT}/certificate.json",
    ".report.html.partial": "run/report.html",
}
"""What a search flushes to disk, in order (a folder stands for the names in it), and which file the
sentence names."""


@dataclass(frozen=True)
class FullDisk:
    """A search whose disk was full at each write once: what it answered, and what was there."""

    folder: Path
    answers: dict[str, Answer]
    kept: dict[str, bool]


@pytest.fixture(scope="module")
def full_disk(
    tmp_path_factory: pytest.TempPathFactory, hwnas_in: Commands, measured_here: Callable[..., Any]
) -> FullDisk:
    folder = tmp_path_factory.mktemp("full")
    answers: dict[str, Answer] = {}
    kept: dict[str, bool] = {}
    real = os.fsync

    def fsync(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        if name not in seen:
            seen.add(name)
            refused.append((name, files(folder)))
            raise FULL
        real(file)

    seen: set[str] = set()
    refused: list[tuple[str, dict[str, bytes]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.ship.measure", measured_here)
        patch.setattr("hwnas.job.measure", measured_here)
        patch.setattr(os, "fsync", fsync)
        for _ in WRITES:
            answer = hwnas_in(folder, *SEARCH)
            if answer.code == 0:
                break
            name, before = refused[-1]
            answers[name] = answer
            before.pop(next((x for x in before if x.endswith(name)), ""), None)
            after = files(folder)
            kept[name] = all(after.get(file) == content for file, content in before.items())
    return FullDisk(folder, answers, kept)


def test_a_search_writes_what_is_tried_here_and_nothing_else(full_disk: FullDisk) -> None:
    assert list(full_disk.answers) == list(WRITES)


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_is_one_sentence_that_names_the_file(full_disk: FullDisk, name: str) -> None:
    answer = full_disk.answers[name]
    assert_refused(answer, f"{WRITES[name]} cannot be written: No space left on device.")
    assert json.loads(answer.out)["error"]["next"].startswith("free some space")
    assert full_disk.kept[name], "what was there before is there"


def test_when_the_disk_has_space_again_the_search_ends_as_an_undisturbed_one(
    full_disk: FullDisk, assert_finishes: Callable[[Path], None]
) -> None:
    assert_finishes(full_disk.folder)


def full_journal(patch: pytest.MonkeyPatch) -> None:
    """The 20th line of a journal does not fit; half of it does."""
    real, lines = Path.open, [0]

    def opened(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        file = real(self, mode, *rest, **more)
        if self.suffix == ".journal" and mode == "ab":
            lines[0] += 1
            if lines[0] == 20:
                file.write(b'["half a li')
                file.close()
                raise OSError(errno.ENOSPC, "No space left on device")
        return file

    patch.setattr(Path, "open", opened)


def full_temporary_folder(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the-temporary-folder/tmp1")

    patch.setattr(tempfile, "mkdtemp", refused)


def no_temporary_folder(patch: pytest.MonkeyPatch) -> None:
    """What `tempfile` raises where no folder has any space."""

    def refused() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    patch.setattr(tempfile, "gettempdir", refused)
    patch.setattr(tempfile, "_get_default_tempdir", refused)
    patch.setattr(tempfile, "tempdir", None)


def full_temporary_models(patch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def written(self: Path, content: Any) -> int:
        if self.suffix == ".onnx" and self.name[0].isdigit():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)

    patch.setattr(Path, "write_bytes", written)


def full_temporary_file(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("hwnas.job.measure", IN_PROCESSES)
    patch.setattr(tempfile, "TemporaryFile", refused)


def full_history(patch: pytest.MonkeyPatch) -> None:
    """SQLite's own refusal, some pages after those that an empty history has."""
    real = sqlite3.connect

    def connect(*arguments: Any, **more: Any) -> sqlite3.Connection:
        database = real(*arguments, **more)
        database.execute("PRAGMA page_size = 512")
        database.execute("PRAGMA max_page_count = 16")
        return database

    patch.setattr(sqlite3, "connect", connect)


@pytest.mark.parametrize(
    ("full", "words"),
    [
        (full_journal, ".journal cannot be written: No space left on device"),
        (full_temporary_folder, "the-temporary-folder/tmp1 cannot be written: No space left"),
        (no_temporary_folder, "cannot be written: No usable temporary directory found"),
        (full_temporary_models, ".onnx cannot be written: No space left on device"),
        (full_temporary_file, f"{tempfile.gettempdir()} cannot be written: No space left"),
        (full_history, "run/search.sqlite cannot be written: database or disk is full"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_full_disk_elsewhere_is_one_sentence_and_the_search_goes_on(
    full: Callable[[pytest.MonkeyPatch], None],
    words: str,
    tmp_path: Path,
    hwnas_in: Commands,
    assert_finishes: Callable[[Path], None],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        full(patch)
        answer = hwnas_in(tmp_path, *SEARCH)
    assert_refused(answer, words)
    assert json.loads(answer.out)["error"]["next"].startswith("free some space")
    assert_finishes(tmp_path)


def test_a_log_that_does_not_fit_is_one_sentence(folder: Path, hwnas_in: Commands) -> None:
    log = folder / "run" / "log.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    answer = hwnas_in(folder, *OTHER_LIMIT)
    assert_refused(answer, "run/log.jsonl cannot be written: No space left on device")
    log.unlink()
    assert hwnas_in(folder, *OTHER_LIMIT).code == 0


@pytest.mark.parametrize("size", [1_000, 12_000, 100_000, 2_000_000])
def test_files_that_the_system_lets_grow_no_further_are_one_sentence(
    size: int, tmp_path: Path, hwnas_in: Commands, assert_finishes: Callable[[Path], None]
) -> None:
    """The system's own refusal, of whatever grows beyond a size, be it SQLite or Arrow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        answer = hwnas_in(tmp_path, *SEARCH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(answer, "cannot be written")
    assert "A file " not in answer.told, "it is named"
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]
    assert_finishes(tmp_path)


@pytest.mark.parametrize(
    "command",
    [("runs",), ("runs", "--json"), ("--help",), ("search", "--help"), ("nothing", "--json")],
    ids=" ".join,
)
def test_standard_output_on_a_full_disk_is_one_sentence(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = io.StringIO()
    with (
        Path("/dev/full").open("w") as full,
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(full),
    ):
        code = cli.run(list(command))
    assert code == 2
    (line,) = told.getvalue().splitlines()
    wrong = "No such command" if command[0] == "nothing" else "Standard output cannot be written"
    assert line.startswith(f"error: {wrong}")


# ---- places that may not be written

needs_permissions = pytest.mark.skipif(not hasattr(os, "seteuid"), reason="the system has no users")


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As a user for whom permissions count, where this one may do anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def refused_to_write(hwnas_in: Commands) -> Commands:
    """A command in a folder, by a user who may not write what is not theirs."""

    def give(folder: Path, *arguments: str) -> Answer:
        folder.chmod(folder.stat().st_mode | 0o055)
        return hwnas_in(folder, *arguments, within=without_rights())

    return give


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """The finished folder, in which nothing may be written."""
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in everything:
        path.chmod(0o755 if path.is_dir() else 0o644)


@needs_permissions
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (SEARCH, "run/.lock"),
        (OTHER_LIMIT, "run/.lock"),
        (of_run("verify"), "run/.lock"),
        (TRAIN, "run/.lock"),
        ((*PROFILE, "--batch", "2"), "tables/simulated-simulated-t1-b2.lock"),
        (("search", "--limit-fraction", "0.5", "--run", "new", *SMALL), "new/config.yaml"),
        (("search", "--limit-fraction", "0.5", *SMALL), "runs/"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_place_that_may_not_be_written_is_one_sentence(
    command: tuple[str, ...], file: str, read_only: Path, refused_to_write: Commands
) -> None:
    before = files(read_only)
    assert_refused(refused_to_write(read_only, *command), file, "Permission denied")
    assert files(read_only) == before


@needs_permissions
@pytest.mark.parametrize(
    "command",
    [PROFILE, ("tables", "--json"), ("tables", "show", TABLE, "--json"), ("runs", ".", "--json")],
    ids=lambda value: value[0],
)
def test_reading_needs_no_right_to_write(
    command: tuple[str, ...], read_only: Path, refused_to_write: Commands
) -> None:
    answer = refused_to_write(read_only, *command)
    assert answer.code == 0, answer.told
    assert json.loads(answer.out)["status"] == "ok"


@needs_permissions
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("run", SEARCH),
        ("run", of_run("verify")),
        ("tables", SEARCH),
        (TABLE, SEARCH),
        ("run/supernet.pt", TRAIN),
        (f"{RESULT}/finalists.json", of_run("retrain")),
        (f"{RESULT}/certificate.json", of_run("verify")),
        ("run/config.yaml", SEARCH),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_file_that_may_not_be_read_is_one_sentence(
    file: str, command: tuple[str, ...], folder: Path, refused_to_write: Commands
) -> None:
    (folder / file).chmod(0)
    for path in (folder / "run", folder / "tables"):  # all else may be written, by anybody
        if path != folder / file:
            path.chmod(0o777)
    (folder / "run" / ".lock").chmod(0o666)
    answer = refused_to_write(folder, *command)
    (folder / file).chmod(0o755)
    assert_refused(answer, file)
    assert "ermission denied" in answer.told or "not a whole checkpoint" in answer.told


def read_only_below(place: str, patch: pytest.MonkeyPatch) -> None:
    """What a file system that is mounted read-only answers, for every path with `place` in it."""
    real_open, real_mkdir = Path.open, Path.mkdir

    def refuse(path: Path) -> None:
        if place in path.parts:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def opened(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(self)
        return real_open(self, mode, *rest, **more)

    def made(self: Path, *rest: Any, **more: Any) -> None:
        if not self.is_dir():
            refuse(self)
        real_mkdir(self, *rest, **more)

    patch.setattr(Path, "open", opened)
    patch.setattr(Path, "mkdir", made)


@pytest.mark.parametrize(
    ("place", "command", "file"),
    [
        ("run", OTHER_LIMIT, "run/.lock"),
        ("run", of_run("verify"), "run/.lock"),
        ("tables", (*PROFILE, "--threads", "2"), "tables/simulated-simulated-t2-b1.lock"),
        ("tables", (*PROFILE, "--tables", "new/tables"), "new/tables/simulated-simulated-t1-b1"),
        ("elsewhere", (*SEARCH[:3], *SMALL, "--run", "elsewhere/run"), "elsewhere/run/config.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_read_only_file_system_is_one_sentence(
    place: str,
    command: tuple[str, ...],
    file: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    hwnas_in: Commands,
) -> None:
    before = files(folder)
    read_only_below(place, monkeypatch)
    assert_refused(hwnas_in(folder, *command), file, "cannot be written: Read-only file system")
    assert files(folder) == before


def test_a_complete_table_that_may_not_be_written_is_enough_for_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, assert_finishes: Callable[[Path], None]
) -> None:
    shutil.rmtree(folder / "run")
    read_only_below("tables", monkeypatch)
    assert_finishes(folder)


# ---- a file where a folder should be


@pytest.mark.parametrize(
    ("place", "command", "named"),
    [
        ("tables", PROFILE, "tables/"),
        ("tables", (*SEARCH, "--seed", "1"), "tables/"),
        ("run", SEARCH, "run/config.yaml"),
        ("run", of_run("verify"), "run/config.yaml"),
        ("run/results", OTHER_LIMIT, "run/results/latency_ms=0.05/finalists.json"),
        (RESULT, SEARCH, f"{RESULT}/finalists.json"),
        ("runs", [x for x in SEARCH if x not in ("--run", "run")], "runs/"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_file_where_a_folder_should_be_is_one_sentence(
    place: str, command: tuple[str, ...], named: str, folder: Path, hwnas_in: Commands
) -> None:
    if (folder / place).is_dir():
        shutil.rmtree(folder / place)
    if place == "tables" and "--seed" in command:
        shutil.rmtree(folder / "run")
    (folder / place).write_text("in the way")
    before = files(folder)
    assert_refused(hwnas_in(folder, *command), named)
    after = files(folder)
    for name in ("run/search.sqlite", "run/table.parquet"):  # scores are kept, and the newest table
        before.pop(name, None)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "name", ["run/log.jsonl", "run/report.html", "run/.lock", "run/table.parquet"]
)
def test_a_folder_where_a_file_should_be_is_one_sentence(
    name: str, folder: Path, hwnas_in: Commands
) -> None:
    a_folder(folder / name)
    assert_refused(hwnas_in(folder, *OTHER_LIMIT), f"{name} cannot be written: Is a directory")
    assert stat.S_ISDIR((folder / name).stat().st_mode)
