from collections import Counter

import numpy as np
from scipy import stats

from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.costs.limits import Limit, counted_cost
from hwnas.search.random import RandomSearch, fresh_samples
from hwnas.spaces.base import Architecture, SearchSpace


def test_proposals_are_uniform_over_the_feasible_set(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    cost = counted_cost(small, "macs")
    feasible = FeasibleSet(small, [Limit(cost, reachable(small, cost).smallest * 1.5)])
    inside = [a for a in small_list if feasible.contains([a])[0]]
    counts = Counter(a for seed in range(800) for a in RandomSearch(feasible, seed=seed).ask(1))
    assert len(inside) > 5
    assert set(counts) <= set(inside)
    assert stats.chisquare([counts[a] for a in inside]).pvalue > 0.001


def test_what_is_left_is_drawn_uniformly(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    left, seen = small_list[::2], set(small_list[1::2])
    rng, feasible = np.random.default_rng(0), FeasibleSet(small, [])
    counts = Counter(a for _ in range(900) for a in fresh_samples(feasible, seen, 1, rng))
    assert set(counts) <= set(left)
    assert stats.chisquare([counts[a] for a in left]).pvalue > 0.001


def test_samples_are_distinct_and_none_of_those_seen(
    small: SearchSpace, small_list: list[Architecture]
) -> None:
    seen = set(small_list[:60])
    found = fresh_samples(FeasibleSet(small, []), seen, 40, np.random.default_rng(0))
    assert len(found) == len(set(found)) == 40
    assert not set(found) & seen


def test_nothing_wanted_draws_nothing(small: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert fresh_samples(FeasibleSet(small, []), set(), 0, rng) == []
    assert fresh_samples(FeasibleSet(small, []), set(), -2, rng) == []
    assert rng.bit_generator.state == before


def test_the_seen_are_not_changed_by_drawing(small: SearchSpace) -> None:
    seen: set[Architecture] = set()
    assert fresh_samples(FeasibleSet(small, []), seen, 3, np.random.default_rng(0))
    assert seen == set()


def test_random_search_never_rejects(tiny: SearchSpace) -> None:
    cost = counted_cost(tiny, "macs")
    feasible = FeasibleSet(tiny, [Limit(cost, reachable(tiny, cost).smallest * 1.3)])
    strategy = RandomSearch(feasible, seed=0)
    strategy.tell(strategy.ask(20), [(0.0,)] * 20)
    strategy.ask(20)
    assert strategy.rejected == 0
