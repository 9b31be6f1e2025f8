"""At which percentiles of a network's calls its latency can be stated."""

MEDIAN = 50
"""The one that is meant unless another is asked for."""

PERCENTILES = (90, 95)
"""The others."""
