"""Images to embeddings, embeddings to latents, latents to images.

Pixels are [B,3,H,W] in -1..1. One normalisation group throughout, so that the strength of a
flat colour is not forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Pixels [B,3,224,224] to embeddings [B,512] of length sqrt(512): a stride-2 convolution per width."""

    def __init__(
        self,
        embed_dim: int = 512,
        image_size: int = 224,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
    ):
        super().__init__()
        self.image_size = image_size
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(1, after), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        cells = (image_size // 2 ** len(widths)) ** 2
        self.head = nn.Linear(widths[-1] * cells, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [B,512] of pixels [B,3,S,S] in -1..1. Raises ValueError for images of another size."""
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels is {tuple(pixels.shape)}: give [B, 3, {size}, {size}] in -1..1")
        return self.norm(self.head(self.convolutions(pixels).flatten(1)))


class ImageDecoder(nn.Module):
    """Embeddings [B,512] to latents [B,256,7,7] (`projection`), and latents to pixels (`decoder`)."""

    def __init__(
        self,
        embed_dim: int = 512,
        latent_channels: int = 256,
        latent_size: int = 7,
        widths: Sequence[int] = (192, 128, 64, 32, 16),
    ):
        super().__init__()
        from diffusers.models.upsampling import Upsample2D

        self.latent_shape = (latent_channels, latent_size, latent_size)
        self.projection = nn.Linear(embed_dim, latent_channels * latent_size**2)
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[0], 3, padding=1)]
        for before, after in zip((widths[0], *widths), widths, strict=False):
            layers += [
                nn.GroupNorm(1, before),
                nn.SiLU(),
                Upsample2D(before, use_conv=True, out_channels=after),
            ]
        layers += [nn.GroupNorm(1, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def get_latent_from_embedding(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B,512] to latents [B,256,7,7]: what the diffusion model learns to draw."""
        return self.projection(embeddings).unflatten(1, self.latent_shape)

    def decode_from_latent(self, latents: Tensor) -> Tensor:
        """Latents [B,256,7,7] to pixels [B,3,224,224], near -1..1 but not clamped.

        Raises ValueError for another shape.
        """
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"latents is {tuple(latents.shape)}: give [B, {', '.join(map(str, self.latent_shape))}]"
            )
        return self.decoder(latents)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B,512] straight to pixels, without diffusion."""
        return self.decode_from_latent(self.get_latent_from_embedding(embeddings))
