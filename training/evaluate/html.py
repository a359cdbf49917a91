"""Parts of a page that is one file: its style, tables, and images inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

LARGEST = 80_000  # bytes of an image that is taken as it is
WIDEST = 1024  # px of the others
NARROW = 480  # px: narrower ones are shown at this width, pixel by pixel
STYLE = """
:root { color-scheme: light dark; --ink: #1e1e22; --pale: #777; --line: #ddd; --paper: #fff;
  --s0: #2663ba; --s1: #c2410c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --pale: #999; --line: #444; --paper: #18181b;
  --s0: #7fb0f5; --s1: #fb923c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 980px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 }
h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--line) }
p.state { color: var(--pale); margin-top: .2em }
code, pre { font: 13px/1.4 ui-monospace, monospace }
pre { white-space: pre-wrap; word-break: break-word; border: 1px solid var(--line); padding: .6em }
.row { display: flex; flex-wrap: wrap; gap: 12px }
svg.curve { width: 460px; max-width: 100%; font: 11px system-ui, sans-serif }
svg text { fill: var(--pale) }
svg text.title { fill: var(--ink); font-size: 13px }
.axis { fill: none; stroke: var(--line) }
polyline { fill: none; stroke-width: 2 }
polyline.pale { opacity: .35 }
circle { fill: var(--paper); opacity: .6 }
circle:hover { opacity: 1; stroke-width: 6 }
.s0 { stroke: var(--s0) }
.s1 { stroke: var(--s1) }
tspan.s0 { fill: var(--s0); stroke: none }
tspan.s1 { fill: var(--s1); stroke: none }
figure { margin: 1em 0 }
figure img { max-width: 100%; border: 1px solid var(--line) }
img.small { image-rendering: pixelated }
figcaption { color: var(--pale) }
table { border-collapse: collapse }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top; word-break: break-word;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
td:first-child { white-space: nowrap }
"""


def document(title: str, body: str) -> str:
    """A whole page; it loads nothing, not even an icon."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(values: Mapping[str, Any]) -> str:
    """Names and values, a row each; "" for none."""
    rows = (f"<tr><td>{escape(str(n))}</td><td>{value(v)}</td></tr>" for n, v in values.items())
    return f"<table>{''.join(rows)}</table>" if values else ""


def value(value: Any) -> str:
    """A value in words, escaped; numbers to five digits."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return escape(", ".join(map(str, value)))
    return "" if value is None else escape(str(value))


def figure(file: Path, caption: str) -> str:
    """An image inside the page; one that cannot be read says so."""
    try:
        source, width = _embedded(file)
    except (OSError, ValueError) as error:
        return f"<p>{escape(file.name)} cannot be read ({escape(str(error))})</p>"
    small = ' class="small"' if width < NARROW else ""
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img{small} alt="{escape(file.name)}" width="{max(width, NARROW)}" src="{source}">'
    return f"<figure>{image}{under}</figure>"


def _embedded(file: Path) -> tuple[str, int]:
    """(data address, width in px) of an image, made smaller where it is large."""
    from PIL import Image

    with Image.open(file) as image:
        width, data, kind = image.width, file.read_bytes(), (image.format or "png").lower()
        if len(data) > LARGEST:
            image = image.convert("RGB")
            image.thumbnail((WIDEST, WIDEST * 4))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=80)
            data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width
