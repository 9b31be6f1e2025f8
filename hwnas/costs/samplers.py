"""Which architecture each training step of a supernet trains."""

import numpy as np

from hwnas.spaces.base import Architecture, SearchSpace


class UniformSampler:
    """SPOS's uniform path sampling (Guo et al. 2019, section 3.3): each gene uniform among the
    values that are legal after the genes before it."""

    def __init__(self, space: SearchSpace, rng: np.random.Generator) -> None:
        self.space = space
        self.rng = rng
        self._legal = [
            [np.flatnonzero(level.source == state) for state in range(len(level.states))]
            for level in space.lattice.levels
        ]

    def sample(self) -> Architecture:
        """One architecture."""
        edges, state = [], 0
        for level, legal in zip(self.space.lattice.levels, self._legal, strict=True):
            left = legal[state]
            genes = np.array([level.steps[edge].genes for edge in left])
            for column in range(genes.shape[1]):
                keep = genes[:, column] == self.rng.choice(np.unique(genes[:, column]))
                left, genes = left[keep], genes[keep]
            edges.append(int(left[0]))
            state = int(level.target[left[0]])
        return self.space.from_edges(edges)
