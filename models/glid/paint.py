"""An image painted by glid outside ComfyUI: known latents, tiles where asked for, glid's own samplers.

Equal to Glid Conditioner and Glid Sampler on the same weights and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...samplers import plms, tiles
from ..denoiser import TextEmbedding
from ..geometry import check_choice
from ..packing import VAE_FACTOR
from .model import CFG, Glid

SAMPLERS = {"plms": plms.plms, "ddim": plms.ddim}
STEPS = 50


@torch.no_grad()
def paint(
    denoiser: Glid,
    image: Tensor,
    mask: Tensor,
    prompt: str | Sequence[str] | Callable[[tiles.Tile], str],
    *,
    negative: str = "",
    cfg: float = CFG,
    sampler: str = "plms",
    steps: int = STEPS,
    seed: int = 0,
    window: int | None = None,
    stride: int | None = None,
    order: str = "outward",
    known: str = "keep",
    blend: int = 32,
    callback: Callable[[int, int, Tensor], None] | None = None,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Image [B,H,W,3] with the mask's hole [B,H,W] painted (1 = repaint), sides divide by 8.

    prompt: one, one per image, or what says each window's own (a Tile's places are in cells of 8 pixels).
    sampler: `plms` (4 steps or more) or `ddim` (steps of an even stride through 1000). window, stride (half
    the window by default), blend: pixels, for one image at a time; without a window all is painted at once.
    order, known: see `samplers/tiles.py`; glid itself is `glid` and `overwrite`. callback(step, steps, x0)
    after every step, on_tile(index, count) before every window. Raises ValueError in one sentence for what
    does not fit.
    """
    check_choice("sampler", sampler, SAMPLERS)
    text, unguided = denoiser.encode_text("" if callable(prompt) else prompt), denoiser.encode_text(negative)
    latents, seen = denoiser.known(image, mask)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)

    def sample(context: Tensor, start: Tensor, words: TextEmbedding = text) -> Tensor:
        condition = denoiser.told(words, context, negative=unguided, cfg=cfg)
        return SAMPLERS[sampler](
            lambda x, time: denoiser.epsilon(x, time, condition), start, steps, callback=callback
        )

    if window is None:
        return denoiser.decode(sample(latents, noise)).cpu()
    stride = stride or window // 2
    for name, value in (("window", window), ("stride", stride), ("blend", blend)):
        if value % VAE_FACTOR:
            raise ValueError(f"{name} is {value} px: use a multiple of {VAE_FACTOR}.")
    if len(latents) != 1:
        raise ValueError(f"image has {len(latents)} items: windows are painted for one canvas at a time.")
    unknown = ~seen[0, 0]
    plan = tiles.plan(unknown, window=window // VAE_FACTOR, stride=stride // VAE_FACTOR, order=order)
    count = iter(range(len(plan)))

    def window_of(context: Tensor, hole: Tensor, part: Tensor, tile: tiles.Tile) -> Tensor:
        if on_tile is not None:
            on_tile(next(count), len(plan))
        return sample(context, part, denoiser.encode_text(prompt(tile)) if callable(prompt) else text)

    made = tiles.sample(
        window_of, latents, unknown, plan, known=known, blend=blend // VAE_FACTOR, noise=noise
    )
    return denoiser.decode(made).cpu()
