"""Once-for-all's EvolutionFinder, run beside `search_speed` in an environment of its own.

Reads one request a line, as JSON, and answers each with a line. Its own MobileNetV3 space is
searched by its shipped code alone; `mobile` through an encoder and a look-up written here, of the
interface that the finder asks for. Seconds are this process's CPU seconds.
"""

import contextlib
import json
import random
import sys
import time
from types import ModuleType

import numpy as np
import torch


class Absent(ModuleType):
    """Stands in for what ofa imports for loading images, which nothing here does."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})


for absent in (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "ofa.utils.my_dataloader",
    "ofa.utils.my_dataloader.my_distributed_sampler",
    "ofa.utils.my_dataloader.my_random_resize_crop",
):
    sys.modules[absent] = Absent(absent)

from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3  # noqa: E402
from ofa.nas.accuracy_predictor import AccuracyPredictor, MobileNetArchEncoder  # noqa: E402
from ofa.nas.efficiency_predictor import Mbv3LatencyModel, MBv3LatencyTable  # noqa: E402
from ofa.nas.search_algorithm import EvolutionFinder  # noqa: E402

KERNELS, EXPANSIONS, DEPTHS, STAGES = [3, 5, 7], [3, 4, 6], [2, 3, 4], 5
SIZE = 224


class Asked(dict):
    """A table that notes the keys it is asked for, in order."""

    def __init__(self):
        super().__init__()
        self.keys_asked = []

    def __missing__(self, key):
        self.keys_asked.append(key)
        return {"mean": 0.0}


def own_space(rows):
    """Its space, its encoder and its latency model over a table of the keys that it asks for.

    `rows[stage][later][kernel][expansion]` is the latency of a stage's first or later blocks.
    """
    network = OFAMobileNetV3(
        n_classes=1000, ks_list=KERNELS, expand_ratio_list=EXPANSIONS, depth_list=DEPTHS
    )
    encoder = MobileNetArchEncoder([SIZE], KERNELS, EXPANSIONS, DEPTHS)
    model = Mbv3LatencyModel(network, {})
    table = MBv3LatencyTable.__new__(MBv3LatencyTable)  # its constructor downloads
    model.latency_tables = {SIZE: table}
    full = {}
    for k, kernel in enumerate(KERNELS):
        for e, expansion in enumerate(EXPANSIONS):
            table.lut = Asked()
            blocks = STAGES * max(DEPTHS)
            model.get_efficiency(
                {
                    "ks": [kernel] * blocks,
                    "e": [expansion] * blocks,
                    "d": [max(DEPTHS)] * STAGES,
                    "image_size": SIZE,
                }
            )
            keys = table.lut.keys_asked
            full |= {key: {"mean": 0.0} for key in keys}
            for place, key in enumerate(keys[2 : 2 + blocks]):
                stage, block = divmod(place, max(DEPTHS))
                full[key] = {"mean": rows[stage][min(block, 1)][k][e]}
    table.lut = full
    return model, encoder


def own_genes(arch):
    """A block's kernel and expansion as one number; 9 for a skip."""
    deepest = max(DEPTHS)
    return [
        KERNELS.index(k) * 3 + EXPANSIONS.index(e) if i % deepest < arch["d"][i // deepest] else 9
        for i, (k, e) in enumerate(zip(arch["ks"], arch["e"], strict=True))
    ]


class Genes:
    """The space `mobile` as an encoder: genes in a list, drawn and redrawn like ofa's own."""

    def __init__(self, levels, sizes):
        self.levels, self.sizes = levels, sizes
        self.starts = np.cumsum([0, *sizes])[:-1]
        self.n_dim = sum(sizes)

    def walk(self, genes):
        """The canonical genes and the op of every position."""
        state, start, canonical, ops = 0, 0, [], []
        for strides, nearest, own, op, target in self.levels:
            flat = 0
            for stride in strides:
                flat += stride * genes[start]
                start += 1
            edge = nearest[state][flat]
            canonical += own[edge]
            ops.append(op[edge])
            state = target[edge]
        return canonical, ops

    def arch2feature(self, arch):
        feature = np.zeros(self.n_dim)
        feature[self.starts + self.walk(arch["genes"])[0]] = 1
        return feature

    def random_sample_arch(self):
        return {"genes": [random.randrange(size) for size in self.sizes]}

    def mutate_resolution(self, arch, probability):
        return arch

    def mutate_arch(self, arch, probability):
        for place, size in enumerate(self.sizes):
            if random.random() < probability:
                arch["genes"][place] = random.randrange(size)
        return arch


class Latency:
    """The sum of a table's rows over the ops of `mobile`."""

    def __init__(self, encoder, per_op):
        self.encoder, self.per_op = encoder, [*per_op, 0.0]

    def get_efficiency(self, arch):
        return sum(self.per_op[op] for op in self.encoder.walk(arch["genes"])[1])


def answer(request, spaces):
    """What a request gives."""
    model, encoder = spaces[request["space"]]
    random.seed(request["seed"])
    np.random.seed(request["seed"])
    torch.manual_seed(0)
    accuracy = AccuracyPredictor(encoder, device="cpu")
    if request["do"] == "checks":
        arches = [encoder.random_sample_arch() for _ in range(request["count"])]
        start = time.process_time()
        latencies = [model.get_efficiency(arch) for arch in arches]
        return {"seconds": time.process_time() - start, "latencies": latencies}
    start = time.process_time()
    finder = EvolutionFinder(model, accuracy, **request["options"])
    _, (score, arch, latency) = finder.run_evolution_search(request["limit"])
    seconds = time.process_time() - start
    genes = own_genes(arch) if request["space"] == "ofa" else encoder.walk(arch["genes"])[0]
    return {"seconds": seconds, "score": score, "genes": genes, "latency": latency}


def main():
    """Take the spaces from the first line, then answer line by line."""
    torch.set_num_threads(1)
    told = json.loads(sys.stdin.readline())
    encoder = Genes(told["levels"], told["sizes"])
    spaces = {"ofa": own_space(told["rows"]), "mobile": (Latency(encoder, told["per_op"]), encoder)}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(json.loads(line), spaces)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
