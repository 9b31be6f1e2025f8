"""How quickly are limits held and searches done, beside once-for-all's EvolutionFinder?

Ofa is installed from PyPI, in a temporary environment. Both sides take turns on one core, on the
same tables, limits and accuracy network: ofa's, three layers of 400 units on a one-hot code, with
random weights. Both have ofa's own options: populations of 100, a quarter of them parents, half
mutations and half crossovers. Limits are met by a tenth or a hundredth of what ofa draws. There
are two spaces: in ofa's MobileNetV3 space its side is its shipped code alone; in `mobile`, its
finder gets an encoder and a table look-up in plain Python, made as quick as that goes
(`ofa_side.py`). Seconds are CPU seconds of a process, for a search from the limit on.

Band: three limits are checked at least 3 million times a second, and 250 times as fast as ofa
checks one. A search in ofa's space scores at least 12 architectures where ofa scores one; in
`mobile`, with that quick look-up, at least as many. Ours are distinct, ofa's counted with repeats.
In the median over seeds its best is no worse. A limit 1 % below the smallest reachable value is
refused and one 1 % above it is met, each in under 10 seconds; ofa ends at neither.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import torch

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import AdditiveCost, Limit, counted_cost
from hwnas.costs.population import genes_of
from hwnas.search.evolution import Evolution
from hwnas.spaces.base import Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import inverted_residual
from hwnas.spaces.registry import load_space
from latency_tables.ops import Tensor
from quant.errors import Unreachable
from quant.precision import Precision

PACKAGES = ("ofa==0.1.0.post202307202001", "tqdm")
POPULATION, PARENTS = 100, 25
SHARES = (0.1, 0.01)
CHECKED = 300
WIDTHS, STRIDES, DEEPEST = (24, 40, 80, 112, 160), (2, 2, 2, 1, 2), 4
SKIPPED = 9


def measure(*, reduced: bool):
    """Checks, searches and limits at the edge, in turns."""
    turns, seeds, generations, patience = (3, 1, 50, 10) if reduced else (9, 3, 200, 60)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.5, 5.0, (len(WIDTHS), 2, 3, 3))
    mobile = load_space("mobile", classes=1000, image_channels=3, size=224)
    per_op = rng.uniform(0.5, 5.0, len(mobile.lattice.ops))
    sides = {"ofa": ofa_space(rows), "mobile": (mobile, latency(per_op), one_hot_accuracy(mobile))}
    told = [{"rows": rows.tolist(), "per_op": per_op.tolist(), **plain(mobile)}]
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(install(Path(folder)), told)
        checks = check_limits(theirs, sides, turns)
        limits = [(name, limit) for name in sides for limit in limits_met(theirs, name, SHARES)]
        searches = [
            search_both(theirs, name, sides[name], limit, seed, generations)
            for seed in range(seeds)
            for name, limit in limits
        ]
        edges = [at_the_edge(theirs, sides["ofa"], name, patience) for name in ("below", "above")]
        theirs.process.communicate()  # the end of its input ends it
    figures = {
        "checks": {
            "ours_per_s": median(checks, "ours_per_s"),
            "theirs_per_s": median(checks, "theirs_per_s"),
            "ratio": float(np.median([c["ours_per_s"] / c["theirs_per_s"] for c in checks])),
        },
        "searches": {
            f"{name}, {share:.0%} meet the limit": {
                "ours_scored_per_s": median(own, "ours_scored_per_s"),
                "theirs_scored_per_s": median(own, "theirs_scored_per_s"),
                "ratios": [s["ours_scored_per_s"] / s["theirs_scored_per_s"] for s in own],
                "leads": [s["ours_best"] - s["theirs_best"] for s in own],
            }
            for (name, limit), share in zip(limits, SHARES * len(sides), strict=True)
            for own in [[s for s in searches if (s["space"], s["limit"]) == (name, limit)]]
        },
        "edges": edges,
    }
    return {"figures": figures, "raw": {"checks": checks, "searches": searches}}


def median(samples, name):
    """The median of one number over samples."""
    return float(np.median([sample[name] for sample in samples]))


# ---- the two spaces


def latency(per_op):
    """A latency that is the sum of a table's rows."""
    return AdditiveCost("latency_ms", np.asarray(per_op), float, float, float)


def ofa_space(rows):
    """Ofa's MobileNetV3 space as ours: 5 stages of 2 to 4 blocks, 3 kernels and 3 expansions each.

    With it its latency, and its accuracy in ofa's code: the image's size, kernels, expansions.
    """
    positions, costs = [], {}
    for stage, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        for block in range(DEEPEST):
            choices = range(SKIPPED + (block >= 2))
            build = ofa_block(width, stride if block == 0 else 1, rows[stage][min(block, 1)], costs)
            positions.append(Position(f"stage{stage}.{block}", {"block": choices}, build))
    space = SearchSpace("ofa-mbv3", Tensor(16, 112, 112), tuple(positions))
    kinds = np.vstack([np.eye(3), np.zeros(3)])
    kernels, expansions = kinds[[*np.repeat(range(3), 3), 3]], kinds[[*[0, 1, 2] * 3, 3]]

    def code(genes):
        parts = [kernels[genes].reshape(len(genes), -1), expansions[genes].reshape(len(genes), -1)]
        return np.hstack([np.ones((len(genes), 1)), *parts])

    table = [costs[op.key] for op in space.lattice.ops]
    return space, latency(table), accuracy(code, 1 + 6 * len(positions))


def ofa_block(width, stride, rows, costs):
    """A block, or a skip after which its stage is skipped to its end."""

    def build(state, values):
        number = values["block"]
        cut = stride == 1 and ("cut", width) in state.skipped
        if number == SKIPPED:
            return Choice(None, State(state.tensor, frozenset([("cut", width)])))
        if cut:
            return None
        kernel, expansion = divmod(number, 3)
        op = inverted_residual(
            state.tensor,
            width,
            kernel=(3, 5, 7)[kernel],
            expansion=(3, 4, 6)[expansion],
            stride=stride,
            precision=Precision("fp32"),
        )
        costs[op.key] = rows[kernel][expansion]
        return Choice(op, State(op.output))

    return build


def one_hot_accuracy(space):
    """The accuracy of a space's genes in a code with a place for each value of each gene."""
    sizes = space.gene_sizes
    starts = np.cumsum(sizes) - sizes

    def code(genes):
        result = np.zeros((len(genes), int(sizes.sum())))
        np.put_along_axis(result, starts + genes, 1.0, axis=1)
        return result

    return accuracy(code, int(sizes.sum()))


def plain(space):
    """A space's lattice as lists: quicker than arrays for one architecture at a time."""
    levels = [
        [x.tolist() for x in (level.strides, level.nearest, level.genes, level.op, level.target)]
        for level in space.lattice.levels
    ]
    return {"levels": levels, "sizes": space.gene_sizes.tolist()}


# ---- the other side


def install(folder):
    """A Python of its own with ofa in it, which sees what is installed here."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text("\n".join(here) + "\n")
    command = [python, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES]
    subprocess.run(command, check=True, capture_output=True)
    return python


class Theirs:
    """`ofa_side.py` in a process of its own: a line asks, a line answers."""

    def __init__(self, python, told):
        self.command = [python, str(Path(__file__).with_name("ofa_side.py"))]
        self.told = "".join(json.dumps(line) + "\n" for line in told)
        self.process = self.start()
        self.process.stdin.write(self.told)

    def start(self):
        """A fresh process that was told nothing yet."""
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **request):
        """The answer to one request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask_within(self, patience, **request):
        """The same of a fresh process; None where it does not end within `patience` seconds."""
        process = self.start()
        try:
            out, _ = process.communicate(self.told + json.dumps(request) + "\n", timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        return json.loads(out)


# ---- the three questions


def check_limits(theirs, sides, turns):
    """Checks a second: three limits at once in `mobile`, ofa's one in its space; turn by turn."""
    space, cost, _ = sides["mobile"]
    genes = FeasibleSet(space, []).samples(np.random.default_rng(0), 200_000)
    costs = [cost, counted_cost(space, "params"), counted_cost(space, "bitops")]
    limits = [Limit(c, float(np.quantile(c.totals(space, genes), 0.5))) for c in costs]
    feasible = FeasibleSet(space, limits)
    samples = []
    for turn in range(turns):
        start = time.process_time()
        inside = feasible.inside(genes)
        seconds = time.process_time() - start
        found = theirs.ask(do="checks", space="ofa", seed=turn, count=CHECKED)
        samples.append(
            {
                "ours_per_s": len(genes) / seconds,
                "ours_share": float(inside.mean()),
                "theirs_per_s": CHECKED / found["seconds"],
            }
        )
    return samples


def limits_met(theirs, name, shares):
    """The limits that shares of what ofa draws from a space meet."""
    found = theirs.ask(do="checks", space=name, seed=0, count=2000)
    return [float(value) for value in np.quantile(found["latencies"], shares)]


def search_both(theirs, name, side, limit, seed, generations):
    """One search on either side, of as many architectures."""
    space, cost, score = side
    start = time.process_time()
    strategy = search(FeasibleSet(space, [Limit(cost, limit)]), score, seed, generations)
    seconds = time.process_time() - start
    options = {"population_size": POPULATION, "max_time_budget": generations}
    found = theirs.ask(do="search", space=name, seed=seed, limit=limit, options=options)
    genes = np.array([found["genes"]])
    np.testing.assert_allclose(score(genes), found["score"], atol=1e-5)
    np.testing.assert_allclose(cost.totals(space, genes), found["latency"], rtol=1e-9)
    return {
        "space": name,
        "limit": limit,
        "seed": seed,
        "ours_seconds": seconds,
        "ours_scored": len(strategy.scores),
        "ours_scored_per_s": len(strategy.scores) / seconds,
        "ours_best": strategy.scores[strategy.elites[0]][0],
        "theirs_seconds": found["seconds"],
        "theirs_scored_per_s": POPULATION * (generations + 1) / found["seconds"],
        "theirs_best": found["score"],
    }


def search(feasible, score, seed, generations):
    """Our search at ofa's options: half mutations, half crossovers."""
    half = POPULATION // 2
    strategy = Evolution(
        feasible,
        seed=seed,
        population=POPULATION,
        parents=PARENTS,
        mutations=half,
        crossovers=half,
    )
    for _ in range(generations + 1):
        proposals = strategy.ask(POPULATION)
        if not proposals:
            break
        strategy.tell(proposals, [(value,) for value in score(genes_of(proposals)).tolist()])
    return strategy


def accuracy(code, width):
    """The accuracy network with the weights that ofa's side has, over genes (n, genes)."""
    torch.manual_seed(0)
    layers = []
    for inputs in (width, 400, 400):
        layers += [torch.nn.Linear(inputs, 400), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(400, 1, bias=False))

    def score(genes):
        with torch.inference_mode():
            return network(torch.from_numpy(code(genes)).float())[:, 0].numpy()

    return score


def at_the_edge(theirs, side, name, patience):
    """A limit 1 % below or above the smallest reachable value: how either side answers."""
    space, cost, score = side
    limit = reachable(space, cost).smallest * {"below": 0.99, "above": 1.01}[name]
    start = time.process_time()
    try:
        strategy = search(FeasibleSet(space, [Limit(cost, limit)]), score, 0, 1)
        scored = len(strategy.scores)
    except Unreachable:
        scored = 0
    seconds = time.process_time() - start
    options = {"population_size": POPULATION, "max_time_budget": 1}
    found = theirs.ask_within(
        patience, do="search", space="ofa", seed=0, limit=limit, options=options
    )
    return {
        "limit": name,
        "ours_seconds": seconds,
        "ours_scored": scored,
        "theirs_ended": found is not None,
        "theirs_patience_s": patience,
    }


def band(figures):
    """What is wrong with the figures."""
    complaints = []
    checks = figures["checks"]
    if checks["ours_per_s"] < 3e6:
        complaints.append(f"{checks['ours_per_s']:.3g} candidates a second are held to limits")
    if checks["ratio"] < 250:
        complaints.append(f"limits are checked only {checks['ratio']:.0f} times as fast")
    for name, searches in figures["searches"].items():
        ratio, lead = np.median(searches["ratios"]), np.median(searches["leads"])
        if ratio < (12 if name.startswith("ofa") else 1):
            complaints.append(f"searches ({name}) are only {ratio:.2f} times as fast")
        if lead < 0:
            complaints.append(f"searches ({name}) end {-lead:.4f} below ofa's")
    for edge in figures["edges"]:
        if edge["ours_seconds"] > 10 or (edge["ours_scored"] > 0) != (edge["limit"] == "above"):
            complaints.append(f"a limit just {edge['limit']} the smallest: {edge}")
        if edge["theirs_ended"]:
            complaints.append(f"ofa ends at a limit just {edge['limit']} the smallest")
    return complaints
