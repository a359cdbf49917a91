"""Image files to tensors: the one reader of the nodes, the command line and training.

Every format that Pillow decodes without starting another program, 8 and 16 bits, the first frame of an
animation, upright by EXIF. Memory is bounded before pixels are decoded. What an image means (a source, a mask
of what) is the caller's business, and so is where files are written; `to_pil` is the way back.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

MAX_PIXELS = 178_956_970  # Pillow's own limit; decoded, those are at most 0.7 GB
WHOLE_PIXELS = 2**26  # 67 megapixels, 0.8 GB in float: the most that is read without making it smaller
GROUND = 1.0  # what shows through transparent pixels where alpha is not kept: white, as a browser shows them
_STRIP = 2**20  # pixels that are converted to float at once

# EPS starts Ghostscript and WMF Windows' renderer; the others are recognised by Pillow but not decoded.
_REFUSED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"}
# Image formats that people have and Pillow may not read here.
_FOREIGN = frozenset(
    ".heic .heif .hif .avif .jxl .svg .exr .hdr .dng .cr2 .cr3 .nef .arw .raf .eps .ps .wmf .emf".split()
)
_PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}
_ORIENTATION = 0x0112  # the EXIF tag

Where = Any  # a path, bytes, a `datasets` image dict, or a PIL image


class ImageFileError(ValueError):
    """An image that cannot be read; the message is the reason, to stand behind a name."""


@cache
def _formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes of the files that can be read here, such as ".png"."""
    formats = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def looks_like_image(path: str | Path) -> bool:
    """Whether a file's suffix is an image's, also of a format that cannot be read here."""
    return Path(path).suffix.lower() in suffixes() | _FOREIGN


def image_size(where: Where) -> tuple[int, int]:
    """(height, width) as the image is shown, from its header alone. Raises ImageFileError."""
    with _opened(where) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(where: Where, *, alpha: bool = False, most: int | None = None) -> Tensor:
    """An image as float32 [H,W,3] in 0..1, or [H,W,4] if `alpha` is to be kept and there is transparency.

    Else transparent pixels lie on white, so that no colour hidden under them is ever seen. Beyond `most`
    pixels the image is made smaller by a whole factor (block means) while it is read; without `most` an image
    beyond `WHOLE_PIXELS` is refused. Raises ImageFileError.
    """

    def convert(strip: Image.Image, kind: str | None) -> Tensor:
        values = _values(strip, kind)
        if values.shape[-1] == 1:
            return values.expand(-1, -1, 3)
        if values.shape[-1] == 4 and not alpha:
            return torch.lerp(torch.full((), GROUND), values[..., :3], values[..., 3:])
        return values

    return _read(where, most, convert, _mean)


def read_mask(where: Where, *, most: int | None = None) -> Tensor:
    """A mask as float32 [H,W] in 0..1, 1 = repaint: what is white, or in an image with transparency what is
    transparent, which is how ComfyUI's mask editor saves a mask.

    Made smaller (`most` as in `read_image`), each block keeps its strongest value. Raises ImageFileError.
    """

    def convert(strip: Image.Image, kind: str | None) -> Tensor:
        values = _values(strip, kind)
        colours = values[..., :3]
        grey = colours[..., 0] if colours.shape[-1] == 1 else colours @ torch.tensor([0.299, 0.587, 0.114])
        hole = 1 - values[..., 3] if values.shape[-1] == 4 else torch.zeros_like(grey)
        return torch.stack((grey, hole), dim=-1)

    grey, hole = _read(where, most, convert, _max).unbind(-1)
    return (hole if bool(hole.any()) else grey).clamp(0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """An image [H,W,C] of 1, 3 or 4 channels or a mask [H,W] in 0..1, rounded to 8 bits; NaN is black."""
    levels = (image.detach().float().clamp(0, 1).nan_to_num(0.0) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray((levels[..., 0] if levels.shape[2:] == (1,) else levels).numpy())


def _mean(values: Tensor, factor: int) -> Tensor:
    return functional.avg_pool2d(values.movedim(-1, 0), factor, ceil_mode=True).movedim(0, -1)


def _max(values: Tensor, factor: int) -> Tensor:
    return functional.max_pool2d(values.movedim(-1, 0), factor, ceil_mode=True).movedim(0, -1)


def _read(
    where: Where,
    most: int | None,
    convert: Callable[[Image.Image, str | None], Tensor],
    pool: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """[H,W,C] by strips of rows, so that no float copy of a larger image than asked for is ever made."""
    with _opened(where) as image:
        if most is None:
            _check_size(image.size, WHOLE_PIXELS)
        orientation = _orientation(image)
        factor = _factor(image.size, most)
        if factor > 1 and image.format == "JPEG":  # its decoder makes small ones for less
            image.draft(None, tuple(-(-side // factor) for side in image.size))
            factor = _factor(image.size, most)
        try:
            image.load()
            _check_size(image.size, WHOLE_PIXELS if most is None else MAX_PIXELS)
            width, height = image.size
            factor = _factor(image.size, most)  # an icon's size is known only now
            rows = max(_STRIP // (width * factor), 1) * factor
            whole = None
            for top in range(0, height, rows):
                part = convert(image.crop((0, top, width, min(top + rows, height))), image.format)
                part = pool(part, factor) if factor > 1 else part
                if whole is None:
                    size = -(-height // factor), *part.shape[1:]
                    whole = torch.empty(size)
                start = top // factor
                whole[start : start + len(part)] = part
        except ImageFileError:
            raise
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise ImageFileError(f"the image cannot be decoded ({_said(error)})") from error
    return _upright(whole, orientation)


def _factor(size: tuple[int, int], most: int | None) -> int:
    """The whole factor that brings width x height to at most `most` pixels."""
    return 1 if most is None else max(math.ceil(math.sqrt(size[0] * size[1] / most)), 1)


@contextlib.contextmanager
def _opened(where: Where) -> Iterator[Image.Image]:
    """The PIL image, its header read and its size checked."""
    if isinstance(where, dict):
        where = where["bytes"] if where.get("bytes") else where.get("path")
    if isinstance(where, Image.Image):
        _check_size(where.size)
        yield where
        return
    if not where:
        raise ImageFileError("the image is missing")
    with contextlib.ExitStack() as stack:
        if isinstance(where, bytes):
            file, suffix = io.BytesIO(where), ""
        elif not os.path.isfile(where):  # also for a name no file can have; never opens a pipe or a device
            raise ImageFileError(f"{where} is missing")
        else:
            suffix = Path(where).suffix.lower()
            try:
                file = stack.enter_context(open(where, "rb"))
            except OSError as error:
                raise ImageFileError(f"{where} cannot be opened ({error.strerror})") from error
        try:
            image = Image.open(file, formats=_formats())
        except Image.DecompressionBombError:
            raise ImageFileError(_too_large("", MAX_PIXELS)) from None
        except Exception as error:
            raise ImageFileError(_unreadable(suffix, error)) from error
        _check_size(image.size)
        yield image


def _check_size(size: tuple[int, int], most: int = MAX_PIXELS) -> None:
    if size[0] * size[1] > most:
        raise ImageFileError(_too_large(f"{size[0]}x{size[1]}, ", most))


def _too_large(size: str, most: int) -> str:
    return f"the image is {size}more than the {most // 10**6} megapixels that are read: make it smaller"


def _unreadable(suffix: str, error: Exception) -> str:
    if suffix and suffix not in suffixes():
        remedy = f"install {_PACKAGES[suffix]} or save it as PNG" if suffix in _PACKAGES else "save it as PNG"
        return f"{suffix} images are not read here: {remedy}"
    known = isinstance(error, Image.UnidentifiedImageError)
    return "not a readable image" if known else f"not a readable image ({_said(error)})"


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """1 to 8 from EXIF or XMP; 1 where there is none or it is damaged.

    Not `image.getexif()`: for PNG that decodes the whole image to look for EXIF behind it, where browsers
    do not look either. TIFF is turned by Pillow itself, its size too.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # a damaged block makes Pillow raise nearly anything; the pixels are fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(values: Tensor, orientation: int) -> Tensor:
    """[H,W,C] turned as EXIF's orientation says."""
    if orientation >= 5:
        values = values.transpose(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values.flip(0)
    if orientation in (2, 3, 6, 7):
        values = values.flip(1)
    return values.contiguous()


def _values(strip: Image.Image, kind: str | None) -> Tensor:
    """A strip in any mode, of a file of format `kind`, as float32 [h,w,C] in 0..1.

    C is 1 (grey), 3, or 4 if there is transparency.
    """
    key = strip.info.get("transparency")
    # Older versions of Pillow give 16-bit PNG as "I"; PNM with more than 8 bits is scaled to 16 by Pillow.
    if strip.mode.startswith("I;16") or (strip.mode == "I" and kind in ("PNG", "PPM")):
        return _sixteen_bits(np.asarray(strip).astype(np.int32), key)
    if strip.mode in ("I", "F"):
        return _numbers(np.array(strip, dtype=np.float32))
    if strip.mode == "La":
        strip = strip.convert("LA")
    transparent = key is not None or strip.mode in ("LA", "PA", "RGBA", "RGBa")
    mode = "RGBA" if transparent else "L" if strip.mode in ("1", "L") else "RGB"
    values = torch.from_numpy(np.array(strip.convert(mode), dtype=np.uint8)).float() / 255
    return values if values.ndim == 3 else values[..., None]


def _sixteen_bits(levels: np.ndarray, key: Any) -> Tensor:
    """Grey levels [h,w] of 0..65535; pixels of the level `key`, if there is one, are transparent."""
    grey = torch.from_numpy(levels).float()[..., None] / 65535
    if not isinstance(key, int):
        return grey
    opaque = torch.from_numpy(levels != key).float()[..., None]
    return torch.cat((grey.expand(-1, -1, 3), opaque), dim=-1)


def _numbers(values: np.ndarray) -> Tensor:
    """Floats or 32-bit integers [h,w], which have no range of their own: 0..1 or refused."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also for NaN
        raise ImageFileError(
            f"its values go from {low:g} to {high:g} where floating point means 0 to 1:"
            " save it with 8 or 16 bits"
        )
    return torch.from_numpy(values)[..., None]
