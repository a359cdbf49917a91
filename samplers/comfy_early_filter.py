"""Best of N as a ComfyUI SAMPLER: `early_filter.py` inside ComfyUI's guiders, masks, previews and interrupts.

Imported at run time only, from a node. The graph's own noise is candidate 0, so that one candidate is the
plain sampler; candidate i is what RandomNoise draws for seed + i, so that the best one can be made again by
itself. Every sample of the graph's batch has candidates, and a best one, of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import einops
import torch
from torch import Tensor
from tqdm.auto import trange

from .comfy import require_flow
from .early_filter import candidate_seed, check, choose, sde_generators
from .gaussian import draw_noise
from .rules import check_schedule, moments, ode_step, resolve_eta

__all__ = ["Settings", "early_filter_sampler", "sample_early_filter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """judge(images [N,H,W,3], groups [N]) -> scores [N]; together: candidates per model call."""

    judge: Callable[[Tensor, Tensor], Tensor]
    vae: Any
    candidates: int
    judge_steps: int
    keep: int = 1
    together: int = 1
    rule: str = "ode"
    eta: float | None = None
    stream: int = 0
    report: Callable[[str], None] | None = None


def early_filter_sampler(settings: Settings) -> comfy.samplers.KSAMPLER:
    """A SAMPLER value for SamplerCustom(Advanced). Raises ValueError for numbers that do not fit together."""
    check(settings.candidates, settings.judge_steps, settings.keep, settings.judge_steps)
    resolve_eta(settings.rule, settings.eta)
    return comfy.samplers.KSAMPLER(sample_early_filter, extra_options={"settings": settings})


@torch.no_grad()
def sample_early_filter(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    *,
    settings: Settings,
) -> Tensor:
    """ComfyUI's sampler function; returns the kept candidates, best first: [keep * B,...].

    Raises ValueError before the first model call for settings that do not fit the schedule or the model.
    """
    s, extra_args = settings, extra_args or {}
    require_flow(model.inner_model.inner_model.model_sampling, "Early Filter Sampler")
    steps = len(sigmas) - 1
    cost = check(s.candidates, s.judge_steps, s.keep, steps)
    eta, schedule = resolve_eta(s.rule, s.eta), sigmas.tolist()
    random = {i for i in range(steps) if s.rule != "ode" and eta > 0 and schedule[i + 1] > 0}
    check_schedule(s.rule, eta, schedule, random)

    seed = extra_args.get("seed") or 0
    generators = sde_generators(seed, s.candidates, s.stream)
    run = _Run(model, extra_args, s.together)
    noise, x = run.initial(x, sigmas[0], seed, s.candidates)
    members = torch.arange(x.shape[1], device=x.device)
    chosen = torch.arange(s.candidates, device=x.device)[:, None].expand(-1, len(members))
    for i in trange(steps, disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = run.predict(x, noise, sigma)
        if callback is not None:
            seen = _contact(denoised) if i < s.judge_steps else denoised.flatten(0, 1)
            callback({"x": x.flatten(0, 1), "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": seen})
        # At the first sigma x is one tensor per candidate, so all arithmetic is that of the plain sampler.
        v = (x - denoised) / sigma
        if i in random:
            drawn = torch.stack([draw_noise(x[0], generator) for generator in generators])
            mean, std = moments(s.rule, x, v, sigma, sigma_next, eta)
            x = mean + std * drawn[chosen, members]
        else:
            x = ode_step(x, v, sigma, sigma_next)
        if i == s.judge_steps - 1:
            scores = _judged(run, denoised, s)
            chosen = choose(scores, s.keep).to(x.device)
            x, noise, denoised = (t[chosen, members] for t in (x, noise, denoised))
            if callback is not None:  # the preview, and the denoised output if this was the last step
                seen = denoised.flatten(0, 1)
                callback({"x": x.flatten(0, 1), "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": seen})
            _report(s, seed, scores, chosen, cost)
    return x.flatten(0, 1)


class _Run:
    """The model as ComfyUI wraps it (KSamplerX0Inpaint around a guider), for any number of candidates."""

    def __init__(self, model, extra_args: dict, together: int):
        self.model, self.extra_args, self.together = model, extra_args, max(1, together)
        self.latent_image = model.latent_image
        self.mask = extra_args.get("denoise_mask")

    def initial(self, x: Tensor, sigma: Tensor, seed: int, candidates: int) -> tuple[Tensor, Tensor]:
        """(noise, latents at the first sigma) of every candidate, [N,B,...]; the first is what was given.

        Raises ValueError for several candidates without noise.
        """
        given = self.model.noise
        if candidates > 1 and not given.any():
            raise ValueError(
                "the noise is all zero but the Early Filter Sampler compares different noise: connect "
                "RandomNoise instead of DisableNoise, or set candidates to 1."
            )
        sampling = self.model.inner_model.inner_model.model_sampling
        noises, noised = [given], [x]
        for index in range(1, candidates):
            generator = torch.Generator().manual_seed(candidate_seed(seed, index))
            noise = torch.randn(given.shape, dtype=given.dtype, generator=generator).to(given.device)
            noises.append(noise)
            noised.append(sampling.noise_scaling(sigma, noise, self.latent_image).to(x))
        return torch.stack(noises), torch.stack(noised)

    def predict(self, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The predicted data of latents [n,B,...], `together` candidates to a model call."""
        made = []
        try:
            for some, its_noise in zip(x.split(self.together), noise.split(self.together), strict=True):
                comfy.model_management.throw_exception_if_processing_interrupted()
                # What masked latents are filled with outside the mask differs from candidate to candidate.
                self.model.noise = its_noise.flatten(0, 1)
                self.model.latent_image = _repeat(self.latent_image, len(some))
                arguments = {**self.extra_args, "denoise_mask": _repeat(self.mask, len(some))}
                flat = some.flatten(0, 1)
                denoised = self.model(flat, sigma * flat.new_ones([len(flat)]), **arguments)
                made.append(denoised.view(some.shape))
        finally:
            self.model.noise, self.model.latent_image = noise[0], self.latent_image
        return torch.cat(made)

    def reload(self) -> None:
        """Back to the GPU with what decoding or judging may have pushed out."""
        guider = self.model.inner_model
        patcher = getattr(guider, "model_patcher", None)
        if patcher is not None:
            models = [patcher, *getattr(guider, "loaded_models", [])]
            needed = guider.inner_model.memory_required(list(self.model.noise.shape))
            comfy.model_management.load_models_gpu(models, memory_required=needed)


def _judged(run: _Run, denoised: Tensor, s: Settings) -> Tensor:
    """Scores [N,B] of predicted data [N,B,...]; not even decoded where there is nothing to choose from."""
    count, batch = denoised.shape[:2]
    if count == 1:
        return denoised.new_zeros(1, batch)
    latents = run.model.inner_model.inner_model.process_latent_out(denoised.flatten(0, 1).float())
    images = s.vae.decode(latents)
    images = images.reshape(-1, *images.shape[-3:])  # a video VAE gives [N, frames, ...]
    if len(images) != count * batch:
        raise ValueError(
            f"the VAE made {len(images)} images of {count * batch} latents: "
            "the Early Filter Sampler judges single images."
        )
    groups = torch.arange(batch).repeat(count)
    scores = s.judge(images, groups).reshape(count, batch)
    run.reload()
    return scores


def _repeat(tensor: Tensor | None, times: int) -> Tensor | None:
    return tensor if tensor is None or times == 1 else torch.cat([tensor] * times)


def _contact(denoised: Tensor) -> Tensor:
    """The first sample of all candidates [N,B,C,h,w] beside one another, for the preview: [1,C,H,W]."""
    first = denoised[:, 0]
    if first.ndim != 4 or len(first) == 1:
        return denoised[0]
    columns = math.ceil(math.sqrt(len(first)))
    rows = math.ceil(len(first) / columns)
    empty = first.new_zeros(rows * columns - len(first), *first.shape[1:])
    return einops.rearrange(torch.cat([first, empty]), "(r k) c h w -> 1 c (r h) (k w)", r=rows)


def _report(s: Settings, seed: int, scores: Tensor, chosen: Tensor, cost) -> None:
    lines = []
    for sample in range(scores.shape[1] if s.candidates > 1 else 0):
        kept = [candidate_seed(seed, int(index)) for index in chosen[:, sample]]
        values = ", ".join(f"{float(score):.4g}" for score in scores[:, sample])
        who = f"sample {sample + 1}: " if scores.shape[1] > 1 else ""
        lines.append(
            f"{who}kept seed {', '.join(map(str, kept))}; scores of the seeds from {seed} on: {values}"
        )
    text = "\n".join([*lines, str(cost)])
    logger.info("early filter: %s", text)
    if s.report is not None:
        s.report(text)
