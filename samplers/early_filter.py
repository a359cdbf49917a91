"""Best of N: judge several candidates after a few steps, and finish only the best.

N noises advance for m of n steps, the data each is heading for (predicted x0) is judged, and the best go
on with their remaining steps of the same schedule: nothing is computed twice. After ICEdit's early filter
(arXiv 2504.20690), which samples M previews of m steps and then samples the best anew with n.
What a judge is stands in `training/rewards`; the ComfyUI loop is `comfy_early_filter.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .flow_match import Callback, sample
from .gaussian import Window, sde_seed, window_steps

__all__ = ["Cost", "Filtered", "best_of", "candidate_seed", "check", "choose", "sde_generators"]

Judge = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cost:
    """Model evaluations per image of the batch: what this run needs, and what others would."""

    candidates: int
    judged_after: int
    steps: int
    kept: int = 1

    @property
    def evaluations(self) -> int:
        """Of this run: all candidates up to the judgement, the kept ones after it."""
        return self.candidates * self.judged_after + self.kept * (self.steps - self.judged_after)

    @property
    def plain(self) -> int:
        """One image without a choice."""
        return self.steps

    @property
    def exhaustive(self) -> int:
        """Every candidate finished before it is judged."""
        return self.candidates * self.steps

    def __str__(self) -> str:
        return (
            f"{self.evaluations} model evaluations: {self.candidates} candidates x {self.judged_after} steps "
            f"+ {self.kept} x {self.steps - self.judged_after} to finish; one plain image takes "
            f"{self.plain}, finishing all candidates {self.exhaustive}"
        )


def check(candidates: int, judge_steps: int, keep: int, steps: int) -> Cost:
    """The cost of a run. Raises ValueError for numbers that do not fit together."""
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}: at least one is needed.")
    if not 1 <= keep <= candidates:
        raise ValueError(f"{keep} of {candidates} candidates cannot be kept: keep 1 to {candidates}.")
    if not 1 <= judge_steps <= steps:
        raise ValueError(
            f"judging after {judge_steps} steps does not fit a schedule of {steps}: choose 1 to {steps}."
        )
    return Cost(candidates, judge_steps, steps, keep)


def candidate_seed(seed: int, index: int) -> int:
    """The seed of candidate `index`: seed, seed + 1, ... so that any of them can be made again by itself."""
    return (seed + index) % 2**64


def sde_generators(seed: int, candidates: int, stream: int = 0) -> list[torch.Generator]:
    """One generator of SDE noise per candidate, as a run of that candidate's own seed would have it."""
    return [
        torch.Generator().manual_seed(sde_seed(candidate_seed(seed, index), stream))
        for index in range(candidates)
    ]


def choose(scores: Tensor, keep: int = 1) -> Tensor:
    """Indices of the best scores along the first axis, best first: [N,...] -> [keep,...].

    A NaN (an image that could not be judged) comes last; of equals the earlier one wins.
    """
    ranked = torch.where(scores.isnan(), -torch.inf, scores.double())
    return ranked.argsort(dim=0, descending=True, stable=True)[:keep]


@dataclass(frozen=True)
class Filtered:
    """latents [keep,...], best first; chosen: their candidate numbers [keep]; scores [N]; the cost."""

    latents: Tensor
    chosen: Tensor
    scores: Tensor
    cost: Cost = field(compare=False)


@torch.no_grad()
def best_of(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    judge: Judge,
    *,
    judge_steps: int,
    keep: int = 1,
    batch: int = 0,
    rule: str = "ode",
    eta: float | None = None,
    window: Window = None,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> Filtered:
    """Run `sigmas` [n+1] from N noises [N,...], judging after `judge_steps` model evaluations of each.

    velocity(x, sigma): the model, for any batch of candidates up to `batch` (0 = all N at once).
    judge(x0): scores [N] of the predicted data [N,...]; higher is better, NaN is never chosen over a number.
    generators: one per candidate for the SDE rules; a candidate's noise does not depend on the others.
    rule, eta, window, callback: as for `flow_match.sample`; the callback sees the steps of each micro-batch.

    With one candidate this is `flow_match.sample`, to the last bit. Raises ValueError before the first model
    call for numbers that do not fit.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
    steps, count = len(sigmas) - 1, len(noise)
    cost = check(count, judge_steps, keep, steps)
    if generators is not None and len(generators) != count:
        raise ValueError(f"{len(generators)} generators were given for {count} candidates: give one each.")
    random = window_steps(window, steps)
    seen: list[Tensor] = []

    def run(x: Tensor, first: int, last: int, who: Sequence[int], watch: Callback) -> Tensor:
        return sample(
            velocity,
            x,
            sigmas[first : last + 1],
            rule=rule,
            eta=eta,
            window=_shifted(random, first, last),
            generator=None if generators is None else [generators[i] for i in who],
            callback=watch,
        )

    def watched(first: int) -> Callback:
        def watch(state: dict) -> None:
            state = {**state, "i": state["i"] + first}
            if state["i"] == judge_steps - 1:
                seen.append(state["denoised"])
            if callback is not None:
                callback(state)

        return watch

    # Between the two parts the latents stay in float32, as they do between the steps of one.
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
    parts = _parts(range(count), batch)
    halfway = torch.cat([run(noise[part], 0, judge_steps, part, watched(0)) for part in parts])
    scores = _scores(judge, torch.cat(seen))
    chosen = choose(scores, keep)
    finished = halfway[chosen.to(halfway.device)]
    if judge_steps < steps:
        parts = _parts(chosen.tolist(), batch)
        kept = zip(finished.split([len(part) for part in parts]), parts, strict=True)
        finished = torch.cat([run(x, judge_steps, steps, part, watched(judge_steps)) for x, part in kept])
    return Filtered(finished, chosen, scores, cost)


def _scores(judge: Judge, predicted: Tensor) -> Tensor:
    """float32 [N] on the CPU for predicted data [N,...]. Raises ValueError unless there is one for each."""
    scores = torch.as_tensor(judge(predicted)).detach().float().cpu()
    if scores.shape != (len(predicted),):
        raise ValueError(
            f"the judge returned shape {tuple(scores.shape)} for {len(predicted)} candidates: one score each."
        )
    return scores


def _shifted(steps: Collection[int], first: int, last: int) -> frozenset[int]:
    """The steps within [first, last), counted from `first`."""
    return frozenset(i - first for i in steps if first <= i < last)


def _parts(items: Sequence[int], size: int) -> list[list[int]]:
    size = size or max(len(items), 1)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
