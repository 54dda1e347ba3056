"""Quantize a model block by block, and write the result."""
