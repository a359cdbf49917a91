"""glid's samplers and guidance as ComfyUI objects, for a MODEL of eight channels.

Imported at run time only, from a node. ComfyUI loads `inpaint.pt` as an SD 1.5 InstructPix2Pix model, which
joins `concat_latent_image` to the noisy latents without scaling it: what glid wants.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.samplers
import torch
from torch import Tensor

from ...samplers import plms
from .geometry import guided

SAMPLERS = {"plms": (plms.plms, plms.plms_levels), "ddim": (plms.ddim, plms.ddim_levels)}


def require_glid(model: Any) -> None:
    """Raise ValueError for a MODEL that is not one of eight channels, which would ignore the image."""
    if not isinstance(model.model, comfy.model_base.SD15_instructpix2pix):
        raise ValueError(
            f"model is a {type(model.model).__name__} without glid's four extra channels and would ignore "
            "the image: load inpaint.pt with Load Diffusion Model."
        )


def prepared(model: Any, sampler: str, steps: int, glid_cfg: bool) -> tuple[Any, GlidSampler, Tensor]:
    """(MODEL, SAMPLER, SIGMAS) of one run: a copy of the model that is asked at glid's exact timesteps.

    Raises ValueError for a step count that the sampler does not have.
    """
    run, levels_of = SAMPLERS[sampler]
    levels = levels_of(steps)
    patched = model.clone()
    sampling = exact_times(patched.get_model_object("model_sampling"), levels)
    patched.add_object_patch("model_sampling", sampling)
    if glid_cfg:
        patched.set_model_sampler_cfg_function(
            lambda given: guided(given["cond"], given["uncond"], given["cond_scale"])
        )
    times = plms.plms_timesteps(steps) if sampler == "plms" else plms.ddim_timesteps(steps)
    sigmas = [sigma_of(levels[float(time)]) for time in times.flip(0)] + [0.0]
    return patched, GlidSampler(run, levels, steps), torch.tensor(sigmas)


def sigma_of(alpha: float) -> float:
    """ComfyUI's noise level of a cumulative alpha."""
    return ((1 - alpha) / alpha) ** 0.5


def exact_times(sampling: torch.nn.Module, levels: dict[float, float]) -> torch.nn.Module:
    """A copy of a MODEL's sampling that calls the model at the timesteps of `levels`, halves among them.

    ComfyUI's own finds the nearest whole one.
    """
    times = torch.tensor(list(levels), dtype=torch.float32)
    known = torch.tensor([sigma_of(alpha) for alpha in levels.values()]).log()

    class Exact(type(sampling)):
        def timestep(self, sigma: Tensor) -> Tensor:
            away = sigma.log().flatten()[:, None].cpu() - known
            return times[away.abs().argmin(dim=1)].view(sigma.shape).to(sigma.device)

    copy = Exact.__new__(Exact)
    copy.__dict__ = dict(sampling.__dict__)
    return copy


class GlidSampler(comfy.samplers.Sampler):
    """PLMS or DDIM as glid samples: from noise alone to the last x0. A noise mask has no part in it."""

    def __init__(self, run: Any, levels: dict[float, float], steps: int):
        self.run, self.levels, self.steps = run, levels, steps

    def sample(
        self,
        model_wrap,
        sigmas: Tensor,
        extra_args: dict,
        callback,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface: the guider, and latents [B,4,h,w] as the model sees them."""
        if len(sigmas) != self.steps + 1:
            raise ValueError(
                f"sigmas has {len(sigmas) - 1} steps but Glid Sampler was made for {self.steps}: connect its "
                "own sigmas."
            )

        def epsilon(x: Tensor, time: Tensor) -> Tensor:
            alpha = self.levels[float(time)]
            seen, sigma = x / alpha**0.5, sigma_of(alpha)
            denoised = model_wrap(seen, seen.new_full((len(seen),), sigma), **extra_args)
            return (seen - denoised) / sigma

        def report(step: int, steps: int, x0: Tensor) -> None:
            if callback is not None:
                callback(step, x0, x0, steps)

        return self.run(epsilon, noise, self.steps, callback=report)
