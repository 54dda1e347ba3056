"""Evaluate: what was lost, saved and gained."""
