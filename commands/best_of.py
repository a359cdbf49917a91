"""The options of `diptych edit` that choose among several candidates: --best-of, --judge, --judge-steps."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import values

MOST = 4096  # candidates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --best-of, --judge and --judge-steps, in a group of their own."""
    add = parser.add_argument_group(
        "best of N", "sample several candidates, finish the one a judge likes best"
    )
    add = add.add_argument
    add(
        "--best-of",
        type=values.whole(1, MOST),
        default=1,
        metavar="N",
        help="candidates; seeds SEED to SEED+N-1 (default 1)",
    )
    add(
        "--judge",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT][:KEY=VALUE,...]",
        help="reward that judges; may be repeated. For example vlm_yes, clip_h:path=FOLDER, keep_l1=0.5 "
        "(default: shapes for the bundled model)",
    )
    add(
        "--judge-steps",
        type=values.steps,
        metavar="M",
        help="steps before judging (default: a third of the steps)",
    )


def check(
    args: argparse.Namespace, steps: int, instruction: str, image: Tensor, layout: Any, tiny: bool
) -> Any:
    """The `BestOf` that the arguments ask for, its judge loaded; None for a plain edit.

    Raises ValueError if they do not go together, or a reward needs what an edit does not have.
    """
    from ..models.editing import BestOf
    from ..samplers.early_filter import check as cost_of

    if args.best_of == 1:
        for option, given in (("--judge", args.judge), ("--judge-steps", args.judge_steps is not None)):
            if given:
                raise ValueError(f"{option} does nothing without --best-of: add for example --best-of 6")
        return None
    if not args.judge and not tiny:
        raise ValueError("--best-of needs a judge: add for example --judge vlm_yes or --judge clip_h")
    from ..training.evaluate.judge import Judge
    from ..training.rewards import Selection, parse

    judge_steps = args.judge_steps if args.judge_steps is not None else max(1, round(steps / 3))
    cost_of(args.best_of, judge_steps, 1, steps)
    chosen = Selection(tuple(parse(text) for text in args.judge or ["shapes"]))
    judge = Judge.of(chosen, instruction, image, layout=layout)

    def tell(made: Any) -> None:
        print(scores(made, chosen, args.seed))
        print(made.cost)

    # One at a time fits wherever a plain edit fits.
    return BestOf(args.best_of, judge, judge_steps, batch=0 if tiny else 1, on_result=tell)


def noting(best: Any, first: int, found: dict[str, Any]) -> Any:
    """The `BestOf` that also puts its candidates, and the seed that was kept, into `found`; None stays None.

    first: the first candidate's seed.
    """
    if best is None:
        return None

    def tell(made: Any) -> None:
        if best.on_result is not None:
            best.on_result(made)
        scores = enumerate(made.scores.tolist(), first)
        found["candidates"] = [{"seed": seed, "score": score} for seed, score in scores]
        found["seed"] = first + int(made.chosen[0])

    return replace(best, on_result=tell)


def scores(made: Any, judges: Any, first: int) -> str:
    """What the judges said of the candidates with seeds from `first` on, and which was kept."""
    given = ["not judged" if score.isnan() else f"{float(score):.4g}" for score in made.scores]
    last, kept = first + len(given) - 1, first + int(made.chosen[0])
    return f"scores by {judges} of seeds {first} to {last}: {', '.join(given)}; kept {kept}"


def evaluations(sampling: Any) -> int:
    """Model evaluations of an edit, for its progress bar."""
    best = sampling.best_of
    if best is None:
        return sampling.steps
    return best.candidates * best.judge_steps + sampling.steps - best.judge_steps
