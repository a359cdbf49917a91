"""Which sampling steps of a rollout are random, and so trained: how a recipe says it, and where that is.

A window's place is a pure function of the update's number, so that it needs no state in a checkpoint.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from ..notation import matched


class Window(NamedTuple):
    """`size` consecutive steps of `steps`, counted from 0, within the half-open range [first, last).

    kind: "fixed" stays at `first`; "random" is drawn anew at each update (Flow-GRPO fast); "progressive"
    moves on by one step every `every` updates and starts over at the end (MixGRPO).
    """

    kind: str
    size: int
    steps: int
    first: int = 0
    last: int = 0
    every: int = 25
    seed: int = 0

    @classmethod
    def read(cls, text: str, size: int, steps: int, seed: int = 0) -> Window:
        """`fixed[:FIRST]`, `random[:FIRST-LAST]` or `progressive[:FIRST-LAST][/EVERY]`.

        Without LAST it stays in the first half of the steps, or as far as its size reaches. Raises ValueError
        for what is written otherwise; `check` says whether it fits.
        """
        match = matched(
            "window",
            text,
            r"(fixed)(?::(\d+))?|(random|progressive)(?::(\d+)-(\d+))?(?:/(\d+))?",
            "use one of fixed:FIRST, random, random:FIRST-LAST, progressive:FIRST-LAST/EVERY",
        )
        kind, every = match[1] or match[3], int(match[6] or 25)
        if (match[6] and kind == "random") or every < 1:
            raise ValueError(f"window is {text!r}: /EVERY is for progressive, 1 or more")
        first = int(match[2] or match[4] or 0)
        return cls(kind, size, steps, first, int(match[5] or max(first + size, steps // 2)), every, seed)

    def check(self) -> None:
        """Raise ValueError if the window does not fit; the last step adds no noise and is never inside."""
        if self.size < 1 or self.last > self.steps - 1 or self.last - self.first < self.size:
            raise ValueError(
                f"a window of {self.size} steps does not fit into steps {self.first} to {self.last} of "
                f"{self.steps} (the last step adds no noise): use a smaller window or more steps"
            )

    def at(self, update: int) -> tuple[int, int]:
        """The half-open range of random steps of one update."""
        room = self.last - self.first - self.size
        moved = 0
        if self.kind == "random":
            moved = random.Random(f"{self.seed}/{update}").randint(0, room)
        elif self.kind == "progressive":
            moved = update // self.every % (room + 1)
        return self.first + moved, self.first + moved + self.size

    @property
    def span(self) -> tuple[int, int]:
        """The half-open range of all steps that are random at some update."""
        return self.first, self.first + self.size if self.kind == "fixed" else self.last
