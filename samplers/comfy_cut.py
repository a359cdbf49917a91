"""Conditionings cut to a window of the canvas, as ComfyUI holds them during a run.

Imported at run time only. Cut is whatever lies on the canvas: the masked image and mask of Fill and
inpainting models, references of the canvas' own size, regional prompts. Cells that earlier windows painted
count as known in the later ones.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch
from torch import Tensor

from . import tiles

UNCUTTABLE = {"control": "a ControlNet", "gligen": "GLIGEN boxes"}


def entries_of(conds: dict[str, list | None]) -> list[dict]:
    """All conditionings of a guider. Raises ValueError for what cannot be cut."""
    found = [entry for entries in conds.values() for entry in entries or ()]
    for entry in found:
        for key, what in UNCUTTABLE.items():
            if entry.get(key) is not None:
                raise ValueError(
                    f"the conditioning has {what}, which Tiled Sampler cannot cut: leave it out."
                )
    return found


class ConcatParts:
    """Which channels of `c_concat` are the masked image and which the mask, for one conditioning."""

    def __init__(
        self, data: Tensor | None, image: slice | None = None, mask: slice | None = None, keep: int = 0
    ):
        self.data, self.image, self.mask, self.keep = data, image, mask, keep

    @classmethod
    def of(cls, model: Any, entry: dict, channels: int) -> ConcatParts:
        """Fill: the image, then 64 channels of mask; inpainting: as the model's `concat_keys` say."""
        concat = entry.get("model_conds", {}).get("c_concat")
        if concat is None:
            return cls(None)
        data, keys = concat.cond, tuple(getattr(model, "concat_keys", ()) or ())
        if not keys:
            # Exactly the image: a control image, or glid's, whose hole is exact zeros.
            fill = data.shape[1] > channels
            return cls(data, slice(0, channels), slice(channels, None) if fill else None)
        places, at = {}, 0
        for key in keys:
            width = 1 if "mask" in key and "image" not in key else channels
            places[key], at = slice(at, at + width), at + width
        if at != data.shape[1]:
            return cls(data)
        inverted = "mask_inverted" in places
        return cls(
            data,
            places.get("masked_image"),
            places.get("mask_inverted" if inverted else "mask"),
            keep=1 if inverted else 0,
        )

    def seen_mask(self) -> Tensor:
        """bool [B,h,w]: what the model is told to repaint."""
        mask = self.data[:, self.mask]
        return ((1 - mask if self.keep else mask) >= 0.5).any(dim=1)

    def cut(self, tile: tiles.Tile, painted: Tensor, canvas: Tensor) -> Tensor:
        """The window [B,C,h,w] of `c_concat`; cells painted by earlier tiles (bool [H,W]) are known."""
        data = self.data[:, :, tile.rows, tile.columns].clone()
        new = painted[tile.rows, tile.columns].to(data.device)
        if self.image is None or not bool(new.any()):
            return data
        masked = data[:, self.image]
        if self.mask is None and bool((masked[:, :, new] != 0).any()):
            return data  # a control image: it shows what is to come, not what is known
        latent = canvas[:, :, tile.rows, tile.columns].to(data)
        if len(latent) != len(data):
            data = data.expand(len(latent), *data.shape[1:]).clone()
            masked = data[:, self.image]
        masked.copy_(torch.where(new, latent, masked))
        if self.mask is not None:
            data[:, self.mask].masked_fill_(new, self.keep)
        return data


def cut_entries(
    entries: list | None, tile: tiles.Tile, painted: Tensor, canvas: Tensor, model
) -> list | None:
    """The conditionings of one window of the canvas [B,C,H,W], without those whose area lies elsewhere."""
    if entries is None:
        return None
    inside = [entry for entry in entries if _area(entry.get("area"), tile) is not None]
    return [_cut(entry, tile, painted, canvas, model) for entry in inside or entries[:1]]


def _area(area, tile: tiles.Tile):
    """A regional prompt's (height, width, y, x) within the window; None if they never meet; () if none."""
    if area is None:
        return ()
    height, width, y, x = area
    top, left = max(y, tile.y), max(x, tile.x)
    bottom, right = min(y + height, tile.y + tile.height), min(x + width, tile.x + tile.width)
    if bottom <= top or right <= left:
        return None
    return (bottom - top, right - left, top - tile.y, left - tile.x)


def _cut(entry: dict, tile: tiles.Tile, painted: Tensor, canvas: Tensor, model) -> dict:
    size = tuple(canvas.shape[2:])
    cut = dict(entry)
    if entry.get("area") is not None:
        area = _area(entry["area"], tile)
        cut.pop("area") if area is None else cut.update(area=area)
    if isinstance(entry.get("mask"), Tensor) and tuple(entry["mask"].shape[-2:]) == size:
        cut["mask"] = entry["mask"][..., tile.rows, tile.columns]
    conds = dict(entry.get("model_conds", {}))
    for name, cond in conds.items():
        if name == "c_concat":
            parts = ConcatParts.of(model, entry, canvas.shape[1])
            conds[name] = type(cond)(parts.cut(tile, painted, canvas))
        elif isinstance(cond, comfy.conds.CONDNoiseShape):
            conds[name] = type(cond)(cond.cond[..., tile.rows, tile.columns])
        elif isinstance(cond, comfy.conds.CONDList):
            conds[name] = type(cond)(
                [
                    item[..., tile.rows, tile.columns] if tuple(item.shape[-2:]) == size else item
                    for item in cond.cond
                ]
            )
    cut["model_conds"] = conds
    return cut
