"""The search of a run: ask, score, tell, with every step in the history; then the finalists."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hwnas.conditions import condition
from hwnas.costs.feasible import FeasibleSet
from hwnas.costs.limits import AdditiveCost, Limit
from hwnas.costs.population import genes_of
from hwnas.history import History, Proposal
from hwnas.job import Job
from hwnas.scoring import evaluator, train
from hwnas.search.base import Strategy
from hwnas.search.random import RandomSearch
from hwnas.spaces.base import Architecture
from hwnas.store import Run
from hwnas.supernet.evaluator import Evaluator
from latency_tables.files import read_object, write_text
from quant.errors import InvalidInput

BASELINE = "random"


def limits_name(limits: Sequence[Limit]) -> str:
    """The name of a set of limits, such as `latency_ms=0.21`; other limits have other names."""
    return ",".join(sorted(f"{limit.cost.name}={limit.value!r}" for limit in limits))


def result_name(job: Job, limits: Sequence[Limit]) -> str:
    """The name of a search's result: its limits, and what was fixed, such as
    `latency_ms=0.21,fixed-block=1c9a6e02`.
    """
    name, fixed = limits_name(limits), dict(job.request.fixed)
    if not fixed:
        return name
    options = "-".join(sorted({gene.rpartition(".")[2] for gene in fixed}))
    digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
    return f"{name},fixed-{options}={digest[:8]}"


def values_of(limits: Sequence[Limit]) -> dict[str, float]:
    """The limits by the name of their cost."""
    return {limit.cost.name: limit.value for limit in limits}


def searches(job: Job, limits: Sequence[Limit]) -> dict[str, str]:
    """The history's name of each strategy's search: the method's first, then the baseline's.

    A table that was measured anew makes it another search, and so does a bound that was raised.
    """
    asked = f"{result_name(job, limits)} table {job.table_id}"
    bounds = "".join(f" {name} x {ratio!r}" for name, ratio in _bounds(limits).items())
    return {name: f"{name} {asked}{bounds}" for name in (job.method.name, BASELINE)}


def _strategy(job: Job, name: str, feasible: FeasibleSet) -> Strategy:
    if name == BASELINE:
        return RandomSearch(feasible, seed=job.request.seed)
    return job.method.strategy(feasible, job.request.seed, job.recipe)


def run_strategy(
    job: Job, name: str, feasible: FeasibleSet, score: Evaluator, history: History
) -> None:
    """Ask, score, tell, until the recipe's evaluations are done or nothing is left to propose."""
    strategy = _strategy(job, name, feasible)
    limits = values_of(feasible.limits)
    search_name = searches(job, feasible.limits)[name]
    known = history.generations(search_name)
    budget, done, number = job.recipe.evaluations, 0, 0
    while done < budget:
        if number < len(known):
            architectures = [Architecture(genes) for genes in known[number]]
        else:
            architectures = strategy.ask(min(job.recipe.population, budget - done))
            bounds = feasible.bounds(architectures)
            proposals = [
                Proposal(a.genes, {name: float(upper[i]) for name, upper in bounds.items()})
                for i, a in enumerate(architectures)
            ]
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


# ---- finalists


@dataclass(frozen=True)
class Finalist:
    """An architecture to retrain: its shared-weight score, its predicted latency, and the upper
    bound of every limited cost.
    """

    genes: tuple[int, ...]
    search_val: float
    latency_ms: float
    upper_latency_ms: float
    upper: dict[str, float]


def search(job: Job, run: Run, limits: Sequence[Limit]) -> list[Finalist]:
    """The best feasible architectures found, by the method and by the random baseline.

    Raises Unreachable before any training where a limit cannot be met.
    """
    feasible = FeasibleSet(job.searched, limits)
    result = run.result(result_name(job, limits))
    if not is_answered(job, result, limits):
        score = evaluator(job, train(job, run))
        names = searches(job, limits)
        with closing(History(run.history)) as history:
            for name in names:
                run_strategy(job, name, feasible, score, history)
            best = ranked(feasible, history, list(names.values()))
        chosen = [_finalist(job, feasible, a, acc) for a, acc in best[: job.recipe.finalists]]
        job.table.save(run.table)
        for stale in result.glob("*"):
            stale.unlink()
        content = {
            **_question(job, limits),
            "bounds": _bounds(limits),
            "finalists": [asdict(item) for item in chosen],
        }
        write_text(result / "finalists.json", json.dumps(content, indent=2) + "\n")
        run.log("search", limits=result_name(job, limits), finalists=len(chosen))
    run.point_to(result)
    return read_finalists(result)


def _question(job: Job, limits: Sequence[Limit]) -> dict[str, Any]:
    """What finalists answer: other limits, other genes that are fixed, or a table measured anew,
    have other finalists.
    """
    names = [name for limit in limits if condition(name := limit.cost.name) is not None]
    others = {name: other.table_id for name in names if (other := job.under(name)) is not job}
    fixed = dict(job.request.fixed)
    return (
        {"limits": values_of(limits), "table": job.table_id}
        | ({"tables": others} if others else {})
        | ({"fixed": fixed} if fixed else {})
    )


def _bounds(limits: Sequence[Limit]) -> dict[str, float]:
    """How far above its prediction each limited latency is held to lie."""
    costs = [limit.cost for limit in limits if condition(limit.cost.name) is not None]
    return {cost.name: cost.upper_ratio for cost in costs if isinstance(cost, AdditiveCost)}


def is_answered(job: Job, result: Path, limits: Sequence[Limit]) -> bool:
    """Whether a result holds the finalists of this very question."""
    if not (result / "finalists.json").exists():
        return False
    asked = _question(job, limits) | {"bounds": _bounds(limits)}
    outcome = _search_outcome(result)
    return all(outcome.get(name) == value for name, value in asked.items())


def settled(job: Job, result: Path, limits: Sequence[Limit]) -> list[Limit]:
    """The limits by the bounds that their result was searched under, where one of its networks was
    then measured to meet them: what later searches measure raises no bound of an answer.
    """
    if not all((result / name).exists() for name in ("certificate.json", "finalists.json")):
        return list(limits)
    bounds = _search_outcome(result).get("bounds", {})
    same = [
        replace(limit, cost=job.bounded(limit.cost.name, bounds[limit.cost.name]))
        if limit.cost.name in bounds
        else limit
        for limit in limits
    ]
    return same if is_answered(job, result, same) else list(limits)


def _finalist(
    job: Job, feasible: FeasibleSet, architecture: Architecture, search_val: float
) -> Finalist:
    additive = float(job.latency.totals(job.space, genes_of([architecture]))[0])
    return Finalist(
        architecture.genes,
        search_val,
        float(job.latency.predict(additive)),
        float(job.latency.upper(additive)),
        {name: float(upper[0]) for name, upper in feasible.bounds([architecture]).items()},
    )


def read_finalists(result: Path) -> list[Finalist]:
    """The finalists of a result; raises InvalidInput where it has none yet."""
    content = _search_outcome(result)
    try:
        return [Finalist(**{**x, "genes": tuple(x["genes"])}) for x in content["finalists"]]
    except (KeyError, TypeError) as error:
        raise _damaged(result, error) from error


def read_limits(job: Job, result: Path) -> list[Limit]:
    """The limits that a result was searched under."""
    try:
        return job.limits(read_asked(result))
    except ValueError as error:
        raise _damaged(result, error) from error


def read_asked(result: Path) -> dict[str, float]:
    """The same by the name of their cost, as they were asked for."""
    content = _search_outcome(result)
    try:
        return {str(name): float(value) for name, value in content["limits"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(result, error) from error


def read_fixed(result: Path) -> dict[str, str]:
    """The genes that a result's search left as they were; none where it does not tell."""
    try:
        return dict(read_object(result / "finalists.json").get("fixed", {}))
    except (OSError, TypeError, ValueError):  # who needs the file reads it, and says what is wrong
        return {}


def read_architecture(path: Path) -> dict[str, str]:
    """What an architecture.json, or the result with it, tells: a value for each gene, by name."""
    file = path / "architecture.json" if path.is_dir() else path
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{file} is not an architecture: {error}.",
            accepted="architecture.json of a result: gene names with their choices",
        ) from error


def fixed_genes(asked: Mapping[str, Path]) -> dict[str, str]:
    """The genes of each option as an architecture has them, by name: `{"block": architecture}`.

    Raises InvalidInput where a file is none, or has no gene of that option.
    """
    found: dict[str, str] = {}
    for option, path in asked.items():
        known = read_architecture(path)
        own = {name: known[name] for name in known if name.rpartition(".")[2] == option}
        if not own:
            raise InvalidInput(
                f"{path} has no gene {option!r} to fix.",
                accepted=", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known)),
            )
        found |= own
    return found


def _search_outcome(result: Path) -> dict[str, Any]:
    file = result / "finalists.json"
    if not file.exists():
        raise InvalidInput(f"{result} has no finalists yet.", next_step="run hwnas search")
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise _damaged(result, error) from error


def _damaged(result: Path, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"{result / 'finalists.json'} is not whole: {error}.",
        next_step="remove it; hwnas search then chooses the finalists again and trains them",
    )
