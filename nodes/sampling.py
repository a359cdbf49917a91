"""Schedule and sampler nodes."""

from __future__ import annotations

NODES: list[type] = []
