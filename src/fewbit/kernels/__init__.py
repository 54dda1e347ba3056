"""Kernels: multiply activations by packed weights."""
