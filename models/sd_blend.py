"""Inpainting in the shell with Stable Diffusion's plain models (four channels), with or without a ControlNet.

The known latents are put back, with the noise of the step, before every prediction. Equal to diffusers'
StableDiffusionInpaintPipeline and StableDiffusionControlNetInpaintPipeline with such a model (tests/parity).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers import ddim
from . import control_inpaint, pixels
from .denoiser import Condition, TextEmbedding, same_batch, sized_mask
from .editing import Sampling
from .flux import check_folder, check_pipeline, default_device, dtype_argument
from .geometry import check_choice
from .inpaint_masks import MASK_RESIZE, latent_mask
from .sd import StableDiffusion

IN_CHANNELS = 4
CONTROL = "control"
USUAL = Sampling(steps=50)


@dataclass(frozen=True)
class ControlCondition(Condition):
    """A prompt and what the ControlNet sees: hint [B,3,H,W], -1 under the mask; scale of its effect."""

    hint: Tensor | None = None
    scale: float = 1.0


class SDBlend(StableDiffusion):
    """epsilon(x, t | text, hint) of a plain UNet, with a diffusers `ControlNetModel` beside it or None."""

    def __init__(self, unet: Any, *parts: Any, controlnet: Any = None, **kwargs: Any):
        """Parts and options of `StableDiffusion`. Raises ValueError unless the UNet takes four channels."""
        super().__init__(unet, *parts, **kwargs)
        self.controlnet = controlnet

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        controlnet: str | Path | None = None,
    ) -> SDBlend:
        """Load diffusers folders or hub ids, frozen, in eval mode. Raises ValueError or FileNotFoundError."""
        check_folder(folder, "unet", IN_CHANNELS, "Stable Diffusion")
        check_pipeline(folder)
        from diffusers import ControlNetModel, StableDiffusionPipeline

        device = torch.device(device) if device is not None else default_device()
        more = dtype_argument(dtype)
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(folder), **more, safety_checker=None, requires_safety_checker=False
        ).to(device)
        control = None
        if controlnet is not None:
            control = ControlNetModel.from_pretrained(str(controlnet), **more).to(device)
        for module in filter(None, (pipeline.unet, pipeline.vae, pipeline.text_encoder, control)):
            module.requires_grad_(False).eval()
        return cls.from_pipeline(pipeline, device=device, controlnet=control)

    def condition(
        self,
        text: TextEmbedding,
        image: Tensor,
        mask: Tensor,
        *,
        negative: TextEmbedding | None = None,
        cfg: float = 7.5,
        scale: float = 1.0,
    ) -> ControlCondition:
        """A prompt with the hint of image [B,H,W,3] and mask [B,H,W]; the hint only if there is a ControlNet.

        Text, image and mask may each have batch 1. Raises ValueError for sizes or batches that do not fit.
        """
        found = None
        if self.controlnet is not None:
            inputs = same_batch(image=pixels.rgb(pixels.as_image(image)), mask=pixels.as_mask(mask))
            found = control_inpaint.hint(**inputs).movedim(-1, 1).to(self.device)
        batch = max(len(text), 1 if found is None else len(found))
        return ControlCondition(
            text=text.expand(batch),
            negative=negative.expand(batch) if negative is not None else None,
            cfg=cfg,
            hint=None if found is None else found.expand(batch, -1, -1, -1),
            scale=scale,
        )

    def _predict(self, joined: Tensor, timestep: Tensor, tokens: Tensor, condition: Condition) -> Tensor:
        found = getattr(condition, "hint", None)
        if found is None:
            return super()._predict(joined, timestep, tokens, condition)
        down, middle = self.controlnet(
            joined,
            timestep,
            encoder_hidden_states=tokens,
            controlnet_cond=found.to(self.dtype).repeat(len(joined) // len(found), 1, 1, 1),
            conditioning_scale=condition.scale,
            return_dict=False,
        )
        return self.unet(
            joined,
            timestep,
            encoder_hidden_states=tokens,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


@torch.no_grad()
def inpaint_blend(
    denoiser: SDBlend,
    image: Tensor,
    mask: Tensor,
    prompts: str | Sequence[str],
    *,
    filled: Tensor | None = None,
    negative: str = "",
    cfg: float = 7.5,
    scale: float = 1.0,
    strength: float = 1.0,
    mask_resize: str = CONTROL,
    sampling: Sampling = USUAL,
) -> Tensor:
    """IMAGE [B,H,W,3] and MASK [B,H,W] (cut at 0.5) to what the model makes of them, an IMAGE of that size.

    Sides must divide by 8. filled: the image with its hole filled (`outpaint.fill`), from which a strength
    below 1 starts; scale: of the ControlNet. mask_resize: `control` (`control_inpaint.cells`) or one of
    `inpaint_masks.latent_mask`. Eta is that of `sampling`, by default 0. Not composited: see
    `control_inpaint.composite`. Raises ValueError for sizes or batches that do not fit.
    """
    check_choice("mask_resize", mask_resize, (CONTROL, *MASK_RESIZE))
    schedule = ddim.late(ddim.schedule(sampling.steps, denoiser.scheduler_config), strength)
    image = pixels.rgb(pixels.as_image(image))
    hard = pixels.binarise(sized_mask(mask, *image.shape[1:3])).to(image.device)
    text = denoiser.encode_text(prompts)
    batch = max(len(text), len(image), len(hard))
    generator = sampling.generator()
    start = image if filled is None else filled
    latents = denoiser.encode(start, generator=sampling.encoder_generator(generator))
    latents = latents.expand(batch, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    small = control_inpaint.cells(hard) if mask_resize == CONTROL else latent_mask(hard[:, None], mask_resize)
    small = small.to(latents).expand(batch, -1, -1, -1)
    condition = denoiser.condition(
        text, image, hard, negative=denoiser.encode_text(negative), cfg=cfg, scale=scale
    )
    made = ddim.sample(
        put_back(lambda x, t: denoiser.epsilon(x, t, condition), latents, noise, small, schedule),
        noise if strength >= 1 else ddim.add_noise(latents, noise, schedule),
        schedule,
        eta=sampling.eta or 0.0,
        window=sampling.window,
        generator=sampling.sde_generator(),
        callback=sampling.callback,
    )
    return denoiser.decode(torch.lerp(latents, made, small.expand_as(made))).cpu()


def put_back(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    cells: Tensor,
    schedule: ddim.Schedule,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`predict` on x whose known cells are the latents with the step's noise; all [B,4,h,w], cells [B,1,h,w].

    As in diffusers, not at the first step, which is all noise at strength 1.
    """
    place = {int(t): index for index, t in enumerate(schedule.timesteps)}

    def run(x: Tensor, timestep: Tensor) -> Tensor:
        index = place[int(timestep)]
        if index:
            x = torch.lerp(ddim.add_noise(latents, noise, schedule, index), x, cells.expand_as(x))
        return predict(x, timestep)

    return run
