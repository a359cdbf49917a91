"""The denoiser of the latent diffusion: a UNet that never leaves 7 x 7, assembled from diffusers' blocks.

diffusers' own UNets halve the size between levels, which 7 does not allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ATTENTION = ("middle", "widest")


class ConditionalUNet2D(nn.Module):
    """Noisy latents [B,256,7,7], timesteps and text embeddings [B,512] to a prediction [B,256,7,7].

    Time and text are added up and modulate every residual block as FiLM (arXiv 1709.07871): h (1 + scale) +
    shift, which is `ResnetBlock2D(time_embedding_norm="scale_shift")`. Each block of the way back takes the
    output of its twin beside what comes from below, and returns to the width that the twin had found.
    """

    def __init__(
        self,
        latent_channels: int = 256,
        condition_dim: int = 512,
        widths: Sequence[int] = (128, 256, 512),
        blocks: int = 2,
        time_width: int = 1024,
        attention: str = "widest",
    ):
        """widths: of the first convolution, then of each level; blocks: residual blocks per level.

        attention: "middle" has one residual and one attention block there, as drawn in the notes; "widest"
        has attention behind each block of the last level too, and a second residual block in the middle.
        """
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r}: use {' or '.join(ATTENTION)}")
        from diffusers.models.attention_processor import Attention
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.resnet import ResnetBlock2D

        groups = min(32, widths[0] // 4)

        def residual(before: int, after: int) -> nn.Module:
            return ResnetBlock2D(
                in_channels=before,
                out_channels=after,
                temb_channels=time_width,
                groups=groups,
                time_embedding_norm="scale_shift",
            )

        def attend(width: int) -> nn.Module:
            head = min(64, width // 4)
            return Attention(
                width,
                heads=width // head,
                dim_head=head,
                bias=True,
                norm_num_groups=groups,
                residual_connection=True,
            )

        first, last = widths[0], widths[-1]
        path = [first, *(width for width in widths[1:] for _ in range(blocks))]
        steps = list(zip(path, path[1:], strict=False))
        everywhere = attention == "widest"

        self.time_waves = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_width)
        self.condition_embedding = TimestepEmbedding(condition_dim, time_width)  # a two-layer MLP
        self.conv_in = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.down = nn.ModuleList(residual(before, after) for before, after in steps)
        self.down_attention = nn.ModuleList(
            attend(after) if everywhere and after == last else nn.Identity() for _, after in steps
        )
        self.middle = residual(last, last)
        self.middle_attention = attend(last)
        self.middle_out = residual(last, last) if everywhere else None
        self.up = nn.ModuleList(residual(2 * after, before) for before, after in reversed(steps))
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, latent_channels, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """latents [B,C,h,w], timesteps [B] in 0..999, condition [B,D]; each of them is needed."""
        waves = self.time_waves(timesteps).to(latents.dtype)
        film = self.time_embedding(waves) + self.condition_embedding(condition.to(latents.dtype))
        h = self.conv_in(latents)
        skips = []
        for block, attention in zip(self.down, self.down_attention, strict=True):
            h = attention(block(h, film))
            skips.append(h)
        h = self.middle_attention(self.middle(h, film))
        if self.middle_out is not None:
            h = self.middle_out(h, film)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), film)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))
