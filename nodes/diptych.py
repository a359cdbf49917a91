"""Diptych building and splitting nodes."""

from __future__ import annotations

NODES: list[type] = []
