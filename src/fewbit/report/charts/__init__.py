"""Drawings as SVG text, made without a library: what they show, a caller says in plain numbers and names."""
