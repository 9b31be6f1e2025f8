"""`python -m benchmarks run [NAME]` writes results; `check` re-runs them at reduced size.

`claims` writes the results of the checks of published claims, named `claims.spos` and the like.
Each benchmark is a module with `measure(reduced) -> {"figures": ..., "raw": ...}` and
`band(figures) -> list of complaints`, the same for both sizes; "pictures" maps the names of files
beside the result to their texts. Results are written here only.
"""

import importlib
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path

from profilers.cuda import card
from profilers.devices import open_profiler
from quant.errors import MissingDependency

RESULTS = Path(__file__).parent / "results"
GPU_BENCHMARKS = ("gpu",)
"""Run by name, on a machine with a GPU; elsewhere a check leaves their results out."""
BENCHMARKS = ("int8_speed", "limits", "search_speed", "tables", "train_step", "fronts")
CLAIMS = ("claims.spos",)
VERSIONS = (
    "hwnas",
    "torch",
    "onnx",
    "onnxruntime",
    "brevitas",
    "numpy",
    "tensorrt",
    "tensorrt_rtx",
)


def run(names: list[str]) -> int:
    """Run benchmarks at full size and write their results."""
    failed = 0
    for name in names or BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        start = time.monotonic()
        try:
            measured = module.measure(reduced=False)
        except MissingDependency as error:
            print(f"{name}: {error}")
            return error.exit_code
        pictures = measured.pop("pictures", {})
        result = {
            "command": f"python -m benchmarks run {name}",
            "commit": commit.stdout.strip(),
            "versions": {package: version(package) for package in VERSIONS if installed(package)},
            "python": platform.python_version(),
            "host": {**asdict(open_profiler("cpu").host()), "hostname": ""},
            "seconds": round(time.monotonic() - start, 1),
            **measured,
        }
        path = RESULTS / f"{name.replace('.', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        for file, text in pictures.items():
            (path.parent / file).write_text(text)
        failed += told(name, measured, module)
    return 1 if failed else 0


def check() -> int:
    """Re-run every committed benchmark at reduced size against its stated band."""
    failed = 0
    for path in sorted(RESULTS.glob("*.json")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        if path.stem in GPU_BENCHMARKS and not has_gpu():
            print(f"{path.stem}: left out, there is no GPU here")
            continue
        failed += told(path.stem, module.measure(reduced=True), module)
    return 1 if failed else 0


def installed(package):
    """Whether a package is here."""
    return bool(list(distributions(name=package)))


def has_gpu():
    """Whether an NVIDIA GPU is here."""
    try:
        return bool(card())
    except MissingDependency:
        return False


def told(name, measured, module):
    """Print a benchmark's figures and its complaints; the answer is how many there are."""
    complaints = module.band(measured["figures"])
    print(f"{name}: {json.dumps(measured['figures'], indent=1)}")
    for complaint in complaints:
        print(f"{name}: OUTSIDE THE BAND: {complaint}")
    return len(complaints)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    match command:
        case "run":
            sys.exit(run(rest))
        case "check":
            sys.exit(check())
        case "claims":
            sys.exit(run(list(CLAIMS)))
        case _:
            sys.exit(__doc__)
