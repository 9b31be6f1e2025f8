"""The examples: a block and a space of one's own, each in one file, up to a certificate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("example", ["own_block", "own_space"])
def test_an_example_is_profiled_trained_searched_and_exported(example: str, tmp_path: Path) -> None:
    answer = subprocess.run(
        f"{sys.executable} -m hwnas search --json --recipe smoke --limit-fraction 0.9 "
        f"--space {EXAMPLES / example}.py:space".split(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode in (0, 4), answer.stderr
    if answer.returncode == 4:
        pytest.skip(f"the machine is too noisy to time on: {answer.stderr.splitlines()[-1]}")
    summary = json.loads(answer.stdout)
    certificate = json.loads((tmp_path / summary["certificate"]).read_text())
    assert certificate["host"]["device"] == "cpu"
    assert certificate["measured"]["median_ms"] <= summary["limits"]["latency_ms"]["value"]
    genes = set(certificate["architecture"])
    assert any(name.startswith("block" if example == "own_block" else "conv") for name in genes)
