"""Genes, blocks, and the spaces that come with hwnas."""
