"""A bundle measures where hwnas is not; what comes back is taken as it was measured, or refused."""

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import profilers.bundle
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.host import Host
from latency_tables.ops import OpSpec, Tensor
from profilers import bundle_runner
from profilers.bundle import CARRIED, Graph, Identity, keys_hash, read_result, write_bundle
from profilers.bundle_runner import FORMAT, JOURNAL, MANIFEST, RESULT, Bundle, Refusal
from profilers.graphs import emit, expected_operators, random_parameters
from profilers.measure import Protocol, shuffled
from profilers.ort import OrtProfiler
from profilers.ort_session import executed_operators, session_options
from quant.errors import InvalidInput, TableError
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
PROTOCOL = Protocol(rounds=3, warmup_ms=0.2, block_ms=0.5, min_runs=4, max_runs=20)
SLOW = Protocol(rounds=3, warmup_ms=20.0, block_ms=40.0, min_runs=4, max_runs=10**6)
PROCESSES = 2


def conv(channels: int, precision: Precision = FP32, kind: str = "fp32") -> OpSpec:
    spec = Tensor(3, 7, 7, Format.parse(kind))
    return conv_norm_activation(spec, channels, kernel=3, precision=precision)


def network(width: int) -> tuple[OpSpec, ...]:
    body = inverted_residual(Tensor(3, 8, 8), width, kernel=3, expansion=2, precision=W8A8)
    return body, classifier(body.output, 8, 4, precision=FP32)


ROWS = {op.key: (op,) for op in (conv(4), conv(5), conv(4, W8A8), conv(4, W8A8, "a8"), conv(6))}
NETWORKS = {f"network {n}": network(width) for n, width in enumerate((4, 12, 8))}
BLOCKS = len(ROWS) * PROTOCOL.rounds + len(NETWORKS) * PROCESSES


def model_of(ops: tuple[OpSpec, ...]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return emit(ops, [random_parameters(op, rng) for op in ops])


def graphs(chains: dict[str, tuple[OpSpec, ...]]) -> Iterator[Graph]:
    for key, ops in chains.items():
        yield Graph(key, model_of(ops).SerializeToString(), expected_operators(ops))


def identity(protocol: Protocol = PROTOCOL) -> Identity:
    return Identity(
        hwnas="0.1.0", space="small", fingerprint="abc", threads=1, batch=2,
        protocol=protocol.to_dict(), processes=PROCESSES,
        rows=keys_hash(ROWS), networks=keys_hash(NETWORKS),
    )  # fmt: skip


def write(folder: Path, protocol: Protocol = PROTOCOL) -> Path:
    write_bundle(folder, identity(protocol), graphs(ROWS), graphs(NETWORKS), "Read this.\n")
    return folder


def start(python: Path, folder: Path, *arguments: str, **more: Any) -> "subprocess.Popen[str]":
    """`python run.py`, as a user of a machine without hwnas types it."""
    return subprocess.Popen(
        [str(python), "run.py", *arguments], cwd=folder, env={"OMP_NUM_THREADS": "1"}, text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # fmt: skip


def run(python: Path, folder: Path, *arguments: str, **more: Any) -> tuple[int, str, str]:
    with start(python, folder, *arguments, **more) as process:
        out, told = process.communicate(timeout=60)
    return process.returncode, out, told


def assert_one_sentence(answer: tuple[int, str, str], words: str) -> None:
    code, out, told = answer
    assert (code, out) == (2, ""), told
    last = told.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert " Next: " in last
    assert "Traceback" not in told


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy, as on another machine."""
    return shutil.copytree(written, tmp_path / "copy")


@pytest.fixture(scope="module")
def measured(
    written: Path, bare_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[int, str, str]]:
    """A result that was really measured without hwnas, and what was told meanwhile."""
    folder = shutil.copytree(written, tmp_path_factory.mktemp("measured") / "copy")
    answer = run(bare_python, folder)
    assert answer[0] == 0, answer
    return folder / RESULT, answer


# ---- what is written


def test_a_bundle_holds_graphs_runner_and_clock_and_nothing_else(written: Path) -> None:
    found = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    models = {f"rows/{n:05}.onnx" for n in range(len(ROWS))}
    models |= {f"networks/{n:05}.onnx" for n in range(len(NETWORKS))}
    clock = {f"profilers/{name}" for name in (*CARRIED, "__init__.py")}
    assert found == {MANIFEST, "README.txt", "run.py"} | models | clock
    here = Path(profilers.bundle.__file__).parent
    assert (written / "run.py").read_bytes() == (here / "bundle_runner.py").read_bytes()
    for name in CARRIED:
        assert (written / "profilers" / name).read_bytes() == (here / name).read_bytes()


def test_the_manifest_tells_of_each_graph_what_it_is(written: Path) -> None:
    content = json.loads((written / MANIFEST).read_text())
    assert content["identity"] == asdict(identity())
    for kind, chains in (("rows", ROWS), ("networks", NETWORKS)):
        assert [graph["key"] for graph in content[kind]] == list(chains)
        for graph, ops in zip(content[kind], chains.values(), strict=True):
            model = (written / graph["file"]).read_bytes()
            assert hashlib.sha256(model).hexdigest() == graph["sha256"]
            assert onnx.load_from_string(model) == model_of(ops)
            assert Counter(graph["operators"]) == expected_operators(ops)


def test_the_size_that_is_told_is_that_of_its_files(tmp_path: Path) -> None:
    told = write_bundle(tmp_path / "b", identity(), graphs(ROWS), graphs(NETWORKS), "")
    assert told == sum(p.stat().st_size for p in (tmp_path / "b").rglob("*") if p.is_file())


def test_a_folder_that_is_not_empty_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InvalidInput, match="is there already"):
            write(taken)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (write(tmp_path / "empty") / MANIFEST).exists()


def test_a_bundle_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Graph]:
        yield next(graphs(NETWORKS))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "b", identity(), graphs(ROWS), broken(), "")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_of_a_bundle_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".b.partial" / "rows").mkdir(parents=True)
    (tmp_path / ".b.partial" / "rows" / "99999.onnx").write_bytes(b"torn")
    write(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "rows" / "99999.onnx").exists()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_for_the_bundle_is_one_sentence(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(InvalidInput, match="cannot be written"):
        write(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


# ---- what the runner needs

CARRIED_SOURCES = [
    Path(bundle_runner.__file__).with_name(n) for n in ("bundle_runner.py", *CARRIED)
]


@pytest.mark.parametrize("path", CARRIED_SOURCES, ids=lambda path: path.name)
def test_what_is_carried_imports_numpy_the_runtime_and_each_other_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "profilers":
            names |= {f"profilers.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    ours = {f"profilers.{Path(name).stem}" for name in CARRIED}
    others = {n.partition(".")[0] for n in names - ours} - sys.stdlib_module_names
    assert others <= {"numpy", "onnxruntime"}


@pytest.mark.parametrize("path", CARRIED_SOURCES, ids=lambda path: path.name)
def test_what_is_carried_needs_nothing_of_a_python_after_3_9(path: Path) -> None:
    """What parses there and still fails: match, a union of types at run time, a strict zip."""
    tree = ast.parse(path.read_text())
    later = [node for node in ast.walk(tree) if isinstance(node, ast.Match)]
    annotations = [n.annotation for n in ast.walk(tree) if isinstance(n, ast.arg | ast.AnnAssign)]
    annotations += [n.returns for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    unions = [a for a in annotations if a is not None and " | " in ast.unparse(a)]
    deferred = "from __future__ import annotations" in path.read_text()
    strict = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "strict"]
    slots = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "slots"]
    assert not later + strict + slots
    assert deferred or not unions


def test_without_numpy_and_the_runtime_it_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    bare = tmp_path / "nothing"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    answer = run(bare / "bin" / "python", bundle)
    assert_one_sentence(answer, "needs numpy and onnxruntime")


def test_it_helps_and_knows_no_other_words(bundle: Path, bare_python: Path) -> None:
    for word, wanted in (("--help", 0), ("-h", 0), ("--fast", 2)):
        code, _, told = run(bare_python, bundle, word)
        assert code == wanted
        assert "numpy and onnxruntime" in told
    assert not (bundle / JOURNAL).exists()


def test_the_operators_that_run_are_those_that_onnx_reads(tmp_path: Path) -> None:
    for ops in (*ROWS.values(), *NETWORKS.values()):
        model, path, options = model_of(ops).SerializeToString(), tmp_path / "o", session_options(1)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(path).graph.node
        found = Counter(n.op_type.replace("Fused", "") for n in nodes if n.input)
        mine = executed_operators(model, 1)
        assert {k: v for k, v in mine.items() if k in found} == {
            k: v for k, v in found.items() if k in mine
        }
        assert sum(mine.values()) == sum(found.values())


# ---- what it measures


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_is_timed_in_rounds_and_told_with_its_machine(
    measured: tuple[Path, tuple[int, str, str]],
) -> None:
    path, (_, out, _) = measured
    header, *blocks, footer = lines_of(path)
    assert header["format"] == FORMAT
    assert header["identity"] == asdict(identity())
    assert header["host"] == asdict(OrtProfiler(threads=1, batch=2).host())
    keys = [key for key, _ in blocks]
    assert keys == [
        key
        for kind, turns in ((ROWS, PROTOCOL.rounds), (NETWORKS, PROCESSES))
        for turn in range(turns)
        for key in shuffled(kind, turn)
    ]
    whole = path.read_bytes()
    content = whole[: whole[:-1].rfind(b"\n") + 1]
    assert footer == {"blocks": BLOCKS, "sha256": hashlib.sha256(content).hexdigest()}
    for _, samples in blocks:
        assert PROTOCOL.min_runs <= len(samples) <= PROTOCOL.max_runs
        assert np.min(samples) > 0
    assert str(path) in out


def test_progress_counts_every_graph_and_block(
    measured: tuple[Path, tuple[int, str, str]],
) -> None:
    told = measured[1][2].splitlines()
    graphs, rows, networks = len(ROWS) + len(NETWORKS), len(ROWS) * 3, len(NETWORKS) * 2
    for label, total in (("checking the graphs", graphs), ("timing ops", rows),
                         ("timing whole networks in fresh processes", networks)):  # fmt: skip
        mine = [line for line in told if line.startswith(f"{label}: ")]
        assert mine[0].startswith(f"{label}: 1 of {total}")
        assert mine[-1] == f"{label}: {total} of {total}, about 0.0 minutes left"


def test_what_comes_back_is_what_was_measured(
    measured: tuple[Path, tuple[int, str, str]],
) -> None:
    path, _ = measured
    wanted: dict[str, list[Any]] = {key: [] for key in (*ROWS, *NETWORKS)}
    for key, samples in lines_of(path)[1:-1]:
        wanted[key].append(samples)
    for named in (path, path.parent):
        result = read_result(named, identity(), ROWS, NETWORKS)
        assert {k: [b.tolist() for b in blocks] for k, blocks in result.blocks.items()} == wanted
        assert result.host == OrtProfiler(threads=1, batch=2).host()


def test_a_result_that_is_there_is_not_measured_again(
    measured: tuple[Path, tuple[int, str, str]], bare_python: Path
) -> None:
    path, _ = measured
    before = path.read_bytes()
    assert run(bare_python, path.parent)[0] == 0
    assert path.read_bytes() == before
    assert not path.with_name(JOURNAL).exists()


def until(holds: Callable[[], bool]) -> None:
    start_s = time.monotonic()
    while not holds():
        assert time.monotonic() - start_s < 30
        time.sleep(0.005)


def test_nothing_that_was_measured_is_lost_by_kills(bare_python: Path, tmp_path: Path) -> None:
    """Killed among the rows, and among the networks; each time with half a line at the end."""
    folder = write(tmp_path / "bundle", SLOW)
    journal = folder / JOURNAL
    rows = len(ROWS) * SLOW.rounds
    kept: list[bytes] = []
    for lines in (1 + rows // 2, 1 + rows + 1):
        with start(bare_python, folder) as process:

            def reached(lines: int = lines) -> bool:
                return journal.exists() and journal.read_bytes().count(b"\n") >= lines

            until(reached)
            process.send_signal(signal.SIGKILL)
        text = journal.read_bytes()
        kept.append(text[: text.rfind(b"\n") + 1])
        assert not (folder / RESULT).exists()
        with journal.open("ab") as file:
            file.write(b'["netw')
    assert run(bare_python, folder)[0] == 0
    whole = (folder / RESULT).read_bytes()
    assert [whole.startswith(part) for part in kept] == [True, True]
    assert whole.count(b"\n") == 2 + BLOCKS, "nothing was measured twice"
    assert not journal.exists()
    read_result(folder, identity(SLOW), ROWS, NETWORKS)


def test_ctrl_c_is_answered_and_the_same_command_goes_on(bare_python: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", SLOW)
    with start(bare_python, folder) as process:
        until(lambda: (folder / JOURNAL).exists() and (folder / JOURNAL).stat().st_size > 2000)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.endswith("Interrupted. The same command goes on where this one stopped.\n")


@pytest.mark.parametrize("size", [10, 40_000])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    size: int, tmp_path: Path, bare_python: Path
) -> None:
    bundle = write(tmp_path / "bundle", replace(PROTOCOL, block_ms=10.0, max_runs=10**6))
    limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    answer = run(
        bare_python, bundle, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert_one_sentence(answer, f"{JOURNAL} cannot be written")
    kept = (bundle / JOURNAL).read_bytes()
    assert run(bare_python, bundle)[0] == 0
    whole = (bundle / RESULT).read_bytes()
    assert whole.startswith(kept[: kept.rfind(b"\n") + 1])
    assert whole.count(b"\n") == 2 + BLOCKS


def test_a_disk_that_is_full_at_the_end_is_one_sentence(bundle: Path, bare_python: Path) -> None:
    (bundle / f".{RESULT}.partial").mkdir()
    assert_one_sentence(run(bare_python, bundle), f"{RESULT} cannot be written")
    kept = (bundle / JOURNAL).read_bytes()
    (bundle / f".{RESULT}.partial").rmdir()
    assert run(bare_python, bundle)[0] == 0
    assert (bundle / RESULT).read_bytes().startswith(kept)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="the system has no users")
def test_a_folder_that_may_not_be_written_is_one_sentence(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a user for whom permissions count, where this one may do anything."""
    monkeypatch.chdir(bundle.parent)
    bundle.parent.chmod(0o755)
    bundle.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(Refusal, match=r"cannot be written: Permission denied\. Next: "):
            bundle_runner.measure(Bundle(Path(bundle.name)))
    finally:
        if root:
            os.seteuid(0)
        bundle.chmod(0o755)


def test_a_full_temporary_folder_is_one_sentence(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_runner, "FOLDER", bundle)
    monkeypatch.setattr(bundle_runner, "_in_fresh_process", full)
    code = bundle_runner.main([])
    out, told = capsys.readouterr()
    assert_one_sentence((code, out, told), "No space left on device")


def test_one_process_measures_a_bundle_at_a_time(bundle: Path, bare_python: Path) -> None:
    with (bundle / JOURNAL).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_one_sentence(run(bare_python, bundle), "in use by another process")


# ---- what the runner refuses


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_graph_that_is_missing_or_damaged_is_told_before_anything_is_timed(
    bundle: Path, bare_python: Path
) -> None:
    graph = bundle / "networks" / "00001.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    assert_one_sentence(run(bare_python, bundle), "00001.onnx is missing or damaged")
    graph.unlink()
    assert_one_sentence(run(bare_python, bundle), "00001.onnx is missing or damaged")
    assert (bundle / JOURNAL).read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": {"threads": 1}}'])
def test_a_manifest_that_is_none_is_told(text: str, bundle: Path, bare_python: Path) -> None:
    (bundle / MANIFEST).write_text(text)
    assert_one_sentence(run(bare_python, bundle), f"{MANIFEST} is not readable")


def test_a_graph_that_runs_in_other_kernels_is_told(bundle: Path, bare_python: Path) -> None:
    edited(bundle / MANIFEST, lambda c: c["rows"][2].update(operators={"QLinearConv": 2}))
    assert_one_sentence(run(bare_python, bundle), "as declared: QLinearConv 1 times, not 2")
    assert (bundle / JOURNAL).read_bytes().count(b"\n") == 1


def test_a_graph_that_does_not_load_is_told(bundle: Path, bare_python: Path) -> None:
    model = onnx.load(bundle / "rows" / "00000.onnx")
    model.opset_import[0].version = 999
    model.graph.node[0].op_type = "Future"
    onnx.save(model, bundle / "rows" / "00000.onnx")
    digest = hashlib.sha256((bundle / "rows" / "00000.onnx").read_bytes()).hexdigest()
    edited(bundle / MANIFEST, lambda c: c["rows"][0].update(sha256=digest))
    assert_one_sentence(run(bare_python, bundle), "does not load in this onnxruntime")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"host": {"cpu": "Another CPU"}}, "another machine or bundle (cpu: Another CPU against"),
        ({"host": {"runtime_version": "0"}}, "runtime_version: 0 against"),
        ({"identity": {"space": "large"}}, "another machine or bundle (another bundle)"),
        ({"host": {"hostname": "renamed", "governor": "powersave"}}, ""),
    ],
)
def test_a_journal_of_another_machine_is_not_continued(
    header: dict[str, dict[str, str]],
    words: str,
    bundle: Path,
    bare_python: Path,
    measured: tuple[Path, tuple[int, str, str]],
) -> None:
    lines = lines_of(measured[0])[:4]
    for name, fields in header.items():
        lines[0][name].update(fields)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (bundle / JOURNAL).write_text(text)
    answer = run(bare_python, bundle)
    if words:
        assert_one_sentence(answer, words)
        assert (bundle / JOURNAL).read_text() == text
    else:
        assert answer[0] == 0
        assert (bundle / RESULT).read_text().startswith(text)


@pytest.mark.parametrize(
    "text", ["no JSON\n", '{"a": 1}\n', "[]\n", "3\n", '{}\n["a"]\n', "{}\n7\n"]
)
def test_a_journal_that_is_none_is_told(text: str, bundle: Path, bare_python: Path) -> None:
    (bundle / JOURNAL).write_text(text)
    assert_one_sentence(run(bare_python, bundle), f"{JOURNAL} is damaged")


# ---- what is not taken


def sealed(path: Path, lines: list[Any]) -> Path:
    """A result of these lines with a digest that holds."""
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    last = {"blocks": len(lines) - 1, "sha256": hashlib.sha256(text).hexdigest()}
    path.write_bytes(text + json.dumps(last).encode() + b"\n")
    return path


def refused(path: Path, words: str, wanted: Identity | None = None) -> None:
    with pytest.raises(TableError) as caught:
        read_result(path, wanted or identity(), ROWS, NETWORKS)
    assert words in caught.value.what
    assert caught.value.next_step
    assert str(path if not path.is_dir() else path / RESULT) in caught.value.what
    assert "\n" not in str(caught.value)


def test_the_seal_of_these_tests_is_that_of_the_runner(
    measured: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    again = sealed(tmp_path / "r", lines_of(measured[0])[:-1])
    assert again.read_bytes() == measured[0].read_bytes()


def test_a_result_cut_off_anywhere_is_not_whole(
    measured: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    whole = measured[0].read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = {0, 1, ends[0] // 2, *ends[:-1], *(end - 3 for end in ends), len(whole) // 2}
    for cut in sorted(cuts):
        (tmp_path / "r").write_bytes(whole[:cut])
        refused(tmp_path / "r", "is not ")
    lines = whole.splitlines(keepends=True)
    for missing in (1, len(lines) // 2, len(lines) - 2):
        (tmp_path / "r").write_bytes(b"".join(lines[:missing] + lines[missing + 1 :]))
        refused(tmp_path / "r", "is not whole, or was changed")


def test_any_edit_of_a_result_is_seen(
    measured: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    whole = measured[0].read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole) - 1, 200, replace=False):
        changed = bytearray(whole)
        changed[at] = 48 + (changed[at] - 47) % 10
        if bytes(changed) == whole:
            continue
        (tmp_path / "r").write_bytes(bytes(changed))
        refused(tmp_path / "r", "")


def test_an_unfinished_bundle_and_an_absent_file_are_told(bundle: Path, tmp_path: Path) -> None:
    refused(bundle, "cannot be read")
    refused(tmp_path / "nothing", "cannot be read")


@pytest.mark.parametrize("text", [b"", b"\n", b"no\n", b"[1]\n", b"\xff\xfe", b"{}\n", b"PAR1"])
def test_a_file_that_is_no_result_is_told(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(text)
    refused(tmp_path / "r", "is not the result of a bundle")


@pytest.mark.parametrize(
    "different",
    [
        {"hwnas": "9.9"},
        {"space": "large"},
        {"fingerprint": "def"},
        {"threads": 2},
        {"batch": 1},
        {"protocol": replace(PROTOCOL, rounds=2).to_dict()},
        {"protocol": replace(PROTOCOL, block_ms=9.0).to_dict()},
        {"processes": 1},
        {"rows": "0"},
        {"networks": "0"},
    ],
    ids=str,
)
def test_a_result_of_another_bundle_is_refused_by_what_differs(
    different: dict[str, Any], measured: tuple[Path, tuple[int, str, str]]
) -> None:
    (name,) = different
    refused(measured[0], f"another bundle ({name}: ", replace(identity(), **different))


def change_line(lines: list[Any], number: int, change: Any) -> list[Any]:
    return [change(line) if n == number else line for n, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: change_line(x, 3, lambda b: [b[0], [*b[1][:-1], 0.0]]), "line 4"),
        (lambda x: change_line(x, 1, lambda b: [b[0], [-1.0, *b[1][1:]]]), "line 2"),
        (lambda x: change_line(x, 2, lambda b: [b[0], [float("nan"), *b[1][1:]]]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [b[0], [float("inf"), *b[1][1:]]]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [b[0], []]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [b[0], None]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [b[0], "fast"]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [b[0], [[1.0, 2.0], [3.0]]]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: ["another op", b[1]]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: [[], b[1]]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: b[1]), "line 3"),
        (lambda x: change_line(x, 2, lambda b: {"key": b[0]}), "line 3"),
        (lambda x: x[:1] + x[2:], "holds 2 of 3 blocks of"),
        (lambda x: x[:-1], "holds 1 of 2 blocks of 'network 2'"),
        (lambda x: x[:1], "holds 0 of 3 blocks of"),
        (lambda x: change_line(x, 0, lambda h: {**h, "format": 2}), "format version 2"),
        (lambda x: change_line(x, 0, lambda h: {**h, "host": {}}), "does not tell its machine"),
        (lambda x: change_line(x, 0, lambda h: {**h, "host": None}), "does not tell its machine"),
        (lambda x: change_line(x, 0, lambda h: {**h, "host": {**h["host"], "batch": 1}}),
         "another condition"),
        (lambda x: change_line(x, 0, lambda h: {**h, "identity": None}), "another bundle (hwnas"),
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_refused_though_its_digest_holds(
    change: Callable[[list[Any]], list[Any]],
    words: str,
    measured: tuple[Path, tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    refused(sealed(tmp_path / "r", change(lines_of(measured[0])[:-1])), words)


def test_more_blocks_and_samples_of_more_columns_are_taken_as_they_are(
    measured: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    header, *blocks = lines_of(measured[0])[:-1]
    wide = [[key, [[*x, x[0] + 1] for x in samples]] for key, samples in blocks]
    path = sealed(tmp_path / "r", [header, *wide, wide[0]])
    result = read_result(path, identity(), ROWS, NETWORKS)
    first = result.blocks[blocks[0][0]]
    assert len(first) == PROTOCOL.rounds + 1
    assert first[0].tolist() == first[-1].tolist() == wide[0][1]


def test_another_runtime_is_only_recorded(
    measured: tuple[Path, tuple[int, str, str]], tmp_path: Path
) -> None:
    header, *blocks = lines_of(measured[0])[:-1]
    header["host"] |= {"runtime_version": "9.9", "cpu": "Some Arm", "hostname": "pi"}
    result = read_result(sealed(tmp_path / "r", [header, *blocks]), identity(), ROWS, NETWORKS)
    assert result.host == Host(
        "cpu", "onnxruntime", "9.9", "Some Arm", header["host"]["flags"], 1, 2,
        header["host"]["governor"], "pi",
    )  # fmt: skip
