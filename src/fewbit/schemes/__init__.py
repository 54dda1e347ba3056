"""Schemes: what the numbers of a quantized weight mean."""
