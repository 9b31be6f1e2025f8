"""Graphs to be timed on another machine, and what comes back from it.

A bundle is a folder that needs Python, NumPy and ONNX Runtime alone: the graphs, a manifest with
their hashes, `run.py` (`profilers.bundle_runner`) and the very files that time graphs here. What it
measures comes back as one file of lines: identity and host, every timed block, a digest of it all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from latency_tables.files import explained
from latency_tables.host import Host
from profilers.bundle_runner import FORMAT, MANIFEST, RESULT
from profilers.measure import Samples
from quant.errors import InvalidInput, TableError

CARRIED = ("host.py", "measure.py", "ort_session.py")
"""What times graphs, here and there."""


@dataclass(frozen=True)
class Identity:
    """What a bundle measures, and how. A result is taken where every field is the one expected.

    `rows` and `networks` are hashes of what is timed (`keys_hash`); each network is timed in
    `processes` fresh processes, rows in the protocol's rounds.
    """

    hwnas: str
    space: str
    fingerprint: str
    threads: int
    batch: int
    protocol: dict[str, Any]
    processes: int
    rows: str
    networks: str


@dataclass(frozen=True)
class Graph:
    """An ONNX file to be timed: how often it executes each operator, as its ops declare."""

    key: str
    model: bytes
    operators: Mapping[str, int]


@dataclass(frozen=True)
class Result:
    """What came back: the machine, and the timed blocks of each row and network by its key."""

    host: Host
    blocks: dict[str, list[Samples]]


def keys_hash(keys: Iterable[str]) -> str:
    """A hash of what is timed, in its order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def write_bundle(
    folder: Path,
    identity: Identity,
    rows: Iterable[Graph],
    networks: Iterable[Graph],
    readme: str,
) -> int:
    """Write a bundle of graphs as `folder`, all of it or nothing.

    Returns its size in bytes. Raises InvalidInput where `folder` is there and not empty, and where
    it cannot be written.
    """
    with explained(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInput(
                f"{folder} is there already.", accepted="a folder that is new or empty"
            )
        partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        content = {
            "format": FORMAT,
            "identity": asdict(identity),
            "rows": list(_written(partial, "rows", rows)),
            "networks": list(_written(partial, "networks", networks)),
        }
        with explained(folder):
            here = Path(__file__).parent
            (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            (partial / "README.txt").write_text(readme, encoding="utf-8")
            shutil.copyfile(here / "bundle_runner.py", partial / "run.py")
            (partial / "profilers").mkdir()
            for name in CARRIED:
                shutil.copyfile(here / name, partial / "profilers" / name)
            (partial / "profilers" / "__init__.py").write_text(
                '"""The clock of hwnas, as it was where this bundle was written."""\n'
            )
            size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return size


def _written(folder: Path, kind: str, graphs: Iterable[Graph]) -> Iterator[dict[str, Any]]:
    """Write graphs one by one; what the manifest tells of each."""
    with explained(folder / kind):
        (folder / kind).mkdir()
    for number, graph in enumerate(graphs):
        name = f"{kind}/{number:05}.onnx"
        with explained(folder / name):
            (folder / name).write_bytes(graph.model)
        yield {
            "key": graph.key,
            "file": name,
            "sha256": hashlib.sha256(graph.model).hexdigest(),
            "operators": dict(graph.operators),
        }


def read_result(
    path: Path, identity: Identity, rows: Iterable[str], networks: Iterable[str]
) -> Result:
    """What `run.py` measured: a result file, or the bundle with one in it.

    Raises TableError where it is not whole, of another bundle or version, or holds what is no
    measurement; `rows` and `networks` are the keys that it must have blocks of.
    """
    if path.is_dir():
        path = path / RESULT
    lines = _lines(path)
    header, footer = _object(lines[:1]), _object(lines[-1:])
    if "identity" not in header:
        raise TableError(
            f"{path} is not the result of a bundle.",
            accepted=f"{RESULT}, which the bundle's run.py writes at its end",
            next_step="finish run.py on the other machine, and carry that file over",
        )
    _check_version(path, header)
    digest = hashlib.sha256(b"".join(lines[:-1])).hexdigest()
    if footer.get("blocks") != len(lines) - 2 or footer.get("sha256") != digest:
        raise TableError(
            f"{path} is not whole, or was changed after it was measured.",
            accepted="the file as run.py wrote it",
            next_step="carry it over again",
        )
    _check_identity(path, header["identity"], identity)
    host = _host(path, header, identity)
    counts = dict.fromkeys(rows, int(identity.protocol["rounds"]))
    counts |= dict.fromkeys(networks, identity.processes)
    return Result(host, _blocks(path, lines[1:-1], counts))


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise TableError(
            f"{path} cannot be read: {error.strerror}.",
            accepted=f"{RESULT} of a bundle, or the bundle's folder with it",
            next_step="finish run.py on the other machine, and carry that file over",
        ) from error


def _object(lines: list[bytes]) -> dict[str, Any]:
    """The object in a line; empty where there is none."""
    try:
        content = json.loads(lines[0])
    except (IndexError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_version(path: Path, header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise TableError(
            f"{path} has format version {header.get('format')}.",
            accepted=f"version {FORMAT}",
            next_step="write a bundle with this hwnas, and measure again",
        )


def _check_identity(path: Path, found: Any, wanted: Identity) -> None:
    known = found if isinstance(found, dict) else {}
    for item in fields(Identity):
        mine, theirs = getattr(wanted, item.name), known.get(item.name)
        if mine != theirs:
            raise TableError(
                f"{path} was measured for another bundle ({item.name}: {theirs} against {mine}).",
                accepted="a result of the space, data, threads, batch and recipe of these flags",
                next_step="repeat the flags that the bundle was written with, or write a new one",
            )


def _host(path: Path, header: dict[str, Any], identity: Identity) -> Host:
    try:
        host = Host(**header["host"])
    except (KeyError, TypeError) as error:
        raise TableError(
            f"{path} does not tell its machine: {error}.", next_step="measure again"
        ) from error
    if (host.threads, host.batch) != (identity.threads, identity.batch):
        raise TableError(
            f"{path} tells another condition than its bundle's.", next_step="measure again"
        )
    return host


def _blocks(path: Path, lines: list[bytes], counts: dict[str, int]) -> dict[str, list[Samples]]:
    """The blocks of each key, in the order of `counts`, which tells the least number of each."""
    blocks: dict[str, list[Samples]] = {key: [] for key in counts}
    for number, line in enumerate(lines, start=2):
        try:
            key, told = json.loads(line)
            samples = np.array(told, float)
            blocks[key].append(samples)
            sound = samples.size > 0 and bool(np.all(np.isfinite(samples) & (samples > 0)))
        except (ValueError, TypeError, KeyError):
            sound = False
        if not sound:
            raise TableError(
                f"{path}: line {number} is no measurement of an op or network of the bundle.",
                accepted="positive numbers of microseconds",
                next_step="measure again",
            )
    for key, least in counts.items():
        if len(blocks[key]) < least:
            raise TableError(
                f"{path} holds {len(blocks[key])} of {least} blocks of {key!r}.",
                accepted="all of them",
                next_step="run run.py again where it was measured, and carry the result over",
            )
    return blocks
