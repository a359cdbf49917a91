"""The images that a score is taken of: a model edits, fills or reconstructs a batch.

Through the same functions of `models/editing.py` that the command line and the nodes' templates follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...models import diptych, editing
from ...models.denoiser import Denoiser
from ...models.editing import Sampling
from ...models.flux_fill import FluxFill
from ...models.flux_kontext import FluxKontext
from ...models.sd_inpaint import SDInpaint


@dataclass(frozen=True)
class ScoreSettings:
    """How images are made and scored. guidance and cfg: None is the model family's own. autocast: compute in
    bfloat16.

    The noise comes from `seed` and the number of the batch, so a figure belongs to a seed and a batch size.
    """

    steps: int = 12
    seed: int = 0
    batch: int = 50
    guidance: float | None = None
    cfg: float | None = None
    autocast: bool = False
    at_sigma: Callable[[float], None] | None = None
    on_scored: Callable[[int, dict[str, float]], None] | None = None  # images so far, their figures
    should_stop: Callable[[], bool] | None = None  # asked before every batch but the first
    keep_partial: bool = False  # an error after the first batch becomes `Scores.failure` instead of raising

    def sampling(self, number: int) -> Sampling:
        """Of batch `number`."""
        return Sampling(self.steps, seed=self.seed * 100_003 + number, at_sigma=self.at_sigma)

    def guided(self, default: float) -> float:
        """The guidance of a family whose own is `default`."""
        return default if self.guidance is None else self.guidance


def edit(
    denoiser: Denoiser, sources: Tensor, instructions: Sequence[str], settings: ScoreSettings, number: int = 0
) -> Tensor:
    """Edited images [N,H,W,3] for sources [N,H,W,3] (sides multiples of 16) and one instruction each.

    FLUX Fill edits in a diptych (ICEdit), Kontext with the source as its reference; `number` is the batch's.
    Raises ValueError for a model that does neither.
    """
    sampling = settings.sampling(number)
    if isinstance(denoiser, FluxKontext):
        guidance = settings.guided(editing.KONTEXT_GUIDANCE)
        return editing.edit_with_kontext(
            denoiser, sources, list(instructions), panel_width=0, guidance=guidance, sampling=sampling
        ).image
    if not isinstance(denoiser, FluxFill):
        raise ValueError(f"{type(denoiser).__name__} does not follow instructions: score it as fill or vae")
    built = diptych.build(sources, panel_width=0)
    prompts = [diptych.format_prompt(words) for words in instructions]
    guidance = settings.guided(editing.ICEDIT_GUIDANCE)
    canvas = editing.fill_canvas(
        denoiser, built.image, built.mask, prompts, guidance=guidance, sampling=sampling
    )
    return diptych.split(canvas, built.layout, paste="panel").edited


def fill(
    denoiser: Denoiser,
    images: Tensor,
    masks: Tensor,
    captions: Sequence[str],
    settings: ScoreSettings,
    number: int = 0,
) -> Tensor:
    """Images [N,H,W,3] repainted where masks [N,H,W] are 1, by FLUX Fill or SD inpainting."""
    sampling = settings.sampling(number)
    if isinstance(denoiser, SDInpaint):
        cfg = {} if settings.cfg is None else {"cfg": settings.cfg}
        return editing.inpaint_sd(denoiser, images, masks, list(captions), sampling=sampling, **cfg)
    guidance = settings.guided(editing.FILL_GUIDANCE)
    return editing.fill_canvas(denoiser, images, masks, list(captions), guidance=guidance, sampling=sampling)


def reconstruct(denoiser: Denoiser, images: Tensor) -> Tensor:
    """Images [N,H,W,3] encoded and decoded by the model's VAE."""
    return denoiser.decode(denoiser.encode(images))
