"""Generating text: one token after the other, by steps that are recorded once."""
