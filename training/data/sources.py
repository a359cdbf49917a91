"""Where samples come from: one `Source` per layout on disk, and the weighted mix.

`open_source(spec, *, seed=0) -> Source` is the only entry point a trainer needs (see the package docstring for specs).
A Source has len(), `source[i] -> Sample` (raises `broken.BrokenSample`), `size(i) -> (height, width)`, `name(i) -> str`.
"""

from __future__ import annotations


def open_source(spec, *, seed: int = 0):
    raise NotImplementedError
