"""The supernet: shared weights for every architecture of a space.

It walks the ops of the architecture at hand, with weights kept under (position, group, role),
sliced and rounded at the sampled precision. It knows no block: what it builds is read from the
space's ops.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hwnas.placement import placement_of
from hwnas.spaces.base import Architecture, PlacedOp, SearchSpace
from hwnas.supernet.elastic import ElasticLayer, ElasticRange, Statistics
from latency_tables.ops import Layer
from profilers.modules import Network, run_op
from quant.precision import ONNXRUNTIME, Runtime

RESIDUAL_GAMMA = 0.3
"""Where a norm's output is added to a shortcut, its factor starts below 1 (after Goyal et al. 2017,
section 5.1, who start at 0): single paths then train about twice as fast on small images."""

NormStatistics = dict[tuple[int, int], Statistics]
"""Batch-norm statistics of one architecture, by (number of the op, index of the layer)."""


class Supernet(nn.Module):
    """Shared weights of `space`, with activations on the grid of `runtime`."""

    def __init__(self, space: SearchSpace, runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.space = space
        self.runtime = runtime
        shapes: dict[str, tuple[int, ...]] = {}
        examples: dict[str, Layer] = {}
        self.layers = nn.ModuleDict()
        self.ranges = nn.ModuleDict()
        summed: set[str] = set()
        for placed in _placed_ops(space):
            added = {i for layer in placed.op.layers if layer.kind == "add" for i in layer.inputs}
            for index, shape in placed.op.weight_shapes.items():
                layer = placed.op.layers[index]
                name = _layer_name(placed, layer)
                shapes[name] = tuple(map(max, shape, shapes.get(name, shape)))
                examples[name] = layer
                if len(placed.op.inputs) + index in added:
                    summed.add(name)
            for index, quantiser in placed.op.quantisers.items():
                grid = runtime.grid(quantiser.bits, signed=quantiser.signed)
                name = _range_name(placed, index)
                if name not in self.ranges:
                    self.ranges[name] = ElasticRange(grid, pact=placed.op.precision.is_pact)
        for name, shape in shapes.items():
            gamma = RESIDUAL_GAMMA if name in summed else 1.0
            self.layers[name] = ElasticLayer(examples[name], shape, gamma)

    def forward(
        self,
        images: Tensor,
        architecture: Architecture,
        statistics: NormStatistics | None = None,
    ) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width).

        Batch norms use the batch's statistics, or those that `recalibrate` returned.
        """
        return self._run(images, architecture, statistics, None)

    def recalibrate(self, architecture: Architecture, batches: Iterable[Tensor]) -> NormStatistics:
        """An architecture's own batch-norm statistics: the cumulative mean over the batches."""
        statistics: NormStatistics = {}
        device = next(self.parameters()).device
        for number, placed in enumerate(self.space.walk(architecture)):
            for index, layer in enumerate(placed.op.layers):
                if layer.norm:
                    zeros = torch.zeros(layer.channels, device=device)
                    statistics[number, index] = (zeros, torch.ones_like(zeros))
        with placement_of(self).scoring():
            for count, images in enumerate(batches, start=1):
                self._run(images, architecture, statistics, 1 / count)
        return statistics

    def extract(self, architecture: Architecture, statistics: NormStatistics) -> Network:
        """The architecture as a network with weights of its own beside the shared ones, the same
        to the last bit.
        """
        network = Network(self.space.lower(architecture), self.runtime)
        placement_of(self).move(network)
        with torch.no_grad():
            for number, (placed, module) in enumerate(
                zip(self.space.walk(architecture), network.op_modules, strict=True)
            ):
                for index, target in module.weighted_layers.items():
                    layer = placed.op.layers[index]
                    shared = self._layer(placed, layer)
                    target.weight.copy_(shared.sliced_weight(placed.op.weight_shapes[index]))
                    if layer.norm:
                        gamma, known = shared.gamma[: layer.channels], statistics[number, index]
                        module.set_norm(index, gamma, shared.bias[: layer.channels], *known)
                    elif target.bias is not None:
                        target.bias.copy_(shared.bias[: layer.channels])
                for index, quantiser in module.activation_quantisers.items():
                    quantiser.limit = float(self._range(placed, index).limit.detach())
        return network.eval()

    def initialise_ranges(self, images: Tensor) -> None:
        """Set every activation range from a batch, by running paths until all were seen; each path
        is one that sees the most ranges that no path saw before.
        """
        ranges: list[list[list[ElasticRange]]] = [
            [
                []
                if step.op is None
                else [
                    self._range(PlacedOp(position.name, step.group, step.op), index)
                    for index in step.op.quantisers
                ]
                for step in level.steps
            ]
            for position, level in zip(self.space.positions, self.space.lattice.levels, strict=True)
        ]
        while True:
            unset = [
                np.array([float(sum(not r.is_set for r in edge)) for edge in level])
                for level in ranges
            ]
            if not any(level.any() for level in unset):
                return
            path = self.space.heaviest(unset)
            if not any(level[e] for level, e in zip(unset, self.space.edges(path), strict=True)):
                return  # what is left stands on no whole network
            with placement_of(self).scoring():
                self._run(images, path, None, None, initialise=True)

    def _run(
        self,
        images: Tensor,
        architecture: Architecture,
        statistics: NormStatistics | None,
        momentum: float | None,
        *,
        initialise: bool = False,
    ) -> Tensor:
        value = images
        for number, placed in enumerate(self.space.walk(architecture)):
            value = self._run_op(number, placed, value, statistics, momentum, initialise)
        return value

    def _run_op(
        self,
        number: int,
        placed: PlacedOp,
        value: Tensor,
        statistics: NormStatistics | None,
        momentum: float | None,
        initialise: bool,
    ) -> Tensor:
        # A training step takes a norm and the quantiser behind it in one pass.
        trains = statistics is None and torch.is_grad_enabled()
        rounded_norms = placed.op.rounded_norms if trains else {}
        rounded = {position for position, _ in rounded_norms.values()}

        def weighted(index: int, layer: Layer, source: Tensor) -> Tensor:
            shared = self._layer(placed, layer)
            precision = self.runtime.layer_precision(
                placed.op.precision, channelwise=placed.op.is_channelwise(index)
            )
            result: Tensor = shared(source, layer, precision)
            if not layer.norm:
                return result
            if index in rounded_norms:
                position, relu = rounded_norms[index]
                quantiser = self._range(placed, position)
                return shared.normalise_and_quantise(result, layer, quantiser, relu=relu)
            known = statistics[number, index] if statistics is not None else None
            return shared.normalise(result, layer, known, momentum)

        def quantise(index: int, source: Tensor, relu: bool) -> Tensor:
            if index in rounded:
                return source
            shared = self._range(placed, index)
            if initialise:
                shared.initialise(source.relu() if relu else source)
            result: Tensor = shared(source, relu=relu)
            return result

        return run_op(placed.op, [value], weighted, quantise)

    def _layer(self, placed: PlacedOp, layer: Layer) -> ElasticLayer:
        found = self.layers[_layer_name(placed, layer)]
        assert isinstance(found, ElasticLayer)
        return found

    def _range(self, placed: PlacedOp, index: int) -> ElasticRange:
        found = self.ranges[_range_name(placed, index)]
        assert isinstance(found, ElasticRange)
        return found


def _placed_ops(space: SearchSpace) -> Iterator[PlacedOp]:
    """Every op that can stand at every position."""
    for position, level in zip(space.positions, space.lattice.levels, strict=True):
        for step in level.steps:
            if step.op is not None:
                yield PlacedOp(position.name, step.group, step.op)


def _layer_name(placed: PlacedOp, layer: Layer) -> str:
    return f"{placed.position}/{placed.group}/{layer.role}"


def _range_name(placed: PlacedOp, index: int) -> str:
    quantiser = placed.op.quantisers[index]
    sign = "signed" if quantiser.signed else "unsigned"
    scheme = " pact" if placed.op.precision.is_pact else ""
    return f"{placed.position}/{placed.group}/value{index}/{quantiser.bits} bits {sign}{scheme}"
