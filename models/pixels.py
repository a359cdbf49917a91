"""IMAGE and MASK tensors: accepting every usual shape, resizing, batches, and the pack's one mask rule.

Float throughout and without side effects: a result may share memory with an input, but no input is written
to. What an image means (panels, prompts) is not decided here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Fit

MASK_THRESHOLD = 0.5  # diffusers' VaeImageProcessor(do_binarize=True): 0 below, 1 from here on


def as_image(image: Tensor, name: str = "image") -> Tensor:
    """[B,H,W,C] or [H,W,C] float 0..1, C in 1, 3, 4 -> float32 [B,H,W,C].

    Raises ValueError for other shapes, integer dtypes (their range is unknown), empty images, and NaN or
    infinity, which would spread.
    """
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{name} is a {type(image).__name__}: give a torch tensor [batch, height, width, channels]."
        )
    if image.ndim == 3:
        image = image[None]
    _check_not_empty(image, name)
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}: give [batch, height, width, channels] with"
            " 1, 3 or 4 channels."
        )
    if not image.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {image.dtype}: divide by its maximum to give floats in 0..1.")
    return _finite(image.float(), name)


def _check_not_empty(tensor: Tensor, name: str) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty, of shape {tuple(tensor.shape)}: give one of at least 1x1 pixels.")


def _finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor. Raises ValueError if it holds NaN or infinity; a sum shows them without a copy."""
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinity: make it again; if a VAE or model made it, run that in float32."
        )
    return tensor


def rgb(image: Tensor) -> Tensor:
    """[B,H,W,C] -> [B,H,W,3]: gray is repeated, alpha is left out (`diptych.split` gives it back)."""
    return image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image[..., :3]


def on_white(image: Tensor) -> Tensor:
    """[B,H,W,C] -> [B,H,W,3] on white, for where alpha does not come back: hidden colours stay hidden."""
    if image.shape[-1] < 4:
        return rgb(image)
    return torch.lerp(torch.ones(()).to(image), rgb(image), image[..., 3:].clamp(0, 1))


def as_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """[H,W], [B,H,W], [B,1,H,W] or [B,H,W,1], any dtype -> float32 [B,H,W]; 1 = repaint.

    uint8 is read as 0..255; what lies outside 0..1 counts as 0 or 1. Raises ValueError for other shapes,
    empty masks, and NaN or infinity.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}: give a torch tensor [batch, height, width].")
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and shape[3] == 1:
        mask = mask[..., 0]
    _check_not_empty(mask, name)
    if mask.ndim != 3:
        raise ValueError(f"{name} has shape {shape}: give [batch, height, width].")
    if mask.dtype == torch.uint8:
        return mask.float() / 255
    if mask.is_complex():
        raise ValueError(f"{name} has dtype {mask.dtype}: give numbers in 0..1.")
    return _finite(mask.float(), name).clamp(0, 1)


def painted(
    mask: Tensor | None, name: str = "mask", *, needed: bool = False, empty_items: bool = False
) -> Tensor | None:
    """The mask [B,H,W], or None for the whole image: the pack's one rule of what an empty mask means.

    A mask of zeros counts as none (Load Image gives one for an image without alpha): the whole image
    is repainted, or if a mask is `needed`, ValueError. In a batch that holds for each mask by itself, unless
    `empty_items` may stay empty beside painted ones (images without holes of their own). A mask that is
    painted but nowhere 0.5 or more would repaint nothing: ValueError.
    """
    if mask is None:
        return None
    mask = as_mask(mask, name)
    peaks = mask.amax(dim=(1, 2))
    empty, faint = peaks == 0, (peaks > 0) & (peaks < MASK_THRESHOLD)
    if bool(faint.any()):
        which, peak = _which(faint, name), float(peaks[faint][0])
        raise ValueError(
            f"{which} is nowhere {MASK_THRESHOLD} or more (at most {peak:.2g}), so it would repaint nothing:"
            " paint it stronger."
        )
    if needed and bool(empty.any()):
        raise ValueError(
            f"{_which(empty, name)} is empty, so nothing would be repainted: paint what to fill."
        )
    if bool(empty.all()):
        return None
    if empty_items:
        return mask
    return torch.where(empty[:, None, None], torch.ones((), device=mask.device), mask)


def _which(chosen: Tensor, name: str) -> str:
    """The first chosen one of a batch, by name."""
    return name if len(chosen) == 1 else f"{name} {int(chosen.nonzero()[0, 0]) + 1} of {len(chosen)}"


def binarise(mask: Tensor) -> Tensor:
    """1 where a mask of any shape is at least 0.5, else 0: the rule of the whole pack. NaN counts as 0."""
    return (mask >= MASK_THRESHOLD).to(mask.dtype)


def resize_image(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of [B,H,W,C], clamped to 0..1; nothing is done to an image of that size."""
    if image.shape[1:3] == (height, width):
        return image
    passes = [_resize_rows, _resize_columns]
    if height > image.shape[1]:
        passes.reverse()  # the pass that makes less data comes first
    for resize in passes:
        image = resize(image, height, width)
    return image.clamp(0, 1)


def _resize_rows(image: Tensor, height: int, width: int) -> Tensor:
    """Height only. Rows are independent, so columns and channels count as one axis: 3x faster on a CPU."""
    if image.shape[1] == height:
        return image
    batch, rows, columns, channels = image.shape
    resized = _bicubic(image.reshape(batch, 1, rows, columns * channels), height, columns * channels)
    return resized.reshape(batch, height, columns, channels)


def _resize_columns(image: Tensor, height: int, width: int) -> Tensor:
    """Width only."""
    if image.shape[2] == width:
        return image
    return _bicubic(image.movedim(-1, 1), image.shape[1], width).movedim(1, -1)


def _bicubic(planes: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a hard or soft mask [B,H,W] so that nothing painted is lost, however thin.

    Along an axis that shrinks a cell takes its strongest pixel, along one that grows its nearest. Values are
    only chosen, never mixed, so cutting at 0.5 before and after is the same.
    """
    if mask.shape[1] != height:
        mask = _resize_axis(mask, height)
    if mask.shape[2] != width:
        mask = _resize_axis(mask.transpose(1, 2), width).transpose(1, 2)
    return mask


def _resize_axis(mask: Tensor, length: int) -> Tensor:
    """[B,H,W] to [B,length,W]."""
    if length < mask.shape[1]:
        return F.adaptive_max_pool2d(mask[:, None], (length, mask.shape[2]))[:, 0]
    centres = (torch.arange(length, device=mask.device) * 2 + 1) * mask.shape[1] // (2 * length)
    return mask[:, centres]


def smooth_resize(weight: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear resize of weights [B,H,W] that fade, where a thin line may fade too."""
    if weight.shape[1:] == (height, width):
        return weight
    planes = weight[:, None]
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True, align_corners=False)[:, 0]


def fit_image(image: Tensor, fit: Fit) -> Tensor:
    """One panel [B,h,w,3] of an image [B,H,W,C]: cut, resized, and padded with its own edge."""
    part = resize_image(rgb(image)[:, fit.shown.rows, fit.shown.columns], *fit.filled[2:])
    if fit.filled[2:] == fit.panel:
        return part
    rows, columns = (
        torch.arange(length, device=image.device).sub_(start).clamp_(0, extent - 1)
        for length, start, extent in zip(fit.panel, fit.filled[:2], fit.filled[2:], strict=True)
    )
    return part[:, rows][:, :, columns]


def fit_mask(mask: Tensor, fit: Fit) -> Tensor:
    """One panel's mask [B,h,w] from a mask [B,H,W], resized as by `resize_mask`; padding is kept (0)."""
    part = resize_mask(mask[:, fit.shown.rows, fit.shown.columns], *fit.filled[2:])
    if fit.filled[2:] == fit.panel:
        return part
    panel = torch.zeros((len(mask), *fit.panel), device=mask.device)
    panel[:, fit.filled.rows, fit.filled.columns] = part
    return panel


def fit_painted(mask: Tensor, fit: Fit, name: str = "mask") -> Tensor:
    """As `fit_mask`, [B,h,w] cut at 0.5, of a mask that repaints something.

    Raises ValueError if nothing is left.
    """
    panel = binarise(fit_mask(mask, fit))
    left = panel.flatten(1).any(dim=1)
    if not bool(left.all()):
        which = _which(~left, name)
        raise ValueError(
            f"{which} lies wholly in the borders that policy crop leaves out: use pad or stretch."
        )
    return panel


def repeat_batch(tensor: Tensor, batch: int) -> Tensor:
    """ComfyUI's batch rule on [B,...]: cycle through the items until there are `batch`, and drop the rest."""
    have = tensor.shape[0]
    if have == batch:
        return tensor
    if have == 1:
        return tensor.expand(batch, *tensor.shape[1:])
    return torch.cat([tensor] * math.ceil(batch / have))[:batch]


def distance(mask: Tensor, limit: int) -> Tensor:
    """Distance in pixels from each pixel of [B,H,W] to the nearest pixel of 1, `limit` + 1 if farther.

    Euclidean, and exact up to `limit`: two scans find the nearest row in each column, then columns are joined
    by brute force over 2 limit + 1 shifts (Felzenszwalb and Huttenlocher, 2012).
    """
    height, width = mask.shape[1:]
    far = float(limit + 1)
    reach = min(limit, width)  # no pixel of a row is farther
    rows = torch.arange(height, dtype=torch.float32, device=mask.device)[None, :, None]
    marked = mask > 0
    above = torch.where(marked, rows, -far).cummax(dim=1).values
    below = torch.where(marked, rows, height + far).flip(1).cummin(dim=1).values.flip(1)
    vertical = torch.minimum(rows - above, below - rows).clamp_(max=far).square_()
    padded = F.pad(vertical, (reach, reach), value=far**2)
    nearest = vertical.clone()
    for shift in range(-reach, reach + 1):
        start = reach + shift
        torch.minimum(nearest, padded[..., start : start + width] + shift**2, out=nearest)
    return nearest.clamp_(max=far**2).sqrt_()


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Grow a hard mask [B,H,W] by a disc of `pixels`, or shrink it if negative (but not from the frame)."""
    if pixels == 0:
        return mask
    if pixels > 0:
        return (distance(mask, pixels) <= pixels).to(mask.dtype)
    return (distance(1 - mask, -pixels) > -pixels).to(mask.dtype)


def soft_edge(mask: Tensor, width: int) -> Tensor:
    """Ramp across the edge of a hard mask [B,H,W], `width` pixels wide and 0.5 at the edge itself."""
    if width <= 0:
        return mask
    reach = width // 2 + 1
    signed = torch.where(mask > 0, distance(1 - mask, reach) - 0.5, 0.5 - distance(mask, reach))
    return (0.5 + signed / width).clamp_(0, 1)


def inner_ramp(mask: Tensor, width: int) -> Tensor:
    """Ramp from the edge of a hard mask [B,H,W] inwards over `width` pixels, exactly 0 outside it.

    A region thinner than twice the width gets a steeper ramp, so that it still reaches 1 in its middle.
    """
    if width <= 0:
        return mask
    depth = distance(1 - mask, width)
    deepest = depth
    for axis in (1, 2):
        deepest = _window_max(deepest, width, axis)
    return torch.where(mask > 0, depth / deepest.clamp(min=1), 0)


def _window_max(values: Tensor, reach: int, axis: int) -> Tensor:
    """Maximum over `reach` pixels on either side along one axis, in about log2(reach) steps."""
    length, result, covered = values.shape[axis], values, 0
    reach = min(reach, length)
    while covered < reach:
        step = min(max(covered, 1), reach - covered, length)
        ahead, behind = result.clone(), result.clone()
        if step < length:
            left, right = [slice(None)] * 3, [slice(None)] * 3
            left[axis], right[axis] = slice(0, length - step), slice(step, length)
            ahead[tuple(left)] = torch.maximum(result[tuple(left)], result[tuple(right)])
            behind[tuple(right)] = torch.maximum(result[tuple(right)], result[tuple(left)])
        result = torch.maximum(ahead, behind)
        covered += step
    return result
