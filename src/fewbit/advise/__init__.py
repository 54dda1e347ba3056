"""Advise: what this machine is, and what to use on it."""
