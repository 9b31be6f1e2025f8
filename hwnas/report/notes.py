"""What a latency table says of the precisions that a search chose: which of them buy no time."""

from collections.abc import Iterable

from hwnas.costs.limits import AdditiveCost
from hwnas.costs.population import genes_of
from hwnas.spaces.base import Architecture, PlacedOp, SearchSpace
from profilers.sizes import file_bytes
from quant.precision import ONNXRUNTIME, Precision, Runtime


def notes(
    space: SearchSpace,
    architecture: Architecture,
    latency: AdditiveCost,
    runtime: Runtime = ONNXRUNTIME,
) -> list[str]:
    """Sentences on an architecture's precisions, none where each is there for its speed.

    A precision that runs in the kernels of another buys bytes at most. Of the others, the table
    tells whether the network is any slower with a wider one in its place.
    """
    placed = space.walk(architecture)
    return [*_alike(placed, runtime), *_no_faster(space, architecture, latency, runtime)]


def _alike(placed: list[PlacedOp], runtime: Runtime) -> list[str]:
    """A sentence for each precision that runs in the kernels of another."""
    found: dict[Precision, list[PlacedOp]] = {}
    for each in placed:
        if each.op.executed != each.op:
            found.setdefault(each.op.precision, []).append(each)
    told = []
    for precision, places in found.items():
        saved = sum(
            file_bytes(each.op.executed, runtime) - file_bytes(each.op, runtime) for each in places
        )
        buys = f"buys bytes ({saved:,}), not time" if saved > 0 else "buys neither bytes nor time"
        run = "1 op runs" if len(places) == 1 else f"{len(places)} ops run"
        names = _listed(each.position for each in places)
        told.append(f"{precision} {buys}: {run} in the kernels of {precision.executed} ({names}).")
    return told


def _no_faster(
    space: SearchSpace, architecture: Architecture, latency: AdditiveCost, runtime: Runtime
) -> list[str]:
    """A sentence for each pair of precisions of which the wider one costs no more somewhere."""
    found: dict[str, list[str]] = {}
    mine = latency.totals(space, genes_of([architecture]))[0]
    for place, other in _at_another_precision(space, architecture):
        chosen, wider = (space.walk(each)[place] for each in (architecture, other))
        if latency.totals(space, genes_of([other]))[0] <= mine:
            before, after = chosen.op.precision.executed, wider.op.precision.executed
            kernels = runtime.kernel(before), runtime.kernel(after)
            names = kernels if kernels[0] != kernels[1] else (before.name, after.name)
            places = found.setdefault(f"{names[0]} is no faster than {names[1]}", [])
            places += [chosen.position] if chosen.position not in places else []
    return [f"By the table, {what} here: {_listed(names)}." for what, names in found.items()]


def _at_another_precision(
    space: SearchSpace, architecture: Architecture
) -> Iterable[tuple[int, Architecture]]:
    """The networks that differ in one op's precision alone, which is a wider one with kernels of
    its own; each with the op's number.
    """
    placed = space.walk(architecture)
    for index, gene in enumerate(space.genes):
        for value in range(len(gene.choices)):
            genes = list(architecture.genes)
            genes[index] = value
            other = space.architecture(genes)
            walked = space.walk(other)
            same = [(each.position, each.op.layers) for each in placed]
            if same != [(each.position, each.op.layers) for each in walked]:
                continue
            pairs = [(a.op.precision, b.op.precision) for a, b in zip(placed, walked, strict=True)]
            changed = [number for number, (a, b) in enumerate(pairs) if a != b]
            if len(changed) == 1 and _is_wider(*pairs[changed[0]]):
                yield changed[0], other


def _is_wider(precision: Precision, other: Precision) -> bool:
    """Whether `other` has more bits, none fewer, and does not run as `precision` does."""
    return (
        precision.executed != other.executed
        and other.weight_bits >= precision.executed.weight_bits
        and other.activation_bits >= precision.activation_bits
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
