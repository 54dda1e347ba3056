"""Renders the charts as PNG with resvg, a small wheel that needs neither a browser nor system libraries."""

from __future__ import annotations


def png(svg: str, scale: float = 2) -> bytes | str:
    """The PNG image, or a sentence that says why it cannot be rendered."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return "resvg-py is not installed (pip install 'fewbit[report]')"
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    letter = empty.format('<text y="15" font-family="Arial,Liberation Sans,DejaVu Sans,sans-serif">M</text>')
    if svg_to_bytes(svg_string=letter) == svg_to_bytes(svg_string=empty.format("")):
        return "this system has no font"
    return bytes(svg_to_bytes(svg_string=svg, zoom=scale))
