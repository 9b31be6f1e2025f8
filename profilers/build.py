"""From ops to measurements: rows of a table, and latencies of whole networks.

Rows are measured in rounds over all of them, one session at a time, so that a drift of the machine
hits all rows alike. Whole networks are measured in fresh processes. Each block goes into a journal
at once; after an interruption, however hard, the same call goes on where it stopped.
"""

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import numpy as np
import onnx

from latency_tables.boundaries import Chain, chain_key, probes, with_heads
from latency_tables.files import explained, held, write_text
from latency_tables.host import Host
from latency_tables.ops import OpSpec
from latency_tables.slopes import hosted, repeated
from latency_tables.table import LatencyTable, Row
from profilers.base import Profiler
from profilers.graphs import check_kernels, emit, random_parameters
from profilers.host import pinned
from profilers.measure import Protocol, Samples, pace_of, shuffled, summarise
from quant.errors import HwnasError, InvalidInput, TableError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are."""


def quiet(_label: str, _done: int, _total: int) -> None:
    """A progress that tells nothing."""


def minutes(
    profiler: Profiler, count: int, protocol: Protocol, *, each_ms: float = 0.0, ops: int = 1
) -> float:
    """How long timing `count` graphs of `ops` ops each will take, told beforehand; `each_ms` is
    about how long a call of one takes.
    """
    block_ms = max(protocol.block_ms, protocol.min_runs * each_ms)
    timed_s = protocol.rounds * (max(protocol.warmup_ms, 2 * each_ms) + block_ms) / 1000
    prepared_s = profiler.seconds_per_row * (1 + protocol.rounds / 4) * (1 + ops) / 2
    return count * (timed_s + prepared_s) / 60


def row_minutes(
    profiler: Profiler, chains: Iterable[Chain], protocol: Protocol, *, op_ms: float
) -> float:
    """How long timing the rows of a table will take, told beforehand; `op_ms` is about how long an
    op takes. The few ops of a chain across a boundary count as one.
    """
    lengths = Counter(len(chain) if profiler.repeats else 1 for chain in chains)
    return sum(
        minutes(profiler, count, protocol, each_ms=length * op_ms, ops=length)
        for length, count in lengths.items()
    )


def row_model(ops: Chain, profiler: Profiler) -> onnx.ModelProto:
    """The graph that is timed for an op, or for a chain: the shipped form, with random weights from
    each op's key, and others in every further copy of an op.
    """
    copies = [(op,) * ops[: place + 1].count(op) for place, op in enumerate(ops)]
    seeds = [zlib.crc32(chain_key(each).encode()) for each in copies]
    numbers = [
        random_parameters(op, np.random.default_rng(seed))
        for op, seed in zip(ops, seeds, strict=True)
    ]
    return emit(ops, numbers, profiler.runtime)


def missing_chains(table: LatencyTable, ops: Sequence[OpSpec]) -> list[Chain]:
    """What must be measured before the table has all that it takes to price the ops: each op
    alone, then chains for the boundaries between them, and where the table has `repeats`, hosts
    with the ops that cannot follow themselves, and copies of those that can.
    """
    known = table.savings_us()
    wanted = [chain for boundary, chain in probes(ops).items() if boundary not in known]
    copies: list[Chain] = []
    if table.repeats:
        told = table.by_chains()
        wanted += [chain for chain in hosted(ops) if chain[-1].key not in told]
        copies = repeated(ops, table.repeats)
    chains = {chain_key(chain): chain for chain in (*with_heads(wanted), *copies)}
    missing = [chain for key, chain in chains.items() if key not in table.chains]
    return [*((op,) for op in table.missing(ops)), *missing]


def table_lock(table_path: Path) -> AbstractContextManager[None]:
    """Hold the table at `table_path` and its journals; raises InvalidInput where another does."""
    return held(table_path.with_suffix(".lock"), str(table_path))


def build_rows(
    profiler: Profiler,
    ops: Sequence[OpSpec],
    table_path: Path,
    protocol: Protocol,
    progress: Progress = quiet,
    *,
    network_us: float = math.inf,
    boundaries: bool = True,
) -> LatencyTable:
    """Measure what the table at `table_path` lacks to price the ops, save it, and return it.

    `network_us` is about the latency of a network of the ops: rows whose interval is wide against
    it are measured in more rounds. Without `boundaries`, only ops alone are measured. The caller
    holds `table_lock`. Raises TableError where the table or its journal was measured on another
    host or by another protocol, InvalidInput where the runtime has no kernel for an op, and
    `WrongKernels` where an op does not run in the kernels that it declares.
    """
    check_kernels(ops, profiler.runtime)
    table = open_table(profiler, table_path, protocol)
    wanted = missing_chains(table, ops) if boundaries else [(op,) for op in table.missing(ops)]
    missing = {chain_key(chain): chain for chain in wanted}
    journal_path = table_path.with_suffix(".journal")
    if not missing:
        with suppress(InvalidInput):  # what a kill between saving and removing left there
            journal = _Journal(journal_path, "ops", table.host, protocol)
            journal.remove(table.rows | table.chains)
        return table
    journal = _Journal(journal_path, "ops", table.host, protocol)
    with tempfile.TemporaryDirectory() as folder, pinned(profiler.threads):
        files = {}
        for number, (key, chain) in enumerate(missing.items()):
            model = row_model(chain, profiler)
            if not journal.count(key):
                profiler.check(model)
            files[key] = Path(folder) / f"{number}.onnx"
            with explained(files[key]):
                files[key].write_bytes(model.SerializeToString())
            progress(
                "checking that every op runs in its declared kernels", number + 1, len(missing)
            )
        wide = list(missing)
        for turn in range(max(protocol.rounds, protocol.max_rounds)):
            if turn >= protocol.rounds:  # what is narrow once has no more blocks, and stays so
                blocks = journal.blocks
                wide = [k for k in wide if not _is_narrow(blocks[k], protocol, network_us)]
            label = "timing ops" if turn < protocol.rounds else "timing noisy ops again"
            total = protocol.rounds * len(missing) if turn < protocol.rounds else len(wide)
            for number, key in enumerate(shuffled(wide, turn)):
                if journal.count(key) <= turn:
                    with profiler.prepare(files[key]) as session:
                        journal.add(key, session.block(protocol))
                done = turn * len(missing) if turn < protocol.rounds else 0
                progress(label, done + number + 1, total)
    add_rows(table, missing, journal.blocks, protocol, network_us=network_us)
    table.save(table_path)
    journal.remove(table.rows | table.chains)
    return table


def add_rows(
    table: LatencyTable,
    chains: Mapping[str, Chain],
    blocks: Mapping[str, Sequence[Samples]],
    protocol: Protocol,
    *,
    network_us: float = math.inf,
) -> None:
    """Put chains that were timed into a table, by key; the first rows of all set its pace. An op
    whose chains leave it no positive cost inside a network has an unstable row.
    """
    if not table.rows:
        table.pace_us = pace_of(block for key in chains for block in blocks[key])
    for key, chain in chains.items():
        measured = summarise(blocks[key], protocol, pace_us=table.pace_us)
        stable = measured.stable and _is_narrow(blocks[key], protocol, network_us)
        times = asdict(replace(measured, stable=stable))
        del times["latency_us"]  # the median
        texts = json.dumps([op.to_json() for op in chain])
        row = Row(key, texts, chain[-1].precision.name, **times)
        (table.rows if len(chain) == 1 else table.chains)[key] = row
    untold = {key for key, inside in table.by_chains().items() if inside.us <= 0}
    for key in untold & table.rows.keys():
        table.rows[key] = replace(table.rows[key], stable=False)


def _is_narrow(blocks: Sequence[Samples], protocol: Protocol, network_us: float) -> bool:
    """Whether the interval of a row is small against a network's latency, both at one pace."""
    measured = summarise(blocks, protocol, pace_us=pace_of(blocks))
    return measured.high_us - measured.low_us <= 2 * protocol.tolerance * network_us


def empty_table(profiler: Profiler, protocol: Protocol) -> LatencyTable:
    """A table without rows, in the profiler's condition."""
    told = protocol.to_dict()
    if profiler.repeats:
        told["repeats"] = list(profiler.repeats)
    return LatencyTable(profiler.host(), told)


def open_table(profiler: Profiler, path: Path, protocol: Protocol) -> LatencyTable:
    """The table at `path`, or an empty one; raises TableError where its condition is another."""
    empty = empty_table(profiler, protocol)
    if not path.exists():
        return empty
    table = LatencyTable.load(path)
    if difference := table.host.difference(empty.host):
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
    journal: Path | None = None,
) -> list[list[Samples]]:
    """Time whole models, a block in each of some fresh processes: the blocks of each model, which
    `summarise` turns into its latency.

    With a `journal`, each block is kept there at once under its model file's hash, and the same
    call measures later only what is missing; `forget` the journal once the result is kept. What the
    device runs is compiled of those that are missing alone. Raises TableError where the journal is
    of another host or protocol, HwnasError where a process fails.
    """
    kept = _Journal(journal, "networks", profiler.host(), protocol)
    files = dict(zip(_keys(models), models, strict=True))
    compiled = functools.cache(profiler.compiled)
    turns = processes or protocol.rounds
    label, total = "timing whole networks in fresh processes", turns * len(files)
    if done := sum(min(kept.count(key), turns) for key in files):
        progress(label, done, total)
    for turn in range(turns):
        missing = [key for key in shuffled(files, turn) if kept.count(key) <= turn]
        if not missing:
            continue
        ready = [compiled(files[key]) for key in missing]
        with _fresh_process(profiler, ready, protocol) as blocks:
            for key, samples in zip(missing, blocks, strict=True):
                kept.add(key, samples)
                done += 1
                progress(label, done, total)
    return [kept.blocks[key][:turns] for key in files]


def journalled(profiler: Profiler, protocol: Protocol, journal: Path) -> frozenset[str]:
    """The hashes of the model files of which a journal of `measure_models` holds a block."""
    return frozenset(_Journal(journal, "networks", profiler.host(), protocol).blocks)


def file_hash(content: bytes) -> str:
    """What names a model file in a journal."""
    return hashlib.sha256(content).hexdigest()


def forget(journal: Path) -> None:
    """Remove the journal of `measure_models`, if it is there; what it holds is kept elsewhere."""
    with explained(journal):
        journal.unlink(missing_ok=True)


def _keys(models: Sequence[Path]) -> list[str]:
    """The hash of each model file; a further copy of the same model has its number behind it."""
    keys: list[str] = []
    seen: Counter[str] = Counter()
    for path in models:
        try:
            digest = file_hash(path.read_bytes())
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}.") from error
        keys.append(f"{digest} {seen[digest]}" if seen[digest] else digest)
        seen[digest] += 1
    return keys


@contextmanager
def _fresh_process(
    profiler: Profiler, models: Sequence[Path], protocol: Protocol
) -> Iterator[Iterator[Samples]]:
    """A new process that times each model, and the blocks as they come; gone when the block ends.

    Should this process be killed, the other notices and leaves (`profilers.worker`).
    """
    job = {
        "parent": os.getpid(),
        "device": profiler.host().device,
        "threads": profiler.threads,
        "batch": profiler.batch,
        "protocol": protocol.to_dict(),
        "models": [str(path) for path in models],
    }
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        json.dump(job, told)
        told.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "profilers.worker"],
            stdin=told,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                yield _blocks(process.stdout, errors, len(models))
            finally:
                process.kill()


def _blocks(lines: IO[str], errors: IO[str], count: int) -> Iterator[Samples]:
    """`count` blocks, a line each; raises HwnasError where the measuring process ends before."""
    for _ in range(count):
        try:
            samples = np.array(json.loads(lines.readline()), float)
        except ValueError as error:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["it ended without a message"]
            raise HwnasError(
                f"The measuring process failed: {last[0]}",
                next_step="run the same command again; what a journal holds is not lost",
            ) from error
        yield samples


class _Journal:
    """Blocks that were measured but are not in a table yet, a line each; survives a kill.

    `kind` says what the keys name. Without a path it is kept in memory alone.
    """

    def __init__(self, path: Path | None, kind: str, host: Host, protocol: Protocol) -> None:
        self.path = path
        self.blocks: dict[str, list[Samples]] = {}
        told = {**asdict(host), "hostname": "", "governor": ""}
        self._identity = {"kind": kind, "host": told, "protocol": protocol.to_dict()}
        if path is not None:
            self._read(path)

    def count(self, key: str) -> int:
        """How many blocks of a key are there."""
        return len(self.blocks.get(key, []))

    def add(self, key: str, samples: Samples) -> None:
        """Keep one block, as it reads back from the file."""
        samples = samples.round(3)
        self.blocks.setdefault(key, []).append(samples)
        if self.path is None:
            return
        with explained(self.path), self.path.open("ab") as file:
            lines = [self._identity] if file.tell() == 0 else []
            file.write(_as_lines([*lines, [key, samples.tolist()]]))

    def remove(self, keys: Iterable[str]) -> None:
        """Forget what a table holds now; other keys' blocks stay for their own build."""
        gone = [key for key in keys if self.blocks.pop(key, None)]
        if not gone or self.path is None:
            return
        if not self.blocks:
            forget(self.path)
            return
        lines = [[key, each.tolist()] for key, blocks in self.blocks.items() for each in blocks]
        write_text(self.path, _as_lines([self._identity, *lines]).decode())

    def _read(self, path: Path) -> None:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            for key, samples in records[1:]:
                self.blocks.setdefault(str(key), []).append(np.array(samples, float))
        except (ValueError, TypeError) as error:
            raise TableError(
                f"{path} is damaged: {error}.",
                next_step="remove it; what it holds is measured again",
            ) from error
        if records and records[0] != self._identity:
            raise TableError(
                f"{path} holds unfinished measurements of another host, protocol or kind.",
                next_step="remove it, or name another --tables folder",
            )
        if whole != text:
            with explained(path):
                os.truncate(path, len(whole))


def _as_lines(records: Iterable[object]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
