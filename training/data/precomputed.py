"""Flux Fill conditions encoded beforehand: a JSON index beside one folder per kind of tensor.

For reward training, needing no target image; `training/precompute.py` makes it. Index: a list of objects
with "caption" (the text that rewards see) and five file names, each looked up in its own folder beside it:

| key | folder | tensor |
|---|---|---|
| prompt_embed_path | prompt_embed/ | T5 embedding [L, D] |
| pooled_prompt_embeds_path | pooled_prompt_embeds/ | pooled CLIP embedding [P] |
| text_ids | text_ids/ | text positions [L, 3] |
| masked_latents_path | masked_latents/ | latents of source * (1 - mask), model space [16, H/8, W/8] |
| mask_latents_path | mask_latents/ | mask at latent size [1, H/8, W/8], 1 = repaint; soft values are kept |
| latents_path (optional) | latents/ | latents of the target image, to train on supervised |
| edit_mask_path (optional) | edit_mask/ | [1, H/8, W/8]: what an edit touches, if not all of the mask |

Optional too: "weight", which multiplies the row's loss, and "layout": "diptych" where the image is
[source | edit], so that rewards see the edit alone beside its source ("inpaint" where it is not). A caption
that is ICEdit's sentence over a mask of the right half says diptych too.

A leading batch axis of one is accepted, and any text length. Files are read with weights_only=True: a file
that needs more is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...models.lora.containers import load_zip, plain
from ...models.prompt import instruction_of
from ..runtime.disk import write_whole
from ..runtime.fingerprints import stamp
from . import text_files
from .sample import BrokenSample, Sample
from .text_files import decode


@dataclass(frozen=True)
class Encoded:
    """The tensors of the table above; floating point in the dtype they were saved in.

    diptych: the image is [source | edit].
    """

    prompt_embed: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    text_ids: torch.Tensor
    masked_latents: torch.Tensor
    mask_latents: torch.Tensor
    latents: torch.Tensor | None = None
    edit_mask: torch.Tensor | None = None
    diptych: bool = False

    @property
    def mask(self) -> torch.Tensor:
        """[H,W] float32 at pixel size: every latent cell stands for its 8x8 pixels, as FLUX packs them."""
        return _to_pixels(self.mask_latents)

    @property
    def edited(self) -> torch.Tensor | None:
        """`edit_mask` at pixel size, [H,W] float32."""
        return None if self.edit_mask is None else _to_pixels(self.edit_mask)


def _to_pixels(mask: torch.Tensor) -> torch.Tensor:
    return mask[0].float().repeat_interleave(8, 0).repeat_interleave(8, 1)


LAYOUTS = (None, "diptych", "inpaint")

# tensor name -> (index key, folder, number of axes)
_PARTS = {
    "prompt_embed": ("prompt_embed_path", "prompt_embed", 2),
    "pooled_prompt_embeds": ("pooled_prompt_embeds_path", "pooled_prompt_embeds", 1),
    "text_ids": ("text_ids", "text_ids", 2),
    "masked_latents": ("masked_latents_path", "masked_latents", 3),
    "mask_latents": ("mask_latents_path", "mask_latents", 3),
    "latents": ("latents_path", "latents", 3),
    "edit_mask": ("edit_mask_path", "edit_mask", 3),
}
OPTIONAL = ("latents", "edit_mask")


class Precomputed:
    """Source over such an index; `sample.encoded` holds the tensors, `sample.prompt` and `caption` the
    caption.
    """

    def __init__(self, index: str | Path, inside: str | bool = False):
        """inside: refuse tensors outside of the index's folder. Raises FileNotFoundError or ValueError."""
        self.index, self.inside = Path(index), str(inside).lower() in ("true", "1", "yes")
        if not self.index.is_file():
            raise FileNotFoundError(f"index {index} does not exist")
        try:
            found = json.loads(decode(self.index.read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"index {index} is not JSON ({error}): write a list of objects") from error
        if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
            raise ValueError(
                f"index {index} is not a list of objects: see the table in {Path(__file__).name}"
            )
        self._rows = found

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows and of their files' sizes and times: tensors computed anew are read anew."""
        files = []
        for index, row in enumerate(self._rows):
            for part, (key, _, _) in _PARTS.items():
                with contextlib.suppress(BrokenSample, OSError, ValueError):
                    if row.get(key):
                        status = self._path(index, part).stat()
                        files.append((index, part, status.st_size, status.st_mtime_ns))
        return stamp("precomputed", str(self.index.resolve()), self._rows, files)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The index file and the row's number in it."""
        return f"{self.index}[{index}]"

    def _path(self, index: int, part: str) -> Path:
        key, folder, _ = _PARTS[part]
        name, where = self.name(index), self._rows[index].get(key)
        if not isinstance(where, str):
            raise BrokenSample(name, f"the key {key!r} is missing or no text")
        return text_files.locate(self.index.parent / folder, where, self.inside, name)

    def _tensor(self, index: int, part: str) -> torch.Tensor:
        name, axes, path = self.name(index), _PARTS[part][2], self._path(index, part)
        try:
            tensor = load_zip(path, path.stat().st_size)
        except FileNotFoundError:
            raise BrokenSample(name, f"{path} is missing") from None
        except Exception as error:  # a damaged or foreign pickle raises anything
            raise BrokenSample(name, f"{path} is not a plain tensor file ({type(error).__name__})") from error
        if not isinstance(tensor, torch.Tensor):
            raise BrokenSample(name, f"{path} holds a {type(tensor).__name__}, not a tensor")
        try:
            tensor = plain(path.name, tensor)
        except ValueError as error:
            raise BrokenSample(name, f"{path}: {error}") from None
        if tensor.ndim == axes + 1 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim != axes or (part != "text_ids" and not tensor.is_floating_point()):
            raise BrokenSample(
                name,
                f"{path} is {tensor.dtype} {list(tensor.shape)}: {part} needs {axes} axes of floating point",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BrokenSample(name, f"{path} holds NaN or infinity")
        return tensor

    def __getitem__(self, index: int) -> Sample:
        name, row = self.name(index), self._rows[index]
        caption = row.get("caption")
        if not isinstance(caption, str):
            raise BrokenSample(name, "the key 'caption' is missing or no text")
        if row.get("layout") not in LAYOUTS:
            raise BrokenSample(name, f"layout is {str(row['layout'])[:40]!r}: write diptych or inpaint")
        parts = {
            part: self._tensor(index, part)
            for part, (key, _, _) in _PARTS.items()
            if part not in OPTIONAL or row.get(key)
        }
        _check(name, parts)
        instruction = self._instruction(row, caption, parts["mask_latents"])
        encoded = Encoded(**parts, diptych=instruction is not None)
        words = instruction or caption
        weight = text_files.weight(row, name)
        return Sample(words, caption=caption, mask=encoded.mask, name=name, weight=weight, encoded=encoded)

    def _instruction(self, row: dict, caption: str, mask: torch.Tensor) -> str | None:
        """What a diptych's caption asks for; None where the row is one image."""
        layout, words = row.get("layout"), instruction_of(caption)
        if layout:
            return (words or caption) if layout == "diptych" else None
        middle = mask.shape[-1] // 2
        halves = not mask[..., :middle].any() and bool((mask[..., middle:] == 1).all())
        return words if halves else None


def write_row(folder: Path, file: str, parts: dict[str, torch.Tensor]) -> None:
    """Write one row's tensors, by name as above, each as `file` in its own folder, never half a file."""
    for part, tensor in parts.items():
        path = folder / _PARTS[part][1] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        write_whole(path, lambda partial, plain=plain: torch.save(plain, partial))


def is_written(folder: Path, file: str, targets: bool) -> bool:
    """Whether all tensors of a row are there; an edit mask is written before the others."""
    wanted = [part for part in _PARTS if part not in OPTIONAL or (part == "latents" and targets)]
    return all((folder / _PARTS[part][1] / file).is_file() for part in wanted)


def index_row(caption: str, file: str, optional: Collection[str]) -> dict[str, str]:
    """A row of the index whose tensors all have one file name; optional: those of `OPTIONAL` it has."""
    keys = [key for part, (key, _, _) in _PARTS.items() if part not in OPTIONAL or part in optional]
    return {"caption": caption} | dict.fromkeys(keys, file)


def read_index(folder: Path) -> list[dict]:
    """The rows of an `index.json` of ours; none where it is not there or not whole."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        return [row for row in found if isinstance(row, dict) and isinstance(row.get("text_ids"), str)]
    return []


def write_index(folder: Path, rows: list[dict]) -> Path:
    """`index.json` of these rows, replaced in one go."""
    path = folder / "index.json"
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _check(name: str, parts: dict[str, torch.Tensor]) -> None:
    """Raises BrokenSample for tensors that do not belong together, or that FLUX cannot take."""
    cells = parts["masked_latents"].shape[1:]
    expected = {
        "text_ids": (parts["prompt_embed"].shape[0], 3),
        "masked_latents": (16, *cells),
        "mask_latents": (1, *cells),
        "latents": (16, *cells),
        "edit_mask": (1, *cells),
    }
    for part, shape in expected.items():
        if part in parts and tuple(parts[part].shape) != shape:
            raise BrokenSample(name, f"{part} is {list(parts[part].shape)} where {list(shape)} is expected")
    if 0 in cells or cells[0] % 2 or cells[1] % 2:
        raise BrokenSample(
            name, f"latents of {cells[0]}x{cells[1]} cells cannot be packed: sides must be even"
        )
    for part in ("mask_latents", "edit_mask"):
        mask = parts.get(part, torch.zeros(1))
        if mask.min() < 0 or mask.max() > 1:
            low, high = float(mask.min()), float(mask.max())
            raise BrokenSample(name, f"{part} goes from {low:g} to {high:g}: write 0 (keep) to 1 (repaint)")
