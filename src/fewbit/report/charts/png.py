"""PNG images of our drawings, by resvg: one small wheel that needs neither a browser nor a library of the system."""

from __future__ import annotations


def png(svg: str, scale: float = 2) -> bytes | str:
    """The image, or a sentence that says why there is none here."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        return "resvg-py is not installed (pip install 'fewbit[report]')"
    empty = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    letter = empty.format('<text y="15" font-family="Arial,Liberation Sans,DejaVu Sans,sans-serif">M</text>')
    if svg_to_bytes(svg_string=letter) == svg_to_bytes(svg_string=empty.format("")):
        return "this system has no font to write with"
    return bytes(svg_to_bytes(svg_string=svg, zoom=scale))
