"""Ask/tell search strategies. NumPy only."""
