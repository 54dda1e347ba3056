"""Schemes: what the numbers of a quantized weight mean, and how to compute them."""
