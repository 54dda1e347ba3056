"""Formats: how quantized tensors lie in files."""
