"""One fresh process that times model files: `python -m profilers.worker`.

Reads a job as JSON from standard input and writes the samples of one block a model, in
microseconds, as JSON to standard output.
"""

import json
import sys

import onnx

from profilers.devices import open_profiler
from profilers.host import pinned
from profilers.measure import Protocol


def main() -> None:
    """Time every model of the job, one session at a time."""
    job = json.load(sys.stdin)
    profiler = open_profiler(job["device"], threads=job["threads"], batch=job["batch"])
    protocol = Protocol(**job["protocol"])
    samples = []
    with pinned(job["threads"]):
        for path in job["models"]:
            with profiler.prepare(onnx.load(path)) as session:
                samples.append(session.block(protocol).round(3).tolist())
    json.dump(samples, sys.stdout)


if __name__ == "__main__":
    main()
