"""Ops and spaces with every value and weight in float: what quantised networks are roundings of."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hwnas.spaces.base import Build, Choice, Position, SearchSpace, State
from latency_tables.ops import OpSpec, Tensor
from quant.precision import Format, Precision

FLOAT = Precision("fp32")


def op_in_float(op: OpSpec) -> OpSpec:
    """The same layers in fp32, from fp32 inputs.

    >>> from hwnas.spaces.blocks import conv_norm_activation
    >>> op_in_float(conv_norm_activation(Tensor(3, 8, 8), 4, kernel=3, precision=Precision("w8a8"))
    ... ).key
    'fp32 [fp32:3x8x8] conv(0) c4 k3 s1 g1 n; relu(1)'
    """
    return replace(op, inputs=tuple(map(_tensor, op.inputs)), precision=FLOAT)


def space_in_float(space: SearchSpace) -> SearchSpace:
    """The same positions, options and groups of weights with every op in fp32.

    Precisions make no difference there, so they are 0 in its canonical architectures.
    """
    positions = tuple(replace(p, build=_build(p)) for p in space.positions)
    return replace(space, name=f"{space.name} in float", positions=positions)


def _tensor(tensor: Tensor) -> Tensor:
    return replace(tensor, format=Format(FLOAT.name, tensor.format.signed))


def _build(position: Position) -> Build:
    def build(state: State, values: Mapping[str, Any]) -> Choice | None:
        choice = position.build(state, values)
        if choice is None:
            return None
        return replace(
            choice,
            op=None if choice.op is None else op_in_float(choice.op),
            state=replace(choice.state, tensor=_tensor(choice.state.tensor)),
        )

    return build
