"""Which sampling steps of a rollout are random, and so trained: a function of the update's number alone.

Being a pure function of (strategy, iteration, seed) it needs no state in a checkpoint.
"""

from __future__ import annotations

import random

STRATEGIES = ("fixed", "random", "progressive")


def window(
    strategy: str,
    iteration: int,
    steps: int,
    *,
    size: int,
    first: int = 0,
    last: int = 0,
    every: int = 25,
    seed: int = 0,
) -> tuple[int, int]:
    """The half-open step window (start, end) of one iteration.

    strategy: "fixed" stays at `first`; "random" draws its start anew each iteration (Flow-GRPO fast);
    "progressive" moves on by one step every `every` iterations and starts over at the end (MixGRPO).
    steps: sampling steps; the last one is deterministic and never inside. size: steps in the window.
    first, last: the window stays within [first, last); last 0 means steps - 1.

    Raises ValueError if the window does not fit.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"window strategy is {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    last = last or steps - 1
    room = last - first - size
    if size < 1 or first < 0 or last > steps - 1 or room < 0:
        raise ValueError(
            f"a window of {size} steps does not fit into steps {first} to {last} of {steps}"
            " (the last step adds no noise): use a smaller window or more steps."
        )
    if strategy == "fixed":
        start = first
    elif strategy == "random":
        start = first + random.Random(f"{seed}/{iteration}").randint(0, room)
    else:
        start = first + iteration // every % (room + 1)
    return start, start + size
