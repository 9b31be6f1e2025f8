"""Is every shipped file under its limit, timed by someone else's ten lines?

Limits spread over the feasible range, one run. Each shipped file is timed by `time_file.py` in
fresh processes, and its accuracy on TEST is taken again in plain onnxruntime.

Band: the median over processes is at most the limit, or over it by no more than the host's own
repeatability, which is the interquartile range of the same file's medians over their median. The
accuracy is the certificate's, exactly. No proposal in the history is over its limit.
"""

import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import hwnas.run
from hwnas.data import as_input, digits

FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.95)
PROCESSES = 9


def measure(*, reduced: bool):
    """Search, ship and time at every limit."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        request = hwnas.run.Request(
            recipe="smoke" if reduced else "quick", tables=home / "tables", run=home / "run"
        )
        job = hwnas.run.Job(request)
        found = job.latency_range()
        run = hwnas.run.open_run(job)
        for fraction in FRACTIONS[1:4] if reduced else FRACTIONS:
            value = found.smallest + fraction * (found.largest - found.smallest)
            summary = hwnas.run.search_to_certificate(job, run, [job.latency_limit(value)])
            rows.append(row(summary, value))
        with sqlite3.connect(run.history) as db:
            over = db.execute("SELECT COUNT(*) FROM bounds WHERE upper > limit_value")
            proposals = db.execute("SELECT COUNT(*) FROM proposals").fetchone()[0]
            figures = {
                "limits": [{k: v for k, v in r.items() if k != "process_medians_ms"} for r in rows],
                "over_limit_by": max(r["plain_median_ms"] / r["limit_ms"] - 1 for r in rows),
                "proposals": proposals,
                "proposals_over_limit": over.fetchone()[0],
                "quality": vars(job.model.quality),
            }
    return {"figures": figures, "raw": {r["limit_ms"]: r["process_medians_ms"] for r in rows}}


def row(summary, limit_ms):
    """What one limit gave."""
    medians = [
        float(
            subprocess.run(
                [sys.executable, str(Path(__file__).with_name("time_file.py")), summary["model"]],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for _ in range(PROCESSES)
    ]
    session = onnxruntime.InferenceSession(summary["model"], providers=["CPUExecutionProvider"])
    with digits().final() as images:
        answers = session.run(None, {"input": as_input(images.x)})[0].argmax(1)
        test = float((answers == images.y).mean())
    low, high = np.percentile(medians, [25, 75])
    return {
        "limit_ms": limit_ms,
        "upper_ms": summary["predicted"]["upper_latency_ms"],
        "certified_ms": summary["measured"]["median_ms"],
        "plain_median_ms": float(np.median(medians)),
        "repeatability": float((high - low) / np.median(medians)),
        "test": summary["accuracy"]["test"],
        "plain_test": test,
        "search_val_shared_weights": summary["search_val_shared_weights"],
        "process_medians_ms": medians,
    }


def band(figures):
    """What is wrong with the figures."""
    complaints = []
    for r in figures["limits"]:
        if r["plain_median_ms"] > r["limit_ms"] * (1 + r["repeatability"]):
            complaints.append(f"{r['plain_median_ms']} ms is over the limit {r['limit_ms']} ms")
        if r["plain_test"] != r["test"]:
            complaints.append(f"accuracy {r['plain_test']} is not the certified {r['test']}")
    if figures["proposals_over_limit"] or not figures["proposals"]:
        complaints.append(f"{figures['proposals_over_limit']} proposals are over their limit")
    return complaints
