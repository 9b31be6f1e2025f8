"""From ops to measurements: rows of a table, and latencies of whole networks.

Rows are measured in rounds over all of them, one session at a time, so that a drift of the machine
hits all rows alike. Each block goes into a journal beside the table at once; after an interruption
the same call goes on where it stopped. Whole networks are measured in fresh processes.
"""

import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx

from latency_tables.files import explained, write_atomically, write_text
from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable, Row
from profilers.base import Profiler
from profilers.graphs import emit, random_parameters
from profilers.host import pinned
from profilers.measure import Measurement, Protocol, Samples, summarise
from quant.errors import HwnasError, TableError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are."""


def quiet(_label: str, _done: int, _total: int) -> None:
    """A progress that tells nothing."""


def minutes(profiler: Profiler, rows: int, protocol: Protocol) -> float:
    """How long `build_rows` will take, told beforehand."""
    counted_s = protocol.rounds * (protocol.warmup_ms + protocol.block_ms) / 1000
    return rows * (counted_s + profiler.seconds_per_row * (1 + protocol.rounds / 4)) / 60


def row_model(op: OpSpec, profiler: Profiler) -> onnx.ModelProto:
    """The graph that is timed for an op: the shipped form, with random weights from its key."""
    rng = np.random.default_rng(zlib.crc32(op.key.encode()))
    return emit([op], [random_parameters(op, rng)], profiler.runtime)


def build_rows(
    profiler: Profiler,
    ops: Sequence[OpSpec],
    table_path: Path,
    protocol: Protocol,
    progress: Progress = quiet,
) -> LatencyTable:
    """Measure the ops that the table at `table_path` lacks, save it, and return it.

    Raises TableError where the table or its journal was measured on another host or by another
    protocol, and `WrongKernels` where an op does not run in the kernels that it declares.
    """
    table = open_table(profiler, table_path, protocol)
    missing = table.missing(ops)
    if not missing:
        return table
    journal = _Journal(table_path.with_suffix(".journal"), table)
    with tempfile.TemporaryDirectory() as folder, pinned(profiler.threads):
        files = []
        for number, op in enumerate(missing):
            model = row_model(op, profiler)
            if not journal.blocks.get(op.key):
                profiler.check(model)
            files.append(Path(folder) / f"{number}.onnx")
            files[-1].write_bytes(model.SerializeToString())
            progress(
                "checking that every op runs in its declared kernels", number + 1, len(missing)
            )
        for turn in range(protocol.rounds):
            for number, op in enumerate(missing):
                if len(journal.blocks.get(op.key, [])) <= turn:
                    with profiler.prepare(onnx.load(files[number])) as session:
                        journal.add(op.key, session.block(protocol))
                done = turn * len(missing) + number + 1
                progress("timing ops", done, protocol.rounds * len(missing))
    for op in missing:
        measured = summarise(journal.blocks[op.key], protocol)
        table.rows[op.key] = Row(op.key, op.to_json(), op.precision.name, **asdict(measured))
    table.save(table_path)
    journal.remove(op.key for op in missing)
    return table


def open_table(profiler: Profiler, path: Path, protocol: Protocol) -> LatencyTable:
    """The table at `path`, or an empty one; raises TableError where its condition is another."""
    host = profiler.host()
    empty = LatencyTable(host, protocol.to_dict())
    if not path.exists():
        return empty
    table = LatencyTable.load(path)
    if difference := table.host.difference(host):
        raise TableError(
            f"{path} was measured on another host ({difference}).",
            accepted="a table of this machine in this condition",
            next_step="name another --tables folder, or remove the file and profile again",
        )
    if table.protocol != empty.protocol:
        raise TableError(
            f"{path} was measured by another protocol ({table.protocol}).",
            next_step="name another --tables folder, or remove the file and profile again",
        )
    return table


def measure_models(
    profiler: Profiler,
    models: Sequence[Path],
    protocol: Protocol,
    progress: Progress = quiet,
    *,
    processes: int | None = None,
) -> list[Measurement]:
    """The latency of whole models, each the median over fresh processes of its block medians."""
    count = processes or protocol.rounds
    blocks: list[list[Samples]] = [[] for _ in models]
    job = {
        "device": profiler.host().device,
        "threads": profiler.threads,
        "batch": profiler.batch,
        "protocol": protocol.to_dict(),
        "models": [str(path) for path in models],
    }
    for turn in range(count):
        answer = subprocess.run(
            [sys.executable, "-m", "profilers.worker"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode != 0:
            last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
            raise HwnasError(
                f"The measuring process failed: {last[0]}",
                next_step="run the same command again; nothing that was measured is lost",
            )
        for mine, samples in zip(blocks, json.loads(answer.stdout), strict=True):
            mine.append(np.array(samples))
        progress("timing whole networks in fresh processes", turn + 1, count)
    return [summarise(mine, protocol) for mine in blocks]


class _Journal:
    """Blocks that were measured but are not in the table yet, a line each; survives a kill."""

    def __init__(self, path: Path, table: LatencyTable) -> None:
        self.path = path
        self.blocks: dict[str, list[Samples]] = {}
        told = {**asdict(table.host), "hostname": "", "governor": ""}
        self._identity = {"host": told, "protocol": table.protocol}
        with explained(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
        try:
            records = [json.loads(line) for line in whole]
            for key, samples in records[1:]:
                self.blocks.setdefault(str(key), []).append(np.array(samples, float))
        except (ValueError, TypeError) as error:
            raise TableError(
                f"{path} is damaged: {error}.", next_step="remove it; its rows are measured again"
            ) from error
        if records and records[0] != self._identity:
            raise TableError(
                f"{path} holds an unfinished table of another host or protocol.",
                next_step="remove it, or name another --tables folder",
            )
        if lines != whole or not whole:
            text = b"".join(whole) or json.dumps(self._identity).encode() + b"\n"
            write_atomically(path, lambda temporary: temporary.write_bytes(text))

    def add(self, key: str, samples: Samples) -> None:
        """Keep one block, as it reads back from the file."""
        samples = samples.round(3)
        self.blocks.setdefault(key, []).append(samples)
        with explained(self.path), self.path.open("a") as file:
            file.write(json.dumps([key, samples.tolist()]) + "\n")

    def remove(self, keys: Iterable[str]) -> None:
        """Forget rows that the table holds now; other ops' blocks stay for their own build."""
        for key in keys:
            del self.blocks[key]
        if not self.blocks:
            self.path.unlink(missing_ok=True)
            return
        lines = [json.dumps(self._identity)]
        for key, blocks in self.blocks.items():
            lines += [json.dumps([key, samples.tolist()]) for samples in blocks]
        write_text(self.path, "\n".join(lines) + "\n")
