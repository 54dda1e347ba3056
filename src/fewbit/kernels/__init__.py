"""Kernels: how activations are multiplied by packed weights."""
