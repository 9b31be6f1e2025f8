"""The command line, as a user types it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hwnas import cli
from hwnas.cli import app
from quant.errors import TableError

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"
COMMANDS = ("profile", "train", "search", "retrain", "export", "verify")
SMALL = ["--space", SPACE, "--device", "simulated", "--recipe", "smoke"]


def hwnas(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in a folder."""
    runner = CliRunner()
    before = Path.cwd()
    os.chdir(folder)
    try:
        answer = runner.invoke(app, list(arguments))
    finally:
        os.chdir(before)
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer.exit_code, answer.stdout, answer.stderr


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("searched")
    code, out, told = hwnas("search", *SMALL, "--limit-fraction", "0.5", "--json", folder=folder)
    assert code == 0, told
    return folder, json.loads(out), told


def test_help_answers_at_once_and_loads_neither_torch_nor_pandas() -> None:
    script = (
        "import sys; sys.argv = ['hwnas', '-h']\n"
        "from hwnas.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'pandas', 'onnx', 'pyarrow'} & set(sys.modules)) or None)"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert answer.stderr == ""
        assert "search" in answer.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    code, out, _ = hwnas(command, "-h", folder=tmp_path)
    assert code == 0
    assert f"Example: hwnas {command}" in out


def test_search_prints_one_object_and_talks_on_standard_error(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    folder, summary, told = searched
    assert summary["status"] == "ok"
    assert (folder / summary["model"]).is_file()
    assert (folder / summary["certificate"]).is_file()
    assert "Profiling" in told
    assert "this space reaches" in told


def test_the_newest_matching_run_is_taken_again(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    folder, summary, _ = searched
    start = time.monotonic()
    code, out, _ = hwnas("search", *SMALL, "--limit-fraction", "0.5", "--json", folder=folder)
    again = json.loads(out)
    assert code == 0
    assert again["run"] == summary["run"]
    assert again["measured"] == summary["measured"]
    assert time.monotonic() - start < 10
    code, out, _ = hwnas("train", *SMALL, "--seed", "1", "--json", folder=folder)
    assert json.loads(out)["run"] != summary["run"]


@pytest.mark.parametrize("command", ["retrain", "export", "verify"])
def test_the_later_stages_work_on_the_newest_result(
    searched: tuple[Path, dict[str, Any], str], command: str
) -> None:
    folder, summary, _ = searched
    code, out, told = hwnas(
        command, "--run", summary["run"], "--tables", "elsewhere", "--json", folder=folder
    )
    assert code == 0, told
    assert json.loads(out)["run"] == summary["run"]
    assert not (folder / "elsewhere").exists(), "a finished result needs no table"


def test_a_limit_below_the_reachable_is_code_3_and_names_the_smallest(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    folder, summary, _ = searched
    start = time.monotonic()
    code, out, told = hwnas("search", *SMALL, "--latency-ms", "0.0001", "--json", folder=folder)
    assert time.monotonic() - start < 10
    failure = json.loads(out)
    assert code == failure["exit_code"] == 3
    assert failure["feasible_min"] == summary["feasible_min"]
    assert failure["feasible_max"] == summary["feasible_max"]
    assert f"{failure['feasible_min']['latency_ms']:.6g}" in told


def test_a_limit_that_does_not_bind_is_said_in_the_first_line(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    folder, _, _ = searched
    code, out, told = hwnas("search", *SMALL, "--latency-ms", "10", "--json", folder=folder)
    assert code == 0
    first = told.strip().splitlines()[0]
    assert "does not bind" in first
    assert "--latency-ms" in first
    assert json.loads(out)["limits"]["latency_ms"]["binding"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search"], "needs one limit"),
        (["search", "--latency-ms", "1", "--limit-fraction", "0.5"], "needs one limit"),
        (["search", "--latency-ms", "-1", *SMALL], "--latency-ms is -1"),
        (["search", "--latency-ms", "nan", *SMALL], "--latency-ms is nan"),
        (["search", "--latency-ms", "1", "--data", "nothing"], "--data is 'nothing'"),
        (["search", "--latency-ms", "1", "--data", "fashion-mnist:."], "holds no train-images"),
        (["profile", "--space", "nothing"], "--space is 'nothing'"),
        (["profile", "--space", "no.py:space"], "not there"),
        (["profile", "--recipe", "nothing"], "--recipe is 'nothing'"),
        (["profile", "--device", "toaster"], "'toaster' is not a device"),
        (["profile", "--device", "gpu"], "cannot measure on a GPU"),
        (["train", "--method", "nothing"], "--method is 'nothing'"),
        (["verify"], "no run under ./runs"),
        (["verify", "--run", "nowhere"], "nowhere is not a run"),
        (["export", "--format", "caffe"], "--format is 'caffe'"),
    ],
)
def test_bad_input_gets_one_sentence_and_code_2(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    code, out, told = hwnas(*arguments, "--json", folder=tmp_path)
    assert code == 2
    assert words in " ".join(told.split())
    assert "Traceback" not in told
    failure = json.loads(out)
    assert failure["status"] == "error"
    assert failure["exit_code"] == 2
    assert words in failure["error"]["what"]


def test_a_flag_that_contradicts_the_run_is_named(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    folder, summary, _ = searched
    code, _, told = hwnas("train", "--run", summary["run"], "--seed", "7", folder=folder)
    assert code == 2
    assert "--seed 7 contradicts" in told


def test_a_run_in_use_names_its_process(searched: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, _ = searched
    script = (
        "import sys, pathlib; from hwnas.store import read_run\n"
        "with read_run(pathlib.Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(folder / summary["run"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, told = hwnas("verify", "--run", summary["run"], folder=folder)
        assert code == 2
        assert str(holder.pid) in told
    finally:
        holder.communicate("")


def test_a_corrupt_table_is_named_and_kept(tmp_path: Path) -> None:
    code, out, _ = hwnas("profile", *SMALL, "--json", folder=tmp_path)
    assert code == 0
    table = tmp_path / json.loads(out)["table"]
    table.write_bytes(table.read_bytes()[:100])
    code, out, told = hwnas("profile", *SMALL, "--json", folder=tmp_path)
    assert code == 2
    assert "is not a latency table" in told
    assert table.stat().st_size == 100


def test_ctrl_c_is_code_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hwnas", "train", *SMALL, "--run", "run", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(2)
    out, told = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("training ended before the signal came")
    assert process.returncode == 130
    assert "goes on where" in told
    assert json.loads(out)["status"] == "interrupted"
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("value", [0.0237413, 0.99999, 1.0, 123.45, 0.13350817, 7e-9])
def test_a_limit_from_a_fraction_is_short_and_never_below_the_value(value: float) -> None:
    rounded = cli._rounded_up(value)
    assert value <= rounded <= value * 1.001
    assert len(f"{rounded:.12g}".replace(".", "").strip("0")) <= 5


def test_a_defect_of_ours_is_code_1_with_its_traceback_and_still_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("hwnas.run.plan", broken)
    code, out, told = hwnas("profile", *SMALL, "--json", folder=tmp_path)
    assert code == json.loads(out)["exit_code"] == 1
    assert json.loads(out)["error"]["what"] == "ZeroDivisionError: a defect"
    assert "Traceback" in told


def test_an_error_is_told_whole_brackets_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "fp32 [fp32:3x32x32] conv(0) c16 k3 s2 g1 n"

    def missing(job: object) -> None:
        raise TableError(f"The table has no row for {key!r}.")

    monkeypatch.setattr("hwnas.run.plan", missing)
    code, _, told = hwnas("profile", *SMALL, folder=tmp_path)
    assert code == 2
    assert key in " ".join(told.split())
