"""Conditioning nodes for FLUX Fill and FLUX Kontext."""

from __future__ import annotations

NODES: list[type] = []
