"""The flow-match step rules as a ComfyUI SAMPLER.

Imported at run time only, from a node: ComfyUI's own machinery (guiders, noise masks, previews, interrupts)
around the formulas of `rules.py`. The loop for diffusers modules is `flow_match.sample`.
"""

from __future__ import annotations

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import trange

from .gaussian import draw_noise, sde_seed, window_steps
from .rules import check_schedule, moments, ode_step, resolve_eta

__all__ = ["flow_match_sampler", "model_shift", "require_flow", "sample_flow_match"]


def flow_match_sampler(
    rule: str, eta: float | None, window: tuple[int, int], stream: int
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER value for SamplerCustom(Advanced); `stream` picks the SDE noise, see `sde_seed`."""
    options = {"rule": rule, "eta": resolve_eta(rule, eta), "window": window, "stream": stream}
    return comfy.samplers.KSAMPLER(sample_flow_match, extra_options=options)


def require_flow(model_sampling: object, user: str) -> None:
    """Refuse a model that is not a flow from noise to data (ComfyUI's CONST parametrisation)."""
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        names = ", ".join(
            base.__name__ for base in type(model_sampling).__mro__[1:-1] if base is not torch.nn.Module
        )
        raise ValueError(
            f"{user} needs a flow-matching model such as FLUX, SD3 or Qwen-Image, but this model samples as "
            f"{names}: use ComfyUI's own samplers and schedulers for it."
        )


def model_shift(model) -> float:
    """The fixed shift a flow MODEL carries, as `schedule.sigmas` counts it (FLUX stores its logarithm).

    Read off the model's own curve at its middle, t = 1/2 -> s / (1 + s), so that any flow model answers.
    """
    middle = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    return middle / (1.0 - middle)


@torch.no_grad()
def sample_flow_match(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    *,
    rule: str,
    eta: float,
    window: tuple[int, int],
    stream: int,
) -> Tensor:
    """ComfyUI's sampler function: from x at sigmas[0] to the latents at sigmas[-1].

    With rule `ode` every operation is that of core `euler`, in its order, so results are equal bit for bit. A
    schedule that ends above 0 leaves exactly the noise that ComfyUI expects there, ready for another sampler.
    """
    extra_args = extra_args or {}
    require_flow(model.inner_model.inner_model.model_sampling, "Flow-Match Euler Sampler")
    steps = len(sigmas) - 1
    random: set[int] = set()
    if rule != "ode" and eta > 0 and steps > 0:
        schedule = sigmas.tolist()
        random = {i for i in window_steps(window, steps) if schedule[i + 1] > 0}
        check_schedule(rule, eta, schedule, random)
    # On the CPU whatever the device, as ComfyUI draws its starting noise: a seed means one image
    # everywhere.
    generator = torch.Generator().manual_seed(sde_seed(extra_args.get("seed") or 0, stream))
    per_sample = x.new_ones([x.shape[0]])
    for i in trange(steps, disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma * per_sample, **extra_args)
        v = (x - denoised) / sigma
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if i in random:
            mean, std = moments(rule, x, v, sigma, sigma_next, eta)
            x = mean + std * draw_noise(x, generator)
        else:
            x = ode_step(x, v, sigma, sigma_next)
    return x
