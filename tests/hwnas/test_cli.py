"""The command line, as a user types it. What it prints with --json is held against its schema in
test_screen.py; damaged files are in test_bad_input.py, real kills in test_stopping.py.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from hwnas import cli, opening
from hwnas.job import LIMITS
from hwnas.placement import cuda_fault
from hwnas.spaces.base import Architecture
from hwnas.spaces.registry import SPACES, load_space
from hwnas.supernet.evaluator import Evaluation, Evaluator
from latency_tables.ops import OpSpec, peak_activation_bytes, total
from latency_tables.table import LatencyTable
from quant.errors import TableError

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke")
COMMANDS = get_command(cli.app).commands  # type: ignore[attr-defined]
EVERY = [*COMMANDS, *(f"tables {name}" for name in COMMANDS["tables"].commands)]
Answer = Any  # of conftest.py, as `hwnas_in` gives it
Commands = Callable[..., Answer]


def process_in(folder: Path, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """A command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hwnas", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        **{"capture_output": True, **more},
    )


@pytest.fixture(scope="module")
def summary(searched: tuple[Path, Answer]) -> dict[str, Any]:
    return dict(searched[1].content)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    searched_as: Callable[[Path, str], Path],
    summary: dict[str, Any],
) -> Path:
    """A folder in which that search has finished."""
    return searched_as(tmp_path_factory.mktemp("searched"), summary["run"])


@pytest.fixture(scope="module")
def ranges(folder: Path, hwnas_in: Commands) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each cost, as a limit that is too low is answered."""
    found = {}
    for name, flag in LIMITS.items():
        failure = hwnas_in(folder, "search", *SMALL, flag, "1e-6", "--json").content
        found[name] = (failure["feasible_min"][name], failure["feasible_max"][name])
    return found


# ---- a second stage: some options as a result has them


@pytest.mark.usefixtures("quick")
def test_kernels_of_a_result_are_kept_and_the_rest_is_searched(
    tmp_path: Path,
    searched_as: Callable[[Path, str], Path],
    summary: dict[str, Any],
    hwnas_in: Commands,
) -> None:
    folder = searched_as(tmp_path, summary["run"])
    first = Path(summary["model"]).parent
    before = {path.name: path.read_bytes() for path in (folder / first).iterdir()}
    asked = ("search", *SMALL, "--limit-fraction", "0.5", "--fix", f"kernel={first}", "--json")
    answer = hwnas_in(folder, *asked)
    assert answer.code == 0, answer.told
    assert answer.content["run"] == summary["run"], "what is fixed is not part of a run"
    kernels = {n: v for n, v in summary["architecture"].items() if n.endswith("kernel")}
    assert answer.content["fixed"] == kernels
    assert kernels.items() <= answer.content["architecture"].items()
    second = Path(answer.content["model"]).parent
    assert second.name.startswith("latency_ms=")
    assert "fixed-kernel=" in second.name
    assert {path.name: path.read_bytes() for path in (folder / first).iterdir()} == before
    place = [gene.name for gene in load_space(SPACE, classes=10, image_channels=1, size=32).genes]
    with contextlib.closing(sqlite3.connect(folder / summary["run"] / "search.sqlite")) as db:
        rows = db.execute("SELECT genes FROM proposals WHERE search LIKE '%fixed-kernel%'")
        genes = [json.loads(text) for (text,) in rows]
    assert len(genes) > 6
    values = {name: {told[place.index(name)] for told in genes} for name in place}
    assert all(len(values[name]) == 1 for name in kernels)
    assert all(len(values[name]) > 1 for name in values.keys() - kernels)
    again = hwnas_in(folder, *asked)
    assert again.content == answer.content, "the question is known, and so is its answer"
    found = (folder / second / "model.onnx").read_bytes()
    (folder / second / "certificate.json").unlink()
    verified = hwnas_in(folder, "verify", "--run", summary["run"], "--json")
    assert verified.code == 0, verified.told
    assert Path(verified.content["certificate"]).parent == second
    assert (folder / second / "model.onnx").read_bytes() == found


@pytest.mark.usefixtures("quick")
def test_a_file_fixes_what_its_flag_would(
    tmp_path: Path,
    searched_as: Callable[[Path, str], Path],
    summary: dict[str, Any],
    hwnas_in: Commands,
) -> None:
    folder = searched_as(tmp_path, summary["run"])
    result = Path(summary["model"]).parent
    file = config(folder, fix={"width": str(result / "architecture.json")})
    flags = ("--fix", f"precision={result}", "--limit-fraction", "1")
    answer = hwnas_in(folder, "search", *SMALL, "--config", file, *flags, "--json")
    assert answer.code == 0, answer.told
    told = summary["architecture"].items()
    kept = {n: v for n, v in told if n.rpartition(".")[2] in ("width", "precision")}
    assert answer.content["fixed"] == kept


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["kernel"], "--fix is 'kernel'."),
        (["=RESULT"], "--fix is '=RESULT'."),
        (["kernel="], "--fix is 'kernel='."),
        (["kernel=RESULT", "kernel=RESULT"], "--fix fixes kernel twice."),
        (["block=RESULT"], "has no gene 'block' to fix."),
        (["kernel=nowhere"], "nowhere is not an architecture"),
        (["kernel=RESULT/model.onnx"], "is not an architecture"),
        (["kernel=other.json"], "conv9.kernel is not a gene of plain."),
        (["kernel=odd.json"], "conv0.kernel is '4'."),
    ],
)
def test_what_cannot_be_fixed_is_refused_in_one_sentence(
    asked: list[str], words: str, folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    (folder / "other.json").write_text('{"conv9.kernel": "3"}')
    (folder / "odd.json").write_text('{"conv0.kernel": "4"}')
    result = str(Path(summary["model"]).parent)
    flags = [x for text in asked for x in ("--fix", text.replace("RESULT", result))]
    if "=" not in asked[0][1:-1]:
        flags = [x for text in asked for x in ("--fix", text)]
    answer = hwnas_in(folder, "search", *SMALL, "--limit-fraction", "0.5", *flags, "--json")
    assert answer.code == 2
    assert words in answer.content["error"]["what"]
    assert answer.content["error"]["accepted"] or "twice" in words


# ---- help and completion


def test_help_answers_at_once_and_loads_neither_torch_nor_pandas() -> None:
    script = (
        "import sys; sys.argv = ['hwnas', '-h']\n"
        "from hwnas.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'onnx', 'pyarrow', 'onnxruntime', 'scipy', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert answer.stderr == ""
        assert "search" in answer.stdout
    assert min(seconds) < 0.5


def test_without_arguments_it_is_help(tmp_path: Path, hwnas_in: Commands) -> None:
    alone, asked = hwnas_in(tmp_path), hwnas_in(tmp_path, "--help")
    assert alone == asked
    assert alone.code == 0
    assert all(name in alone.out for name in COMMANDS)


@pytest.mark.parametrize("command", EVERY)
def test_every_command_has_help_with_an_example_that_parses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hwnas_in: Commands
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = hwnas_in(tmp_path, *command.split(), "-h")
    assert answer.code == 0
    assert answer.told == ""
    (example,) = re.findall(r"Example: (hwnas [^│\n]*)", answer.out)
    program, *words = shlex.split(example)
    assert f"{program} {' '.join(words)}".startswith(f"hwnas {command}")
    parsed = COMMANDS[words[0]]
    rest = words[1:]
    if " " in command:
        parsed, rest = parsed.commands[words[1]], words[2:]
    with parsed.make_context(command, list(rest)) as context:
        given = {name: value for name, value in context.params.items() if value}
    assert len(given) >= len(rest) // 2, f"{example} parses as {given}"


@pytest.mark.parametrize("command", EVERY)
def test_every_command_takes_json(command: str) -> None:
    found = COMMANDS[command.split()[0]]
    if " " in command:
        found = found.commands[command.split()[1]]
    assert "--json" in {flag for option in found.params for flag in option.opts}


def completed(line: str, folder: Path, shell: str = "bash") -> list[str]:
    """What a shell is offered at the end of a line."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_HWNAS_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
    }
    script = "import sys; sys.argv = ['hwnas']; from hwnas.cli import main; main()"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    return answer.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hwnas ", sorted(COMMANDS)),
        ("hwnas pr", ["predict", "profile"]),
        ("hwnas tables ", ["check", "diff", "export", "merge", "show"]),
        ("hwnas search --space ", sorted(SPACES)),
        ("hwnas profile --device s", ["simulated"]),
        ("hwnas train --recipe s", ["smoke", "standard"]),
        ("hwnas search --max-", ["--max-activation-mb", "--max-bitops", "--max-macs",
                                 "--max-params", "--max-size-mb"]),
    ],
)  # fmt: skip
def test_completion_offers_commands_flags_and_names(
    line: str, offered: list[str], tmp_path: Path
) -> None:
    assert sorted(completed(line, tmp_path)) == offered


# ---- what is printed where


def test_search_prints_one_object_and_talks_on_standard_error(
    searched: tuple[Path, Answer],
) -> None:
    folder, answer = searched
    assert answer.content["status"] == "ok"
    assert (folder / answer.content["model"]).is_file()
    assert (folder / answer.content["certificate"]).is_file()
    for words in (
        "Before measuring",
        "Profiling",
        "cost ",
        "Recipe smoke",
        "training the supernet",
    ):
        assert f"\n{words}" in f"\n{answer.told}"


def test_quiet_prints_nothing_on_standard_error_even_as_a_process(
    searched_by_process: tuple[Path, "subprocess.CompletedProcess[str]"],
) -> None:
    _, answer = searched_by_process
    assert answer.returncode == 0
    assert answer.stderr == ""
    assert answer.stdout.startswith("limit ")


@pytest.mark.usefixtures("quick")
def test_quiet_results_are_those_that_are_told_aloud(folder: Path, hwnas_in: Commands) -> None:
    common = ("search", *SMALL, "--limit-fraction", "0.5")
    aloud, quiet = hwnas_in(folder, *common), hwnas_in(folder, *common, "-q")
    assert aloud.out == quiet.out
    assert quiet.told == ""


@pytest.mark.usefixtures("quick")
def test_verbose_tells_every_stage(tmp_path: Path, hwnas_in: Commands) -> None:
    common = ("search", *SMALL, "--limit-fraction", "0.5")
    answer = hwnas_in(tmp_path, *common, "--verbose")
    stages = re.findall(r"^\d\d:\d\d:\d\d (\w+) ", answer.told, re.MULTILINE)
    assert stages == ["train", "search", *["retraining", "retrain"] * 2, "verify"]
    assert not re.search(r"^\d\d:\d\d:\d\d ", hwnas_in(tmp_path, *common, "--seed", "1").told)


def test_quiet_contradicts_verbose(tmp_path: Path, hwnas_in: Commands) -> None:
    answer = hwnas_in(tmp_path, "search", *SMALL, "--limit-fraction", "0.5", "-q", "-v")
    assert answer.code == 2
    assert "--quiet contradicts --verbose" in answer.told


def test_a_defect_of_ours_is_code_1_with_its_traceback_and_still_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hwnas_in: Commands
) -> None:
    def broken(job: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("hwnas.run.plan", broken)
    answer = hwnas_in(tmp_path, "profile", *SMALL, "--json")
    assert answer.code == answer.content["exit_code"] == 1
    assert answer.content["error"]["what"] == "ZeroDivisionError: a defect"
    assert "Traceback" in answer.told


def test_an_error_is_told_whole_brackets_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hwnas_in: Commands
) -> None:
    key = "fp32 [fp32:3x32x32] conv(0) c16 k3 s2 g1 n"

    def missing(job: object) -> None:
        raise TableError(f"The table has no row for {key!r}.")

    monkeypatch.setattr("hwnas.run.plan", missing)
    answer = hwnas_in(tmp_path, "profile", *SMALL)
    assert answer.code == 2
    assert key in answer.told


@pytest.mark.parametrize(
    "command",
    [("tables", "show"), ("tables", "show", "--json"), ("search", "--help"), ("spaces",)],
    ids=" ".join,
)
def test_a_reader_that_leaves_is_no_failure(command: tuple[str, ...], folder: Path) -> None:
    """As `hwnas ... | head -1`, with a pipe that is closed before anything is written."""
    table = sorted((folder / "tables").glob("*.parquet")) if "show" in command else []
    reader, writer = os.pipe()
    os.close(reader)
    answer = process_in(
        folder, *command, *map(str, table), capture_output=False, stdout=writer,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_a_reader_of_standard_error_that_leaves_does_not_stop_the_search(
    folder: Path, summary: dict[str, Any]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    answer = process_in(
        folder, "search", *SMALL, "--limit-fraction", "0.5", "--json", capture_output=False,
        stdout=subprocess.PIPE, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    assert answer.returncode == 0
    assert json.loads(answer.stdout) == summary


# ---- runs, tables, spaces, devices


def test_the_newest_matching_run_is_taken_again(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    again = hwnas_in(folder, "search", *SMALL, "--limit-fraction", "0.5", "--json")
    assert again.code == 0
    assert again.content == summary
    assert "Recipe" not in again.told, "nothing is left to do"
    other = hwnas_in(folder, "train", *SMALL, "--seed", "1", "--json")
    assert other.content["run"] != summary["run"]


@pytest.mark.parametrize("command", ["retrain", "export", "verify"])
def test_the_later_stages_work_on_the_newest_result(
    folder: Path, summary: dict[str, Any], command: str, hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, command, "--run", summary["run"], "--tables", "elsewhere", "--json")
    assert answer.code == 0, answer.told
    assert answer.content["run"] == summary["run"]
    assert not (folder / "elsewhere").exists(), "a finished result needs no table"


def test_without_run_the_later_stages_take_the_newest_run(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    newest = max((folder / "runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    os.utime(folder / summary["run"] / "config.yaml")
    assert newest.exists()
    assert hwnas_in(folder, "retrain", "--json").content["run"] == summary["run"]


def test_a_flag_that_contradicts_the_run_is_named(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    for flag, value in (("--seed", "7"), ("--device", "cpu"), ("--batch", "2"),
                        ("--recipe", "quick"), ("--data", "other.npz")):  # fmt: skip
        answer = hwnas_in(folder, "train", "--run", summary["run"], flag, value)
        assert answer.code == 2
        assert f"{flag} {value} contradicts {summary['run']}" in answer.told


# ---- where weights are trained


NO_CUDA = pytest.mark.skipif(not cuda_fault(), reason="CUDA can be used here")
TRAINING = ("train", "search --limit-fraction 0.5")
LATER = ("retrain", "export", "verify")


@NO_CUDA
@pytest.mark.parametrize("line", TRAINING)
def test_cuda_that_is_not_there_is_refused_before_anything_is_done(
    line: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    (tmp_path / "run.yaml").write_text("train_on: cuda\n")
    for asked in (("--train-on", "cuda"), ("--config", "run.yaml")):
        answer = hwnas_in(tmp_path, *line.split(), *SMALL, *asked, "--json")
        assert answer.code == 2
        error = answer.content["error"]
        assert error["what"].startswith("PyTorch cannot compute on CUDA here: ")
        assert error["accepted"].startswith("cpu, ")
        assert error["next"]
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@NO_CUDA
@pytest.mark.parametrize("line", LATER)
def test_later_stages_refuse_it_too(line: str, folder: Path, hwnas_in: Commands) -> None:
    answer = hwnas_in(folder, line, "--train-on", "cuda")
    assert answer.code == 2
    assert "cannot compute on CUDA" in answer.told


def test_another_device_to_train_on_is_refused(tmp_path: Path, hwnas_in: Commands) -> None:
    answer = hwnas_in(tmp_path, "train", *SMALL, "--train-on", "tpu", "--json")
    assert answer.code == 2
    assert answer.content["error"]["accepted"] == "cpu, cuda"


def test_what_profiles_does_not_mind_where_weights_are_trained(
    folder: Path, hwnas_in: Commands
) -> None:
    """Of a file that is for a machine with a GPU; the table is there."""
    (folder / "gpu.yaml").write_text("train_on: cuda\n")
    assert hwnas_in(folder, "profile", *SMALL[:4], "--recipe", "smoke", "--config", "gpu.yaml"
                    ).code == 0  # fmt: skip


def test_where_weights_are_trained_is_told_and_no_part_of_a_run(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    asked = ("search", *SMALL, "--limit-fraction", "0.5", "--train-on", "cpu", "--json")
    answer = hwnas_in(folder, *asked)
    assert answer.content == summary, "what was searched without the flag is known with it"
    log = (folder / summary["run"] / "log.jsonl").read_text().splitlines()
    told = {line["event"]: line.get("on") for line in map(json.loads, log)}
    assert told["train"] == told["retraining"] == "cpu"
    assert "train_on" not in (folder / summary["run"] / "config.yaml").read_text()


def test_the_estimate_says_where_weights_will_be_trained(
    tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, "train", *SMALL, "--train-on", "cpu")
    assert answer.code == 0, answer.told
    assert re.search(r"about [\d.]+ minutes on cpu\. Data:", " ".join(answer.told.split()))


def test_flags_that_were_not_given_are_the_runs_own(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    answer = hwnas_in(
        folder, "search", "--run", summary["run"], "--limit-fraction", "0.5", "--json"
    )
    assert answer.code == 0, answer.told
    assert answer.content == summary


def test_runs_lists_every_run_with_its_results_newest_first(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    os.utime(folder / summary["run"] / "config.yaml")
    first = hwnas_in(folder, "runs", "--json").content["runs"][0]
    assert (first["run"], first["recipe"], first["seed"]) == (summary["run"], "smoke", 0)
    assert first["trained"]
    (result,) = (x for x in first["results"] if x["model"] == summary["model"])
    assert result["measured_ms"] == summary["measured"]["median_ms"]
    assert result["test"] == summary["accuracy"]["test"]
    told = hwnas_in(folder, "runs").out
    assert told.splitlines()[1].split()[0] == summary["run"]
    assert f"{summary['accuracy']['test']:.2%}" in told


def test_tables_and_tables_show_tell_what_is_in_a_table(folder: Path, hwnas_in: Commands) -> None:
    (path,) = (folder / "tables").glob("*.parquet")
    table = LatencyTable.load(path)
    (listed,) = hwnas_in(folder, "tables", "--json").content["tables"]
    assert (listed["rows"], list(listed["models"])) == (len(table.rows), list(table.models))
    name = str(path.relative_to(folder))
    assert listed["table"] == name
    shown = hwnas_in(folder, "tables", "show", name, "--json").content
    assert {row["key"]: row["median_us"] for row in shown["rows"]} == {
        key: row.median_us for key, row in table.rows.items()
    }
    told = hwnas_in(folder, "tables", "show", name).out
    assert all(key in told for key in table.rows)
    assert name in hwnas_in(folder, "tables").out


def test_json_before_the_inner_command_counts_too(folder: Path, hwnas_in: Commands) -> None:
    (path,) = (folder / "tables").glob("*.parquet")
    one = hwnas_in(folder, "tables", "--json", "show", str(path))
    assert one.content == hwnas_in(folder, "tables", "show", str(path), "--json").content


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("runs",), "no runs  in runs; hwnas search makes one"),
        (("runs", "elsewhere"), "no runs  in elsewhere"),
        (("tables",), "no tables  in tables; hwnas profile makes one"),
        (("tables", "--tables", "elsewhere"), "no tables  in elsewhere"),
    ],
)
def test_an_empty_folder_is_told_and_is_no_failure(
    command: tuple[str, ...], words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, *command)
    assert answer.code == 0
    assert words in answer.out
    content = hwnas_in(tmp_path, *command, "--json").content
    assert content[command[0]] == []
    assert list(tmp_path.iterdir()) == []


def test_devices_tells_which_can_be_measured_and_why_not(
    tmp_path: Path, hwnas_in: Commands
) -> None:
    found = {x["device"]: x for x in hwnas_in(tmp_path, "devices", "--json").content["devices"]}
    assert found["cpu"]["usable"]
    assert found["simulated"]["usable"]
    refused = hwnas_in(tmp_path, "profile", "--device", "gpu", *SMALL[:2])
    assert found["gpu"]["usable"] == (refused.code == 0)
    assert found["gpu"]["about"] in refused.told.replace("\n", " ")
    assert "simulated" in hwnas_in(tmp_path, "devices").out


def test_spaces_counts_what_a_brute_force_counts(tmp_path: Path, hwnas_in: Commands) -> None:
    (found,) = hwnas_in(tmp_path, "spaces", "--space", SPACE, "--json").content["spaces"]
    size = found["image_size"]
    space = load_space(SPACE, classes=10, image_channels=3, size=size)
    networks = [space.lower(architecture) for architecture in space.enumerate()]
    assert found["architectures"] == len(networks)
    params = [total("params", ops) for ops in networks]
    assert (found["smallest"]["params"], found["largest"]["params"]) == (min(params), max(params))
    peaks = [peak_activation_bytes(ops) / 1e6 for ops in networks]
    assert found["largest"]["activation_mb"] == max(peaks)
    presets = hwnas_in(tmp_path, "spaces")
    assert presets.code == 0
    assert [line.split()[0] for line in presets.out.splitlines()] == [
        "space",
        *SPACES,
    ]


def test_predict_tells_the_latency_op_by_op(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    model = summary["model"]
    found = hwnas_in(folder, "predict", model, "--json").content
    assert found["latency_ms"] == pytest.approx(summary["predicted"]["latency_ms"], rel=1e-12)
    assert found["upper_latency_ms"] == pytest.approx(
        summary["predicted"]["upper_latency_ms"], rel=1e-12
    )
    offset = found["latency_ms"] * 1000 - sum(op["cost_us"] for op in found["ops"])
    assert 0 <= offset <= 20
    architecture = str(Path(model).with_name("architecture.json"))
    assert hwnas_in(folder, "predict", architecture, "--json").content == found
    told = hwnas_in(folder, "predict", model).out
    assert f"predicted {found['latency_ms']:.4g} ms" in re.sub(" +", " ", told)
    assert all(op["key"] in told for op in found["ops"])


def test_predict_takes_a_table_that_is_named(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    (table,) = (folder / "tables").glob("*.parquet")
    found = hwnas_in(folder, "predict", summary["model"], "--table", str(table), "--json").content
    assert found["table"] == str(table)
    answer = hwnas_in(
        folder, "predict", summary["model"], "--table", str(table), "--calibration", "another"
    )
    assert answer.code == 2
    assert "no latency model 'another'" in answer.told


@pytest.mark.usefixtures("quick")
def test_tables_are_kept_where_hwnas_home_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hwnas_in: Commands
) -> None:
    monkeypatch.setenv("HWNAS_HOME", str(tmp_path / "home"))
    answer = hwnas_in(tmp_path, "profile", *SMALL, "--json")
    assert answer.code == 0
    table = Path(answer.content["table"])
    assert table.parent == tmp_path / "home" / "tables"
    assert table.is_file()
    assert hwnas_in(tmp_path, "tables", "--json").content["tables"][0]["table"] == str(table)
    named = hwnas_in(tmp_path, "tables", "--tables", "elsewhere", "--json").content
    assert named["tables"] == [], "--tables wins"
    assert not (tmp_path / "tables").exists()
    monkeypatch.setenv("HWNAS_HOME", "")
    assert hwnas_in(tmp_path, "tables", "--json").content["tables"] == []


# ---- limits


def middle(low: float, high: float, share: float = 0.4) -> float:
    """A value between two, on a logarithmic scale."""
    return float(low * (high / low) ** share)


def counts_of(ops: Sequence[OpSpec]) -> dict[str, float]:
    """What is counted of a network, op by op."""
    counts: dict[str, float] = {name: total(name, ops) for name in ("params", "macs", "bitops")}
    return {**counts, "activation_mb": peak_activation_bytes(ops) / 1e6}


def assert_under_every_limit(
    folder: Path, summary: dict[str, Any], asked: dict[str, float]
) -> None:
    """The certificate, the file on disk and every row of the history are under each limit."""
    assert {name: limit["value"] for name, limit in summary["limits"].items()} == asked
    certificate = json.loads((folder / summary["certificate"]).read_text())
    size = (folder / summary["model"]).stat().st_size
    counts = certificate["counts"]
    shipped = {
        "latency_ms": certificate["measured"]["median_ms"],
        "size_mb": size / 1e6,
        "activation_mb": counts["peak_activation_bytes"] / 1e6,
        **{name: counts[name] for name in ("params", "macs", "bitops")},
    }
    assert counts["size_bytes"] == size == summary["size_bytes"]
    space = load_space(SPACE, classes=10, image_channels=1, size=32)
    ops = space.lower(space.parse(certificate["architecture"]))
    assert {name: shipped[name] for name in counts_of(ops)} == counts_of(ops)
    for name, value in asked.items():
        assert shipped[name] <= value
        upper = summary["limits"][name]["upper"]
        assert upper <= value
        assert shipped[name] <= upper or name == "latency_ms"  # the only one that is not exact
        assert certificate["holds"][name]
    name = ",".join(sorted(f"{cost}={value!r}" for cost, value in asked.items()))
    with contextlib.closing(sqlite3.connect(folder / summary["run"] / "search.sqlite")) as db:
        proposals = db.execute(
            "SELECT genes FROM proposals WHERE search LIKE ?", (f"% {name} table %",)
        ).fetchall()
        bounds = db.execute(
            "SELECT cost, limit_value, upper FROM bounds WHERE search LIKE ?",
            (f"% {name} table %",),
        ).fetchall()
    assert len(bounds) == len(proposals) * len(asked) > 0
    for cost, limit, upper in bounds:
        assert limit == asked[cost]
        assert upper <= limit
    for (genes,) in proposals:
        found = counts_of(space.lower(Architecture(tuple(json.loads(genes)))))
        assert all(found[cost] <= value for cost, value in asked.items() if cost in found)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_alone_is_a_law(
    name: str,
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    hwnas_in: Commands,
) -> None:
    value = middle(*ranges[name])
    common = ("search", *SMALL, "--run", summary["run"], "--json")
    answer = hwnas_in(folder, *common, LIMITS[name], repr(value))
    assert answer.code == 0, answer.told
    assert answer.content["limits"][name]["binding"]
    assert_under_every_limit(folder, answer.content, {name: value})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "names",
    [("latency_ms", "size_mb"), ("params", "bitops", "activation_mb"), tuple(LIMITS)],
    ids=" and ".join,
)
def test_several_limits_together_are_a_law(
    names: tuple[str, ...],
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    hwnas_in: Commands,
) -> None:
    asked = {name: middle(*ranges[name], 0.5) for name in names}
    flags = [word for name in names for word in (LIMITS[name], repr(asked[name]))]
    answer = hwnas_in(folder, "search", *SMALL, "--run", summary["run"], "--json", *flags)
    assert answer.code == 0, answer.told
    assert_under_every_limit(folder, answer.content, asked)
    assert set(answer.content["feasible_min"]) == {"latency_ms", *names}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_a_fraction_is_a_latency_between_the_smallest_and_the_largest(
    fraction: float,
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    hwnas_in: Commands,
) -> None:
    low, high = ranges["latency_ms"]
    common = ("search", *SMALL, "--run", summary["run"], "--json")
    answer = hwnas_in(folder, *common, "--limit-fraction", str(fraction))
    assert answer.code == 0, answer.told
    limit = answer.content["limits"]["latency_ms"]
    exact = low + fraction * (high - low)
    assert exact <= limit["value"] <= exact * 1.001
    assert limit["binding"] == (fraction < 1)
    assert_under_every_limit(folder, answer.content, {"latency_ms": limit["value"]})


@pytest.mark.parametrize("value", [0.0237413, 0.99999, 1.0, 123.45, 0.13350817, 7e-9])
def test_a_limit_from_a_fraction_is_short_and_never_below_the_value(value: float) -> None:
    rounded = opening._rounded_up(value)
    assert value <= rounded <= value * 1.001
    assert len(f"{rounded:.12g}".replace(".", "").strip("0")) <= 5


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", LIMITS.values())
def test_a_limit_that_is_no_positive_number_is_refused_by_its_flag(
    flag: str, value: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, "search", *SMALL, flag, value, "--json")
    assert answer.code == 2
    assert answer.content["error"]["what"] == f"{flag} is {float(value)}."
    assert answer.content["error"]["accepted"] == "a positive number"
    assert list(tmp_path.iterdir()) == []


def test_a_search_needs_a_limit_and_not_two_of_latency(tmp_path: Path, hwnas_in: Commands) -> None:
    answer = hwnas_in(tmp_path, "search", *SMALL, "--json")
    assert answer.code == 2
    assert all(flag in answer.content["error"]["accepted"] for flag in LIMITS.values())
    answer = hwnas_in(tmp_path, "search", *SMALL, "--latency-ms", "1", "--limit-fraction", "0.5")
    assert answer.code == 2
    assert "needs one latency limit" in answer.told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "with a table") for name in LIMITS),
        *((name, "in a fresh folder") for name in LIMITS if name not in ("macs", "bitops")),
    ],
)
def test_a_limit_that_does_not_bind_is_said_in_the_first_line(
    name: str,
    place: str,
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    tmp_path: Path,
    hwnas_in: Commands,
) -> None:
    """On standard output and on standard error, with the reachable range and a limit that binds."""
    low, high = ranges[name]
    where, run = (folder, summary["run"]) if place == "with a table" else (tmp_path, "runs/new")
    flags = (LIMITS[name], repr(high * 10))
    answer = hwnas_in(where, "search", *SMALL, "--run", run, *flags)
    assert answer.code == 0, answer.told
    for line in (answer.out.splitlines()[0], answer.first_told):
        assert "does not bind" in line
        near, far, suggested = numbers_of(line)[-3:]
        assert near == pytest.approx(low, rel=0.3 if name == "latency_ms" else 1e-3)
        assert far == pytest.approx(high, rel=0.3 if name == "latency_ms" else 1e-3)
        assert low < suggested < high
    assert LIMITS[name] in answer.first_told
    assert answer.told.count(answer.first_told) == 1
    again = hwnas_in(where, "search", *SMALL, "--run", run, *flags, "--json").content
    assert again["limits"][name] == {
        "value": high * 10, "binding": False, "upper": again["limits"][name]["upper"],
    }  # fmt: skip


def numbers_of(line: str) -> list[float]:
    """The numbers in a line for people, thousands apart."""
    return [
        float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", line)
    ]


@pytest.mark.usefixtures("quick")
def test_limits_that_do_not_bind_come_before_one_that_does(
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    hwnas_in: Commands,
) -> None:
    flags = ("--max-params", repr(middle(*ranges["params"])), "--max-macs", "1e12")
    answer = hwnas_in(folder, "search", *SMALL, "--run", summary["run"], *flags)
    assert answer.code == 0
    assert answer.first_told.startswith("Limit 1e+12 macs does not bind")
    assert answer.told.count("does not bind") == 1
    assert "does not bind" in answer.out.splitlines()[0]


def test_a_limit_below_the_reachable_is_code_3_and_names_the_smallest(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, "search", *SMALL, "--latency-ms", "0.0001", "--json")
    failure = answer.content
    assert answer.code == failure["exit_code"] == 3
    assert failure["feasible_min"] == summary["feasible_min"]
    assert failure["feasible_max"] == summary["feasible_max"]
    assert f"{failure['feasible_min']['latency_ms']:.6g}" in answer.told


@pytest.mark.parametrize("name", [name for name in LIMITS if name != "latency_ms"])
def test_a_counted_limit_that_cannot_be_met_is_refused_before_any_profiling(
    name: str, tmp_path: Path, ranges: dict[str, tuple[float, float]], hwnas_in: Commands
) -> None:
    low, high = ranges[name]
    answer = hwnas_in(tmp_path, "search", *SMALL, LIMITS[name], repr(low * 0.999), "--json")
    failure = answer.content
    assert answer.code == failure["exit_code"] == 3
    assert failure["feasible_min"] == {name: low}
    assert failure["feasible_max"] == {name: high}
    (advised,) = numbers_of(failure["error"]["next"])
    assert low < advised < low * 1.1
    assert list(tmp_path.iterdir()) == [], "nothing was measured, let alone trained"


@pytest.mark.usefixtures("quick")
def test_the_smallest_reachable_value_itself_can_be_met(
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    hwnas_in: Commands,
) -> None:
    flags = [w for name in LIMITS for w in (LIMITS[name], repr(ranges[name][0]))]
    answer = hwnas_in(folder, "search", *SMALL, "--run", summary["run"], *flags, "--json")
    assert answer.code == 0, answer.told
    assert_under_every_limit(folder, answer.content, {name: ranges[name][0] for name in LIMITS})


APART = '''
"""A space in which fewer parameters mean more work: widths and strides go together."""

from hwnas import Position, SearchSpace, State, Choice
from hwnas.spaces.blocks import classifier, conv_norm_activation
from latency_tables.ops import Tensor
from quant.precision import Precision

SHAPES = {"wide": (32, 2), "flat": (8, 1)}


def space(*, classes, image_channels, size):
    def conv(state, values):
        width, stride = SHAPES[values["shape"]]
        op = conv_norm_activation(state.tensor, width, kernel=values["kernel"], stride=stride,
                                  precision=Precision("fp32"))
        return Choice(op, State(op.output), group=f"{values['shape']}{values['kernel']}")

    def head(state, values):
        op = classifier(state.tensor, 16, classes, precision=Precision("fp32"))
        return Choice(op, State(op.output))

    options = {"shape": ["wide", "flat"], "kernel": [3, 5]}
    return SearchSpace("apart", Tensor(image_channels, size, size), (
        Position("conv0", options, conv), Position("conv1", options, conv),
        Position("head", {}, head)))
'''


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("second", ["macs", "latency_ms"])
def test_limits_that_cannot_be_met_together_are_code_3_before_any_training(
    second: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    (tmp_path / "apart.py").write_text(APART)
    common = ("search", "--space", "apart.py:space", *SMALL[2:], "--json")
    first_range, second_range = (
        [hwnas_in(tmp_path, *common, LIMITS[name], "1e-9").content[end][name]
         for end in ("feasible_min", "feasible_max")]
        for name in ("params", second)
    )  # fmt: skip
    alone = [(LIMITS["params"], repr(first_range[0])), (LIMITS[second], repr(second_range[0]))]
    before = sorted(tmp_path.rglob("*"))
    answer = hwnas_in(tmp_path, *common, *alone[0], *alone[1])
    failure = answer.content
    assert answer.code == failure["exit_code"] == 3
    assert "Each limit can be met alone" in failure["error"]["what"]
    for name, (low, high) in (("params", first_range), (second, second_range)):
        assert failure["feasible_min"][name] == low
        assert failure["feasible_max"][name] == high
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.rglob("supernet.pt"))
    assert not list(tmp_path.rglob("search.sqlite"))
    assert bool(list(tmp_path.rglob("*.parquet"))) == (second == "latency_ms")
    advised = dict(re.findall(r"(\w+)=([\d.e+-]+)", failure["error"]["next"]))
    assert set(advised) == {"params", second}
    flags = [word for name, value in advised.items() for word in (LIMITS[name], value)]
    assert hwnas_in(tmp_path, *common, *flags).code == 0, "what is advised can be met"


@pytest.mark.usefixtures("quick")
def test_other_limits_on_a_run_train_no_supernet_and_score_nothing_twice(
    folder: Path,
    summary: dict[str, Any],
    ranges: dict[str, tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
    hwnas_in: Commands,
) -> None:
    supernet = folder / summary["run"] / "supernet.pt"
    before = (supernet.stat().st_mtime_ns, supernet.stat().st_ino)
    with contextlib.closing(sqlite3.connect(folder / summary["run"] / "search.sqlite")) as db:
        known = {genes for (genes,) in db.execute("SELECT genes FROM scores")}
    scored: list[str] = []
    real = Evaluator.__call__

    def spy(self: Evaluator, architecture: Architecture) -> Evaluation:
        scored.append(json.dumps(architecture.genes))
        return real(self, architecture)

    monkeypatch.setattr(Evaluator, "__call__", spy)
    value = repr(middle(*ranges["latency_ms"], 0.6))
    common = ("search", *SMALL, "--run", summary["run"], "--latency-ms", value)
    answer = hwnas_in(folder, *common, "--json")
    assert answer.code == 0, answer.told
    assert "training steps" not in answer.told
    assert (supernet.stat().st_mtime_ns, supernet.stat().st_ino) == before
    assert len(scored) == len(set(scored))
    assert not known & set(scored)
    with contextlib.closing(sqlite3.connect(folder / summary["run"] / "search.sqlite")) as db:
        rows = {genes for (genes,) in db.execute("SELECT genes FROM scores")}
        asked = {
            genes
            for (genes,) in db.execute(
                "SELECT genes FROM proposals WHERE search LIKE ?", (f"% latency_ms={value} %",)
            )
        }
    assert rows == known | set(scored)
    assert asked & known, "some of what was asked for was scored before"


# ---- configuration files


def config(folder: Path, **fields: Any) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(fields))
    return "run.yaml"


@pytest.mark.usefixtures("quick")
def test_a_configuration_file_stands_for_its_flags_and_flags_win(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    file = config(
        folder, space=SPACE, device="cpu", threads=64, recipe={"name": "quick"}, seed=5,
        run=summary["run"], limits={"latency_ms": 0.001, "size_mb": 0.15},
    )  # fmt: skip
    flags = ("--device", "simulated", "--recipe", "smoke", "--seed", "0", "--threads", "1")
    answer = hwnas_in(folder, "search", "--config", file, *flags, "--latency-ms", "0.04", "--json")
    assert answer.code == 0, answer.told
    assert answer.content["run"] == summary["run"]
    asked = {name: limit["value"] for name, limit in answer.content["limits"].items()}
    assert asked == {"latency_ms": 0.04, "size_mb": 0.15}
    assert_under_every_limit(folder, answer.content, asked)


@pytest.mark.usefixtures("quick")
def test_a_fraction_on_the_command_line_wins_over_a_latency_in_the_file(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    file = config(folder, run=summary["run"], limits={"latency_ms": 0.001})
    answer = hwnas_in(folder, "search", "--config", file, "--limit-fraction", "0.5", "--json")
    assert answer.code == 0, answer.told
    assert answer.content["limits"] == summary["limits"]


@pytest.mark.usefixtures("quick")
def test_tables_and_run_of_the_file_are_used_and_the_effective_configuration_is_stored(
    tmp_path: Path, hwnas_in: Commands
) -> None:
    recipe = {"name": "smoke", "evaluations": 6, "supernet": {"steps": 4, "flip": True}}
    file = config(
        tmp_path, space=SPACE, device="simulated", recipe=recipe, tables="kept/tables",
        run="kept/run", seed=3, limits={"params": 40000},
    )  # fmt: skip
    answer = hwnas_in(tmp_path, "search", "--config", file, "--json")
    assert answer.code == 0, answer.told
    assert answer.content["run"] == "kept/run"
    assert answer.content["evaluated"] == 6
    assert list((tmp_path / "kept" / "tables").glob("*.parquet"))
    stored = yaml.safe_load((tmp_path / "kept" / "run" / "config.yaml").read_text())
    assert (stored["seed"], stored["device"], stored["space"]) == (3, "simulated", SPACE)
    assert (stored["recipe"]["evaluations"], stored["recipe"]["supernet"]["flip"]) == (6, True)
    assert stored["recipe"]["supernet"]["steps"] == 4
    assert stored["recipe"]["supernet"]["batch"] == 16, "the recipe's own"
    assert "limits" not in stored, "limits are not part of a run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "run.yaml"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recipe": {"name": "smoke", "supernet": {"steps": "many"}}}, "recipe.supernet.steps"),
        ({"recipe": {"name": "smoke", "supernet": {"step": 1}}}, "recipe.supernet.step"),
        ({"recipe": {"supernet": {"steps": 1}}}, "recipe.name"),
        ({"limits": {"watts": 1.0}}, "watts"),
        ({"limits": {"params": -1.0}}, "limits.params"),
        ({"limits": {"latency_ms": "soon"}}, "limits.latency_ms"),
        ({"treads": 2}, "treads: no such field"),
        ({"threads": 0}, "threads"),
        ({"threads": "2"}, "threads"),
        ({"space": "nothing"}, "--space is 'nothing'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_wrong_field_of_a_configuration_file_is_named_with_its_path(
    fields: dict[str, Any], words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    file = config(tmp_path, **{"device": "simulated", "limits": {"params": 1e4}, **fields})
    answer = hwnas_in(tmp_path, "search", "--config", file, "--json")
    assert answer.code == 2
    assert words in answer.content["error"]["what"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("a: [b", "is not readable YAML"), ("- 1", "run.yaml")],
)
def test_a_configuration_file_that_is_none_is_refused(
    content: str | None, words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    answer = hwnas_in(tmp_path, "search", "--config", "run.yaml", "--json")
    assert answer.code == 2
    assert words in answer.content["error"]["what"]
    assert "\n" not in answer.content["error"]["what"]


def test_a_file_that_contradicts_the_run_is_named_by_the_flag(
    folder: Path, summary: dict[str, Any], hwnas_in: Commands
) -> None:
    for fields, words in (
        ({"seed": 4}, "--seed 4 contradicts"),
        ({"recipe": {"name": "smoke", "population": 4}}, "differs from the plain smoke in a field"),
    ):
        file = config(folder, run=summary["run"], limits={"params": 4e4}, **fields)
        answer = hwnas_in(folder, "search", "--config", file, "--json")
        assert answer.code == 2
        assert words in answer.content["error"]["what"]
        assert summary["run"] in answer.content["error"]["what"]


# ---- what cannot be used


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("search --latency-ms 1 --data nothing", "--data is 'nothing'"),
        ("search --latency-ms 1 --data fashion-mnist:.", "holds no train-images"),
        ("search --latency-ms 1 --data folder:nowhere", "nowhere"),
        ("search --latency-ms 1 --data nowhere.npz", "nowhere.npz"),
        ("profile --space nothing", "--space is 'nothing'"),
        ("profile --space no.py:space", "not there"),
        ("profile --recipe nothing", "--recipe is 'nothing'"),
        ("profile --device toaster", "'toaster' is not a device"),
        ("profile --device gpu", "No NVIDIA driver is on this machine"),
        ("profile --image-size 2", "--image-size"),
        ("train --method nothing", "--method is 'nothing'"),
        ("verify", "no run under ./runs"),
        ("verify --run nowhere", "nowhere is not a run"),
        ("export --format caffe", "--format is 'caffe'"),
    ],
)
def test_bad_input_gets_one_sentence_and_code_2(
    arguments: str, words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, *arguments.split(), "--json")
    assert answer.code == answer.content["exit_code"] == 2
    assert words in answer.content["error"]["what"]
    (line,) = answer.told.splitlines()
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["retrain", "export", "verify"])
def test_a_run_that_was_only_trained_has_no_result_yet(
    command: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, "train", *SMALL, "--run", "run", "--json")
    assert answer.code == 0, answer.told
    answer = hwnas_in(tmp_path, command, "--run", "run", "--json")
    assert answer.code == 2
    assert "run holds no result yet" in answer.content["error"]["what"]
    assert answer.content["run"] == "run"


def test_portable_files_are_asked_for_once_and_the_run_remembers(
    tmp_path: Path, hwnas_in: Commands
) -> None:
    for flags in (("--portable",), (), ("--portable",)):
        answer = hwnas_in(tmp_path, "train", *SMALL, *flags, "--run", "run", "--json")
        assert answer.code == 0, answer.told
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["portable"] is True
    assert hwnas_in(tmp_path, "train", *SMALL, "--run", "plain", "--json").code == 0
    answer = hwnas_in(tmp_path, "train", *SMALL, "--portable", "--run", "plain", "--json")
    assert answer.code == 2
    assert "--portable True contradicts plain" in answer.content["error"]["what"]


# ---- signals


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM)]
)
def test_a_signal_is_code_130_and_the_same_command_goes_on(
    signals: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    """A process of its own; further signals while it leaves change nothing."""
    recipe = {"name": "smoke", "supernet": {"steps": 2000}}
    file = config(tmp_path, space=SPACE, device="simulated", recipe=recipe, run="run")
    process = subprocess.Popen(
        [sys.executable, "-m", "hwnas", "train", "--config", file, "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("training the supernet") for line in process.stderr)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.03)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["status"] == "interrupted"
    assert json.loads(out)["run"] == "run"
    assert told.splitlines()[-1].startswith("Interrupted. The same command goes on where")
    assert "Traceback" not in told
