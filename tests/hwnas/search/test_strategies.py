"""What every strategy keeps: feasible, new, bounded, reproducible, resumable."""

import json
import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import COUNTED, Cost, Limit, counted_cost
from hwnas.costs.population import genes_of, totals
from hwnas.search.base import Score, Strategy
from hwnas.search.evolution import Evolution
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture, Ints, SearchSpace

CostNamed = Callable[[SearchSpace, str], Cost]
Build = Callable[[FeasibleSet, int], Strategy]


def evolution(feasible: FeasibleSet, seed: int) -> Strategy:
    return Evolution(feasible, seed=seed, population=20, parents=5, mutations=10, crossovers=6)


def random_search(feasible: FeasibleSet, seed: int) -> Strategy:
    return RandomSearch(feasible, seed=seed)


EVERY = pytest.mark.parametrize("build", [evolution, random_search])


def score(architecture: Architecture) -> Score:
    """A made-up accuracy that has ties, then a made-up loss."""
    genes = np.array(architecture.genes)
    return (float((genes * np.arange(1, len(genes) + 1)).sum() % 23), -float(genes.sum()))


def run(strategy: Strategy, asks: int, count: int) -> list[list[Architecture]]:
    """Ask and tell; what was proposed each time."""
    told = []
    for _ in range(asks):
        told.append(strategy.ask(count))
        strategy.tell(told[-1], [score(a) for a in told[-1]])
    return told


def tight(space: SearchSpace, name: str, factor: float, cost_named: CostNamed) -> FeasibleSet:
    cost = cost_named(space, name)
    return FeasibleSet(space, [Limit(cost, reachable(space, cost).smallest * factor)])


def exhaust(strategy: Strategy, count: int) -> list[Architecture]:
    """Everything proposed until the first empty answer."""
    found: list[Architecture] = []
    for _ in range(1000):
        proposals = strategy.ask(count)
        if not proposals:
            return found
        strategy.tell(proposals, [score(a) for a in proposals])
        found += proposals
    raise AssertionError("a strategy went on for ever")


@EVERY
@pytest.mark.parametrize(
    ("name", "factor"), [("macs", 1.3), ("macs", 2.0), ("weight_bytes", 1.5), ("latency_ms", 1.2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_proposal_is_feasible_canonical_and_new(
    tiny: SearchSpace, cost_named: CostNamed, build: Build, name: str, factor: float, seed: int
) -> None:
    feasible = tight(tiny, name, factor, cost_named)
    (limit,) = feasible.limits
    asked = [a for told in run(build(feasible, seed), 12, 20) for a in told]
    assert len(asked) > 60
    assert len(set(asked)) == len(asked)
    sums = totals(tiny, limit.cost.per_op, genes_of(asked))
    assert all(limit.cost.upper(total) <= limit.value for total in sums)
    assert all(tiny.architecture(a.genes) == a for a in asked)


@EVERY
def test_proposals_meet_two_limits_at_once(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    limits = [
        Limit(cost_named(tiny, name), reachable(tiny, cost_named(tiny, name)).smallest * factor)
        for name, factor in (("macs", 3.0), ("latency_ms", 1.6))
    ]
    asked = [a for told in run(build(FeasibleSet(tiny, limits), 0), 6, 20) for a in told]
    assert len(asked) == 120
    for limit in limits:
        sums = totals(tiny, limit.cost.per_op, genes_of(asked))
        assert all(limit.cost.upper(total) <= limit.value for total in sums)


@EVERY
def test_an_ask_never_answers_with_more_than_it_was_asked_for(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    strategy = build(tight(tiny, "macs", 3.0, cost_named), 0)
    run(strategy, 2, 20)
    counts = [0, *range(1, 31), 50]
    assert [len(strategy.ask(count)) for count in counts] == counts


def test_the_usual_evolution_never_answers_with_more_than_it_was_asked_for(
    tiny: SearchSpace, cost_named: CostNamed
) -> None:
    strategy = Evolution(tight(tiny, "macs", 3.0, cost_named), seed=0)
    run(strategy, 1, 50)
    assert [len(strategy.ask(count)) for count in range(1, 31)] == list(range(1, 31))


@EVERY
@pytest.mark.parametrize("factor", [1.0, 1.3, 100.0])
def test_a_space_used_up_is_answered_with_nothing_and_soon(
    small: SearchSpace,
    small_list: list[Architecture],
    cost_named: CostNamed,
    build: Build,
    factor: float,
) -> None:
    feasible = tight(small, "macs", factor, cost_named)
    strategy = build(feasible, 3)
    found = exhaust(strategy, 20)
    assert len(set(found)) == len(found)
    assert set(found) == {
        a for a, inside in zip(small_list, feasible.contains(small_list), strict=True) if inside
    }
    start = time.perf_counter()
    assert strategy.ask(20) == []
    assert strategy.ask(1) == []
    assert time.perf_counter() - start < 3


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_an_empty_answer_means_that_nothing_is_left_even_one_at_a_time(
    small: SearchSpace,
    small_list: list[Architecture],
    cost_named: CostNamed,
    build: Build,
    seed: int,
) -> None:
    feasible = tight(small, "macs", 100.0, cost_named)
    assert set(exhaust(build(feasible, seed), 1)) == set(small_list)


@EVERY
def test_proposals_meet_sums_and_a_peak_at_once(tiny: SearchSpace, build: Build) -> None:
    costs = [counted_cost(tiny, name) for name in COUNTED]
    limits = [Limit(cost, reachable(tiny, cost).smallest * 8) for cost in costs]
    limits[-1] = Limit(costs[-1], reachable(tiny, costs[-1]).smallest * 1.5)
    feasible = FeasibleSet(tiny, limits)
    assert all(feasible.binding(limit) for limit in limits)
    asked = [a for told in run(build(feasible, 0), 6, 20) for a in told]
    assert len(set(asked)) == len(asked) == 120
    for limit in limits:
        assert limit.cost.totals(tiny, genes_of(asked)).max() <= limit.value


class Thin(FeasibleSet):
    """A set that no draw ever hits."""

    listed = None

    def samples(self, rng: np.random.Generator, count: int) -> Ints:
        return np.empty((0, len(self.space.genes)), np.int64)


@EVERY
def test_a_set_too_thin_to_draw_from_still_gives_its_witness(
    tiny: SearchSpace, build: Build
) -> None:
    cost = counted_cost(tiny, "macs")
    feasible = Thin(tiny, [Limit(cost, reachable(tiny, cost).smallest * 2)])
    strategy = build(feasible, 0)
    assert strategy.ask(20) == [feasible.witness]
    strategy.tell([feasible.witness], [(0.5,)])
    found = exhaust(strategy, 20) if isinstance(strategy, RandomSearch) else strategy.ask(20)
    assert feasible.witness not in found
    assert feasible.contains(found).all()
    assert (len(found) > 0) == isinstance(strategy, Evolution), "mutations of the witness"


@EVERY
def test_the_same_seed_and_history_give_the_same_proposals_and_another_seed_does_not(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    feasible = tight(tiny, "macs", 3.0, cost_named)
    again = tight(tiny, "macs", 3.0, cost_named)
    first = run(build(feasible, 5), 5, 20)
    assert run(build(again, 5), 5, 20) == first
    assert not {a for t in run(build(feasible, 6), 5, 20) for a in t} >= set(first[0])


@EVERY
def test_a_history_told_to_a_fresh_instance_goes_on_as_if_it_had_never_stopped(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    feasible = tight(tiny, "latency_ms", 1.5, cost_named)
    undisturbed = run(build(feasible, 7), 8, 20)
    for stop in (1, 2, 5):
        history = [a for told in undisturbed[:stop] for a in told]
        at_once, one_by_one = build(feasible, 7), build(feasible, 7)
        at_once.tell(history, [score(a) for a in history])
        for architecture in history:
            one_by_one.tell([architecture], [score(architecture)])
        assert run(at_once, 8 - stop, 20) == undisturbed[stop:]
        assert run(one_by_one, 8 - stop, 20) == undisturbed[stop:]


@EVERY
def test_asking_changes_nothing_until_scores_are_told(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    feasible = tight(tiny, "macs", 2.0, cost_named)
    one, other = build(feasible, 1), build(feasible, 1)
    for _ in range(3):
        one.ask(7)
    assert run(one, 4, 20) == run(other, 4, 20)


SCRIPT = """
import json
import numpy as np
from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Limit, counted_cost
from hwnas.search.evolution import Evolution
from hwnas.search.random import RandomSearch
from hwnas.spaces.mobile import mobile_tiny

space = mobile_tiny(classes=10)
cost = counted_cost(space, "macs")
feasible = FeasibleSet(space, [Limit(cost, reachable(space, cost).smallest * 2)])
told = []
for strategy in (
    Evolution(feasible, seed=4, population=20, parents=5, mutations=10, crossovers=6),
    RandomSearch(feasible, seed=4),
):
    for _ in range(5):
        found = strategy.ask(20)
        strategy.tell(found, [(float(sum(a.genes) % 7), -float(a.genes[0])) for a in found])
        told.append([a.genes for a in found])
print(json.dumps(told))
"""


def test_proposals_are_the_same_in_another_process_with_another_hash_seed(
    in_process: Callable[[str, str], str],
) -> None:
    one, other = (json.loads(in_process(SCRIPT, seed)) for seed in ("1", "2"))
    assert one == other
    assert [len(told) for told in one] == [20] * 10


@EVERY
@pytest.mark.parametrize("bad", [(math.nan,), (0.5, math.nan)])
def test_nan_is_refused_and_nothing_is_noted(
    tiny: SearchSpace, cost_named: CostNamed, build: Build, bad: Score
) -> None:
    feasible = tight(tiny, "macs", 2.0, cost_named)
    strategy, untouched = build(feasible, 2), build(feasible, 2)
    proposals = strategy.ask(3)
    with pytest.raises(ValueError, match="NaN"):
        strategy.tell(proposals, [(0.5, 1.0), (0.6, 1.0), bad])
    assert run(strategy, 3, 20) == run(untouched, 3, 20)


@EVERY
def test_a_score_for_each_architecture_is_demanded(
    tiny: SearchSpace, cost_named: CostNamed, build: Build
) -> None:
    strategy = build(tight(tiny, "macs", 2.0, cost_named), 2)
    with pytest.raises(ValueError, match="2 scores for 3"):
        strategy.tell(strategy.ask(3), [(0.5,), (0.6,)])


@EVERY
def test_nothing_is_rejected_where_no_limit_binds(tiny: SearchSpace, build: Build) -> None:
    strategy = build(FeasibleSet(tiny, []), 0)
    run(strategy, 3, 20)
    strategy.ask(20)
    assert strategy.rejected == 0
