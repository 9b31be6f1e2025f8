"""The loop around a strategy: ask, score, tell, with every step in the run's history."""

from collections.abc import Sequence

from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import Limit
from hwnas.costs.population import genes_of, totals
from hwnas.job import Job
from hwnas.search.base import Strategy
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture
from hwnas.store import History, Proposal
from hwnas.supernet.evaluator import Evaluator

BASELINE = "random"


def limits_name(limits: Sequence[Limit]) -> str:
    """The name of a set of limits, such as `latency_ms=0.21`; other limits have other names."""
    return ",".join(f"{limit.cost.name}={limit.value!r}" for limit in limits)


def searches(job: Job, limits: Sequence[Limit]) -> dict[str, str]:
    """The history's name of each strategy's search: the method's first, then the baseline's.

    A table that was measured anew makes it another search, since its bounds are others.
    """
    return {
        name: f"{name} {limits_name(limits)} table {job.table_id}"
        for name in (job.method.name, BASELINE)
    }


def _strategy(job: Job, name: str, feasible: FeasibleSet) -> Strategy:
    if name == BASELINE:
        return RandomSearch(feasible, seed=job.request.seed)
    return job.method.strategy(feasible, job.request.seed, job.recipe)


def run_strategy(
    job: Job, name: str, feasible: FeasibleSet, score: Evaluator, history: History
) -> None:
    """Ask, score, tell, until the recipe's evaluations are done or nothing is left to propose."""
    strategy = _strategy(job, name, feasible)
    limits = {limit.cost.name: limit.value for limit in feasible.limits}
    search_name = searches(job, feasible.limits)[name]
    known = history.generations(search_name)
    budget, done, number = job.recipe.evaluations, 0, 0
    while done < budget:
        if number < len(known):
            architectures = [Architecture(genes) for genes in known[number]]
        else:
            architectures = strategy.ask(min(job.recipe.population, budget - done))
            proposals = [Proposal(a.genes, _bounds(feasible, a)) for a in architectures]
            history.add_generation(search_name, number, proposals, limits, strategy.rejected)
        if not architectures:
            return
        scores = []
        for architecture in architectures:
            found = history.score(architecture.genes)
            if found is None:
                evaluation = score(architecture)
                history.add_score(architecture.genes, evaluation.accuracy, evaluation.loss)
                found = (evaluation.accuracy, evaluation.loss)
            scores.append((found[0], -found[1]))
            done += 1
            job.progress(f"scoring architectures ({name})", done, budget)
        strategy.tell(architectures, scores)
        number += 1


def _bounds(feasible: FeasibleSet, architecture: Architecture) -> dict[str, float]:
    genes = genes_of([architecture])
    return {
        limit.cost.name: limit.cost.upper(
            float(totals(feasible.space, limit.cost.per_op, genes)[0])
        )
        for limit in feasible.limits
    }


def ranked(
    feasible: FeasibleSet, history: History, names: Sequence[str]
) -> list[tuple[Architecture, float]]:
    """Every scored architecture of these searches, best first, with its accuracy."""
    scores: dict[Architecture, tuple[float, float]] = {}
    for search_name in names:
        for generation in history.generations(search_name):
            for genes in generation:
                if found := history.score(genes):
                    scores[Architecture(genes)] = (found[0], -found[1])
    inside = feasible.contains(list(scores))
    kept = [a for a, fits in zip(scores, inside, strict=True) if fits]
    kept.sort(key=lambda a: scores[a], reverse=True)
    return [(a, scores[a][0]) for a in kept]
