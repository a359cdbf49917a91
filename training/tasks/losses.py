"""Training targets and losses of the flow-matching and epsilon models: functions of tensors alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sigma_from_uniform(
    u: Tensor, sampling: str = "logit_normal", mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Map uniform u [B] to sigma in (0, 1), float32 [B].

    logit_normal: sigmoid(mean + std * Phi^-1(u)) (SD3, arXiv 2403.03206, eq. 19; ICEdit: mean 0, std 1, no
    resolution shift); uniform: u.
    """
    u = u.double().clamp(1e-6, 1 - 1e-6)
    if sampling == "logit_normal":
        normal = math.sqrt(2.0) * torch.erfinv(2 * u - 1)
        sigma = torch.sigmoid(mean + std * normal)
    elif sampling == "uniform":
        sigma = u
    else:
        raise ValueError(f"time_sampling is {sampling!r}: use logit_normal or uniform")
    return sigma.clamp(1e-5, 1 - 1e-5).float()


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x_sigma = (1 - sigma) data + sigma noise, and the velocity target noise - data; sigma [B]."""
    s = sigma.view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    return (1 - s) * data + s * noise, noise - data


def region(mask: Tensor | None, latents: Tensor, loss_on: str, weight: float) -> Tensor | None:
    """Per-cell weights [B,1,h,w] from a repaint mask [B,1,H,W] (1 = repaint); None = every cell alike.

    A cell counts as repainted in proportion to its repainted pixels.
    """
    if loss_on == "all" or mask is None:
        return None
    cells = torch.nn.functional.interpolate(mask.float(), size=latents.shape[-2:], mode="area")
    return cells if loss_on == "edited" else 1 + (weight - 1) * cells


def emphasised(cells: Tensor | None, touched: Tensor, weight: float) -> Tensor:
    """Per-cell weights (None = 1 everywhere) plus `weight` times the edited share of each cell [B,1,h,w]."""
    return (1.0 if cells is None else cells) + weight * touched


def weighted_mse(
    prediction: Tensor, target: Tensor, cells: Tensor | None = None, row_weight: Tensor | None = None
) -> Tensor:
    """Squared error per row [B] in float32: mean over cells weighted by `cells` [B,1,h,w], times row_weight
    [B]."""
    error = (prediction.float() - target.float()) ** 2
    if cells is None:
        rows = error.flatten(1).mean(1)
    else:
        cells = cells.expand_as(error)
        rows = (error * cells).flatten(1).sum(1) / cells.flatten(1).sum(1).clamp_min(1e-6)
    return rows if row_weight is None else rows * row_weight


def total(rows: Tensor, prior: Tensor | None = None, prior_weight: float = 1.0) -> Tensor:
    """Mean over instance rows plus prior_weight times the mean over class rows (`prior` bool [B]).

    With as many class as instance rows and weight 1 this is twice the joint mean (DreamBooth).
    """
    if prior is None or not bool(prior.any()):
        return rows.mean()
    instance = rows[~prior].mean() if bool((~prior).any()) else rows.new_zeros(())
    return instance + prior_weight * rows[prior].mean()


def diffused(data: Tensor, noise: Tensor, alpha_bar: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """DDPM's forward process: x_t = sqrt(a) x0 + sqrt(1-a) eps, and the target of `prediction`.

    alpha_bar: cumulative alphas [B]; prediction: epsilon or v_prediction (arXiv 2202.00512, app. D), else
    ValueError.
    """
    # DDPMScheduler.add_noise and get_velocity are the same but for a table of alphas in the data's dtype.
    a = alpha_bar.view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    x = a.sqrt() * data + (1 - a).sqrt() * noise
    if prediction == "epsilon":
        return x, noise
    if prediction == "v_prediction":
        return x, a.sqrt() * noise - (1 - a).sqrt() * data
    raise ValueError(f"prediction_type is {prediction!r}: only epsilon and v_prediction can be trained")
