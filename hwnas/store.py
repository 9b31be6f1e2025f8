"""A run: the directory that holds everything one search made.

config.yaml      what the run is of: its identity
table.parquet    the latency table that was used
supernet.pt      shared weights, with the optimiser, to go on from
search.sqlite    every proposal and every score, written at once
results/LIMITS/  one folder a set of limits: finalists, files, certificate.json
best             the newest result's folder
log.jsonl        what happened, a line each
"""

import itertools
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hwnas.recipes import first_error
from latency_tables.files import explained, held, write_text
from quant.errors import InvalidInput

RUN_TABLE = "table.parquet"

_log = logging.getLogger("hwnas")


class RunConfig(BaseModel):
    """A run's identity. Limits are not part of it: one run answers many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: str
    space_fingerprint: str
    precisions: list[str] | None = None
    data: str
    data_fingerprint: str
    image_size: int
    device: str
    threads: int
    batch: int
    portable: bool = False
    method: str
    recipe: dict[str, Any]
    seed: int

    def difference(self, other: "RunConfig") -> str:
        """The first field in which two runs differ, with both values; empty if none does."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                return f"{name}: {mine.get(name)} against {theirs.get(name)}"
        return ""


class Run:
    """A run directory."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @property
    def table(self) -> Path:
        """The latency table used."""
        return self.path / RUN_TABLE

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
        try:
            return self.path / pointer.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"{pointer} does not name a result: {' '.join(str(error).split())}.",
                next_step="remove it; hwnas search writes it again",
            ) from error

    def point_to(self, result: Path) -> None:
        """Make a result the newest."""
        write_text(self.path / "best", f"{result.relative_to(self.path)}\n")

    def log(self, event: str, **fields: Any) -> None:
        """Add a line to log.jsonl."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields}
        path = self.path / "log.jsonl"
        with explained(path), path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        _log.info("%s %s", event, " ".join(f"{name}={value}" for name, value in fields.items()))

    def trained_on(self) -> list[str]:
        """Every device on which weights of this run were trained, as the log tells them (`on`)."""
        path, found = self.path / "log.jsonl", set()
        with explained(path):
            lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            with suppress(ValueError):  # a line that a crash left in half
                if on := json.loads(line).get("on"):
                    found.add(str(on))
        return sorted(found)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; raises InvalidInput that names the process which has it."""
        with held(self.path / ".lock", str(self.path)):
            yield


def _flat(fields: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested fields by their path, such as `recipe.supernet.steps`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{above}{name}.") if inner else {f"{above}{name}": value}
    return flat


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
    for run in list_runs(root):
        if run.config == config:
            return run
    return _new(_unused(root, _name(config)), config)


def list_runs(root: Path = Path("runs")) -> list[Run]:
    """The runs under a folder, newest first; a damaged one is left out."""
    found = sorted(root.glob("*/config.yaml"), key=lambda p: p.stat().st_mtime, reverse=True)
    runs = []
    for file in found:
        try:
            runs.append(read_run(file.parent))
        except InvalidInput:  # a damaged run of something else is no reason to refuse this one
            continue
    return runs


def _name(config: RunConfig) -> str:
    """What a run's folder is called, such as `mobile-folder-photos-cpu`."""
    kind, _, place = config.data.partition(":")
    parts = [Path(config.space).name, kind if place else Path(kind).stem, Path(place).stem]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(filter(None, [*parts, config.device])))


def _unused(root: Path, name: str) -> Path:
    """A new folder `name-N` that no other process has made."""
    for number in itertools.count(1):
        path = root / f"{name}-{number}"
        with explained(path):
            root.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
        return path
    raise AssertionError("there is always another number")


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
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"{file} is not readable YAML: {reason}.", next_step="name another --run"
        ) from error
    except ValidationError as error:
        raise InvalidInput(
            f"{file}: {first_error(error)}.",
            next_step="name another --run; this one was made by another version or edited",
        ) from error


def _new(path: Path, config: RunConfig) -> Run:
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    write_text(path / "config.yaml", text)
    return Run(path, config)
