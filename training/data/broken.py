"""Broken or missing files: skipped, counted, named at the end; more than 5 % stops with the list.

Not for errors that concern the whole data set (a missing column, an empty folder): those are ValueErrors at
opening.
"""

from __future__ import annotations

LISTED = 20


class BrokenSample(ValueError):
    """One unreadable example: `name` says which, `reason` why. Sources raise it, `Broken` counts it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        # Exceptions cross DataLoader workers by pickle, which would call __init__ with the one message only.
        return type(self), (self.name, self.reason)


class Broken:
    """The broken examples of one data set of `total` examples.

    More than `limit` (a fraction) of the data set broken is a ValueError with the list: from `close`, so
    that the list is complete, or from `record` as soon as the list is longer than a person would read.
    """

    def __init__(self, total: int, limit: float = 0.05):
        if total < 1:
            raise ValueError(
                f"the data set holds {total} examples: point the data option at a folder with data"
            )
        self.total, self.limit = total, limit
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def record(self, error: BrokenSample) -> None:
        """Count one broken example (once, however often it is met)."""
        self.reasons.setdefault(error.name, error.reason)
        if len(self) > LISTED:
            self.close()

    def close(self) -> str:
        """One sentence for the end of a run, empty when nothing was broken."""
        if len(self) > self.limit * self.total:
            raise ValueError(
                f"{len(self)} of {self.total} examples are broken, more than {self.limit:.0%}: "
                f"repair or remove them ({self._list()})"
            )
        if not self.reasons:
            return ""
        return f"{len(self)} of {self.total} examples were broken and skipped: {self._list()}"

    def _list(self) -> str:
        items = [f"{name}: {reason}" for name, reason in list(self.reasons.items())[:LISTED]]
        if len(self) > LISTED:
            items.append(f"and {len(self) - LISTED} more")
        return "; ".join(items)
