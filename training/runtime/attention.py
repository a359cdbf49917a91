"""Which attention kernel learns fastest on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 1024  # latent cells; above, the written-out attention matrices cost more memory than they are worth


def for_learning(latents: Tensor) -> AbstractContextManager:
    """A context for forward and backward pass of samples with these latents [B,C,h,w].

    torch's fused CPU kernel has a slow backward pass on short sequences: written out, a step of the tiny
    models takes three quarters of the time. Not for replaying what another kernel sampled.
    """
    height, width = latents.shape[-2:]
    if latents.device.type == "cpu" and height * width <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
