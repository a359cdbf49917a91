"""Data that nobody vouches for: a sample or BrokenSample; what cannot be opened at all is a ValueError."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from comfyui_diptych.models.image_files import ImageFileError, image_size, read_image, read_mask
from comfyui_diptych.training.data.sample import BrokenSample
from comfyui_diptych.training.data.sources import open_source
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")


def encoded(mode, kind, exif=b""):
    array = np.random.default_rng(0).integers(0, 255, (18, 21, 4), dtype=np.uint8)
    image = Image.fromarray(array).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def files():
    """One small image in every format and mode that can be written here."""
    made = []
    for kind in KINDS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"):
            try:
                made.append(encoded(mode, kind, b"Exif\0\0MM\0*\0\0\0\x08\0\0" if kind == "JPEG" else b""))
            except (OSError, ValueError, KeyError):
                continue
    return made


FILES = files()


@st.composite
def damaged(draw):
    """An image file with bytes overwritten, cut off, repeated or put in."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["overwrite", "cut", "insert", "flip"]))
        if how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif how == "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(new)] = new
        elif at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@given(damaged() | st.binary(max_size=200))
def test_damaged_images(data):
    for read in (lambda: read_image(data, most=2**20), lambda: read_mask(data, most=2**20)):
        try:
            values = read()
        except ImageFileError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert bool(((values >= 0) & (values <= 1)).all()) and values.numel() <= 3 * 2**20
    try:
        height, width = image_size(data)
    except ImageFileError:
        return
    assert height > 0 and width > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from(
    ["a.png", "b\\c.png", "none.png", "../a.png", "/dev/zero", ".", "", "d.jsonl", "a\0.png", "\ud800"]
)
COLUMNS = ("prompt", "text", "image", "file_name", "mask", "source", "weight", "class")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "b").mkdir()
    Image.new("L", (6, 5), 200).save(folder / "a.png")
    Image.new("RGBA", (7, 9), (1, 2, 3, 0)).save(folder / "b" / "c.png")
    return folder


def read_all(spec):
    """Every sample of a source that can be read; anything but BrokenSample passes through."""
    source, samples = open_source(spec), []
    for index in range(len(source)):
        try:
            samples.append(source[index])
        except BrokenSample as error:
            assert len(str(error)) < 700
    for sample in samples:
        assert isinstance(sample.prompt, str) and sample.target.shape[2] == 3
        sample.prompt.encode("utf-8")
        assert sample.mask is None or (
            sample.mask.shape == sample.target.shape[:2] and bool(sample.mask.any())
        )
        assert 0 <= sample.weight <= 1000
        for image in (sample.target, sample.source):
            assert image is None or bool(((image >= 0) & (image <= 1)).all())
    return samples


@st.composite
def lines(draw):
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=40))
    row = {name: draw(paths | json_values) for name in draw(st.lists(st.sampled_from(COLUMNS), unique=True))}
    if draw(st.booleans()):
        row = {
            "prompt": "p",
            "image": "a.png",
            **{k: v for k, v in row.items() if k not in ("prompt", "image")},
        }
    return json.dumps(row).encode()


@given(rows=st.lists(lines(), max_size=4), encoding=st.sampled_from(["", "utf-8-sig", "utf-16"]))
def test_rows_of_any_json_in_any_column(folder, rows, encoding):
    data = b"\n".join(rows)
    if encoding:
        data = data.decode("latin-1").encode(encoding)
    (folder / "d.jsonl").write_bytes(data)
    try:
        samples = read_all(f"jsonl:{folder / 'd.jsonl'}?inside=true")
    except ValueError as error:
        assert type(error) is ValueError and "d.jsonl" in str(error)
        return
    for sample in samples:
        assert torch.equal(sample.target, sample.target.clamp(0, 1))
        assert folder.resolve() in sample.image_path.resolve().parents


@given(
    data=st.binary(max_size=120) | st.text(alphabet='file_name,tex\n"\r;a.png', max_size=120).map(str.encode)
)
def test_tables_of_any_bytes(folder, data):
    (folder / "m.csv").write_bytes(b"file_name,text\n" * (len(data) % 2) + data)
    try:
        read_all(f"jsonl:{folder / 'm.csv'}")
    except ValueError as error:
        assert type(error) is ValueError and "m.csv" in str(error)


NAMES = st.sampled_from(
    [
        "a_source.png",
        "a_target.PNG",
        "a_mask.gif",
        "a.txt",
        "A.txt",
        "_source.png",
        "a_source.jpg",
        "b_target.webp",
        "b.txt",
        "._a_target.png",
        "Thumbs.db",
        "c_source",
        "d_source_target.png",
        "a_source.svg",
        "b_source.tiff",
    ]
)


@given(
    contents=st.dictionaries(NAMES, st.sampled_from(FILES) | damaged() | st.binary(max_size=30), max_size=8)
)
def test_folders_of_any_files(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("pairs")
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for kind in ("pairs", "images"):
        try:
            read_all(f"{kind}:{folder}")
        except ValueError as error:
            assert type(error) is ValueError and str(folder) in str(error)


@pytest.fixture(scope="module")
def encoded_row(tmp_path_factory):
    """One row of precomputed data, all of it right."""
    folder = tmp_path_factory.mktemp("precomputed")
    parts = {
        "prompt_embed": torch.zeros(3, 4),
        "pooled_prompt_embeds": torch.zeros(4),
        "text_ids": torch.zeros(3, 3),
        "masked_latents": torch.zeros(16, 2, 2),
        "mask_latents": torch.ones(1, 2, 2),
    }
    row = {"caption": "x"}
    for name, tensor in parts.items():
        (folder / name).mkdir()
        torch.save(tensor, folder / name / "0.pt")
        row["text_ids" if name == "text_ids" else f"{name}_path"] = "0.pt"
    (folder / "index.json").write_text(json.dumps([row]))
    return folder


@given(data=st.data())
def test_a_damaged_tensor_file_is_a_broken_row(encoded_row, data):
    path = encoded_row / data.draw(st.sampled_from(["prompt_embed", "masked_latents"])) / "0.pt"
    whole = path.read_bytes()
    torn = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(torn) - 1))
        torn[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del torn[data.draw(st.integers(0, len(torn) - 1)) :]
    try:
        path.write_bytes(bytes(torn))
        open_source(f"precomputed:{encoded_row / 'index.json'}")[0]
    except BrokenSample:
        pass
    finally:
        path.unlink()  # a mapped file must not change under its tensors
        path.write_bytes(whole)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("caption", "prompt_embed_path", "text_ids", "masked_latents_path", "latents_path", "layout", "weight")


@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, min_size=1, max_size=3))
def test_an_index_row_of_anything_is_a_sample_or_broken(encoded_row, tmp_path_factory, changes):
    (row,) = json.loads((encoded_row / "index.json").read_text())
    index = encoded_row / "changed.json"
    index.write_text(json.dumps([row | changes]))
    try:
        source = open_source(f"precomputed:{index}")
        assert source.fingerprint
        source[0]
    except BrokenSample:
        pass
