"""Whole methods of outpainting: canvas, fill, windows, blurs and paste-back, around any model that paints.

A model is a callable that paints one `Piece`; the shell's is `models/repaint.py`, ComfyUI's
`comfy_repaint.py`. The geometry of webui's scripts is `passes.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import pixels
from ..geometry import Box, check_choice
from . import inputs
from .canvas import expand
from .fills import fill
from .passes import Mk2Pass, Sides, mk2_passes, poor_mans_plan
from .paste import paste_back

METHODS = ("direct", "tiles", "mk2", "poor man", "mosaic")
CELL = 8  # pixels to a latent cell
AUTO = "auto"
FILL_OF = {"direct": "edge", "tiles": "edge", "mk2": "noise", "poor man": "blur", "mosaic": "mosaic"}
BLUR_OF = {"mk2": 8, "poor man": 4}  # webui's defaults
SEEDED = ("noise", "gaussian", "perlin")
MOSAIC_OVERLAP = 0.15  # of each side of the image, repainted as well
BLACK = 0.0  # what webui's mk2 expects in the new area


@dataclass(frozen=True)
class Piece:
    """What a model is asked to paint: an image [B,h,w,3] whose hole is filled, and the mask [1,h,w] of it.

    - `cells`: bool [1,h/8,w/8], the latents that change while sampling, the others are put back at every
      step; None leaves that to the model, if it knows masks.
    - `seed`: added to the run's own.
    - `window`, `stride`: px of the windows to paint it in, and from one to the next (half a window by
      default); None is all at once. `order`: theirs, one of `samplers.tiles.ORDERS`.
    """

    image: Tensor
    mask: Tensor
    cells: Tensor | None = None
    seed: int = 0
    window: int | None = None
    stride: int | None = None
    order: str = "outward"


Paint = Callable[[Piece], Tensor]


@dataclass(frozen=True)
class Options:
    """How a method works; see `outpaint`."""

    window: int = 512
    stride: int | None = None
    fill: str = AUTO
    mask_blur: int | None = None
    overlap: float = 0
    feather: int = 0
    match_colour: bool = True
    multiple: int = 16
    seed: int = 0
    noise_q: float = 1.0
    color_variation: float = 0.05
    fill_options: dict | None = None
    order: str = "outward"

    def fill_of(self, method: str) -> str:
        """The fill that the method begins with."""
        return FILL_OF[method] if self.fill == AUTO else self.fill


def outpaint(paint: Paint, image: Tensor, sides: Sides, method: str, options: Options = Options()) -> Tensor:
    """The image [B,H,W,C] with more on its sides, [B,h,w,C]; known pixels bit for bit outside the seam.

    `sides`: px for left, top, right and bottom. `method`:

    - `direct`: the canvas at once. `tiles`: by windows of `window` px, `stride` px apart, in `order`, outward
      or glid's (`samplers/tiles.py`). Both give exactly the size asked for; negative amounts crop, `overlap`
      px of the edge are repainted, `match_colour` and `feather` are those of `paste_back`, `multiple` is what
      the model's sides divide by.
    - `mk2`, `poor man`: webui's scripts. Axes that grow become multiples of 64. `mask_blur`: px, theirs by
      default (8 and 4). `noise_q` and `color_variation`: of mk2's noise.
    - `mosaic`: sd-webui-mosaic-outpaint; tiles of the mirror image, and 15 % of each side repainted.

    `fill`: what stands in the hole first; `auto` is each method's own, which mk2 and mosaic always take.
    `seed`: of a random fill. Raises ValueError in one sentence before anything is painted.
    """
    check_choice("method", method, METHODS)
    inputs.checked(image)
    if not any(value > 0 for value in sides.values()):
        said = ", ".join(f"{side} {value}" for side, value in sides.items())
        raise ValueError(f"the amounts are {said}: nothing is to be painted, give a side more than 0.")
    if options.fill != AUTO and method in ("mk2", "mosaic"):
        raise ValueError(f"fill is {options.fill!r} but {method} has its own: choose auto.")
    if method in BLUR_OF:
        cut = [f"{side} is {value}" for side, value in sides.items() if value < 0]
        if cut:
            raise ValueError(f"{' and '.join(cut)}: {method} does not crop, use direct or tiles.")
        return (_mk2 if method == "mk2" else _poor_man)(paint, image, sides, options)
    return _on_a_canvas(paint, image, sides, method, options)


def _on_a_canvas(paint: Paint, image: Tensor, sides: Sides, method: str, options: Options) -> Tensor:
    mosaic = method == "mosaic"
    overlap = MOSAIC_OVERLAP if mosaic and not options.overlap else options.overlap
    canvas, mask, layout = expand(image, **sides, overlap=overlap, multiple=options.multiple)
    filled = _filled(canvas, mask, method, options)
    cells = F.max_pool2d((mask >= 0.5).float()[:, None], CELL)[:, 0] > 0 if mosaic else None
    windows = (options.window, options.stride) if method == "tiles" else (None, None)
    painted = paint(Piece(filled, mask, cells, 0, *windows, options.order))
    match = options.match_colour and not mosaic
    return paste_back(painted, image, layout, feather=options.feather, match_colour=match)


def _filled(canvas: Tensor, mask: Tensor, method: str, options: Options) -> Tensor:
    how = options.fill_of(method)
    chosen = dict(options.fill_options or {})
    if how in SEEDED:
        chosen["seed"] = options.seed
    if how == "noise":
        chosen |= {"noise_q": options.noise_q, "color_variation": options.color_variation}
    return fill(canvas, mask, how, **chosen)


def _mk2(paint: Paint, image: Tensor, sides: Sides, options: Options) -> Tensor:
    """Outpainting mk2: matched noise beside the image, a blurred mask, one side after another."""
    blur = BLUR_OF["mk2"] if options.mask_blur is None else options.mask_blur
    known = pixels.rgb(inputs.checked(image))
    size, window = tuple(known.shape[1:3]), inputs.whole_number(options.window, "window", CELL)
    sigmas = (
        4 * blur * bool(sides["top"] + sides["bottom"]),
        4 * blur * bool(sides["left"] + sides["right"]),
    )
    for step in mk2_passes(size, sides, window, blur):
        known = _mk2_side(paint, known, step, sigmas, options)
    grown = mk2_passes(size, sides, window, blur)
    start = [sum(step.placed[axis] for step in grown) for axis in (0, 1)]
    return _with_alpha(known, image, Box(*start, *size))


def _mk2_side(paint: Paint, image: Tensor, step: Mk2Pass, sigmas, options: Options) -> Tensor:
    canvas = image.new_full((len(image), *step.canvas, 3), BLACK)
    canvas[:, step.placed.rows, step.placed.columns] = image
    mask = _all_but(step.keep, step.canvas).to(image)
    canvas = _filled(canvas, mask, "mk2", options)
    at = (slice(None), step.window.rows, step.window.columns)
    part, soft = canvas[at], gaussian(mask[at], *sigmas)
    cells = _cells(_all_but(step.keep_latent, step.window[2:]).to(image))
    painted = _padded(paint, Piece(part, soft, cells))
    canvas[at] = _laid_over(part, painted, soft)
    return canvas[:, : step.size[0], : step.size[1]]


def _poor_man(paint: Paint, image: Tensor, sides: Sides, options: Options) -> Tensor:
    """Poor man's outpainting: the filled canvas in overlapping tiles that know nothing of one another."""
    blur = BLUR_OF["poor man"] if options.mask_blur is None else options.mask_blur
    known = pixels.rgb(inputs.checked(image))
    plan = poor_mans_plan(
        tuple(known.shape[1:3]), sides, inputs.whole_number(options.window, "window", CELL), blur
    )
    canvas = known.new_full((len(known), *plan.canvas, 3), BLACK)
    canvas[:, plan.placed.rows, plan.placed.columns] = known
    unknown = _all_but(plan.placed, plan.canvas).to(known)
    canvas = _filled(canvas, unknown, "poor man", options)
    mask, latent = (_all_but(box, plan.canvas).to(known) for box in (plan.keep, plan.keep_latent))
    rows, seed, painted = {}, 0, set(plan.painted)
    for tile in plan.tiles:
        at = (slice(None), tile.rows, tile.columns)
        part = canvas[at]
        if tile in painted:
            soft = gaussian(mask[at], 2 * blur, 2 * blur)
            piece = Piece(part, soft, _cells(latent[at]), seed)
            part, seed = _laid_over(part, _padded(paint, piece), soft), seed + 1
        row = rows.setdefault(tile.top, canvas[:, tile.rows].clone())
        ramp = _ramp(tile.left, tile.width, plan.overlap).to(part)[:, None]
        row[:, :, tile.columns] = torch.lerp(row[:, :, tile.columns], part, ramp.expand_as(part))
    result = canvas.clone()
    for top, row in rows.items():
        at = (slice(None), slice(top, top + row.shape[1]))
        ramp = _ramp(top, row.shape[1], plan.overlap).to(row)[:, None, None]
        result[at] = torch.lerp(result[at], row, ramp.expand_as(row))
    return _with_alpha(result, image, plan.placed)


def _ramp(start: int, length: int, overlap: int) -> Tensor:
    """How much of a tile counts over the one before it [length]: rising over its first `overlap` px."""
    return (torch.arange(length) / max(overlap, 1)).clamp(max=1) if start else torch.ones(length)


def _laid_over(part: Tensor, painted: Tensor, soft: Tensor) -> Tensor:
    """The painted part over what was there, by twice the blurred mask, as webui lays them."""
    share = (2 * soft).clamp(0, 1)[..., None]
    return torch.lerp(part, painted.to(part), share.expand_as(part))


def _all_but(box: Box, size: tuple[int, int]) -> Tensor:
    """[1,H,W]: 0 in the box, 1 around it."""
    mask = torch.ones(1, *size)
    mask[:, box.rows, box.columns] = 0
    return mask


def _cells(mask: Tensor) -> Tensor:
    """bool [1,h,w] of the cells that are more than half in the mask, by a bicubic reduction as webui's."""
    mask = _even(mask)
    size = tuple(side // CELL for side in mask.shape[1:])
    return F.interpolate(mask[:, None], size, mode="bicubic", antialias=True)[:, 0].round() > 0


def _even(planes: Tensor) -> Tensor:
    """[B,H,W] continued to the right and below to whole tokens of 16 px."""
    height, width = planes.shape[1:]
    room = (0, -width % (2 * CELL), 0, -height % (2 * CELL))
    return F.pad(planes[:, None], room, mode="replicate")[:, 0]


def _padded(paint: Paint, piece: Piece) -> Tensor:
    """The piece painted at sides that every model takes, multiples of 16, and cut to its own again."""
    height, width = piece.image.shape[1:3]
    image = torch.stack([_even(plane) for plane in piece.image.unbind(-1)], dim=-1)
    return paint(replace(piece, image=image, mask=_even(piece.mask)))[:, :height, :width]


def gaussian(mask: Tensor, sigma_y: float, sigma_x: float) -> Tensor:
    """A mask [B,H,W] blurred along each axis, 0 for not at all; the image goes on as its mirror image.

    The window ends at 2.5 sigma, as webui's, so that pixels far from the mask are exactly 0.
    """
    rows, columns = (
        _blur_matrix(n, s).to(mask) for n, s in zip(mask.shape[1:], (sigma_y, sigma_x), strict=True)
    )
    return (rows @ mask @ columns.T).clamp(0, 1)


def _blur_matrix(length: int, sigma: float) -> Tensor:
    """[length,length]: row i holds the weights of pixel i."""
    if not sigma or length == 1:
        return torch.eye(length, dtype=torch.float64)
    reach = int(2.5 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    period = 2 * (length - 1)
    folded = (torch.arange(length)[:, None] + offsets) % period
    folded = torch.minimum(folded, period - folded)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, folded, (weights / weights.sum()).expand(length, -1))


def _with_alpha(result: Tensor, image: Tensor, placed: Box) -> Tensor:
    """The result with the image's alpha, if it has one; what is new is opaque."""
    image = inputs.checked(image)
    if image.shape[-1] != 4:
        return result
    alpha = torch.ones_like(result[..., :1])
    alpha[:, placed.rows, placed.columns] = image[..., 3:].to(result)
    return torch.cat([result, alpha], dim=-1)
