"""Random inpainting masks, 1 = repaint.

One function per kind, each drawing a whole batch at once; `random_masks` deals the kinds out. Every mask
repaints something (a hole of no area teaches nothing, a known flaw of the DreamBooth inpainting script) and,
except for kinds in `WHOLE`, keeps something. Not for masks read from files (`sample.read_mask`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .published_masks import dreambooth, glid

LEAST, MOST = 0.01, 0.95  # share of the image a partial mask may repaint


def _uniform(generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres as shares of the image: y [H,1], x [1,W]."""
    return (torch.arange(height) + 0.5)[:, None] / height, (torch.arange(width) + 0.5)[None] / width


def noise(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """Blurred noise cut at a quantile: organic blobs over 10 to 80 % of the image. [B,H,W] bool."""
    field = torch.zeros(batch, height, width)
    for octave, cells in enumerate((3, 6, 12)):
        coarse = torch.randn(batch, 1, min(cells, height), min(cells, width), generator=generator)
        smooth = torch.nn.functional.interpolate(
            coarse, size=(height, width), mode="bicubic", align_corners=False
        )
        field += smooth[:, 0] / 2**octave
    share = _uniform(generator, 0.1, 0.8, batch)
    ranks = field.flatten(1).argsort(1).argsort(1).view_as(field)
    return ranks >= ((1 - share) * height * width)[:, None, None]


def _boxes(batch: int, generator) -> torch.Tensor:
    """[B,4,4]: (centre y, centre x, half height, half width) of 1 to 4 boxes; absent ones have no size."""
    half = _uniform(generator, 0.06, 0.35, batch, 4, 2)
    centre = half + (1 - 2 * half) * torch.rand(batch, 4, 2, generator=generator)
    count = torch.randint(1, 5, (batch, 1), generator=generator)
    present = torch.arange(4)[None] < count
    return torch.cat([centre, half * present[..., None]], -1)


def rectangles(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """The union of 1 to 4 rectangles. [B,H,W] bool."""
    cy, cx, hy, hx = _boxes(batch, generator)[..., None, None].unbind(2)
    y, x = _grid(height, width)
    return (((y - cy).abs() < hy) & ((x - cx).abs() < hx)).any(1)


def ellipses(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """The union of 1 to 4 axis-aligned ellipses. [B,H,W] bool."""
    cy, cx, hy, hx = _boxes(batch, generator)[..., None, None].unbind(2)
    y, x = _grid(height, width)
    tiny = 1e-9  # an absent ellipse: no pixel centre is that close
    return (((y - cy) / (hy + tiny)) ** 2 + ((x - cx) / (hx + tiny)) ** 2 < 1).any(1)


def strokes(batch: int, height: int, width: int, generator=None, *, points: int = 32) -> torch.Tensor:
    """A brush dragged along a random smooth path. [B,H,W] bool."""
    heading = torch.rand(batch, 1, generator=generator) * 2 * torch.pi
    heading = heading + torch.randn(batch, points, generator=generator).mul(0.45).cumsum(1)
    length = _uniform(generator, 0.015, 0.05, batch, 1)
    start = _uniform(generator, 0.2, 0.8, batch, 1, 2)
    path = start + (length[..., None] * torch.stack([heading.sin(), heading.cos()], -1)).cumsum(1)
    path = 1 - (path.remainder(2) - 1).abs()  # reflected at the borders
    radius = _uniform(generator, 0.03, 0.1, batch, 1, 1)
    y, x = _grid(height, width)
    painted = torch.zeros(batch, height, width, dtype=torch.bool)
    for point in path.unbind(1):
        cy, cx = point[:, 0, None, None], point[:, 1, None, None]
        painted |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    return painted


def full(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """Everything: text-to-image as inpainting, and prior preservation's class images. [B,H,W] bool."""
    return torch.ones(batch, height, width, dtype=torch.bool)


def half(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """Outpainting: a band of 1/8 to 5/8 at one of the four sides. [B,H,W] bool."""
    side = torch.randint(0, 4, (batch,), generator=generator)[:, None, None]
    band = _uniform(generator, 1 / 8, 5 / 8, batch, 1, 1)
    y, x = (axis.expand(height, width) for axis in _grid(height, width))
    distance = torch.stack([y, 1 - y, x, 1 - x])[side[:, 0, 0]]
    return distance < band


def outpaint_sides(batch: int, height: int, width: int, generator=None) -> torch.Tensor:
    """Outpainting on several sides at once: bands of 1/8 to 1/2 at 1 to 4 of them. [B,H,W] bool."""
    order = torch.rand(batch, 4, generator=generator).argsort(1)
    chosen = order < torch.randint(1, 5, (batch, 1), generator=generator)
    bands = (_uniform(generator, 1 / 8, 1 / 2, batch, 4) * chosen)[..., None, None]
    y, x = (axis.expand(height, width) for axis in _grid(height, width))
    return (torch.stack([y, 1 - y, x, 1 - x]) < bands).any(1)


_DRAW = {
    "noise": noise,
    "rectangles": rectangles,
    "ellipses": ellipses,
    "strokes": strokes,
    "full": full,
    "half": half,
    "outpaint_sides": outpaint_sides,
    "glid": glid,
    "dreambooth": dreambooth,
}
KINDS = tuple(_DRAW)
WHOLE = ("full", "glid")  # may repaint the whole image


def random_masks(
    batch: int,
    height: int,
    width: int,
    *,
    kinds: Sequence[str] = KINDS,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """[B,H,W] float32 of 0 and 1 (1 = repaint), each of a random kind out of `kinds` (repeat a kind to
    favour it).

    A pure function of the generator's state. Partial masks repaint between 1 and 95 % of the image: what
    falls outside becomes a half.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"mask kinds {sorted(unknown) or 'are empty'}: choose from {', '.join(KINDS)}")
    if height < 8 or width < 8:
        raise ValueError(f"a mask of {width}x{height} pixels is too small: use at least 8x8")
    chosen = torch.randint(0, len(kinds), (batch,), generator=generator)
    masks = torch.empty(batch, height, width, dtype=torch.bool)
    for index, kind in enumerate(kinds):
        rows = (chosen == index).nonzero()[:, 0]
        if len(rows):
            masks[rows] = _draw(kind, len(rows), height, width, generator)
    return masks.float()


def draw(
    kinds: Sequence[str], height: int, width: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One such mask, [H,W] float32."""
    return random_masks(1, height, width, kinds=kinds, generator=generator)[0]


def _draw(kind: str, batch: int, height: int, width: int, generator) -> torch.Tensor:
    masks = _DRAW[kind](batch, height, width, generator)
    if kind in WHOLE:
        return masks
    share = masks.float().mean((1, 2))
    poor = (share < LEAST) | (share > MOST)
    return torch.where(poor[:, None, None], half(batch, height, width, generator), masks)
