"""glid-3-xl-stable as a training task: Stable Diffusion with the known latents as four more channels.

No mask channel: what is to be painted is exact zeros. Its own script widens a text-to-image model by random
numbers and encodes the whole image, hole included; here new channels begin at zero, and the hole is hidden.
"""

from __future__ import annotations

from torch import Tensor

from .sd_inpaint import SDInpaintTask


class GlidTask(SDInpaintTask):
    """UNet input: noisy latents 4, known latents 4; else as its base."""

    name = "glid"
    denoiser_input = (8, "glid")
    pipeline = "StableDiffusionPipeline"  # no pipeline of diffusers has a use for the four channels

    def host_class(self) -> type:
        """`models.glid.model.Glid`."""
        from ...models.glid.model import Glid

        return Glid

    def features(self, cells: Tensor, image: Tensor) -> Tensor:
        """The known latents [B,4,h,w], exact zeros where cells [B,1,h,w] are to be painted."""
        return image * (1 - cells)
