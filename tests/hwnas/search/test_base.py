import math

import pytest

from hwnas.search.base import check_scores
from hwnas.spaces.base import Architecture


@pytest.mark.parametrize("scores", [[], [()], [(0.5,), (1.0, -2.0)], [(math.inf, -math.inf)]])
def test_scores_that_compare_are_accepted(scores: list[tuple[float, ...]]) -> None:
    check_scores([Architecture((n,)) for n in range(len(scores))], scores)


@pytest.mark.parametrize(
    "scores", [[(math.nan,)], [(0.5,), (1.0, math.nan)], [(math.nan, 1.0), (0.5, 1.0)]]
)
def test_nan_anywhere_is_refused(scores: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="holds NaN"):
        check_scores([Architecture((n,)) for n in range(len(scores))], scores)


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(ValueError, match="1 scores for 2 architectures"):
        check_scores([Architecture((0,)), Architecture((1,))], [(0.5,)])
