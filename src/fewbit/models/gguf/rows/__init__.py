"""The rows of `architectures.py`, by the kind of layers."""
