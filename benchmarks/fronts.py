"""Is a search over precisions better than the best uniform precision, at equal measured latency?

Fashion-MNIST (in the folder that HWNAS_DATA_DIR names) at 24 x 24 pixels, a small space of widths,
expansions and depths with fp32 and w8a8 for each block. A seed trains one supernet. Under each of
some limits it is searched three times, with as many evaluations each: with all precisions, with
fp32 alone and with w8a8 alone, in spaces that share its weights. The best network of each search is
retrained, all of them in the same way, exported, measured, and scored on TEST.

A front's hypervolume is the area that it dominates above `LEAST_ACCURACY`, from the smallest limit
to 1.05 times the largest, divided by that distance: the accuracy above the reference that it has in
the mean over latencies. Its difference from that of the better uniform precision, seed by seed, has
a 95 % t interval.

Band: the interval of that difference does not lie below zero: a search that may mix precisions
loses nothing that can be told from chance. Above zero it is a gain; a gain is not asked for.
Reduced: one seed on digits, with tiny budgets.
"""

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Limit, latency_cost
from hwnas.export.onnx_file import accuracy, write_onnx
from hwnas.job import Job, Request
from hwnas.job import measure as measured
from hwnas.retrain import retrain
from hwnas.run import open_run
from hwnas.scoring import evaluator, train
from hwnas.spaces.mobile import Stage, mobile
from profilers.build import quiet
from quant.errors import InvalidInput

PRECISIONS = ("fp32", "w8a8")
MODES = {"mixed": PRECISIONS, "fp32": ("fp32",), "w8a8": ("w8a8",)}
LIMITS = 4
SIZE = 24
LEAST_ACCURACY = 0.7
RECIPE = {
    "name": "quick",
    "supernet": {"steps": 600, "batch": 64},
    "retrain": {"steps": 250, "batch": 64, "learning_rate": 0.01},
    "evaluations": 24,
    "population": 8,
    "recalibration_images": 128,
    "validation_images": 512,
    "calibration": {"fit": 20, "bound": 39, "test": 10},
}
LESS = {
    "supernet": {"steps": 300, "batch": 32},
    "retrain": {"steps": 60, "batch": 32},
    "evaluations": 12,
    "population": 6,
    "processes": 2,
    "calibration": {"fit": 12, "bound": 19, "test": 8},
}
COLOURS = {"mixed": "#c03028", "fp32": "#3060b0", "w8a8": "#309050"}


def fronts_space(*, classes, image_channels=1, size=SIZE, precisions=PRECISIONS):
    """Widths, expansions, depths and precisions."""
    return mobile(
        "fronts",
        (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 64, 96)), Stage(2, 2, (64, 128, 192))),
        classes=classes,
        size=size,
        image_channels=image_channels,
        kernels=(3,),
        expansions=(2, 4),
        precisions=precisions,
    )


def measure(*, reduced: bool):
    """Search, retrain, export and measure, seed by seed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            space=f"{__file__}:fronts_space",
            data="digits" if reduced else fashion_mnist(),
            image_size=SIZE,
            recipe=RECIPE | (LESS if reduced else {}),
            tables=Path(folder),
        )
        job = Job(request)
        sides = {mode: Side(job, names) for mode, names in MODES.items()}
        ranges = [reachable(side.space, side.latency) for side in sides.values()]
        limits = np.geomspace(
            1.1 * max(found.smallest for found in ranges),
            min(found.largest for found in ranges),
            LIMITS,
        ).tolist()
        rows = [
            row
            for seed in range(1 if reduced else 3)
            for row in of_seed(job, sides, limits, seed, Path(folder))
        ]
        quality = asdict(job.model.quality)
    figures = {"limits_ms": limits, "quality": quality, **compared(rows, limits)}
    return {"figures": figures, "raw": rows, "pictures": {"fronts.svg": picture(rows, limits)}}


def fashion_mnist():
    """The data, as `--data` names it."""
    folder = os.environ.get("HWNAS_DATA_DIR")
    if not folder:
        raise InvalidInput(
            "HWNAS_DATA_DIR is not set.", accepted="a folder with Fashion-MNIST's four files in it"
        )
    return f"fashion-mnist:{folder}"


class Side:
    """The networks of some precisions, as a space of their own over a job's table and weights."""

    def __init__(self, job, names):
        data = job.splits
        self.whole, self.names = job.space, names
        self.space = fronts_space(
            classes=data.classes, image_channels=data.channels, size=data.size, precisions=names
        )
        self.latency = latency_cost(self.space, job.table, job.model)

    def in_whole(self, architecture):
        """The same network in the space of all precisions."""
        told = self.space.describe(architecture)
        return self.whole.architecture(
            [gene.choices.index(told.get(gene.name, self.names[0])) for gene in self.whole.genes]
        )


def of_seed(job, sides, limits, seed, folder):
    """The finalist of each search under each limit, retrained, exported and measured."""
    asked = replace(job.request, seed=seed, run=folder / str(seed))
    mine = Job(asked)
    score = evaluator(mine, train(mine, open_run(mine)))
    found = {
        (mode, limit): searched(job, side, limit, score, seed)
        for limit in limits
        for mode, side in sides.items()
    }
    shipped = {}
    for number, architecture in enumerate(dict.fromkeys(found.values())):
        network = score.supernet.extract(architecture, score.statistics(architecture))
        retrain(network, job.splits, job.recipe.retrain, seed=seed, progress=quiet)
        path = folder / f"{seed}-{number}.onnx"
        model = write_onnx(network, job.profiler, path)
        with job.profiler.prepare(model) as session, job.splits.final() as images:
            shipped[architecture] = path, accuracy(session, images)
    times = measured(job, [path for path, _ in shipped.values()])
    latency = dict(zip(shipped, (m.latency_us / 1000 for m in times), strict=True))
    return [
        {
            "seed": seed,
            "mode": mode,
            "limit_ms": limit,
            "latency_ms": latency[architecture],
            "test": shipped[architecture][1],
            "search_val_shared": score(architecture).accuracy,
            "integer_share": integer_share(job.space.lower(architecture)),
            "architecture": job.space.describe(architecture),
        }
        for (mode, limit), architecture in found.items()
    ]


def searched(job, side, limit, score, seed):
    """The best network that the job's method finds on a side under a limit."""
    feasible = FeasibleSet(side.space, [Limit(side.latency, limit)])
    strategy, scores = job.method.strategy(feasible, seed, job.recipe), {}
    while left := job.recipe.evaluations - len(scores):
        asked = strategy.ask(min(job.recipe.population, left))
        if not asked:
            break
        told = [score(side.in_whole(architecture)).score for architecture in asked]
        strategy.tell(asked, told)
        scores |= dict(zip(asked, told, strict=True))
    return side.in_whole(max(scores, key=scores.__getitem__))


def integer_share(ops):
    """The share of a network's MACs that integer kernels do."""
    return sum(op.macs for op in ops if op.precision.is_integer) / sum(op.macs for op in ops)


# ---- fronts


def hypervolume(points, first, last, least):
    """The area that points (latency, accuracy) dominate above an accuracy, between latencies."""
    area, best, start = 0.0, least, first
    for time, right in sorted(points):
        if time < last and right > best:
            area += (best - least) * (max(time, first) - start)
            start, best = max(time, first), right
    return area + (best - least) * (last - start)


def compared(rows, limits):
    """The hypervolume of each front, seed by seed, and their differences."""
    seeds, most = sorted({row["seed"] for row in rows}), 1.05 * limits[-1]

    def volumes(*modes):
        fronts = [
            [(row["latency_ms"], row["test"]) for row in rows if row["seed"] == seed
             and row["mode"] in modes]
            for seed in seeds
        ]  # fmt: skip
        return np.array(
            [
                hypervolume(front, limits[0], most, LEAST_ACCURACY) / (most - limits[0])
                for front in fronts
            ]
        )

    found = {mode: volumes(mode) for mode in MODES}
    better = max((found[mode] for mode in PRECISIONS), key=np.mean)
    found |= {"both_uniform": volumes(*PRECISIONS), "all": volumes(*MODES)}
    differences = {
        "mixed_to_better_uniform": found["mixed"] - better,
        "mixed_to_both_uniform": found["mixed"] - found["both_uniform"],
        "all_to_both_uniform": found["all"] - found["both_uniform"],
    }
    return {
        "hypervolume": {mode: each.tolist() for mode, each in found.items()},
        "differences": {name: interval(each) for name, each in differences.items()},
        "at_limits": [
            {"limit_ms": limit}
            | {mode: means([r for r in rows if (r["mode"], r["limit_ms"]) == (mode, limit)])
               for mode in MODES}
            for limit in limits
        ],
        "most_use": max(row["latency_ms"] / row["limit_ms"] for row in rows),
    }  # fmt: skip


def means(rows):
    """What the finalists of one search are in the mean over seeds."""
    names = ("latency_ms", "test", "integer_share")
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def interval(values):
    """The mean with its 95 % t interval, which takes two values at least."""
    told = {"mean": float(values.mean()), "each": values.tolist()}
    if len(values) > 1:
        ends = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        told |= dict(zip(("low", "high"), map(float, ends), strict=True))
    return told


def band(figures):
    """What is wrong with the figures."""
    found = figures["differences"]["mixed_to_better_uniform"]
    if found.get("high", 0.0) < 0:
        return [f"mixed precision loses {-found['mean']:.4f} of hypervolume to a uniform one"]
    return []


def picture(rows, limits):
    """The fronts as an SVG: a line a search and seed, a dot a network, limits as grey lines."""
    width, height, edge = 760, 480, 60
    times, rights = ([row[name] for row in rows] for name in ("latency_ms", "test"))
    left, right = 0.9 * min(times), 1.05 * max(*times, *limits)
    bottom, top = min(rights) - 0.01, max(rights) + 0.01

    def x(ms):
        return edge + (ms - left) / (right - left) * (width - 2 * edge)

    def y(share):
        return height - edge - (share - bottom) / (top - bottom) * (height - 2 * edge)

    def text(at_x, at_y, words, anchor="middle", colour="#333"):
        return (
            f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}">'
            f"{words}</text>"
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(width / 2, height - 12, "measured latency, ms (grey: the limits)"),
        text(edge, 24, "accuracy on TEST after retraining", "start"),
    ]
    for limit in limits:
        parts.append(f'<path d="M{x(limit):.1f} {y(top):.1f}V{y(bottom):.1f}" stroke="#ccc"/>')
        parts.append(text(x(limit), height - edge + 18, f"{limit:.3f}"))
    for share in np.linspace(bottom, top, 6):
        parts.append(text(edge - 8, y(share) + 4, f"{share:.3f}", "end"))
    for number, mode in enumerate(MODES):
        parts.append(text(width - edge, 24 + 16 * number, mode, "end", COLOURS[mode]))
        for seed in sorted({row["seed"] for row in rows}):
            front = sorted(
                (row["latency_ms"], row["test"])
                for row in rows
                if (row["mode"], row["seed"]) == (mode, seed)
            )
            line = "L".join(f"{x(ms):.1f} {y(share):.1f}" for ms, share in front)
            parts.append(f'<path d="M{line}" fill="none" stroke="{COLOURS[mode]}" opacity="0.4"/>')
            parts += [
                f'<circle cx="{x(ms):.1f}" cy="{y(share):.1f}" r="4" fill="{COLOURS[mode]}"/>'
                for ms, share in front
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"
