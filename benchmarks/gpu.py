"""What holds on an NVIDIA GPU? `python -m benchmarks run gpu`, on a machine that has one.

Which backend runs on the card is tried first. On each that does, at batches of 1 and 64: a table of
`mobile` with one width a stage, held against 30 networks that it has not seen; then the largest
networks under 10 limits, measured. On the same networks the order of this machine's CPU is held
against the GPU's (after MoGA, Chu et al. 2020, table 2, whose networks change places between a CPU
and a GPU). Last, what sharing costs a training step.

Band: mean error at most 3 %, tau at least 0.95, no network over its limit by more than the
repeatability; a step of a sampled path at most 1.05 times the same network alone, 1.25 times in
mixed precision.
"""

import itertools
import tempfile
from dataclasses import asdict
from pathlib import Path

from scipy import stats

from benchmarks import train_step
from benchmarks.tables import drawn, profiled, timed, tried, under_limits
from hwnas.calibration import draw
from hwnas.job import Job, Request
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.ops import total
from profilers.cuda import card, open_cuda
from profilers.devices import open_profiler
from profilers.measure import summarise
from quant.errors import HwnasError
from quant.precision import Precision

BACKENDS = ("gpu", "gpu-torch")
PRECISIONS = ("fp32", "fp16", "w8a8")
RECIPE = {"name": "standard", "processes": 2, "calibration": {"fit": 20, "bound": 40, "test": 4}}
MEAN_ERROR, TAU = 0.03, 0.95


def space(*, classes, image_channels=3, size=224, precisions=PRECISIONS):
    """The preset's stages with a width each: hundreds of rows, not thousands."""
    stages = (
        Stage(1, 1, (16,)), Stage(3, 2, (32,)), Stage(4, 2, (48,), squeeze=4), Stage(4, 2, (80,)),
        Stage(3, 1, (112,), squeeze=4), Stage(3, 2, (160,), squeeze=4),
    )  # fmt: skip
    return mobile(
        "mobile, one width a stage", stages, classes=classes, size=size,
        image_channels=image_channels, head_channels=960, kernels=(3, 5), precisions=precisions,
    )  # fmt: skip


def measure(*, reduced: bool):
    """Everything, on the backends that run; raises MissingDependency where there is no GPU."""
    gpu = card()
    tried = {device: refusal_of(device) for device in BACKENDS}
    figures = {
        "gpu": asdict(gpu),
        "memory": open_cuda().name,
        "backends": {device: refusal or "runs" for device, refusal in tried.items()},
        "tables": {},
    }
    raw = {}
    for device, batch in itertools.product(BACKENDS, (1,) if reduced else (1, 64)):
        if not tried[device]:
            name = f"{device}, batch {batch}"
            figures["tables"][name], raw[name] = table(device, batch, reduced=reduced)
    sharing = {}
    for size, images in ((32, 96),) if reduced else ((32, 96), (224, 128)):
        found = train_step.on("cuda", size=size, batch=images, paths=5 if reduced else 20)
        raw[f"steps at {size} px"] = found.pop("raw")
        sharing[f"{size} px"] = found
    return {"figures": figures | {"sharing": sharing}, "raw": raw}


def refusal_of(device):
    """Why a backend does not run on this card; "" where it does, with the right output."""
    try:
        profiler = open_profiler(device)
        request = Request(space="mobile-tiny", device=device, precisions=runnable(profiler))
        job = Job(request)
        for architecture in draw(job.space, 3):
            ops = job.space.lower(architecture)
            next(iter(timed(job, [ops])))
    except HwnasError as error:
        return str(error)
    return ""


def runnable(profiler):
    """Which of the precisions a backend has kernels for."""
    found = []
    for name in PRECISIONS:
        try:
            profiler.runtime.kernel(Precision(name))
        except HwnasError:
            continue
        found.append(name)
    return tuple(found)


def table(device, batch, *, reduced):
    """A table, the networks that it has not seen, the limits, and the CPU's order of the same."""
    limits, evaluations, held_out = (3, 200, 10) if reduced else (10, 2000, 30)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            Request(
                space=f"{__file__}:space", data="none:1000", device=device, batch=batch,
                precisions=runnable(open_profiler(device)), recipe=RECIPE, tables=Path(folder),
            )
        )  # fmt: skip
        chosen, fit_chains, chains = drawn(job, held_out)
        figures, rows, calibration, first = profiled(job, fit_chains, chains)
        model, second = tried(job, rows, calibration, first, chains, figures)
        figures["precisions"] = list(job.request.precisions)
        figures["limits"], searched = under_limits(job, rows, model, limits, evaluations)
        raw = {
            "held_out": [asdict(n) | {"again_us": m.latency_us}
                         for n, m in zip(first, second, strict=True)],
            "searched": searched,
        }  # fmt: skip
        if batch == 1:
            figures["order"], raw["order"] = order(job, chosen)
    for network in raw["held_out"]:
        del network["rows"]
    return figures, raw


def order(job, architectures):
    """Whether networks that are quicker on the GPU are quicker on this machine's CPU, in fp32."""
    cpu = Job(Request(space=job.request.space, data="none:1000", precisions=("fp32",)))
    known = {gene.name for gene in cpu.space.genes}
    in_fp32 = [
        cpu.space.parse({n: x for n, x in job.space.describe(each).items() if n in known})
        for each in architectures
    ]
    chains = [list(cpu.space.lower(architecture)) for architecture in in_fp32]
    on_cpu_ms, on_gpu_ms = (
        [summarise(each, where.recipe.protocol).median_us / 1000 for each in timed(where, chains)]
        for where in (cpu, job)
    )
    macs = [float(total("macs", ops)) for ops in chains]
    figures = {
        "tau_cpu_gpu": tau(on_cpu_ms, on_gpu_ms),
        "tau_macs_cpu": tau(macs, on_cpu_ms),
        "tau_macs_gpu": tau(macs, on_gpu_ms),
        "pairs_that_change_places": changed(on_cpu_ms, on_gpu_ms),
    }
    rows = [
        {"cpu_ms": c, "gpu_ms": g, "macs": m}
        for c, g, m in zip(on_cpu_ms, on_gpu_ms, macs, strict=True)
    ]
    return figures, rows


def tau(first, second):
    """Kendall's tau."""
    return float(stats.kendalltau(first, second).statistic)


def changed(first, second, *, margin=0.05):
    """The share of pairs of which one is quicker by the margin here, and the other there."""
    pairs = list(itertools.combinations(range(len(first)), 2))

    def quicker(times, i, j):
        return times[i] * (1 + margin) < times[j]

    swapped = sum(
        (quicker(first, i, j) and quicker(second, j, i))
        or (quicker(first, j, i) and quicker(second, i, j))
        for i, j in pairs
    )
    return swapped / len(pairs)


def band(figures):
    """What is wrong with the figures."""
    complaints = [] if figures["tables"] else ["no backend runs on this card"]
    for name, found in figures["tables"].items():
        quality, limits = found["quality"], found["limits"]
        if quality["mean_error"] > MEAN_ERROR:
            complaints.append(f"{name}: mean error {quality['mean_error']:.2%}")
        if quality["tau"] < TAU:
            complaints.append(f"{name}: tau {quality['tau']:.3f}")
        if limits["most_use"] > 1 + limits["repeatability"]:
            complaints.append(f"{name}: a network measures {limits['most_use']:.3f} of its limit")
    for size, found in figures["sharing"].items():
        complaints += [f"{size}: {text}" for text in train_step.sharing_band(found)]
    return complaints
