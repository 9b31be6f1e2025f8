"""`python run.py` times the graphs of this folder on this machine.

Needs Python 3.9 or newer, numpy and onnxruntime, nothing else. Every timed block is kept in
journal.jsonl at once: after an interruption, however hard, the same command goes on. At the end
all is in result.jsonl, for the machine that wrote this folder (see README.txt).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info < (3, 9):  # noqa: UP036 -- hwnas needs a newer Python, this file does not
    sys.stderr.write("error: run.py needs Python 3.9 or newer. Next: start it with a newer one.\n")
    sys.exit(2)
try:
    from profilers.host import pinned
    from profilers.measure import Protocol, now_s, shuffled
    from profilers.ort_session import (
        executed_operators,
        open_session,
        provenance,
        timed,
        wrong_operators,
    )
except ImportError as error:
    sys.stderr.write(
        f"error: run.py needs numpy and onnxruntime ({error}). "
        "Next: python -m pip install numpy onnxruntime.\n"
    )
    sys.exit(2)
try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
MANIFEST, JOURNAL, RESULT = "bundle.json", "journal.jsonl", "result.jsonl"
FOLDER = Path(__file__).resolve().parent


class Refusal(Exception):
    """What stands in the way, and what to do next."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(f"{what} Next: {next_step}.")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one sentence."""
    try:
        yield
    except OSError as error:
        raise Refusal(
            f"{path} cannot be written: {error.strerror or error}.",
            "free some space, or copy the folder where it can be written; the same command goes on "
            "and nothing measured is lost",
        ) from error


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn the runtime's refusal of a graph into one sentence."""
    try:
        yield
    except Exception as error:  # of whatever kind the runtime raises
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{path} does not load in this onnxruntime: {reason}.",
            f"install the onnxruntime of README.txt; if it is that one, free some space in "
            f"{tempfile.gettempdir()}",
        ) from error


class Bundle:
    """The manifest of a folder. `rows` and `networks` map each key to its graph's file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.identity: dict[str, Any] = content["identity"]
            self.threads, self.batch = int(self.identity["threads"]), int(self.identity["batch"])
            self.processes = int(self.identity["processes"])
            self.protocol = Protocol(**self.identity["protocol"])
            self.rows, self.networks = (
                {graph["key"]: folder / graph["file"] for graph in content[kind]}
                for kind in ("rows", "networks")
            )
            self._graphs = {graph["key"]: graph for kind in ("rows", "networks")
                            for graph in content[kind]}  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"{folder / MANIFEST} is not readable: {error!r}.", "copy the whole folder again"
            ) from error

    def check(self, journal: Journal, progress: Progress) -> None:
        """Raise Refusal where a graph is not as it was written, or, of those that were not timed
        yet, does not run in the kernels that it declares.
        """
        for number, (key, graph) in enumerate(self._graphs.items()):
            path = self.folder / graph["file"]
            model = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(model).hexdigest() != graph["sha256"]:
                raise Refusal(f"{path} is missing or damaged.", "copy the whole folder again")
            if not journal.counts[key]:
                with loading(path):
                    found = executed_operators(model, self.threads)
                if wrong := wrong_operators(graph["operators"], found):
                    raise Refusal(
                        f"This onnxruntime does not run {path} as declared: {wrong}.",
                        "install the onnxruntime of README.txt",
                    )
            progress.tell("checking the graphs", number + 1, len(self._graphs))


class Journal:
    """What was timed: a line of identity and host, then `[key, samples]` for each block."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.counts: Counter[str] = Counter()
        with explained(self.path):
            self._file: BinaryIO = self.path.open("a+b")
            self._lock()
            self._file.seek(0)
            text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]  # what a kill cut off is timed again
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self.counts.update(key for key, _ in lines[1:])
            other = _difference(lines[0], header) if lines else ""
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(
                f"{self.path} is damaged: {error}.", "remove it; what it holds is timed again"
            ) from error
        if other:
            raise Refusal(
                f"{self.path} holds measurements of another machine or bundle ({other}).",
                "remove it, or copy the bundle anew",
            )
        with explained(self.path):
            self._file.truncate(len(whole))
            if not lines:
                self._write(header)

    def add(self, key: str, samples: Any) -> None:
        """Keep one block: a list of microseconds, or of rows of them."""
        with explained(self.path):
            self._write([key, samples])
        self.counts[key] += 1

    def seal(self, result: Path) -> None:
        """Write all of it to `result`, with a last line that tells whether it is whole."""
        digest, blocks, partial = hashlib.sha256(), -1, result.with_name(f".{result.name}.partial")
        with explained(result):
            self._file.seek(0)
            with partial.open("wb") as file:
                for line in self._file:
                    digest.update(line)
                    blocks += 1
                    file.write(line)
                file.write(_line({"blocks": blocks, "sha256": digest.hexdigest()}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(result)

    def close(self, *, remove: bool = False) -> None:
        """Let another process have it; with `remove`, it is kept elsewhere."""
        with suppress(OSError):  # what a full disk kept from being written, for one
            if remove:
                self.path.unlink()
            self._file.close()

    def _write(self, content: Any) -> None:
        self._file.write(_line(content))
        self._file.flush()

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refusal(
                    f"{self.path} is in use by another process.", "wait for it"
                ) from error


class Progress:
    """One line that is written over on a terminal; elsewhere a line for every tenth."""

    def __init__(self) -> None:
        self._label, self._start_s, self._first, self._tenth = "", 0.0, 0, -1

    def tell(self, label: str, done: int, total: int) -> None:
        """What is being done, how far, and about how long it will still take."""
        if label != self._label:
            self._label, self._start_s, self._first, self._tenth = label, now_s(), done, -1
        text = f"{label}: {done} of {total}"
        if done > self._first:
            left_s = (now_s() - self._start_s) / (done - self._first) * (total - done)
            text += f", about {left_s / 60:.1f} minutes left"
        if sys.stderr.isatty():
            sys.stderr.write("\r" + text.ljust(79) + ("\n" if done == total else ""))
        elif self._tenth != 10 * done // total:
            sys.stderr.write(text + "\n")
        self._tenth = 10 * done // total
        sys.stderr.flush()


def time_block_of(bundle: Bundle, path: Path) -> Any:
    """One block of a graph, in microseconds with three decimals, as plain lists."""
    with loading(path):
        session = open_session(path.read_bytes(), bundle.threads)
    return timed(session, bundle.batch, bundle.protocol).round(3).tolist()


def time_rows(bundle: Bundle, journal: Journal, progress: Progress) -> None:
    """All rows in rounds, one session at a time, so that a drift of the machine hits all alike."""
    total, done = bundle.protocol.rounds * len(bundle.rows), 0
    with pinned(bundle.threads):
        for turn in range(bundle.protocol.rounds):
            for key in shuffled(bundle.rows, turn):
                done += 1
                if journal.counts[key] <= turn:
                    journal.add(key, time_block_of(bundle, bundle.rows[key]))
                    progress.tell("timing ops", done, total)


def time_networks(bundle: Bundle, journal: Journal, progress: Progress) -> None:
    """All whole networks, each time in a fresh process."""
    total = bundle.processes * len(bundle.networks)
    for turn in range(bundle.processes):
        missing = [key for key in shuffled(bundle.networks, turn) if journal.counts[key] <= turn]
        done = turn * len(bundle.networks) + len(bundle.networks) - len(missing)
        if missing:
            for key, samples in _in_fresh_process(missing):
                journal.add(key, samples)
                done += 1
                progress.tell("timing whole networks in fresh processes", done, total)


def _in_fresh_process(keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        told.write(json.dumps({"parent": os.getpid(), "networks": keys}).encode())
        told.seek(0)
        with subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--networks"],
            stdin=told,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process:
            assert process.stdout is not None
            try:
                for key in keys:
                    line = process.stdout.readline()
                    if not line.endswith(b"\n"):
                        errors.seek(0)
                        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                        raise Refusal(
                            f"The measuring process failed: {(last or ['it was killed'])[0]}",
                            "run the same command again; nothing measured is lost",
                        )
                    yield key, json.loads(line)
            finally:
                process.kill()


def measure_networks(bundle: Bundle) -> None:
    """What the fresh process does: a line for each network that standard input names."""
    job = json.load(sys.stdin)
    with pinned(bundle.threads):
        for key in job["networks"]:
            if os.getppid() != job["parent"]:
                return
            samples = time_block_of(bundle, bundle.networks[key])
            sys.stdout.write(json.dumps(samples) + "\n")
            sys.stdout.flush()


def measure(bundle: Bundle) -> Path:
    """Time whatever is not in the journal yet; the result, which is there already or is written."""
    result = bundle.folder / RESULT
    if not result.exists():
        header = {
            "format": FORMAT,
            "identity": bundle.identity,
            "host": provenance(bundle.threads, bundle.batch),
        }
        journal, progress = Journal(bundle.folder, header), Progress()
        try:
            bundle.check(journal, progress)
            time_rows(bundle, journal, progress)
            time_networks(bundle, journal, progress)
            journal.seal(result)
        except BaseException:
            journal.close()
            raise
        journal.close(remove=True)
    return result


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 done, 2 something stands in the way, 130 interrupted."""
    try:
        if arguments == ["--networks"]:
            measure_networks(Bundle(FOLDER))
            return 0
        if arguments:
            sys.stderr.write(f"{__doc__}\n")
            return 0 if arguments[0] in ("-h", "--help") else 2
        result = measure(Bundle(FOLDER))
    except Refusal as refusal:
        sys.stderr.write("\n" * sys.stderr.isatty() + f"error: {refusal}\n")
        return 2
    except OSError as error:  # of a temporary file: all others are named where they are written
        reason = error.strerror or str(error)
        sys.stderr.write(f"error: {error.filename or tempfile.gettempdir()}: {reason}. Next: free "
                         "some space; the same command goes on.\n")  # fmt: skip
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. The same command goes on where this one stopped.\n")
        return 130
    sys.stdout.write(f"All is in {result}; README.txt says where it goes.\n")
    return 0


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing that differs between two headers, but for the host's name and governor."""
    if old["identity"] != new["identity"] or old["format"] != new["format"]:
        return "another bundle"
    for name, value in new["host"].items():
        if name not in ("hostname", "governor") and old["host"][name] != value:
            return f"{name}: {old['host'][name]} against {value}"
    return ""


def _line(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
