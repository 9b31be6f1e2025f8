"""Limits, costs of whole populations, and the feasible set. NumPy and SciPy only."""
