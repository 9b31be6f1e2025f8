"""What an op costs inside a network, beside what it costs alone.

Alone in its graph an op pays for the call and for bringing its input and output into the layout
that its kernels want. Inside a network it shares those with its neighbours: what is saved at the
boundary between two ops is measured on chains. A boundary is what the saving hangs on
(`OpSpec.boundary`): the tensor with its format, whether it is added to the result, the precision.

For a chain whose last op crosses a boundary, saving = chain without the last op + last op alone
- whole chain.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from latency_tables.ops import OpSpec, Tensor

Chain = tuple[OpSpec, ...]

LEAST_SHARE = 0.1
"""An op inside a network costs at least this share of what it costs alone."""


def chain_key(chain: Sequence[OpSpec]) -> str:
    """The canonical text of a chain: its ops' keys.

    >>> from latency_tables.ops import OpBuilder, Tensor
    >>> from quant.precision import Precision
    >>> op = OpBuilder(Precision("fp32"), Tensor(3, 8, 8))
    >>> _ = op.pool(0)
    >>> chain_key((op.build(),)) == op.build().key
    True
    """
    return " => ".join(op.key for op in chain)


def heads(ops: Iterable[OpSpec]) -> dict[Tensor, Chain]:
    """What can stand before an op, by the tensor that it takes: the shortest chain of the ops that
    hands it on, and among those the one with the fewest MACs, whose first op adds no input to its
    result: first in a graph, such an op does not run as it does inside a network.

    `ops` come in the order of a network's positions, each with one input.
    """
    before: dict[Tensor, Chain] = {}
    for op in ops:
        head = before.get(op.inputs[0], ()) if op.adds(0) else ()
        if op.adds(0) and not head:
            continue
        chain = (*head, op)
        if op.output not in before or _size(chain) < _size(before[op.output]):
            before[op.output] = chain
    return before


def probes(ops: Iterable[OpSpec]) -> dict[str, Chain]:
    """A chain for every boundary that the ops cross behind another of them, by boundary; all as
    they are executed. Before the op with the fewest MACs stands what `heads` has.
    """
    ops = list(dict.fromkeys(op.executed for op in ops))
    before = heads(ops)
    found: dict[str, Chain] = {}
    for op in ops:
        if op.inputs[0] in before:
            chain = (*before[op.inputs[0]], op)
            if op.boundary not in found or op.macs < found[op.boundary][-1].macs:
                found[op.boundary] = chain
    return found


def with_heads(chains: Iterable[Chain]) -> list[Chain]:
    """The chains of several ops that must be measured to know the savings of `chains`, each once:
    themselves, and themselves without their last op.
    """
    return list(dict.fromkeys(c for chain in chains for c in (chain[:-1], chain) if len(c) > 1))


def savings_us(costs_us: Mapping[str, float], chains: Iterable[Chain]) -> dict[str, float]:
    """What each boundary saves, in us: the median over the chains that cross it last.

    `costs_us` has what each chain, and each op alone, was measured at, by key.
    """
    found: dict[str, list[float]] = {}
    for chain in chains:
        parts = [chain_key(chain[:-1]), chain[-1].key]
        if all(part in costs_us for part in parts):
            saved = sum(costs_us[part] for part in parts) - costs_us[chain_key(chain)]
            found.setdefault(chain[-1].boundary, []).append(saved)
    return {boundary: float(np.median(saved)) for boundary, saved in found.items()}


def _size(chain: Chain) -> tuple[int, int]:
    return len(chain), sum(op.macs for op in chain)
