"""Diptychs: put an image beside the place for its edit, and take the edit back to the image's own size.

`build` makes the image, mask and prompt that ICEdit-style in-context editing wants; `split` undoes it.
Between them the `Layout` remembers the geometry. Pixels that need no resampling come back bit for bit, in
float. Encoding and sampling happen elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import geometry, pixels
from .geometry import Box, Fit, check_choice, check_whole
from .prompt import ICEDIT_TEMPLATE, format_prompt

__all__ = ["ICEDIT_TEMPLATE", "Diptych", "Layout", "Split", "build", "format_prompt", "split"]

SIDES = ("right", "left", "bottom", "top", "none")
SECOND = ("copy", "gray", "noise")
PASTE = ("auto", "panel", "mask", "changed")
PANEL_WIDTH = 512  # the width ICEdit was trained at
# Two decodes of one scene differ by about 0.02 to 0.05 a channel where nothing was edited; 0.08 is 20 of 255.
CHANGE_THRESHOLD = 0.08
MAX_REACH = 2**14  # pixels that a region may grow or fade


@dataclass(frozen=True)
class Layout:
    """The geometry of a diptych, sizes as (height, width) in pixels.

    `shown` is the part of the source that the panels show and `filled` the part of a panel that it fills;
    `side` is where the edit is, "none" meaning a single panel. `source` [B,H,W,C] and `edit_mask` [B,H,W]
    (hard) are references to what `build` was given, so that borders, alpha and untouched pixels can be
    returned; they take no part in comparisons.
    """

    source_size: tuple[int, int]
    panel_size: tuple[int, int]
    side: str
    policy: str
    shown: Box
    filled: Box
    source: Tensor | None = field(default=None, compare=False, repr=False)
    edit_mask: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def fit(self) -> Fit:
        """How the source goes into a panel."""
        return Fit(self.panel_size, self.shown, self.filled, self.policy)

    @property
    def size(self) -> tuple[int, int]:
        """Of the whole diptych."""
        height, width = self.panel_size
        return (
            height * (2 if self.side in ("bottom", "top") else 1),
            width * (2 if self.side in ("right", "left") else 1),
        )

    @property
    def edit_panel(self) -> Box:
        """Where in the diptych the edit is."""
        height, width = self.panel_size
        return Box(
            height if self.side == "bottom" else 0, width if self.side == "right" else 0, height, width
        )

    @property
    def source_panel(self) -> Box:
        """Where in the diptych the source is; the edit panel itself if there is only one."""
        height, width = self.panel_size
        return Box(height if self.side == "top" else 0, width if self.side == "left" else 0, height, width)

    def __str__(self) -> str:
        """What was done to the image, for people."""
        (height, width), (rows, columns) = self.source_size, self.filled[2:]
        words = [f"{width}x{height}"]
        if self.shown[2:] != self.source_size:
            words.append(f"cropped to {self.shown.width}x{self.shown.height}")
        if self.resampled:
            factor = geometry.distortion(self.shown[2:], self.filled[2:])
            bent = f" (its aspect changes by {factor - 1:.1%})" if factor >= 1.001 else ""
            words.append(f"resized to {columns}x{rows}{bent}")
        if self.filled[2:] != self.panel_size:
            words.append(f"padded to {self.panel_size[1]}x{self.panel_size[0]}")
        return ", ".join(words) if len(words) > 1 else f"{words[0]}, as it is"

    @property
    def resampled(self) -> bool:
        """Whether the panels are the source at another scale."""
        return self.shown[2:] != self.filled[2:]

    def at(self, size: tuple[int, int]) -> Layout:
        """The same layout for a source of another (height, width) but equal aspect (within 2%).

        Raises ValueError for another aspect.
        """
        if tuple(size) == self.source_size:
            return self
        stretch = (size[1] * self.source_size[0]) / (size[0] * self.source_size[1])
        if not 0.98 < stretch < 1.02:
            raise ValueError(
                f"source is {size[1]}x{size[0]} but the layout was made for {self.source_size[1]}x"
                f"{self.source_size[0]}: connect the image that the layout was made from."
            )
        return replace(self, source_size=tuple(size), shown=self.shown.scaled(self.source_size, size))


class Diptych(NamedTuple):
    """image [B,H,W,3] float32 0..1, mask [B,H,W] of 0 and 1 (1 = repaint), the prompt, and the layout."""

    image: Tensor
    mask: Tensor
    prompt: str
    layout: Layout


class Split(NamedTuple):
    """Both panels at the source's size, [B,H,W,3] float32, or 4 channels if the source has alpha."""

    edited: Tensor
    source: Tensor


def build(
    image: Tensor,
    instruction: str | None = None,
    *,
    edit_mask: Tensor | None = None,
    panel_width: int | None = PANEL_WIDTH,
    policy: str = "stretch",
    side: str = "right",
    second: str = "copy",
    seed: int = 0,
    template: str = ICEDIT_TEMPLATE,
    keep_rest: bool = False,
) -> Diptych:
    """Build the diptych of an image [B,H,W,C] (or [H,W,C]), float 0..1, C in 1, 3, 4.

    - `panel_width`: pixels, a multiple of 16; the height follows from the aspect. 0 or None keeps the size.
    - `policy`: how sides become multiples of 16: `stretch`, `crop` (borders come back from the source in
      `split`), `pad` (with the edge's own pixels) or `auto` (`geometry.resolve`). With the size kept, crop
      and pad never resample.
    - `side`: where the edit goes; `none` makes one panel, for plain filling, with the instruction as prompt.
    - `second`: what the repainted pixels hold until then: a copy of the source, gray, or noise from `seed`.
    - `edit_mask` [B,H,W] (any size): repaint only there; elsewhere the edit panel shows the source, and
      `split` returns the source itself. It is binarised at 0.5; an empty one is none (`pixels.painted`).
    - Batches of unequal length repeat as in ComfyUI.

    Raises ValueError in one sentence for whatever it cannot take.
    """
    check_choice("side", side, SIDES)
    check_choice("second", second, SECOND)
    check_whole("seed", seed, 0, 2**64 - 1)
    source = pixels.as_image(image)
    hard = pixels.painted(edit_mask, "edit_mask")
    size = tuple(source.shape[1:3])
    masked = hard is not None
    fit = (
        geometry.fit_width(size, panel_width, policy, masked)
        if panel_width
        else geometry.keep_scale(size, policy, masked)
    )
    geometry.check_panel(size, fit)
    if side == "none":
        prompt = (instruction or "").strip()
    else:
        prompt = format_prompt(instruction, template, side=side, keep_rest=keep_rest)
    if hard is not None:
        hard = pixels.binarise(pixels.resize_mask(hard, *size)).to(source.device)
        batch = max(len(source), len(hard))
        source, hard = pixels.repeat_batch(source, batch), pixels.repeat_batch(hard, batch)
    layout = Layout(size, fit.panel, side, fit.policy, fit.shown, fit.filled, source, hard)

    canvas = torch.empty((len(source), *layout.size, 3), device=source.device)
    edit, beside = layout.edit_panel, layout.source_panel
    canvas[:, beside.rows, beside.columns] = pixels.fit_image(source, layout.fit)
    if side != "none":
        canvas[:, edit.rows, edit.columns] = canvas[:, beside.rows, beside.columns]
    mask = torch.zeros(canvas.shape[:3], device=source.device)
    mask[:, edit.rows, edit.columns] = 1.0 if hard is None else pixels.fit_painted(hard, fit, "edit_mask")
    if second != "copy":
        canvas = torch.where(mask[..., None] > 0, _filling(second, canvas, seed), canvas)
    return Diptych(canvas, mask, prompt, layout)


def _filling(second: str, canvas: Tensor, seed: int) -> Tensor:
    """Mid gray, or uniform noise [B,H,W,3] that is the same on every device."""
    if second == "gray":
        return torch.full((), 0.5, device=canvas.device)
    return torch.rand(canvas.shape, generator=torch.Generator().manual_seed(seed)).to(canvas)


def split(
    diptych: Tensor | Diptych,
    layout: Layout | None = None,
    *,
    source: Tensor | None = None,
    mask: Tensor | None = None,
    paste: str = "auto",
    feather: int = 0,
    grow: int = 0,
    threshold: float = CHANGE_THRESHOLD,
) -> Split:
    """Take the edit (and the source panel) out of a diptych [B,h,w,C], at the source's own size.

    - `source`: what untouched pixels, cropped borders and alpha are taken from; by default the image that
      `build` was given. It may be larger or smaller than that one at the same aspect: its size is returned.
    - `paste`: which pixels of the edit are taken, the others being the source's, exactly:
      `panel` all that the panel shows; `mask` those in `mask`, or in the edit mask of `build`; `changed`
      those whose colour differs from the diptych's own source panel by more than `threshold` in some channel
      (full strength from twice the threshold on: both panels went through the same model, so their
      difference is the edit), within the mask if there is one; `auto` is `mask` if there is one, else
      `panel`.
    - `grow`, `feather`: pixels of the source. The region grows by a disc first, then its edge fades inwards,
      so that pixels outside stay exact. `panel` fades only at borders that crop left over.

    A diptych of another size is read in proportion. Raises ValueError in one sentence for what does not fit.
    """
    check_choice("paste", paste, PASTE)
    if isinstance(diptych, Diptych):
        diptych, layout = diptych.image, layout or diptych.layout
    if not isinstance(layout, Layout):
        raise ValueError("layout is missing: connect the layout that came with this image.")
    canvas = pixels.as_image(diptych, "diptych")
    if source is not None:
        source = pixels.as_image(source, "source")
    for name, value in (("feather", feather), ("grow", grow)):
        check_whole(name, value, 0 if name == "feather" else -MAX_REACH, MAX_REACH)
    mask = _painted(mask, layout)
    given = [item for item in (source, mask) if item is not None]
    source = layout.source if source is None else source
    if source is not None:
        layout = layout.at(source.shape[1:3])
    mask = layout.edit_mask if mask is None else mask
    if paste == "mask" and mask is None:
        raise ValueError("paste is 'mask' but there is no mask: connect one here or to the Diptych Builder.")
    if paste == "auto":
        paste = "panel" if mask is None else "mask"

    after, before = _part(canvas, layout.edit_panel, layout), _part(canvas, layout.source_panel, layout)
    edited, beside = (pixels.resize_image(part, *layout.shown[2:]) for part in (after, before))
    if source is None:
        if paste != "panel" or layout.shown[2:] != layout.source_size:
            raise ValueError("source is missing: connect the image that the layout was made from.")
        return Split(edited, beside)
    source = source.to(canvas.device)
    weight = None
    if paste != "panel" and mask is not None:
        weight = pixels.binarise(pixels.resize_mask(mask.to(canvas.device), *layout.source_size))
    if paste == "changed":
        if layout.side == "none":
            before = _unpainted(source, after, layout)
        weight = _both(_changed(after, before, layout, threshold), weight)
    batch = max(len(part) for part in (canvas, *given))
    return Split(
        _paste(edited, source, _region(weight, layout, grow, feather, edited.device), layout, batch),
        _paste(beside, source, None, layout, len(canvas)),
    )


def _unpainted(source: Tensor, after: Tensor, layout: Layout) -> Tensor:
    """The source as the panel showed it, in the size of `after`, for where no source panel is beside."""
    before = _part(pixels.fit_image(source, layout.fit), layout.edit_panel, layout)
    return pixels.resize_image(before, *after.shape[1:3])


def _painted(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """The mask, where empty masks of a batch are the edit mask of `build`; None if it is all empty."""
    painted = pixels.painted(mask)
    if painted is None or layout.edit_mask is None:
        return painted
    empty = pixels.as_mask(mask).amax(dim=(1, 2)) == 0
    if not bool(empty.any()):
        return painted
    own = pixels.resize_mask(layout.edit_mask.to(painted), *painted.shape[1:])
    return torch.where(empty[:, None, None], pixels.repeat_batch(own, len(painted)), painted)


def _part(canvas: Tensor, panel: Box, layout: Layout) -> Tensor:
    """The part of a panel that shows the source, [B,h,w,3], at the canvas's own scale."""
    size = tuple(canvas.shape[1:3])
    part = Box(panel.top + layout.filled.top, panel.left + layout.filled.left, *layout.filled[2:])
    if size != layout.size:
        stretch = (size[1] * layout.size[0]) / (size[0] * layout.size[1])
        if not 0.98 < stretch < 1.02:
            raise ValueError(
                f"diptych is {size[1]}x{size[0]} but its layout is {layout.size[1]}x{layout.size[0]}:"
                " connect the image that was made with this layout."
            )
        part = part.scaled(layout.size, size)
    return pixels.rgb(canvas)[:, part.rows, part.columns]


def _changed(after: Tensor, before: Tensor, layout: Layout, threshold: float) -> Tensor:
    """Weight [B,H,W] by the largest channel difference: 0 up to `threshold`, 1 from twice of it."""
    if not 0 < threshold <= 1:
        raise ValueError(
            f"threshold is {threshold}: use a number above 0 up to 1, such as {CHANGE_THRESHOLD}."
        )
    difference = (after - pixels.repeat_batch(before, len(after))).abs().amax(dim=-1)
    weight = ((difference - threshold) / threshold).clamp_(0, 1)
    size = layout.shown[2:]
    # Smooth, but not beyond the pixels that changed: what did not change must stay exact.
    support = functional.interpolate(weight[:, None], size, mode="nearest-exact")[:, 0] > 0
    weight = torch.where(support, pixels.smooth_resize(weight, *size), 0)
    whole = torch.zeros((len(weight), *layout.source_size), device=weight.device)
    whole[:, layout.shown.rows, layout.shown.columns] = weight
    return whole


def _both(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight inside the mask, over the longer batch of the two."""
    if mask is None:
        return weight
    batch = max(len(weight), len(mask))
    return pixels.repeat_batch(weight, batch) * pixels.repeat_batch(mask, batch)


def _region(weight: Tensor | None, layout: Layout, grow: int, feather: int, device) -> Tensor | None:
    """Grow and feather the weight [B,H,W] within what the panel shows; None if that is everything."""
    visible = torch.zeros((1, *layout.source_size), device=device)
    visible[:, layout.shown.rows, layout.shown.columns] = 1
    if weight is None:
        everything = layout.shown[2:] == layout.source_size
        return None if everything or not feather else pixels.inner_ramp(visible, feather)
    if grow:
        weight = pixels.grow((weight > 0).float(), grow)
    weight = weight * visible
    return weight * pixels.inner_ramp((weight > 0).float(), feather) if feather else weight


def _paste(edited: Tensor, source: Tensor, weight: Tensor | None, layout: Layout, batch: int) -> Tensor:
    """Lay `edited` [B,h,w,3] over the source's shown part by weight (None: wholly), and give alpha back."""
    whole = pixels.repeat_batch(pixels.rgb(source), batch).clone()
    shown = whole[:, layout.shown.rows, layout.shown.columns]
    edited = pixels.repeat_batch(edited, batch)
    if weight is None:
        shown.copy_(edited)
    else:
        weight = pixels.repeat_batch(weight, batch)[:, layout.shown.rows, layout.shown.columns, None]
        shown.copy_(torch.lerp(shown, edited, weight.expand_as(shown)))  # exact at weights 0 and 1
    if source.shape[-1] < 4:
        return whole
    return torch.cat((whole, pixels.repeat_batch(source[..., 3:], batch)), dim=-1)
