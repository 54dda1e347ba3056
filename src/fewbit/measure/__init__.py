"""Measurements: quality, memory, speed, and the comparison that collects them."""
