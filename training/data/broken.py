"""Broken or missing files: skipped, counted, named at the end; more than 5 % stops with the list.

`BrokenSample(name, reason)` is what a source raises; `Broken(total, limit=0.05)` counts (`record`, `report() -> str`);
`Tolerant(source, broken)` is the same source whose item i is the next readable one when i is broken.
"""

from __future__ import annotations


class BrokenSample(ValueError):
    """One unreadable example: `name` says which, the message why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason
