"""The stages over a run directory, and the whole path through them.

Each stage does what is missing and returns; called again it goes on where it stopped. Feasibility
is decided from the table, before any training.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from hwnas import store
from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import Limit
from hwnas.costs.population import genes_of
from hwnas.estimate import estimate
from hwnas.export import certificate as certificates
from hwnas.history import History
from hwnas.job import (
    LIMITS,
    Job,
    Request,
    check_limits,
    flag_of,
    is_profiled,
    plan,
    request_fields,
    request_of,
)
from hwnas.loop import (
    fixed_genes,
    limits_name,
    ranked,
    read_fixed,
    read_limits,
    result_name,
    search,
    searches,
    settled,
)
from hwnas.report import page
from hwnas.report.notes import notes
from hwnas.report.page import limit_text, measured_rows, number
from hwnas.retrain import accuracy as torch_accuracy
from hwnas.scoring import train
from hwnas.ship import (
    bitops,
    export,
    is_shipped,
    is_stable,
    remeasure,
    retrain_finalists,
    shipped_file,
    verify,
)
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.store import Run, list_runs, read_run
from profilers.host import disturbances
from profilers.recheck import drift
from quant.errors import Unstable

__all__ = [
    "LIMITS", "FeasibleSet", "Job", "Request", "check_limits", "disturbances", "drift",
    "estimate", "export", "feasible_range", "fixed_genes", "flag_of", "is_profiled", "is_stable",
    "limit_text", "limits_name", "list_runs", "measured_rows", "number", "open_run", "plan",
    "read_fixed", "read_limits", "read_run", "remeasure", "request_fields", "request_of",
    "result_rows", "retrain_finalists", "search", "search_to_certificate", "told_measured",
    "torch_accuracy", "train", "verify",
]  # fmt: skip

MEASURED = ("measured", "measured_under")


def open_run(job: Job) -> Run:
    """The run of a job."""
    return store.open_run(job.config(), job.request.run)


def search_to_certificate(job: Job, run: Run, limits: Sequence[Limit]) -> dict[str, Any]:
    """From whatever is there to a certified file: what `hwnas search --json` prints."""
    result = run.result(result_name(job, limits))
    limits = settled(job, result, limits)
    feasible = FeasibleSet(job.searched, limits)
    search(job, run, limits)
    file = result / "certificate.json"
    content = certificates.read_certificate(file) if file.exists() else None
    if content is None or not (is_stable(content) and is_shipped(result, content)):
        content = verify(job, run, limits)
    summary = {
        "status": "ok" if is_stable(content) else "unstable",
        "exit_code": 0 if is_stable(content) else Unstable.exit_code,
        "run": str(run.path),
        "architecture": content["architecture"],
        "limits": {
            limit.cost.name: {
                "value": limit.value,
                "binding": feasible.binding(limit),
                "upper": content["upper"][limit.cost.name],
            }
            for limit in limits
        },
        "predicted": content["predicted"],
        **told_measured(content),
        "accuracy": content["accuracy"],
        **_search_facts(job, run, feasible),
        **feasible_range(feasible),
        **({"fixed": dict(fixed)} if (fixed := job.request.fixed) else {}),
        "method": {"name": job.method.name, "evidence": job.method.evidence},
        "model": str(shipped_file(job, result)),
        "size_bytes": content["counts"]["size_bytes"],
        "notes": notes(
            job.space,
            job.space.parse(content["architecture"]),
            job.latency,
            job.profiler.runtime,
        ),
        **bitops(job.space, job.space.parse(content["architecture"])),
        **_other_files(result, content),
        "certificate": str(file),
        "report": str(run.report),
    }
    page.write_report(run.report, summary, *_points(job, run, feasible))
    return summary


def _other_files(result: Path, certificate: dict[str, Any]) -> dict[str, Any]:
    """The files for other devices than the search's own, where limits asked for them."""
    files = certificate.get("files", {})
    told = {
        device: {"model": str(result / facts["file"]), "accuracy": facts["accuracy"]}
        for device, facts in files.items()
    }
    return {"files": told} if told else {}


def told_measured(certificate: dict[str, Any]) -> dict[str, Any]:
    """What a certificate measured, as a command tells it."""
    return {name: certificate[name] for name in MEASURED if name in certificate}


def result_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A search's summary as (what, value) lines for people."""
    return page.rows(summary)


def feasible_range(feasible: FeasibleSet) -> dict[str, dict[str, float]]:
    """The smallest and the largest upper bound of each limited cost."""
    return {
        "feasible_min": {name: r.smallest for name, r in feasible.ranges.items()},
        "feasible_max": {name: r.largest for name, r in feasible.ranges.items()},
    }


def _search_facts(job: Job, run: Run, feasible: FeasibleSet) -> dict[str, Any]:
    names = searches(job, feasible.limits)
    with closing(History(run.history)) as history:
        best = {name: ranked(feasible, history, [names[name]])[:1] for name in names}
        mine = names[job.method.name]
        return {
            "evaluated": sum(map(len, history.generations(mine))),
            "rejected": history.rejected(mine),
            "search_val_shared_weights": {
                name: found[0][1] if found else None for name, found in best.items()
            },
        }


def _points(job: Job, run: Run, feasible: FeasibleSet) -> list[list[page.Point]]:
    """What the method and the baseline scored: latency in ms, accuracy, what was chosen."""
    points: list[list[page.Point]] = []
    with closing(History(run.history)) as history:
        for name in searches(job, feasible.limits).values():
            found = ranked(feasible, history, [name])
            genes = genes_of([architecture for architecture, _ in found])
            sums = job.latency.totals(job.space, genes) if found else np.zeros(0)
            points.append(
                [
                    (float(job.latency.predict(float(additive))), right, _label(job.space, a))
                    for (a, right), additive in zip(found, sums, strict=True)
                ]
            )
    return points


def _label(space: SearchSpace, architecture: Architecture) -> str:
    return " ".join(space.describe(architecture).values())
