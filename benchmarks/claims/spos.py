"""Does SPOS (Guo et al. 2019) hold here? `python -m benchmarks.claims.spos` tells in ten minutes.

Digits of 8 x 8 pixels, in spaces small enough to know the truth, on two processes. Every threshold
stands below, fixed before the seeds that are counted were run.

1. Rank. 81 networks (4 layers of 3 blocks): Kendall's tau-b between their accuracies on SEARCH-VAL
   with shared weights, after 1,500 steps, and those on TEST of the same networks trained alone, 150
   steps and the mean of two seeds. Beside it the tau between the two seeds, which is what one more
   training would tell (their mean is less noisy than either, so that shared weights can be above
   it), and what the order by MACs would give.
2. Recalibration. The mean accuracy over the 81 networks with norms recalibrated for each, less that
   with the running statistics that all paths share.
3. Search. 4^8 networks under a limit that 60 % meet: nothing proposed is over it, and with at least
   four seeds of five evolution ends as high as random search after as many evaluations.
4. Slicing. Of networks of many widths, blocks and precisions, what is extracted answers as the
   shared weights do.
5. Bits. A ResNet with six pairs of bits (DoReFa weights, PACT activations): the network found
   within the BitOPs of uniform 2W2A is, retrained, about as good as that one at least.

And two checks are shown to fail where they must: the rank with its networks mixed up, and the rule
that a step leaves alone what its path does not use where gradients are zeroed instead of removed.
"""

import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy import stats

from benchmarks.__main__ import run
from hwnas.batches import in_order
from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import Limit, counted_cost
from hwnas.costs.population import genes_of
from hwnas.costs.samplers import UniformSampler
from hwnas.data import load
from hwnas.recipes import RECIPES
from hwnas.retrain import retrain
from hwnas.search.evolution import Evolution
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, inverted_residual
from hwnas.spaces.mobile import Stage, mobile
from hwnas.spaces.parts import Stage as Stages
from hwnas.spaces.parts import conv_stem, one_op
from hwnas.spaces.resnet import resnet
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import train_supernet
from latency_tables.ops import Tensor, total
from profilers.build import quiet
from profilers.modules import Network
from quant.precision import Precision

LEAST_TAU = 0.30
NULL_TAU_SD = 0.076
"""The standard deviation of tau between 81 numbers and others that have nothing to do with them."""
LEAST_WINS = 4
MOST_APART = 1e-5
MOST_LOST = 0.003

SEEDS, ALONE_SEEDS, SEARCH_SEEDS, BITS_SEEDS = (1, 2, 3), (2, 3), range(5), range(3)
"""Seed 0, and 1 alone, were for choosing how large spaces and budgets are: they are not counted."""
EVALUATIONS, POPULATION, PARENTS, CHILDREN = 160, 20, 5, 8
LEAST = 2 * POPULATION
"""Evaluations, however much is left out: the first population is the same on both sides."""
SHARE_WITHIN = 0.6
SLICED = 20
PROCESSES = 2

BLOCKS = {"k3e1": (3, 1), "k5e2": (5, 2), "k3e4": (3, 4)}
FOUR_BLOCKS = {"k3e1": (3, 1), "k5e1": (5, 1), "k3e3": (3, 3), "k5e3": (5, 3)}
PAIRS = ((1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4))
"""Bits of weights and activations, as SPOS searched them."""
UNIFORM = (2, 2)

QUICK = RECIPES["quick"]
SHARED = QUICK.supernet.model_copy(update={"steps": 1500, "batch": 128})
SHORT = SHARED.model_copy(update={"steps": 40})
ALONE = QUICK.retrain.model_copy(update={"steps": 150, "batch": 128})
RETRAINED = QUICK.retrain.model_copy(update={"steps": 300, "batch": 128})
SIZE, RECALIBRATED = 8, 900
FP32 = Precision("fp32")


def measure(*, reduced: bool):
    """All checks, shared out to two processes."""
    shorter = 10 if reduced else 1
    context = get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        found = pool.submit(searched, shorter)
        bits = pool.submit(low_bits, PAIRS, "pact-", shorter)
        shared = [pool.submit(shared_scores, seed, shorter) for seed in SEEDS]
        alone = [
            list(pool.map(partial(trained_alone, seed=seed, shorter=shorter), range(81)))
            for seed in ALONE_SEEDS
        ]
        sliced, untouched = pool.submit(slices), [pool.submit(rule_one, way) for way in (1, 0)]
        scores = [future.result() for future in shared]
        figures = {
            "rank": rank([score["recalibrated"] for score in scores], alone),
            "recalibration": {
                "gains": [float(np.mean(s["recalibrated"]) - np.mean(s["tracked"])) for s in scores]
            },
            "search": found.result(),
            "slicing": sliced.result(),
            "bits": bits.result(),
            "unsampled_untouched": untouched[0].result(),
            "controls": {
                "mixed_up": mixed_up([score["recalibrated"] for score in scores], alone),
                "untouched_with_zeroed_gradients": untouched[1].result(),
            },
        }
    return {"figures": figures, "raw": {"shared": scores, "alone": alone}}


# ---- the spaces


def chain(name, layers, blocks):
    """A stem, layers of (channels, stride) with a block to choose each, and a head."""
    stem = conv_stem(16, 1, ("fp32",))
    head = one_op(
        "head", ("fp32",), lambda x, precision: classifier(x, 64, 10, precision=precision)
    )
    middle = [
        Position(f"layer{number}", {"block": tuple(blocks)}, block(blocks, channels, stride))
        for number, (channels, stride) in enumerate(layers)
    ]
    positions = (stem, *middle, head)
    return SearchSpace(name, Tensor(1, SIZE, SIZE), positions, 10)


def block(blocks, channels, stride):
    """A layer that is one of some inverted residuals, each with weights of its own."""

    def build(state, values):
        kernel, expansion = blocks[values["block"]]
        op = inverted_residual(
            state.tensor, channels, kernel=kernel, expansion=expansion, stride=stride,
            precision=FP32,
        )  # fmt: skip
        return Choice(op, State(op.output), values["block"])

    return build


@cache
def ranked_space():
    """4 layers of 3 blocks: all 81 networks can be trained."""
    return chain("ranked", ((24, 2), (24, 1), (32, 1), (32, 2)), BLOCKS)


@cache
def searched_space():
    """8 layers of 4 blocks."""
    layers = ((16, 1), (16, 1), (24, 2), (24, 1), (24, 1), (32, 2), (32, 1), (32, 1))
    return chain("searched", layers, FOUR_BLOCKS)


@cache
def sliced_space():
    """Widths, kernels, expansions and precisions over shared weights."""
    return mobile(
        "sliced", (Stage(2, 1, (16, 24, 32)), Stage(2, 2, (24, 32, 48))), classes=10, size=SIZE,
        image_channels=1, stem_stride=1, kernels=(3, 5), expansions=(2, 3),
    )  # fmt: skip


def bits_space(names):
    """A ResNet of three blocks, six convolutions beside the shortcuts; stem and head are float."""
    return resnet(
        "bits", (Stages(1, 16, 1), Stages(2, 32)), classes=10, size=SIZE, image_channels=1,
        pooled=False, stem_channels=16, multipliers=(1.0,), precisions=names,
    )  # fmt: skip


# ---- what runs in a process of its own


@cache
def digits():
    """The digits, 8 x 8."""
    return load("digits", size=SIZE, resize=True)


def fresh(space, seed):
    """A supernet before its training."""
    torch.manual_seed(seed)
    return Supernet(space)


def train(supernet, recipe, seed, sampler=None, progress=quiet):
    """Train a supernet on uniform paths, or on a sampler's; the answer is the supernet."""
    with tempfile.TemporaryDirectory() as folder:
        train_supernet(
            supernet, digits(), sampler or UniformSampler(supernet.space), recipe,
            seed=seed, checkpoint=Path(folder) / "supernet.pt", progress=progress,
        )  # fmt: skip
    return supernet


@contextmanager
def tracked(supernet, momentum=0.1) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Running means and variances of each layer over whatever path comes, as a plain batch norm
    keeps them, by the layer's name.
    """
    known = {}

    def see(name, _layer, _inputs, output):
        if output.ndim == 4 and len(output) > 1:
            variance, mean = torch.var_mean(output.detach(), (0, 2, 3))
            old = known.setdefault(name, (torch.zeros_like(mean), torch.ones_like(variance)))
            for running, new in zip(old, (mean, variance), strict=True):
                running.lerp_(new, momentum)

    hooks = [
        layer.register_forward_hook(partial(see, name)) for name, layer in supernet.layers.items()
    ]
    yield known
    for hook in hooks:
        hook.remove()


def shortened(recipe, shorter):
    """The recipe with so many times fewer steps."""
    return recipe.model_copy(update={"steps": max(1, recipe.steps // shorter)})


def evaluator(supernet):
    """Scores on all of SEARCH-VAL, with norms over all of TRAIN."""
    return Evaluator(
        supernet, digits(), recalibration_images=RECALIBRATED, validation_images=400, batch=100
    )


def shared_scores(seed, shorter):
    """The accuracy of each of the 81 networks with shared weights: recalibrated, and tracked."""
    space = ranked_space()
    supernet = fresh(space, seed)
    with tracked(supernet) as known:
        train(supernet, shortened(SHARED, shorter), seed)
    score, scores = evaluator(supernet), {"recalibrated": [], "tracked": []}
    for architecture in space.enumerate():
        statistics = {
            (number, index): known[f"{placed.position}/{placed.group}/{layer.role}"]
            for number, placed in enumerate(space.walk(architecture))
            for index, layer in enumerate(placed.op.layers)
            if layer.norm
        }
        scores["recalibrated"].append(score(architecture).accuracy)
        with torch.no_grad():
            answer = partial(supernet, architecture=architecture, statistics=statistics)
            scores["tracked"].append(accuracy(answer, digits().search_val))
    return scores


def trained_alone(number, seed, shorter):
    """The accuracy on TEST of one of the 81 networks with weights of its own."""
    architecture = list(ranked_space().enumerate())[number]
    torch.manual_seed(seed)
    network = Network(ranked_space().lower(architecture))
    retrain(network, digits(), shortened(ALONE, shorter), seed=seed, progress=quiet)
    return tested(network)


def tested(network):
    """The accuracy of a trained network on TEST."""
    with digits().final() as images, torch.no_grad():
        return accuracy(network, images)


def accuracy(answer, images):
    """The share of images that are classified rightly."""
    right = sum(int((answer(x).argmax(1) == y).sum()) for x, y in in_order(images, 100))
    return right / len(images)


def searched(shorter):
    """Evolution and random search on one supernet, under one limit, with each seed."""
    space = searched_space()
    supernet = train(fresh(space, 0), shortened(SHARED, shorter), 0)
    score, cost = evaluator(supernet), counted_cost(space, "macs")
    drawn = FeasibleSet(space, []).samples(np.random.default_rng(0), 5000)
    limit = float(np.quantile(cost.totals(space, drawn), SHARE_WITHIN))
    feasible = FeasibleSet(space, [Limit(cost, limit)])
    best, proposed = [], []
    for seed in SEARCH_SEEDS:
        sides = [
            Evolution(feasible, seed=seed, population=POPULATION, parents=PARENTS,
                      mutations=CHILDREN, crossovers=CHILDREN),
            RandomSearch(feasible, seed=seed),
        ]  # fmt: skip
        histories = [asked(side, score, max(EVALUATIONS // shorter, LEAST)) for side in sides]
        best.append([max(history.values()) for history in histories])
        proposed += [architecture for history in histories for architecture in history]
    return {
        "networks": space.count,
        "limit_macs": limit,
        "share_within": float((cost.totals(space, drawn) <= limit).mean()),
        "proposed": len(proposed),
        "over_limit": sum(total("macs", space.lower(a)) > limit for a in proposed),
        "best": best,
        "wins": sum(evolution >= random for evolution, random in best),
        "ahead": sum(evolution > random for evolution, random in best),
    }


def asked(strategy, score, evaluations):
    """What a strategy proposed, with the score of each."""
    history = {}
    while len(history) < evaluations:
        proposals = strategy.ask(min(POPULATION, evaluations - len(history)))
        if not proposals:
            break
        scores = [score(architecture).score for architecture in proposals]
        strategy.tell(proposals, scores)
        history |= dict(zip(proposals, scores, strict=True))
    return history


def slices():
    """How far extracted networks are from the shared weights, at most."""
    space = sliced_space()
    supernet = train(fresh(space, 0), SHORT, 0)
    score, sampler = evaluator(supernet), UniformSampler(space)
    images, apart, seen = next(in_order(digits().search_val, 100))[0], [], set()
    for seed in range(SLICED):
        architecture = sampler.sample(np.random.default_rng(seed))
        statistics = score.statistics(architecture)
        with torch.no_grad():
            shared = supernet(images, architecture, statistics)
            own = supernet.extract(architecture, statistics)(images)
        apart.append(float((shared - own).abs().max()))
        seen.add(architecture)
    return {"networks": len(seen), "most_apart": max(apart)}


def low_bits(pairs, prefix, shorter):
    """The best network found within the BitOPs of uniform 2W2A, and that one; both retrained."""
    names = tuple(f"{prefix}w{weights}a{activations}" for weights, activations in pairs)
    space = bits_space(names)
    supernet = train(fresh(space, 0), shortened(SHARED, shorter), 0)
    uniform = space.architecture([pairs.index(UNIFORM)] * len(space.genes))
    cost = counted_cost(space, "bitops")
    budget = float(cost.totals(space, genes_of([uniform]))[0])
    feasible, score = FeasibleSet(space, [Limit(cost, budget)]), evaluator(supernet)
    strategy = Evolution(
        feasible, seed=0, population=POPULATION, parents=PARENTS,
        mutations=CHILDREN, crossovers=CHILDREN,
    )  # fmt: skip
    history = asked(strategy, score, max(EVALUATIONS // shorter, LEAST))
    found = {"uniform": uniform, "searched": max(history, key=history.__getitem__)}
    return {"within": len(history), "networks": space.count} | {
        name: {
            "precisions": space.describe(architecture),
            "bitops_all": total("bitops", space.lower(architecture)),
            "bitops_searched": total(
                "bitops", [op for op in space.lower(architecture) if op.precision.is_integer]
            ),
            "search_val_shared": score(architecture).accuracy,
            "tests": [
                retrained(score, architecture, seed, shortened(RETRAINED, shorter))
                for seed in BITS_SEEDS
            ],
        }
        for name, architecture in found.items()
    }


def retrained(score, architecture, seed, recipe):
    """The accuracy on TEST of a network that starts from the shared weights."""
    network = score.supernet.extract(architecture, score.statistics(architecture))
    retrain(network, digits(), recipe, seed=seed, progress=quiet)
    return tested(network)


class Turned:
    """One path in the first half of training, another in the second."""

    first, second = Architecture((0, 0, 0, 0)), Architecture((1, 1, 1, 1))

    def sample(self, _rng, progress):
        return self.first if progress < 0.5 else self.second


def rule_one(removed):
    """Whether the weights of a path are bit for bit what they were once training leaves it;
    without `removed`, the optimiser zeroes gradients where it should remove them.
    """
    space, before = ranked_space(), {}
    supernet = fresh(space, 0)
    used = tuple(
        f"layers.{placed.position}/{placed.group}/" for placed in space.walk(Turned.first)[1:-1]
    )

    def keep(_label, done, steps):
        if done == steps // 2:
            before.update({k: v.clone() for k, v in supernet.state_dict().items()})

    zero_grad = torch.optim.Optimizer.zero_grad

    def zeroed(optimiser, set_to_none=True):
        return zero_grad(optimiser, set_to_none=set_to_none and bool(removed))

    with mock.patch.object(torch.optim.Optimizer, "zero_grad", zeroed):
        train(supernet, SHORT, 0, Turned(), keep)
    after = supernet.state_dict()
    left = [name for name in after if name.startswith(used)]
    assert left, "the first path has weights of its own"
    return all(torch.equal(before[name], after[name]) for name in left)


# ---- what is told


def rank(shared, alone):
    """How well shared weights rank the networks as training each alone does."""
    truth = np.mean(alone, axis=0)
    space = ranked_space()
    macs = [total("macs", space.lower(a)) for a in space.enumerate()]
    taus = [tau(scores, truth) for scores in shared]
    return {
        "taus": taus,
        "mean": float(np.mean(taus)),
        "ceiling": tau(*alone),
        "by_macs": tau(macs, truth),
        "alone_range": [float(truth.min()), float(truth.max())],
    }


def mixed_up(shared, alone):
    """The same with the networks of the shared scores mixed up."""
    rng = np.random.default_rng(0)
    return rank([rng.permutation(scores).tolist() for scores in shared], alone)


def tau(left, right):
    """Kendall's tau-b."""
    return float(stats.kendalltau(left, right).statistic)


def ranks(found):
    """Whether a rank correlation is one."""
    return found["mean"] >= LEAST_TAU and found["mean"] > 2 * NULL_TAU_SD


def band(figures):
    """What is wrong with the figures."""
    complaints = []
    if not ranks(figures["rank"]):
        complaints.append(f"shared weights rank with tau {figures['rank']['mean']:.2f} only")
    if min(figures["recalibration"]["gains"]) <= 0:
        complaints.append("recalibrated norms are not better with every seed")
    found = figures["search"]
    if found["over_limit"] or found["wins"] < LEAST_WINS:
        complaints.append(
            f"evolution is as good as random search with {found['wins']} seeds of "
            f"{len(found['best'])}, and {found['over_limit']} proposals are over the limit"
        )
    if figures["slicing"]["most_apart"] > MOST_APART:
        complaints.append(f"extracted networks are {figures['slicing']['most_apart']:.2g} away")
    bits, uniform = figures["bits"]["searched"], figures["bits"]["uniform"]
    if bits["bitops_all"] > uniform["bitops_all"]:
        complaints.append("the network that was found takes more BitOPs than uniform 2W2A")
    if np.mean(bits["tests"]) < np.mean(uniform["tests"]) - MOST_LOST:
        complaints.append("the network that was found is worse than uniform 2W2A")
    if not figures["unsampled_untouched"]:
        complaints.append("a step moves weights that its path does not use")
    if ranks(figures["controls"]["mixed_up"]):
        complaints.append(
            "networks that are mixed up rank as well: the check of rank tells nothing"
        )
    if figures["controls"]["untouched_with_zeroed_gradients"]:
        complaints.append("zeroed gradients move nothing either: the check of steps tells nothing")
    return complaints


if __name__ == "__main__":
    sys.exit(run(["claims.spos"]))
