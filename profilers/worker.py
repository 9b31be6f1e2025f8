"""One fresh process that times model files: `python -m profilers.worker`.

Reads a job as JSON from standard input and writes one line a model to standard output as soon as it
is timed: the samples of one block, in microseconds, as JSON. Leaves before the next model where the
process that gave the job is gone.
"""

import json
import os
import sys
from pathlib import Path

from profilers.devices import open_profiler
from profilers.host import pinned
from profilers.measure import Protocol


def main() -> None:
    """Time every model of the job, one session at a time."""
    job = json.load(sys.stdin)
    profiler = open_profiler(job["device"], threads=job["threads"], batch=job["batch"])
    protocol = Protocol(**job["protocol"])
    with pinned(job["threads"]):
        for path in job["models"]:
            if os.getppid() != job["parent"]:
                return
            with profiler.prepare(Path(path)) as session:
                samples = session.block(protocol).round(3).tolist()
            sys.stdout.write(json.dumps(samples) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
