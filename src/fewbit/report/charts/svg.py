"""Builds SVG as text, with all content escaped.

Colors are CSS classes. A page that embeds a drawing has rules in terms of its custom properties (`rules(None)`). A
standalone file has the same rules with the colors filled in, for viewers that do not support custom properties.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

# Characters that XML 1.0 does not allow, and lone surrogates, which UTF-8 cannot encode.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2024",
    "soft": "#5b636d",
    "line": "#e3e6ea",
    "axis": "#9aa2ab",
    "accent": "#0b62c4",
    "hollow": "#ffffff",
    "failed": "#b3261e",
    "h0": "#f3f6fa",
    "h1": "#fde9b8",
    "h2": "#fbc97b",
    "h3": "#f4a04f",
    "h4": "#e3743a",
    "h5": "#c44a38",
    "h6": "#97293f",
    "h7": "#631642",
    "h8": "#330a33",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e8eaed",
    "soft": "#a3abb4",
    "line": "#2a2f35",
    "axis": "#6b737c",
    "accent": "#6cb0ff",
    "hollow": "#14171a",
    "failed": "#ff8a80",
    "h0": "#20252a",
    "h1": "#3a2140",
    "h2": "#5c2450",
    "h3": "#852d50",
    "h4": "#b03e47",
    "h5": "#d25c3c",
    "h6": "#eb843c",
    "h7": "#f8b352",
    "h8": "#fde59a",
}
STEPS = 9  # colors of a heat map, h0 to h8: light to dark, reversed on a dark page, so that large values stand out

FONT = "ui-sans-serif,system-ui,'Segoe UI','Helvetica Neue',Arial,'Liberation Sans','DejaVu Sans',sans-serif"

_RULES = """
.chart text{font-family:@font;font-size:12px;fill:@ink}
.chart .tick{fill:@soft}
.chart .name{font-size:12px;fill:@soft}
.chart .on{font-weight:600;fill:@ink}
.chart .title{font-size:15px;font-weight:600}
.chart .grid{stroke:@line;stroke-width:1}
.chart .axis{stroke:@axis;stroke-width:1}
.chart .front{fill:none;stroke:@accent;stroke-width:1.5;stroke-dasharray:5 4}
.chart .bar{stroke:@axis;stroke-width:1.25}
.chart .lead{stroke:@axis;stroke-width:.75}
.chart .dot{fill:@hollow;stroke:@soft;stroke-width:1.75}
.chart .open{stroke:@accent;stroke-dasharray:2 2}
.chart .best{fill:@accent;stroke:@hollow;stroke-width:1.5}
.chart .halo{stroke:@hollow;stroke-width:4;stroke-linejoin:round;paint-order:stroke}
.chart .paper{fill:@paper}
.chart .none{fill:none;stroke:@line}
"""


def escaped(text: object) -> str:
    """`text` escaped for HTML and XML, also inside attributes. Text that a model wrote is untrusted."""
    return escape(_UNWRITABLE.sub("\ufffd", str(text)))


def element(name: str, *content: str, text: object = None, **attributes: object) -> str:
    """`<name ...>content</name>`. `content` is markup; `text` is escaped. An attribute `class_` becomes class, other
    `_` become `-`, and attributes with the value None are left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{_number(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(content) + (escaped(text) if text is not None else "")
    return f"<{name}{said}>{inner}</{name}>" if inner else f"<{name}{said}/>"


def drawing(width: float, height: float, *content: str, name: str, title: str, description: str) -> str:
    """An image with a title and a description for screen readers. `name` makes their ids unique in a page."""
    return element(
        "svg",
        element("title", text=title, id=f"{name}-title"),
        element("desc", text=description, id=f"{name}-desc"),
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        class_="chart",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def rules(colors: Mapping[str, str] | None) -> str:
    """The CSS rules of all drawings, with these colors. None: with the page's custom properties --ink, --soft, ..."""
    given = {"font": FONT, **(colors or {name: f"var(--{name})" for name in LIGHT})}
    written = _RULES + "".join(f".chart .h{i}{{fill:@h{i}}}\n" for i in range(STEPS))
    return re.sub(r"@(\w+)", lambda found: given[found[1]], written)


def standalone(image: str, *, dark: bool = True) -> str:
    """A drawing as a standalone file, with background and style. `dark`: with dark colors for viewers in dark mode."""
    style = rules(LIGHT) + (f"@media (prefers-color-scheme:dark){{{rules(DARK)}}}" if dark else "")
    head, rest = image.split(">", 1)
    paper = element("rect", class_="paper", width="100%", height="100%")
    return f"{head}>{element('style', style)}{paper}{rest}\n"


def extent(text: str, size: float = 12) -> float:
    """The estimated width of a text in pixels. It errs on the wide side."""
    narrow, wide = "iljtfrI.,:;'|!()[] -", "mwMW@%&"
    return size * sum(0.36 if c in narrow else 0.88 if c in wide else 0.66 if c.isupper() else 0.59 for c in text)


def cut(text: str, most: int) -> str:
    """`text`, shortened to `most` characters in the middle if it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def _number(value: object) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else escaped(value)
