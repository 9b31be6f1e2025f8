"""The measuring process: a line a model at once, and it never outlives who asked for it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwnas.spaces.blocks import classifier, inverted_residual
from latency_tables.ops import Tensor
from profilers.graphs import emit, random_parameters
from profilers.measure import Protocol
from profilers.simulated import CALL_US, op_us
from quant.precision import Precision

PROTOCOL = Protocol(rounds=2, warmup_ms=0.5, block_ms=1.0, min_runs=4, max_runs=20)


def network(width: int) -> list[Any]:
    body = inverted_residual(
        Tensor(3, 8, 8), width, kernel=3, expansion=2, precision=Precision("w8a8")
    )
    return [body, classifier(body.output, 8, 4, precision=Precision("fp32"))]


def write(folder: Path, width: int) -> Path:
    ops, rng = network(width), np.random.default_rng(0)
    path = folder / f"{width}.onnx"
    path.write_bytes(emit(ops, [random_parameters(op, rng) for op in ops]).SerializeToString())
    return path


def job(models: list[Path], **different: object) -> str:
    asked = {
        "parent": os.getpid(),
        "device": "simulated",
        "threads": 1,
        "batch": 1,
        "protocol": PROTOCOL.to_dict(),
        "models": [str(model) for model in models],
    }
    return json.dumps({**asked, **different})


def work(told: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "profilers.worker"], input=told, capture_output=True, text=True
    )


def test_it_answers_one_line_a_model_in_order(tmp_path: Path) -> None:
    answer = work(job([write(tmp_path, width) for width in (4, 12, 8)], batch=2))
    assert (answer.returncode, answer.stderr) == (0, "")
    blocks = [json.loads(line) for line in answer.stdout.splitlines()]
    for width, block in zip((4, 12, 8), blocks, strict=True):
        wanted = CALL_US + 2 * sum(map(op_us, network(width)))
        assert block == [[pytest.approx(wanted, abs=1e-3), 1.0]] * PROTOCOL.min_runs


def test_what_was_timed_before_a_failure_is_told(tmp_path: Path) -> None:
    answer = work(job([write(tmp_path, 4), tmp_path / "absent.onnx", write(tmp_path, 8)]))
    assert answer.returncode == 1
    assert len(answer.stdout.splitlines()) == 1
    assert "absent.onnx" in answer.stderr.splitlines()[-1]


def test_a_model_is_told_before_the_next_one_is_timed(tmp_path: Path) -> None:
    """The second model is a pipe that is opened only after the first answer was read."""
    first, second = write(tmp_path, 4), tmp_path / "second.onnx"
    os.mkfifo(second)
    with subprocess.Popen(
        [sys.executable, "-m", "profilers.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin:
            process.stdin.write(job([first, second]))
        assert len(json.loads(process.stdout.readline())) == PROTOCOL.min_runs
        second.write_bytes(first.read_bytes())
        assert len(json.loads(process.stdout.readline())) == PROTOCOL.min_runs
        assert process.stdout.readline() == ""
    assert process.returncode == 0


def test_it_does_nothing_for_a_process_that_is_gone(tmp_path: Path) -> None:
    answer = work(job([write(tmp_path, 4)], parent=os.getpid() + 1))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


# ---- the asking process is killed

MEASURE = """
import json, sys
from pathlib import Path
from profilers.build import measure_models
from profilers.devices import open_profiler
from profilers.measure import Protocol

protocol, models = json.load(sys.stdin)
progress = lambda *told: print(*told, flush=True)
measure_models(open_profiler("cpu"), [Path(m) for m in models], Protocol(**protocol), progress)
"""


def children(process: int) -> list[int]:
    """The processes that a process started, as Linux tells them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            state = status(int(folder.name))
            if state and state[1] == process:
                found.append(int(folder.name))
    return found


def status(process: int) -> tuple[str, int] | None:
    """The state and the parent of a process, or None where there is none."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, *_ = text.rpartition(")")[2].split()
    return state, int(parent)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for it in /proc")
def test_it_leaves_soon_after_the_asking_process_was_killed(tmp_path: Path) -> None:
    """In the middle of many models: each takes a second, all of them half a minute."""
    models = [str(write(tmp_path, width)) for width in range(2, 32)]
    protocol = Protocol(rounds=1, warmup_ms=1.0, block_ms=1000.0, min_runs=1, max_runs=10**9)
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as asking:  # fmt: skip
        assert asking.stdin is not None
        assert asking.stdout is not None
        with asking.stdin:
            asking.stdin.write(json.dumps([protocol.to_dict(), models]))
        assert asking.stdout.readline().endswith(" 1 30\n")
        (worker,) = children(asking.pid)
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    start = time.monotonic()
    while (state := status(worker)) and state[0] != "Z":
        assert time.monotonic() - start < 10, "the measuring process outlived the one that asked"
        time.sleep(0.05)
