"""`python -m benchmarks run [NAME]` writes results; `check` re-runs them at reduced size.

Each benchmark is a module with `measure(reduced) -> {"figures": ..., "raw": ...}` and
`band(figures) -> list of complaints`, the same for both sizes. Results are written here only.
"""

import importlib
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from profilers.devices import open_profiler

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ("limits", "search_speed", "tables", "train_step")
VERSIONS = ("hwnas", "torch", "onnx", "onnxruntime", "brevitas", "numpy")


def run(names: list[str]) -> int:
    """Run benchmarks at full size and write their results."""
    failed = 0
    for name in names or BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        start = time.monotonic()
        measured = module.measure(reduced=False)
        result = {
            "command": f"python -m benchmarks run {name}",
            "commit": commit.stdout.strip(),
            "versions": {package: version(package) for package in VERSIONS},
            "python": platform.python_version(),
            "host": {**asdict(open_profiler("cpu").host()), "hostname": ""},
            "seconds": round(time.monotonic() - start, 1),
            **measured,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        failed += told(name, measured, module)
    return 1 if failed else 0


def check() -> int:
    """Re-run every committed benchmark at reduced size against its stated band."""
    failed = 0
    for path in sorted(RESULTS.glob("*.json")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        failed += told(path.stem, module.measure(reduced=True), module)
    return 1 if failed else 0


def told(name, measured, module):
    """Print a benchmark's figures and its complaints; the answer is how many there are."""
    complaints = module.band(measured["figures"])
    print(f"{name}: {json.dumps(measured['figures'], indent=1)}")
    for complaint in complaints:
        print(f"{name}: OUTSIDE THE BAND: {complaint}")
    return len(complaints)


def claims() -> int:
    """Check the published systems' claims."""
    print("No claim check is committed yet.")
    return 0


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    match command:
        case "run":
            sys.exit(run(rest))
        case "check":
            sys.exit(check())
        case "claims":
            sys.exit(claims())
        case _:
            sys.exit(__doc__)
