"""Shared weights for a whole space, in PyTorch."""
