"""Does the table tell the truth, how soon is it there, and how much of a limit can be used?

The default CPU condition. The space's ops and chains are measured as `hwnas profile` does it; then
calibration networks and held-out random networks in turn, each in five fresh processes, and the
held-out ones in five more; then for limits over the feasible range the network with the most MACs
that a search finds, exported with random weights and measured the same way. What an op costs inside
a network is told in several ways, each calibrated on the same networks and held against the same
held-out ones.

Band (full size): mean error at most 1 % beyond half of what two measurements of one network differ
by; nothing over its limit by more than the host's own repeatability; the table at most twice the
time of its counted runs.
"""

import copy
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from scipy import stats

from hwnas.calibration import (
    calibration_networks,
    draw,
    fitted,
    measured_networks,
    model_files,
    network_models,
)
from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Limit, counted_cost, latency_cost
from hwnas.costs.population import genes_of
from hwnas.job import Job, Request
from hwnas.quality import SEED, held_against
from hwnas.search.evolution import Evolution
from latency_tables.model import MeasuredNetwork, predict_us, quality
from latency_tables.percentiles import MEDIAN
from profilers.build import build_rows, empty_table, measure_models

SLOPES = (2, 4, 8)
REFINED = 0.05
"""How far a row may usually be off, for the rows that are refined on whole networks."""


def measure(*, reduced: bool):
    """Profile, hold out, search under limits."""
    space, data = ("mobile-tiny", "digits") if reduced else ("mobile", "none:1000")
    held_out, limits, evaluations = (20, 5, 400) if reduced else (100, 50, 3000)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Request(space=space, data=data, recipe="standard", tables=Path(folder)))
        _, fit_chains, chains = drawn(job, held_out)
        figures, table, calibration, first = profiled(job, fit_chains, chains)
        model, second = tried(job, table, calibration, first, chains, figures)
        figures["ways"] = ways(job, table, calibration, fit_chains, first, chains)
        found, searched = under_limits(job, table, model, limits, evaluations)
        figures["limits"] = found
        raw_out = {
            "held_out": [asdict(n) | {"again_us": m.latency_us, "again_observed_us": m.observed_us}
                         for n, m in zip(first, second, strict=True)],
            "calibration": [asdict(n) for n in calibration],
            "searched": searched,
        }  # fmt: skip
    for network in (*raw_out["held_out"], *raw_out["calibration"]):
        del network["rows"]
    figures = {"space": space, **figures}
    return {"figures": figures, "raw": raw_out}


def drawn(job, held_out):
    """Architectures to hold out; the chains of the calibration networks, and theirs."""
    known = calibration_networks(job.space, job.recipe.calibration)
    chosen = draw(job.space, held_out, seed=SEED, but=set(known))
    lowered = [[list(job.space.lower(each)) for each in some] for some in (known, chosen)]
    return chosen, *lowered


def tried(job, table, calibration, first, chains, figures):
    """The model of the calibration networks, and the held-out ones measured again; what both say
    goes into the figures.
    """
    second = networks_of(job, table, chains, timed(job, chains))
    model = fitted(calibration, job.recipe.calibration)
    figures |= held_against(model, first, second)
    figures["upper_ratio"] = model.upper_ratio
    figures["coverage_random"] = coverage(
        [n.observed_us / 1000 for n in first], [model.upper_ms(additive(model, n)) for n in first]
    )
    return model, second


def profiled(job, fit_chains, chains):
    """The table, the calibration networks and the held-out ones, with what the first two took."""
    start = time.monotonic()
    table = build_rows(
        job.profiler, job.space.lattice.ops, job.table_path, job.recipe.protocol,
        network_us=4000.0,
    )  # fmt: skip
    rows_s, start = time.monotonic() - start, time.monotonic()
    together = timed(job, [*fit_chains, *chains])
    networks_s = time.monotonic() - start
    blocks, held_out = together[: len(fit_chains)], together[len(fit_chains) :]
    everything = [*table.rows.values(), *table.chains.values()]
    rows_counted_s = sum(row.runs * row.median_us for row in everything) / 1e6
    counted_s, all_s = (
        sum(block[:, 0].sum() for each in some for block in each) / 1e6
        for some in (blocks, together)
    )
    figures = {
        "rows": len(table.rows),
        "chains": len(table.chains),
        "unstable_rows": sum(not row.stable for row in everything),
        "calibration_networks": len(fit_chains),
        "table_seconds": rows_s + networks_s * counted_s / all_s,
        "rows_seconds": rows_s,
        "counted_seconds": rows_counted_s + counted_s,
    }
    calibration = networks_of(job, table, fit_chains, blocks)
    return figures, table, calibration, networks_of(job, table, chains, held_out)


def networks_of(job, table, chains, blocks):
    """Networks with their blocks, priced by the table."""
    return measured_networks(chains, blocks, table, job.recipe)


def timed(job, chains):
    """The blocks of networks, each in the recipe's number of fresh processes."""
    with model_files(network_models(chains, job.profiler)) as paths:
        return measure_models(
            job.profiler, paths, job.recipe.protocol, processes=job.recipe.processes
        )


def additive(model, network):
    """The additive cost of a network, in us."""
    return sum(model.op_cost_us(precision, us) for precision, us in network.rows)


def coverage(observed, upper):
    """How often a bound held, with the 95 % interval of Clopper and Pearson (1934)."""
    held = int(np.sum(np.array(observed) <= np.array(upper)))
    interval = stats.binomtest(held, len(observed)).proportion_ci()
    return {"held": held, "of": len(observed), "low": interval.low, "high": interval.high}


def ways(job, table, calibration, chains, held_out, held_chains):
    """Ways to tell what an op costs inside a network, on the same networks to fit and to test."""
    alone = {key: row.median_us for key, row in table.rows.items()}
    ops = job.space.lattice.ops
    inside = dict(zip([op.key for op in ops], table.in_network_us(ops), strict=True))
    sloped, found = slopes(job, table), {}
    for name, costs in (("alone", alone), ("slopes", sloped), ("boundaries", inside)):
        fit = [priced(n, ops, costs) for n, ops in zip(calibration, chains, strict=True)]
        test = [priced(n, ops, costs) for n, ops in zip(held_out, held_chains, strict=True)]
        model = fitted(fit, job.recipe.calibration)
        predicted = np.array([predict_us(model, n) for n in test])
        true = np.array([n.latency_us for n in test])
        found[name] = told(predicted, true)
        used = job.recipe.calibration.fit
        better = refined(model, fit[:used], chains[:used], test, held_chains, costs)
        found[f"{name}, refined"] = told(better, true)
    return found


def told(predicted, true):
    """What is said of a way."""
    found = asdict(quality(predicted, true, 0.0))
    return {name: found[name] for name in ("mean_error", "worst_error", "tau")}


def priced(network, ops, costs):
    """The same network with other costs of its ops."""
    rows = tuple((op.precision.name, costs[op.key]) for op in ops)
    return MeasuredNetwork(rows, network.latency_us, network.observed_us, network.tails_us)


def slopes(job, table):
    """What ops cost inside a network as a device tells it that repeats ops: by slopes, and behind
    hosts. What the table has is not measured again.
    """
    profiler, ops = copy.copy(job.profiler), job.space.lattice.ops
    profiler.repeats = SLOPES
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / job.table_path.name
        told = empty_table(profiler, job.recipe.protocol).protocol
        replace(table, protocol=told).save(path)
        sloped = build_rows(profiler, ops, path, job.recipe.protocol)
    return dict(zip([op.key for op in ops], sloped.in_network_us(ops), strict=True))


def refined(model, fit, fit_chains, test, test_chains, costs):
    """Rows moved by what whole networks say of them: a ridge on relative errors, in its dual."""

    places = {key: place for place, key in enumerate(costs)}

    def parts_us(chains):
        result = np.zeros((len(chains), len(places)))
        for row, ops in enumerate(chains):
            for op in ops:
                result[row, places[op.key]] += costs[op.key]
        return result

    plain = np.array([predict_us(model, n) for n in (*fit, *test)])
    true = np.array([n.latency_us for n in fit])
    mine = parts_us(fit_chains) / true[:, None]
    kernel = REFINED**2 * mine @ mine.T + 0.01**2 * np.eye(len(fit))
    moves = REFINED**2 * mine.T @ np.linalg.solve(kernel, 1 - plain[: len(fit)] / true)
    return plain[len(fit) :] + parts_us(test_chains) @ moves


def under_limits(job, table, model, count, evaluations):
    """The network with the most MACs under each of some limits, exported and measured.

    In turns spread over the range, as searches follow each other: what a turn measures joins the
    calibration before the next. `use` is of what the limit was when it was searched for.
    """
    found = reachable(job.space, latency_cost(job.space, table, model))
    values = np.geomspace(1.05 * found.smallest, 0.9 * found.largest, count)
    turns, rows, chains = max(1, count // 10), [], []
    for turn in range(turns):
        bounded = model.at(MEDIAN)
        asked = values[turn::turns].tolist()
        best = [most_macs(job, table, bounded, value, evaluations) for value in asked]
        mine = [list(job.space.lower(architecture)) for architecture in best]
        for value, architecture, one in zip(
            asked, best, networks_of(job, table, mine, timed(job, mine)), strict=True
        ):
            cost_us, name = additive(model, one), " ".join(map(str, architecture.genes))
            rows.append({
                "turn": turn,
                "limit_ms": value,
                "upper_ms": bounded.upper_ms(cost_us),
                "predicted_ms": bounded.predict_ms(cost_us),
                "measured_ms": one.observed_us / 1000,
                "paced_ms": one.latency_us / 1000,
            })  # fmt: skip
            model = model.joined(MEDIAN, name, one.observed_us / 1000, cost_us)
        chains += mine
    for row, again in zip(rows, networks_of(job, table, chains, timed(job, chains)), strict=True):
        row["again_ms"] = again.observed_us / 1000
    use = np.array([row["measured_ms"] / row["limit_ms"] for row in rows])
    apart = np.array([abs(row["again_ms"] / row["measured_ms"] - 1) for row in rows])
    paced = np.array([row["paced_ms"] / row["predicted_ms"] for row in rows])
    figures = {
        "count": count,
        "median_use": float(np.median(use)),
        "most_use": float(use.max()),
        "over": int((use > 1).sum()),
        "repeatability": float(np.percentile(apart, 95)),
        "paced_bias": float(np.median(paced) - 1),
        "upper_ratio_after": model.at(MEDIAN).upper_ratio,
        "coverage_searched": held_bounds(rows),
        "coverage_once_joined": held_bounds([row for row in rows if row["turn"]] or rows),
    }
    return figures, rows


def most_macs(job, table, model, limit_ms, evaluations):
    """The network with the most MACs that a search finds under a limit."""
    cost, macs = latency_cost(job.space, table, model), counted_cost(job.space, "macs")
    strategy, score = Evolution(FeasibleSet(job.space, [Limit(cost, limit_ms)]), seed=0), {}
    while len(score) < evaluations and (asked := strategy.ask(50)):
        told = [(m,) for m in macs.totals(job.space, genes_of(asked)).tolist()]
        strategy.tell(asked, told)
        score |= dict(zip(asked, told, strict=True))
    return max(score, key=score.__getitem__)


def held_bounds(rows):
    """How often the bounds of searched networks held."""
    return coverage([row["measured_ms"] for row in rows], [row["upper_ms"] for row in rows])


def band(figures):
    """What is wrong with the figures."""
    complaints = []
    allowed = (0.01 if figures["space"] == "mobile" else 0.04) + figures["floor"]["mean_error"] / 2
    if figures["quality"]["mean_error"] > allowed:
        complaints.append(f"mean error {figures['quality']['mean_error']:.2%} above {allowed:.2%}")
    limits = figures["limits"]
    if limits["most_use"] > 1 + limits["repeatability"]:
        complaints.append(f"a network measures {limits['most_use']:.3f} of its limit")
    if figures["space"] == "mobile" and figures["table_seconds"] > 2 * figures["counted_seconds"]:
        complaints.append("the table took more than twice the time of its counted runs")
    return complaints
