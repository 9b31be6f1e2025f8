"""Which architecture each training step of a supernet trains."""

from collections.abc import Mapping

import numpy as np

from hwnas.spaces.base import Architecture, SearchSpace


class UniformSampler:
    """SPOS's uniform path sampling (Guo et al. 2019, section 3.3).

    Each gene is uniform among the values that are legal after the genes before it. For the first
    `held_for` of training, genes whose option is in `held` take the legal value nearest to that
    index instead (negative from the end): widths sampled from the first step on are known not to
    converge.
    """

    def __init__(
        self, space: SearchSpace, *, held: Mapping[str, int] | None = None, held_for: float = 0.0
    ) -> None:
        self.space = space
        self.held = dict(held or {})
        self.held_for = held_for
        self._options = [
            [(gene.name.rpartition(".")[2], len(gene.choices)) for gene in position.genes]
            for position in space.positions
        ]
        self._legal = [
            [np.flatnonzero(level.source == state) for state in range(len(level.states))]
            for level in space.lattice.levels
        ]
        self._genes = [np.array([s.genes for s in level.steps]) for level in space.lattice.levels]

    def sample(self, rng: np.random.Generator, progress: float = 1.0) -> Architecture:
        """One architecture; `progress` is the share of training that is done."""
        held = self.held if progress < self.held_for else {}
        edges, state = [], 0
        for level, options, legal, genes in zip(
            self.space.lattice.levels, self._options, self._legal, self._genes, strict=True
        ):
            left = legal[state]
            for column, (option, size) in enumerate(options):
                values = np.unique(genes[left, column])
                if option in held:
                    value = values[np.argmin(np.abs(values - held[option] % size))]
                else:
                    value = rng.choice(values)
                left = left[genes[left, column] == value]
            edges.append(int(left[0]))
            state = int(level.target[left[0]])
        return self.space.from_edges(edges)
