"""Charts as SVG text, drawn without a library from plain numbers and names."""
