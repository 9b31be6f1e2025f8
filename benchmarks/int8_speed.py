"""Is our integer network as fast as the best that ONNX Runtime's own quantiser makes of our floats?

Networks of `mobile` at 224 pixels: the smallest, the largest and some random ones. Each has one set
of shared weights, untrained but with norms and ranges from images, and is exported in fp32, in w8a8
(the stem in fp32, as the space has it; and whole), and with fp32 and w8a8 mixed at random.
`onnxruntime.quantization.quantize_static` gets the fp32 file: at its best settings (unsigned
activations, signed weights per channel, their whole range, after its own preparation) and as it is.
All files of a network take turns, in an order of each turn's own, in fresh processes; ours does so
twice, which tells how much two timings of one file differ. Times are told at the core's pace.

Band: in the geometric mean over networks ours takes at most as long as what `quantize_static` makes
at its best, and no network takes longer, within the most that a second copy of ours differs by.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from scipy import stats

from hwnas.calibration import draw
from hwnas.costs.feasible import reachable
from hwnas.costs.limits import counted_cost
from hwnas.export.onnx_file import write_onnx
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.registry import load_space
from hwnas.supernet.network import Supernet
from profilers.build import measure_models
from profilers.devices import open_profiler
from profilers.measure import Protocol
from profilers.ort import optimised_operators

PRECISIONS = ("fp32", "w8a8")
STEM = "stem.precision"
MIXES = ("mixed_0", "mixed_1")
IMAGES = 4
SEED = 2
"""Networks apart from those that latency models are calibrated on."""

RATIOS = {
    "ratio_to_best": [("ours", "best")],
    "ratio_to_default": [("ours", "default")],
    "ratio_to_fp32": [("ours", "fp32")],
    "best_to_fp32": [("best", "fp32")],
    "whole_to_best": [("ours_whole", "best")],
    "mixed_to_int8": [(mix, "ours") for mix in MIXES],
    "mixed_to_fp32": [(mix, "fp32") for mix in MIXES],
    "copy": [("ours_copy", "ours")],
}
"""Each figure, with the pairs of files that it is the ratio of."""


def measure(*, reduced: bool):
    """Export, quantise and time every network."""
    random, processes = (1, 5) if reduced else (5, 15)
    protocol = Protocol(warmup_ms=20.0, block_ms=100.0)
    space = load_space("mobile", classes=1000, image_channels=3, size=224)
    ends = reachable(space, counted_cost(space, "macs"))
    chosen = [ends.cheapest, ends.dearest, *draw(space, random, seed=SEED)]
    profiler, raw = open_profiler("cpu"), []
    for number, architecture in enumerate(chosen):
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(precisions_of(space, architecture), profiler, Path(folder), number)
            blocks = measure_models(profiler, list(files.values()), protocol, processes=processes)
            raw.append({
                "architecture": space.describe(architecture),
                "operators": {
                    name: dict(optimised_operators(onnx.load(path)))
                    for name, path in files.items() if name != "ours_copy"
                },
                "paced": {
                    name: [paced(block) for block in each]
                    for name, each in zip(files, blocks, strict=True)
                },
                "ms": {
                    name: [float(np.median(block[:, 0])) / 1000 for block in each]
                    for name, each in zip(files, blocks, strict=True)
                },
            })  # fmt: skip
    ms = [{name: float(np.median(each)) for name, each in found["ms"].items()} for found in raw]
    return {"figures": {"median_ms": ms} | ratios(raw), "raw": raw}


def precisions_of(space, architecture):
    """The space of a network's blocks and widths, with the precision of each op to choose."""
    values = space.describe(architecture)

    def left(position):
        return {
            name: PRECISIONS
            if name == "precision"
            else [v for v in options if str(v) == values.get(f"{position.name}.{name}", str(v))]
            for name, options in position.options.items()
        }

    positions = tuple(replace(position, options=left(position)) for position in space.positions)
    return SearchSpace(space.name, space.input, positions, space.classes)


def write_files(space, profiler, folder, seed):
    """Our files of a network, and what `quantize_static` makes of the fp32 one."""
    torch.manual_seed(seed)
    supernet = Supernet(space, profiler.runtime)
    rng = np.random.default_rng(seed)
    shape = (IMAGES, space.input.channels, space.input.height, space.input.width)
    images = torch.from_numpy(rng.random(shape, np.float32))
    supernet.initialise_ranges(images)
    stem = [gene.name for gene in space.genes].index(STEM)
    genes = {"fp32": np.zeros(len(space.genes), int), "ours_whole": np.ones(len(space.genes), int)}
    genes["ours"] = genes["ours_whole"].copy()
    genes |= {mix: rng.integers(2, size=len(space.genes)) for mix in MIXES}
    for name in ("ours", *MIXES):
        genes[name][stem] = 0
    files = {}
    for name, each in genes.items():
        architecture = space.architecture(each.tolist())
        network = supernet.extract(architecture, supernet.recalibrate(architecture, [images]))
        files[name] = folder / f"{name}.onnx"
        write_onnx(network, profiler, files[name])
    files["ours_copy"] = folder / "ours_copy.onnx"
    files["ours_copy"].write_bytes(files["ours"].read_bytes())
    files["default"], files["best"] = folder / "default.onnx", folder / "best.onnx"
    quantize_static(files["fp32"], files["default"], Reader(images.numpy()))
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(files["fp32"]), str(prepared))
    quantize_static(
        prepared,
        files["best"],
        Reader(images.numpy()),
        per_channel=True,
        reduce_range=False,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return files


class Reader(CalibrationDataReader):
    """Images one by one, as `quantize_static` takes them."""

    def __init__(self, images):
        self.images = iter(images[:, None])

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"input": image}


def paced(block):
    """The median call of a block in units of the pace around it."""
    return float(np.median(block[:, 0] / block[:, 1]))


def ratios(raw):
    """Each ratio, the geometric mean over networks; beside it, in `over_networks`, its 95 % t
    interval and that of each network, the median over processes.
    """
    figures, over_networks = {}, {}
    for figure, pairs in RATIOS.items():
        each = [
            float(np.median(np.divide(found["paced"][ours], found["paced"][theirs])))
            for found in raw
            for ours, theirs in pairs
        ]
        logs = np.log(each)
        low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
        figures[figure] = float(np.exp(logs.mean()))
        over_networks[figure] = {
            "low": float(np.exp(low)), "high": float(np.exp(high)), "each": each,
        }  # fmt: skip
    return figures | {"over_networks": over_networks}


def band(figures):
    """What is wrong with the figures."""
    noise = max(abs(ratio - 1) for ratio in figures["over_networks"]["copy"]["each"])
    complaints = []
    if figures["ratio_to_best"] > 1 + noise:
        complaints.append(
            f"ours takes {figures['ratio_to_best']:.3f} times as long as the best (+-{noise:.3f})"
        )
    for number, ratio in enumerate(figures["over_networks"]["ratio_to_best"]["each"]):
        if ratio > 1 + noise:
            complaints.append(f"network {number} takes {ratio:.3f} times as long (+-{noise:.3f})")
    return complaints
