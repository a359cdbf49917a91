"""The whole way from an image and words to an edited image, outside ComfyUI.

Condition, schedule, sampler and decode in one call each, on the denoisers of this folder: what the command
line and scripts use. Training has its own loop; ComfyUI has its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..samplers import ddim, early_filter, flow_match
from ..samplers.gaussian import sde_seed
from ..samplers.schedule import sigmas, token_count
from . import diptych, geometry, pixels
from .condition import reference
from .denoiser import Condition, TextEmbedding
from .flux import FluxDenoiser
from .flux_fill import FluxFill
from .flux_kontext import FluxKontext
from .inpaint_masks import USUAL, MaskRule
from .packing import VAE_FACTOR
from .sd_inpaint import SDInpaint

ICEDIT_GUIDANCE = 50.0
FILL_GUIDANCE = 30.0
KONTEXT_GUIDANCE = 2.5


@dataclass(frozen=True)
class BestOf:
    """Several candidates of which the best is finished (`samplers/early_filter.py`); number i has seed + i.

    judge: images as the model paints them, [N,H,W,3] in 0..1, to scores [N]. batch: candidates per model call
    (0 = all). on_result: told what was chosen and what it cost.
    """

    candidates: int
    judge: Callable[[Tensor], Tensor]
    judge_steps: int
    batch: int = 1
    on_result: Callable[[early_filter.Filtered], None] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the image is sampled. rule, eta, window: see `samplers/flow_match.py`.

    seed: of the CPU generator that draws the initial noise in float32; the noise of an SDE rule comes from a
    second one, seeded by `sde_seed`. The same seed gives the same noise in ComfyUI and here.
    posterior: "mode" of the VAE encoding, or "sample" with the first generator in FluxFillPipeline's order.
    callback: called once per step with a dict. at_sigma: called before each prediction with the noise level
    (a flow's sigma, or `ddim.noise_level`), for LoRAs that work in a part of the schedule only. best_of: for
    one image at a time, with posterior "mode".
    """

    steps: int = 28
    seed: int = 0
    rule: str = "ode"
    eta: float | None = None
    window: Any = None
    posterior: str = "mode"
    callback: flow_match.Callback | None = None
    at_sigma: Callable[[float], None] | None = None
    best_of: BestOf | None = None

    def __post_init__(self):
        geometry.check_choice("posterior", self.posterior, ("mode", "sample"))
        geometry.check_choice("rule", self.rule, flow_match.RULES)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: at least one step is needed")
        if self.best_of is not None:
            early_filter.check(self.best_of.candidates, self.best_of.judge_steps, 1, self.steps)
            if self.posterior != "mode":
                raise ValueError(
                    "best_of needs posterior mode: a sampled one draws other noise for each seed"
                )

    def generator(self) -> torch.Generator:
        """A CPU generator of the starting noise."""
        return torch.Generator().manual_seed(self.seed)

    def sde_generator(self) -> torch.Generator:
        """A CPU generator of the noise that SDE rules add; independent of the starting noise."""
        return torch.Generator().manual_seed(sde_seed(self.seed))

    def flow(self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, schedule: Tensor) -> Tensor:
        """Latents like x, walked by these settings from the first sigma of a schedule [n+1] to the last."""
        return flow_match.sample(
            velocity,
            x,
            schedule,
            rule=self.rule,
            eta=self.eta,
            window=self.window,
            generator=self.sde_generator(),
            callback=self.callback,
        )

    def encoder_generator(self, generator: torch.Generator) -> torch.Generator | None:
        """What the VAE's posterior is sampled with: the given generator, or None for its mode."""
        return generator if self.posterior == "sample" else None


class Edit(NamedTuple):
    """image: the result at the source's own size, [B,H,W,3] float32 0..1 (4 channels if the source had
    alpha). canvas: what the model painted, at its own size: the whole diptych, or the one panel."""

    image: Tensor
    canvas: Tensor


def run(
    denoiser: FluxDenoiser,
    condition: Condition,
    noise: Tensor,
    sampling: Sampling,
) -> Tensor:
    """Sample and decode: noise [B,16,h,w] to IMAGE [B,8h,8w,3] on the CPU.

    The schedule's shift counts the tokens of the noise, so a diptych's is that of both panels.
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if sampling.at_sigma is not None:
            sampling.at_sigma(float(sigma))
        return denoiser.velocity(x, sigma, condition)

    schedule = sigmas(sampling.steps, seq_len=token_count(*noise.shape[-2:]))
    if sampling.best_of is not None:
        latents = _best_of(denoiser, velocity, noise, schedule, sampling)
        return denoiser.decode(latents).cpu()
    latents = sampling.flow(velocity, noise.to(denoiser.device), schedule)
    return denoiser.decode(latents).cpu()


def _best_of(denoiser, velocity, noise: Tensor, schedule: Tensor, sampling: Sampling) -> Tensor:
    """The best candidate's latents [1,16,h,w]; noise [1,...] is that of the first."""
    best = sampling.best_of
    if len(noise) != 1:
        raise ValueError(f"best_of works on one image at a time but the batch is {len(noise)}: pass one.")
    noises = [noise]
    for index in range(1, best.candidates):
        generator = torch.Generator().manual_seed(early_filter.candidate_seed(sampling.seed, index))
        noises.append(torch.randn(noise.shape, generator=generator))
    made = early_filter.best_of(
        velocity,
        torch.cat(noises).to(denoiser.device),
        schedule,
        lambda x0: best.judge(torch.cat([denoiser.decode(one).cpu() for one in x0.split(1)])),
        judge_steps=best.judge_steps,
        batch=best.batch,
        rule=sampling.rule,
        eta=sampling.eta,
        window=sampling.window,
        generators=early_filter.sde_generators(sampling.seed, best.candidates),
        callback=sampling.callback,
    )
    if best.on_result is not None:
        best.on_result(made)
    return made.latents


def _noise(batch: int, channels: int, image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1] // VAE_FACTOR, image.shape[2] // VAE_FACTOR
    return torch.randn(batch, channels, height, width, generator=generator)


@torch.no_grad()
def fill_canvas(
    denoiser: FluxFill,
    image: Tensor,
    mask: Tensor,
    prompts: str | Sequence[str],
    *,
    guidance: float = FILL_GUIDANCE,
    negative: str | None = None,
    cfg: float = 1.0,
    sampling: Sampling = Sampling(),
) -> Tensor:
    """FluxFillPipeline's own task: IMAGE [B,H,W,3] and MASK [B,H,W], sides multiples of 16, to [B,H,W,3].

    Prompts, images and masks may each have batch 1. Raises ValueError for sizes or batches that do not fit.
    """
    generator = sampling.generator()
    text = denoiser.encode_text(prompts)
    batch = max(len(text), pixels.as_image(image).shape[0], pixels.as_mask(mask).shape[0])
    if sampling.posterior == "sample":
        # The pipeline encodes the whole image too, and discards it at full strength; its draw comes first.
        denoiser.encode(image, generator=generator)
    noise = _noise(batch, 16, image, generator)
    condition = denoiser.condition(
        text,
        image,
        mask,
        guidance=guidance,
        negative=denoiser.encode_text(negative) if negative is not None else None,
        cfg=cfg,
        generator=sampling.encoder_generator(generator),
    )
    return run(denoiser, condition, noise, sampling)


def edit_with_fill(
    denoiser: FluxFill,
    image: Tensor,
    instruction: str,
    *,
    edit_mask: Tensor | None = None,
    panel_width: int | None = diptych.PANEL_WIDTH,
    policy: str = "stretch",
    side: str = "right",
    paste: str = "auto",
    guidance: float = ICEDIT_GUIDANCE,
    sampling: Sampling = Sampling(),
) -> Edit:
    """ICEdit: put the image in a diptych, let Fill repaint the other half, and take the edit back.

    image: [B,H,W,C] of any size, gray and RGBA too. Options are those of `diptych.build` and `diptych.split`;
    `side="none"` fills `edit_mask` of the image itself, with the instruction as the prompt. Raises ValueError
    for what those two refuse.
    """
    built = diptych.build(
        image, instruction, edit_mask=edit_mask, panel_width=panel_width, policy=policy, side=side
    )
    canvas = fill_canvas(
        denoiser, built.image, built.mask, built.prompt, guidance=guidance, sampling=sampling
    )
    return Edit(diptych.split(canvas, built.layout, paste=paste).edited, canvas)


def kontext_reference(
    image: Tensor, policy: str = "auto", panel_width: int | None = None
) -> tuple[Tensor, diptych.Layout]:
    """An image [B,H,W,C] as Kontext takes it [B,h,w,3], and the layout that undoes it.

    panel_width: None for the trained size of nearest aspect, 0 for its own in multiples of 16, else the
    width. Raises ValueError for a width or a policy that does not fit.
    """
    if panel_width:
        built = diptych.build(image, side="none", panel_width=panel_width, policy=policy)
        return built.image, built.layout
    made = reference(image, size="preferred" if panel_width is None else "keep", policy=policy)
    return made.image, made.layout


@torch.no_grad()
def edit_with_kontext(
    denoiser: FluxKontext,
    image: Tensor,
    instruction: str | Sequence[str],
    *,
    further: Sequence[Tensor] = (),
    panel_width: int | None = None,
    policy: str = "auto",
    method: str = "offset",
    guidance: float = KONTEXT_GUIDANCE,
    negative: str | None = None,
    cfg: float = 1.0,
    sampling: Sampling = Sampling(),
) -> Edit:
    """Kontext: the image [B,H,W,C] is the first reference, the result has its size and aspect.

    further: more references. panel_width: see `kontext_reference`. policy: `stretch` as diffusers does,
    `crop` as ComfyUI does, `pad`, or `auto` (`geometry.resolve`). method: where several references are placed
    (`flux_kontext.reference_positions`). negative, cfg: classifier-free guidance. Raises ValueError for
    batches that do not fit.
    """
    sized = [kontext_reference(view, policy, panel_width) for view in (image, *further)]
    references, layouts = zip(*sized, strict=True)
    generator = sampling.generator()
    text = denoiser.encode_text(instruction)
    batch = max(len(text), *(len(view) for view in references))
    noise = _noise(batch, 16, references[0], generator)
    condition = denoiser.condition(
        text,
        references,
        guidance=guidance,
        negative=denoiser.encode_text(negative) if negative is not None else None,
        cfg=cfg,
        method=method,
        generator=sampling.encoder_generator(generator),
    )
    canvas = run(denoiser, condition, noise, sampling)
    return Edit(diptych.split(canvas, layouts[0]).edited, canvas)


@torch.no_grad()
def inpaint_sd(
    denoiser: SDInpaint,
    image: Tensor,
    mask: Tensor,
    prompts: str | Sequence[str] | TextEmbedding,
    *,
    negative: str | TextEmbedding = "",
    cfg: float = 7.5,
    rule: MaskRule = USUAL,
    strength: float = 1.0,
    sampling: Sampling = Sampling(steps=50),
) -> Tensor:
    """Stable Diffusion inpainting with DDIM: IMAGE [B,H,W,3] and MASK [B,H,W] to an IMAGE of that size.

    Sides must divide by 8; eta is that of `sampling`, by default 0. rule: how the model is told of the mask.
    strength: 1 starts from noise alone, less from the image with noise, in as many steps fewer. The draw
    order is StableDiffusionInpaintPipeline's. Raises ValueError for sizes or batches that do not fit.
    """
    schedule = ddim.late(ddim.schedule(sampling.steps, denoiser.scheduler_config), strength)
    generator = sampling.generator()
    text = _embedding(denoiser, prompts)
    batch = max(len(text), pixels.as_image(image).shape[0], pixels.as_mask(mask).shape[0])
    start = None
    if strength < 1:
        start = denoiser.encode(image, generator=sampling.encoder_generator(generator)).cpu()
    noise = _noise(batch, 4, image, generator)
    condition = denoiser.condition(
        text,
        image,
        mask,
        negative=_embedding(denoiser, negative),
        cfg=cfg,
        rule=rule,
        generator=sampling.encoder_generator(generator),
    )

    def epsilon(x: Tensor, timestep: Tensor) -> Tensor:
        if sampling.at_sigma is not None:
            sampling.at_sigma(ddim.noise_level(int(timestep), denoiser.scheduler_config))
        return denoiser.epsilon(x, timestep, condition)

    latents = ddim.sample(
        epsilon,
        (noise if start is None else ddim.add_noise(start, noise, schedule)).to(denoiser.device),
        schedule,
        eta=sampling.eta or 0.0,
        window=sampling.window,
        generator=generator,
        callback=sampling.callback,
    )
    return denoiser.decode(latents).cpu()


def _embedding(denoiser: SDInpaint, text: str | Sequence[str] | TextEmbedding) -> TextEmbedding:
    return text if isinstance(text, TextEmbedding) else denoiser.encode_text(text)
