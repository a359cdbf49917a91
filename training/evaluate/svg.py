"""Curves as inline SVG: a line, its points with their values, and the running mean where there are many."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from .history import History

WIDTH, HEIGHT = 460, 220  # px, of which the margins are
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 28, 24
MOST = 150  # points that are drawn of a series: those between are left out, the first and last never
SMOOTH = 20  # so many points or more get a running mean over a twentieth of them


def chart(title: str, series: Mapping[str, History], smooth: bool = True) -> str:
    """One chart of the series by name, values over steps; "" where none has a value.

    Hovering a point shows its step and value. smooth: with a running mean over many points.
    """
    series = {name: values for name, values in series.items() if values}
    if not series:
        return ""
    steps = [step for values in series.values() for step in values]
    numbers = [value for values in series.values() for value in values.values()]
    x, y = (
        _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT),
        _scale(min(numbers), max(numbers), HEIGHT - BOTTOM, TOP),
    )
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>', *_legend(series)]
    parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for value, at in ((max(numbers), TOP + 8), (min(numbers), HEIGHT - BOTTOM)):
        parts.append(f'<text x="{LEFT - 4}" y="{at}" text-anchor="end">{value:.3g}</text>')
    for step, anchor, at in ((min(steps), "start", LEFT), (max(steps), "end", WIDTH - RIGHT)):
        parts.append(f'<text x="{at}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step}</text>')
    for number, (name, values) in enumerate(series.items()):
        parts.append(_series(name, values, x, y, number, smooth))
    about = f'class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<svg {about}>{''.join(parts)}</svg>"


def _scale(low: float, high: float, start: float, end: float):
    """What puts low..high on start..end; a single value in the middle."""
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _legend(series: Mapping[str, History]) -> list[str]:
    if len(series) < 2:
        return []
    words = "".join(
        f'<tspan class="s{number}" dx="8">{escape(name)}</tspan>' for number, name in enumerate(series)
    )
    return [f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end">{words}</text>']


def _series(name: str, values: History, x, y, number: int, smooth: bool) -> str:
    points = list(values.items())
    smoothed = _running_mean(points) if smooth and len(points) >= SMOOTH else []
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(points))
    mean = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(smoothed))
    dots = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2">'
        f"<title>{escape(f'{name} {step}: {value:.6g}'.strip())}</title></circle>"
        for step, value in thinned(points)
    )
    raw = f'<polyline class="raw{" pale" if smoothed else ""}" points="{line}"/>'
    return f'<g class="s{number}">{raw}{f"""<polyline points="{mean}"/>""" if mean else ""}{dots}</g>'


def thinned(points: list[tuple[int, float]], most: int = MOST) -> list[tuple[int, float]]:
    """At most so many of the points, evenly, first and last among them."""
    return [points[index] for index in spread(len(points), most)]


def spread(count: int, most: int) -> list[int]:
    """At most so many indices below count, evenly, first and last among them."""
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)}) if count else []


def _running_mean(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value's mean with those before it, a twentieth of all together at most."""
    window, total, out = max(1, len(points) // 20), 0.0, []
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        out.append((step, total / min(index + 1, window)))
    return out
