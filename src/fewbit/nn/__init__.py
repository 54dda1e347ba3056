"""Layers that hold packed weights."""
