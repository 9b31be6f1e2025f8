"""Real processes that are really killed, at every stage and inside file writes: the same command
goes on where it stopped, and ends as if nothing had happened.

The processes are forks of one that has loaded everything, since loading takes longer than what they
do; the undisturbed run that they are held against is a fresh `python -m hwnas`.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latency_tables.table import LatencyTable

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
STEPS = {"supernet": 130, "retrain": 112}
RECIPE = {"name": "smoke", **{part: {"steps": n, "batch": 4} for part, n in STEPS.items()}}
"""Long enough to cross the checkpoints, which are written every 100 steps."""

SEARCH = (
    "search", "--limit-fraction", "0.5", "--space", SPACE, "--device", "simulated",
    "--config", "recipe.yaml", "--run", "run", "--json",
)  # fmt: skip

CHECKING = "checking that every op runs in its declared kernels"
OPS = "timing ops"
BUILDING = "building whole networks"
WHOLE = "timing whole networks in fresh processes"
TRAINING = "training the supernet"
SPOS = "scoring architectures (spos)"
RANDOM = "scoring architectures (random)"
FIRST = "retraining finalist 1 of 2"
SECOND = "retraining finalist 2 of 2"

DRIVER = '''
import fnmatch, json, os, signal, stat, sys, time
from contextlib import contextmanager

import hwnas.cli, hwnas.config, hwnas.data.names, hwnas.listing, hwnas.predict, hwnas.run
import plotly.graph_objects, plotly.io  # what a report loads on first use
from hwnas.screen import Screen
from hwnas.supernet.evaluator import Evaluator
from profilers.base import Session

digits = hwnas.data.names.digits()
hwnas.data.names.digits = lambda: digits


def become(job):
    """This process is the command from here on."""
    os.chdir(job["folder"])
    for name, number in (("out", 1), ("told", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    events = os.open(job["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    seen = [0] * len(job["stops"])

    def note(*event):
        os.write(events, (json.dumps(event) + "\\n").encode())

    def stop_at(kind, name, half=None):
        for number, stop in enumerate(job["stops"]):
            if name in stop.get("but", ()):
                continue
            if kind in stop and fnmatch.fnmatchcase(name, stop[kind]):
                seen[number] += 1
                if seen[number] == stop["at"]:
                    if half is not None and stop["signal"] == "SIGKILL":
                        os.ftruncate(half, os.fstat(half).st_size // 2)
                    note("stopped", kind, name)
                    os.kill(os.getpid(), getattr(signal, stop["signal"]))

    def spied(owner, method, kind, what):
        real = getattr(owner, method)

        def spy(self, argument):
            answer = real(self, argument)
            note(kind, what(argument))
            return answer

        setattr(owner, method, spy)

    real_progress, real_fsync = Screen.progress, os.fsync

    @contextmanager
    def progress(self):
        with real_progress(self) as tell:
            def told(label, done, total):
                tell(label, done, total)
                note("progress", label, done, total)
                stop_at("stage", label)
            yield told

    def fsync(file):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))
        stop_at("file", name, file if stat.S_ISREG(os.fstat(file).st_mode) else None)
        real_fsync(file)
        note("written", name)

    Screen.progress, os.fsync = progress, fsync
    spied(Session, "block", "block", lambda protocol: None)
    spied(Evaluator, "__call__", "scored", lambda architecture: architecture.genes)
    sys.argv = ["hwnas", *job["arguments"]]
    try:
        hwnas.cli.main()
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left.code)  # a fork cannot take down the threads of what it was forked from


def ended(pid):
    """How a process ended; one that does not end is killed."""
    for turn in range(12_000):
        if turn == 11_000:
            os.kill(pid, signal.SIGKILL)
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status) if turn < 11_000 else 99
        time.sleep(0.01)


for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        answer = ended(job["wait"])
    else:
        answer = os.fork()
        if answer == 0:
            become(job)
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
'''

Stop = dict[str, Any]
Event = list[Any]


def at(stage: str, count: int, how: str = "SIGKILL") -> Stop:
    """A stop at the nth time that a process tells of a stage."""
    return {"stage": stage.replace("[", "[[]"), "at": count, "signal": how}


def inside(file: str, count: int = 1, how: str = "SIGKILL", but: Sequence[str] = ()) -> Stop:
    """A stop at the nth write of a file, or of a folder's names; after a kill the file is half
    there. Names in `but` do not count.
    """
    return {"file": file, "at": count, "signal": how, "but": list(but)}


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code (minus the signal's number), what it printed and did."""

    code: int
    out: str
    told: str
    events: list[Event]

    def told_of(self, label: str) -> list[int]:
        """How far a stage was, each time that it was told."""
        return [event[2] for event in self.events if event[:2] == ["progress", label]]

    @property
    def scored(self) -> list[tuple[int, ...]]:
        """The architectures that were scored."""
        return [tuple(event[1]) for event in self.events if event[0] == "scored"]

    @property
    def ops_timed(self) -> int:
        """Blocks of ops that were timed."""
        count, label = 0, ""
        for event in self.events:
            if event[0] == "progress":
                label = event[1]
            count += event[0] == "block" and label in (CHECKING, OPS)
        return count


class Nursery:
    """Starts commands as forks of one process, and waits for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._files: dict[int, Path] = {}
        (folder / "tmp").mkdir()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
        self.environment.pop("HWNAS_HOME", None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )

    def close(self) -> None:
        """End the process that the others are forks of."""
        self._process.communicate()

    def start(
        self, folder: Path, stops: Sequence[Stop] = (), arguments: Sequence[str] = SEARCH
    ) -> int:
        """Start a command in a folder; its process id."""
        self._count += 1
        files = self._folder / f"process-{self._count}"
        names = {name: str(files.with_suffix(f".{name}")) for name in ("out", "told", "events")}
        job = {"folder": str(folder), "arguments": list(arguments), "stops": list(stops), **names}
        pid = self._ask(job)
        self._files[pid] = files
        return pid

    def wait(self, pid: int) -> Ended:
        """How a command ended."""
        code = self._ask({"wait": pid})
        out, told, events = (
            self._files[pid].with_suffix(f".{name}").read_text()
            for name in ("out", "told", "events")
        )
        return Ended(code, out, told, [json.loads(line) for line in events.splitlines()])

    def run(self, folder: Path, *stops: Stop, arguments: Sequence[str] = SEARCH) -> Ended:
        """A command from its start to its end."""
        return self.wait(self.start(folder, stops, arguments))

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))


def prepared(folder: Path) -> Path:
    """A folder with the recipe in it."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"recipe": RECIPE}))
    return folder


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@dataclass(frozen=True)
class Finished:
    """A folder in which the search has finished, and what it printed."""

    folder: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Finished:
    folder = prepared(tmp_path_factory.mktemp("undisturbed"))
    answer = subprocess.run(
        [sys.executable, "-m", "hwnas", *SEARCH],
        cwd=folder,
        env=nursery.environment,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return Finished(folder, json.loads(answer.stdout))


# ---- what is compared


def database(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table of a whole SQLite file."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        names = [
            name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        return {name: sorted(db.execute(f"SELECT * FROM {name}").fetchall()) for name in names}


def plain(state: Any) -> Any:
    """A state with its tensors as their bytes."""
    match state:
        case torch.Tensor():
            return (state.dtype, tuple(state.shape), state.contiguous().numpy().tobytes())
        case dict():
            return {name: plain(value) for name, value in state.items()}
        case list() | tuple():
            return [plain(value) for value in state]
        case _:
            return state


def content(path: Path) -> Any:
    """What a file holds, but for what tells when it was made; fails where it is not whole."""
    match path.suffix:
        case ".parquet":
            table = LatencyTable.load(path)
            return (table.host, table.protocol, table.rows, table.models)
        case ".sqlite":
            return database(path)
        case ".pt":
            return plain(torch.load(path, weights_only=True))
        case ".json":
            whole = json.loads(path.read_text())
            whole.pop("made", None)
            whole.get("hashes", {}).pop("code", None)  # somebody may be writing code meanwhile
            return whole
        case ".html":
            text = path.read_text()
            assert text.startswith("<!doctype html>")
            assert text.endswith("</html>\n")
            return "whole"  # its picture has a name that is drawn anew
        case ".jsonl" | ".journal":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            return bool(lines)  # when things happened, and how often
        case _ if path.name == ".lock" or path.suffix == ".lock":
            return "a lock"
        case _:
            return path.read_bytes()


def tree(folder: Path) -> dict[str, Any]:
    """Every file of a folder, hidden ones too, by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): content(path) for path in sorted(files)}


def assert_same(ended: Ended, folder: Path, undisturbed: Finished) -> None:
    """A run that was stopped has ended as the undisturbed one, to the last bit."""
    assert ended.code == 0, ended.told
    assert json.loads(ended.out) == undisturbed.summary
    found, expected = tree(folder), tree(undisturbed.folder)
    assert sorted(found) == sorted(expected), "nothing is missing, nothing is left over"
    for name, inside in expected.items():
        assert found[name] == inside, name


def assert_whole(folder: Path) -> None:
    """After a kill every file is whole, but one at most that was being written beside its place."""
    half = [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    assert len(half) <= 1, half
    for path in folder.rglob("*"):
        if path.is_file() and path not in half:
            content(path)


def half_written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*.partial"))


# ---- one run, killed again and again

KILLS = {
    "checking kernels": at(CHECKING, 20),
    "timing ops, early": at(OPS, 100),
    "timing ops, late": at(OPS, 250),
    "building whole networks": at(BUILDING, 15),
    "timing whole networks, early": at(WHOLE, 10),
    "timing whole networks, late": at(WHOLE, 41),
    "supernet, before a checkpoint": at(TRAINING, 50),
    "supernet, after a checkpoint": at(TRAINING, 110),
    "supernet, at the last step": at(TRAINING, STEPS["supernet"] - 100),
    "scoring spos, first generation": at(SPOS, 4),
    "scoring spos, last generation": at(SPOS, 10),
    "scoring random": at(RANDOM, 5),
    "retraining finalist 1, early": at(FIRST, 50),
    "retraining finalist 1, late": at(FIRST, 110),
    "retraining finalist 2, at the last step": at(SECOND, STEPS["retrain"]),
    "export": inside(".finalist-1.onnx.partial"),
    "verify, timing": at(WHOLE, 2),
    "verify, certificate": inside(".certificate.json.partial"),
    "report": inside(".report.html.partial"),
}
"""Where each process is killed, one after the other."""

STAGES = list(KILLS)


@dataclass(frozen=True)
class Chain:
    """A run that was killed at every stage: what each process did, the last one to the end."""

    folder: Path
    killed: dict[str, Ended]
    half: dict[str, list[str]]
    last: Ended

    def after(self, stage: str) -> Ended:
        """The process that went on after a kill."""
        number = STAGES.index(stage) + 1
        return self.killed[STAGES[number]] if number < len(STAGES) else self.last

    @property
    def processes(self) -> list[Ended]:
        return [*self.killed.values(), self.last]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Chain:
    folder = prepared(tmp_path_factory.mktemp("killed"))
    killed, half = {}, {}
    for stage, stop in KILLS.items():
        killed[stage] = nursery.run(folder, stop)
        assert_whole(folder)
        half[stage] = half_written(folder)
    return Chain(folder, killed, half, nursery.run(folder))


@pytest.mark.parametrize("stage", STAGES)
def test_each_process_was_killed_where_it_should_be(chain: Chain, stage: str) -> None:
    ended = chain.killed[stage]
    assert ended.code == -signal.SIGKILL, ended.told
    assert ended.out == ""
    assert ended.events[-1][0] == "stopped"


def test_a_run_that_was_killed_at_every_stage_ends_as_an_undisturbed_one(
    chain: Chain, undisturbed: Finished
) -> None:
    assert_same(chain.last, chain.folder, undisturbed)


def test_each_block_of_an_op_is_timed_once(chain: Chain, undisturbed: Finished) -> None:
    (path,) = (undisturbed.folder / "tables").glob("*.parquet")
    table = LatencyTable.load(path)
    blocks = table.protocol["rounds"] * len(table.rows | table.chains)
    assert [process.ops_timed for process in chain.processes if process.ops_timed] == [
        100, 150, blocks - 250,
    ]  # fmt: skip


@pytest.mark.parametrize("stage", [x for x in STAGES if x.startswith("timing whole")])
def test_timing_whole_networks_goes_on_with_the_next_block(chain: Chain, stage: str) -> None:
    reached = chain.killed[stage].told_of(WHOLE)[-1]
    assert chain.after(stage).told_of(WHOLE)[:2] == [reached, reached + 1]


@pytest.mark.parametrize(
    ("stage", "label", "reached", "kept"),
    [
        ("supernet, before a checkpoint", TRAINING, 50, 0),
        ("supernet, after a checkpoint", TRAINING, 110, 100),
        ("retraining finalist 1, early", FIRST, 50, 0),
        ("retraining finalist 1, late", FIRST, 110, 100),
    ],
)
def test_training_goes_on_from_its_checkpoint(
    chain: Chain, stage: str, label: str, reached: int, kept: int
) -> None:
    assert chain.killed[stage].told_of(label)[-1] == reached
    assert chain.after(stage).told_of(label)[0] == kept + 1


@pytest.mark.parametrize(
    ("stage", "label"),
    [
        ("supernet, at the last step", TRAINING),
        ("retraining finalist 2, at the last step", SECOND),
    ],
)
def test_what_was_trained_to_the_last_step_is_not_trained_again(
    chain: Chain, stage: str, label: str
) -> None:
    place = STAGES.index(stage)
    last = STEPS["supernet" if label == TRAINING else "retrain"]
    assert chain.processes[place].told_of(label)[-1] == last
    assert all(process.told_of(label) == [] for process in chain.processes[place + 1 :])


@pytest.mark.parametrize(
    ("label", "last"),
    [
        (OPS, "building whole networks"),
        (BUILDING, "supernet, before a checkpoint"),
        (SPOS, "retraining finalist 1, early"),
        (RANDOM, "retraining finalist 1, early"),
        (FIRST, "retraining finalist 2, at the last step"),
    ],
)
def test_a_finished_stage_is_not_entered_again(chain: Chain, label: str, last: str) -> None:
    place = STAGES.index(last)
    assert chain.processes[place - 1].told_of(label)
    assert all(process.told_of(label) == [] for process in chain.processes[place + 1 :])


def test_each_architecture_is_scored_once(chain: Chain) -> None:
    scored = [genes for process in chain.processes for genes in process.scored]
    assert len(scored) == len(set(scored))
    rows = database(chain.folder / "run" / "search.sqlite")["scores"]
    assert sorted(scored) == sorted(tuple(json.loads(genes)) for genes, *_ in rows)


@pytest.mark.parametrize("stage", ["export", "verify, certificate", "report"])
def test_a_file_that_was_half_written_is_written_again(chain: Chain, stage: str) -> None:
    name = KILLS[stage]["file"]
    assert chain.half[stage] == [name]
    assert ["written", name] in chain.after(stage).events
    later = STAGES[STAGES.index(stage) + 1 :]
    assert all(name not in chain.half[other] for other in later)


# ---- killed inside a file write, whichever it is


def killed_in_writes(
    every: int, folder: Path, nursery: Nursery
) -> tuple[list[tuple[str, Ended]], Ended]:
    """The processes of one run, each killed in the nth write of a file that none wrote before, with
    the file's name; and the one that comes through.
    """
    seen: set[str] = set()
    killed: list[tuple[str, Ended]] = []
    for _ in range(40):
        ended = nursery.run(folder, inside("*", every, but=sorted(seen)))
        if ended.code == 0:
            return killed, ended
        assert ended.code == -signal.SIGKILL, ended.told
        assert ended.out == ""
        assert_whole(folder)
        (name,) = (event[2] for event in ended.events if event[0] == "stopped")
        seen |= {name, *(event[1] for event in ended.events if event[0] == "written")}
        killed.append((name, ended))
    raise AssertionError(f"no process came through: {[name for name, _ in killed]}")


def test_kills_inside_file_writes_leave_nothing_half_written(
    tmp_path: Path, nursery: Nursery, undisturbed: Finished
) -> None:
    killed, last = killed_in_writes(4, prepared(tmp_path / "a"), nursery)
    assert len(killed) >= 4
    assert_same(last, tmp_path / "a", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_kills_inside_every_file_write(
    every: int, tmp_path: Path, nursery: Nursery, undisturbed: Finished
) -> None:
    killed, last = killed_in_writes(every, prepared(tmp_path / "a"), nursery)
    names = [name for name, _ in killed]
    assert len(set(names)) == len(names)
    if every == 1:
        shipped = ["config.yaml", "supernet.pt", "table.parquet", "finalists.json", "best",
                   "finalist-0.training.pt", "finalist-0.pt", "finalist-0.onnx", "weights.pt",
                   "model.onnx", "architecture.json", "certificate.json",
                   "report.html"]  # fmt: skip
        assert {f".{name}.partial" for name in shipped} < set(names)
    assert_same(last, tmp_path / "a", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(
    ("stage", "every"),
    [(CHECKING, 7), (OPS, 31), (BUILDING, 5), (WHOLE, 9), (TRAINING, 101), (SPOS, 1), (RANDOM, 1),
     (FIRST, 101), (SECOND, 101)],
)  # fmt: skip
def test_a_stage_that_is_stopped_again_and_again_ends_as_an_undisturbed_one(
    stage: str, every: int, how: str, tmp_path: Path, nursery: Nursery, undisturbed: Finished
) -> None:
    folder = prepared(tmp_path / "a")
    expected = {"SIGKILL": -signal.SIGKILL}.get(how, 130)
    stopped = 0
    for number in range(1, 40):
        ended = nursery.run(folder, at(stage, number * every if stage in REDONE else every, how))
        if ended.code == 0:
            break
        assert ended.code == expected, ended.told
        assert_whole(folder)
        stopped += 1
    assert stopped >= 1
    assert_same(ended, folder, undisturbed)


REDONE = (CHECKING, OPS, BUILDING, SPOS, RANDOM)
"""Stages that tell of every unit, of those too that an earlier process did."""


# ---- a polite request to stop, and a second process


@dataclass(frozen=True)
class Polite:
    """A run of which a process was halted, looked at by others, and then asked to stop."""

    folder: Path
    holders: dict[str, int]
    refused: dict[str, Ended]
    asked: dict[str, Ended]
    last: Ended


def wait_until_halted(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} did not come to the place where it halts")


OTHERS = {
    "the table": {"search": SEARCH, "profile": ("profile", *SEARCH[3:9], "--json")},
    "the run": {
        "search": SEARCH,
        "train": ("train", "--run", "run", "--json"),
        "verify": ("verify", "--run", "run", "--json"),
    },
}
"""The commands that a second process gives while another one holds something."""


@pytest.fixture(scope="module")
def polite(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Polite:
    folder = prepared(tmp_path_factory.mktemp("polite"))
    holders, refused, asked = {}, {}, {}
    for held, stops in {
        "the table": (at(OPS, 50, "SIGSTOP"), at(WHOLE, 20, "SIGINT")),
        "the run": (at(TRAINING, 20, "SIGSTOP"), at(TRAINING, 120, "SIGTERM")),
    }.items():
        pid = nursery.start(folder, stops)
        wait_until_halted(pid)
        for name, arguments in OTHERS[held].items():
            refused[f"{held}, {name}"] = nursery.run(folder, arguments=arguments)
        os.kill(pid, signal.SIGCONT)
        holders[held] = pid
        asked[f"{stops[-1]['signal']} in {stops[-1]['stage']}"] = nursery.wait(pid)
    for name, stop in {
        "SIGTERM in scoring": at(SPOS, 5, "SIGTERM"),
        "SIGINT in retraining": at(SECOND, 60, "SIGINT"),
        "SIGTERM in a file write": inside(".model.onnx.partial", 1, "SIGTERM"),
    }.items():
        asked[name] = nursery.run(folder, stop)
        assert half_written(folder) == []
    return Polite(folder, holders, refused, asked, nursery.run(folder))


POLITE = [
    f"SIGINT in {WHOLE}",
    f"SIGTERM in {TRAINING}",
    "SIGTERM in scoring",
    "SIGINT in retraining",
    "SIGTERM in a file write",
]


@pytest.mark.parametrize("name", POLITE)
def test_a_polite_stop_is_code_130_and_one_object(polite: Polite, name: str) -> None:
    assert list(polite.asked) == POLITE
    ended = polite.asked[name]
    assert ended.code == 130
    answer = json.loads(ended.out)
    assert (answer["status"], answer["exit_code"]) == ("interrupted", 130)
    assert answer["error"]["next"] == "run the same command again"
    assert ("run" in answer) == (name != POLITE[0]), "the run is told where there was one"
    assert ended.told.splitlines()[-1].startswith("Interrupted. The same command goes on")
    assert "Traceback" not in ended.told


def test_a_run_that_was_stopped_politely_ends_as_an_undisturbed_one(
    polite: Polite, undisturbed: Finished
) -> None:
    assert_same(polite.last, polite.folder, undisturbed)


@pytest.mark.parametrize(
    ("held", "command"), [(held, name) for held, names in OTHERS.items() for name in names]
)
def test_a_second_process_is_refused_and_told_which_one_is_at_it(
    polite: Polite, held: str, command: str
) -> None:
    ended = polite.refused[f"{held}, {command}"]
    assert ended.code == 2
    what = json.loads(ended.out)["error"]["what"]
    assert what.endswith(f" is in use by process {polite.holders[held]}.")
    assert what.startswith("run " if held == "the run" else "tables/simulated-")
    assert "Traceback" not in ended.told
    assert not ended.told_of(OPS)
    assert not ended.told_of(TRAINING)
