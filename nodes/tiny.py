"""Loader of the bundled tiny demo models."""

from __future__ import annotations

NODES: list[type] = []
