"""Formats: how quantized weights are laid out in files."""
