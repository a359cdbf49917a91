"""Image files as people have them: every mode and rotation gives what it shows, or one sentence."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from comfyui_diptych.commands import images
from comfyui_diptych.models import image_files
from comfyui_diptych.models.image_files import ImageFileError, image_size, read_image, read_mask
from comfyui_diptych.training.data import sample
from PIL import Image, ImageOps

RAMP = np.linspace(0, 1, 24 * 36).reshape(24, 36)


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(levels, dtype) -> Image.Image:
    return Image.fromarray((RAMP * levels).round().astype(dtype))


def palette() -> Image.Image:
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("P")
    image.putpalette([value for level in range(256) for value in (level, level, level)])
    return image


GREYS = {
    "8 bits": encoded(grey(255, np.uint8)),
    "16 bits": encoded(grey(65535, np.uint16)),
    "16-bit TIFF": encoded(grey(65535, np.uint16), "TIFF"),
    "big-endian 16-bit TIFF": encoded(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"),
    "16-bit PGM": b"P5 36 24 65535\n" + (RAMP * 65535).round().astype(">u2").tobytes(),
    "float TIFF": encoded(Image.fromarray(RAMP.astype("f4")), "TIFF"),
    "RGB": encoded(grey(255, np.uint8).convert("RGB")),
    "CMYK": encoded(grey(255, np.uint8).convert("RGB").convert("CMYK"), "TIFF"),
    "JPEG": encoded(grey(255, np.uint8), "JPEG", quality=100),
    "CMYK JPEG": encoded(grey(255, np.uint8).convert("RGB").convert("CMYK"), "JPEG", quality=100),
    "LA": encoded(grey(255, np.uint8).convert("LA")),
    "palette": encoded(palette()),
    "WebP": encoded(grey(255, np.uint8).convert("RGB"), "WEBP", lossless=True),
    "GIF": encoded(palette(), "GIF"),
    "BMP": encoded(grey(255, np.uint8), "BMP"),
}


@pytest.mark.parametrize("kind", GREYS)
def test_every_kind_of_file_keeps_its_levels_as_image_and_as_mask(kind):
    want = torch.from_numpy(RAMP).float()
    image, mask = read_image(GREYS[kind]), read_mask(GREYS[kind])
    assert image.shape == (24, 36, 3) and mask.shape == (24, 36)
    assert image.dtype == mask.dtype == torch.float32
    assert (image - want[..., None]).abs().max() < 0.012 and (mask - want).abs().max() < 0.012
    assert image_size(GREYS[kind]) == (24, 36)


def test_one_bit_is_black_and_white():
    checks = Image.fromarray(RAMP > 0.5)
    assert checks.mode == "1"
    assert torch.equal(read_mask(encoded(checks)), torch.from_numpy(RAMP > 0.5).float())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_and_their_size_too(kind, orientation):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (3, 5, 3), dtype=np.uint8)).resize((40, 24), Image.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        data = encoded(image, kind, exif=exif, quality=95)
    except KeyError:
        pytest.skip(f"this Pillow writes no {kind}")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = read_image(data)
    assert torch.equal(image, torch.from_numpy(np.array(expected)).float() / 255)
    assert image_size(data) == tuple(image.shape[:2]) == ((40, 24) if orientation >= 5 else (24, 40))


def damaged_exif() -> dict[str, bytes]:
    image = Image.new("RGB", (60, 40), (90, 90, 90))
    jpeg = encoded(image, "JPEG")
    blocks = {
        "text as orientation": b"Exif\0\0II*\0\x08\0\0\0\x01\0"
        + struct.pack("<HHI", 0x0112, 2, 4)
        + b"abc\0",
        "orientation 77": b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 77, 0),
        "cut": b"Exif\0\0II*\0\x08\0",
        "noise": b"Exif\0\0" + bytes(range(64)),
        "far offset": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    }
    files = {
        name: jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
        for name, block in blocks.items()
    }
    files["PNG"] = encoded(image, exif=b"\x00\x08\x00\x02\x01\x12\x00\x03")
    return files


@pytest.mark.parametrize("name", damaged_exif())
def test_a_readable_image_with_damaged_exif_is_an_image(name):
    data = damaged_exif()[name]
    assert image_size(data) == (40, 60) and read_image(data).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (200, 20)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert abs(float(read_image(data)[..., 0].mean()) - 200 / 255) < 0.02


def transparent() -> dict[str, bytes]:
    """The left half transparent over red, the right half opaque blue; by every way of saying so."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = 255, 0, 0, 0
    rgba[:, 8:] = 0, 0, 255, 255
    full = Image.fromarray(rgba)
    indexed = Image.fromarray((rgba[..., 2] // 255).astype(np.uint8)).convert("P")
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    return {
        "RGBA": encoded(full),
        "RGBA WebP": encoded(full, "WEBP", lossless=True, exact=True),
        "palette": encoded(indexed, transparency=0),
        "palette GIF": encoded(indexed, "GIF", transparency=0),
        "RGB with a key colour": encoded(full.convert("RGB"), transparency=(255, 0, 0)),
        "16-bit grey with a key": encoded(
            Image.fromarray(np.where(rgba[..., 3] == 0, 65535, 0).astype(np.uint16)), transparency=65535
        ),
    }


@pytest.mark.parametrize("kind", transparent())
def test_transparent_pixels_never_show_their_colours_and_are_the_hole_of_a_mask(kind):
    data = transparent()[kind]
    image, kept = read_image(data), read_image(data, alpha=True)
    assert (image[:, :8] == 1).all() and not (image[:, 8:, 0] > 0).any()
    assert torch.equal(kept[..., 3], torch.cat((torch.zeros(16, 8), torch.ones(16, 8)), 1))
    assert torch.equal(read_mask(data), 1 - kept[..., 3])  # as ComfyUI's Load Image


def test_an_opaque_alpha_says_nothing_about_a_mask():
    mask = Image.fromarray(np.where(RAMP > 0.5, 255, 0).astype(np.uint8))
    assert torch.equal(read_mask(encoded(mask.convert("RGBA"))), read_mask(encoded(mask)))


def test_soft_alpha_lies_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 3] = 51  # a fifth black
    assert torch.allclose(read_image(encoded(Image.fromarray(rgba))), torch.tensor(0.8))


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "I;16", "F"])
def test_a_huge_image_is_made_smaller_without_a_float_copy_of_it(mode, tmp_path):
    side, most = 1600, 2**14
    if mode in ("I;16", "F"):
        levels = np.zeros((side, side), {"I;16": np.uint16, "F": np.float32}[mode])
        levels[: side // 2] = 65535 if mode == "I;16" else 1
        image = Image.fromarray(levels)
    else:
        image = Image.new(mode, (side, side))
        white = 1 if mode == "1" else 255 if mode in "LP" else (255,) * len(mode)
        image.paste(white, (0, 0, side, side // 2))
    if mode == "P":
        image.putpalette([value for level in range(256) for value in (level,) * 3])
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    image.save(path)
    del image
    tracemalloc.start()
    image = read_image(path, most=most)
    mask = read_mask(path, most=most)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.shape[0] * image.shape[1] <= most and image.shape[:2] == mask.shape
    expected = torch.ones(()) if mode == "RGBA" else torch.tensor([1.0, 0.0])
    assert torch.allclose(image[[2, -2]][:, 5, 0], expected, atol=1e-5)
    assert peak < 24e6  # 1600 x 1600 in float32 is 31 MB as RGB


def test_a_mask_made_smaller_keeps_its_thinnest_stroke():
    levels = np.zeros((900, 900), np.uint8)
    levels[:, 450] = 255
    mask = read_mask(encoded(Image.fromarray(levels)), most=90 * 90)
    assert mask.shape == (90, 90) and (mask.amax(1) == 1).all() and mask.sum() == 90


def test_reading_smaller_takes_the_means_of_blocks():
    values = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    expected = values.reshape(10, 4, 15, 4, 3).mean((1, 3)) / 255
    image = read_image(encoded(Image.fromarray(values)), most=150)
    assert torch.allclose(image, torch.from_numpy(expected).float(), atol=1e-5)


def bomb() -> bytes:
    """A PNG whose header says 60000 x 60000."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", 60000, 60000)

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "missing"),
        (b"not an image", "not a readable image"),
        (encoded(grey(255, np.uint8))[:80], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "not a readable image"),
        (bomb(), "178 megapixels"),
        (encoded(Image.fromarray((RAMP * 300).astype("f4")), "TIFF"), "go from 0 to 300"),
        (encoded(Image.fromarray(np.full((4, 4), np.nan, "f4")), "TIFF"), "nan"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "70000"),
        ({"bytes": None, "path": None}, "missing"),
    ],
)
def test_what_is_no_image_is_one_sentence(data, words):
    for read in (read_image, read_mask):
        with pytest.raises(ImageFileError, match=words) as error:
            read(data)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(sample.BrokenSample, match=f"here: .*{words}"):
        sample.read_image(data, "here")


def test_a_whole_image_beyond_the_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_files, "WHOLE_PIXELS", 800)
    with pytest.raises(ImageFileError, match="36x24, more than the 0 megapixels"):
        read_image(GREYS["8 bits"])
    assert read_image(GREYS["8 bits"], most=800).shape == (12, 18, 3)


def test_paths_of_all_kinds(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(GREYS["8 bits"])
    assert read_image(path).shape == read_image(str(path)).shape == read_image({"path": str(path)}).shape
    for missing in (tmp_path / "none.png", tmp_path, "a\0b", "x" * 5000):
        with pytest.raises(ImageFileError, match="missing"):
            read_image(missing)
    heic = tmp_path / "a.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    if ".heic" not in image_files.suffixes():
        with pytest.raises(ImageFileError, match=r"\.heic images are not read here: install pillow-heif"):
            read_image(heic)


def test_what_pillow_reads_has_a_suffix_here_but_nothing_that_runs_programs():
    assert {".png", ".jfif", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".apng"} <= image_files.suffixes()
    assert not {".eps", ".ps", ".wmf", ".emf", ".mpg", ".h5"} & image_files.suffixes()
    assert image_files.looks_like_image("A.HEIC") and not image_files.looks_like_image("a.txt")


def test_the_command_line_reads_the_same(tmp_path):
    for kind, data in (GREYS | transparent()).items():
        path = tmp_path / "x"
        path.write_bytes(data)
        assert torch.equal(images.load_image(path)[0], read_image(data, alpha=True)), kind
        assert torch.equal(images.load_mask(path)[0], read_mask(data)), kind
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.load_image(tmp_path / "none.png")


@pytest.mark.parametrize("suffix", images.OPAQUE)
def test_formats_without_transparency_are_written_on_white(tmp_path, suffix):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0] = 255  # red, wholly transparent
    images.save(Image.fromarray(rgba), tmp_path / f"x{suffix}")
    assert float(read_image(tmp_path / f"x{suffix}").min()) > 0.98
