"""The outpainting nodes: each widget reaches the function it is for; the files offered are those there."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych import NODE_CLASS_MAPPINGS as NODES
from comfyui_diptych.models import outpaint
from comfyui_diptych.nodes import menus


def run(node: str, **inputs):
    """The node with its widgets at their defaults, but for `inputs`."""
    cls = NODES[node]
    schema = cls.INPUT_TYPES()
    given = {
        name: definition[1]["default"]
        for name, definition in {**schema["required"], **schema.get("optional", {})}.items()
        if "default" in definition[1]
    }
    return getattr(cls(), cls.FUNCTION)(**given | inputs)


@pytest.fixture
def image():
    return torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(0))


def test_from_canvas_to_image(image):
    canvas, mask, layout = run("DiptychOutpaintCanvas", image=image, left=24, bottom=-8)
    assert canvas.shape == (1, 32, 80, 3)
    (filled,) = run("DiptychFillHole", image=canvas, mask=mask, how="mirror")
    (finished,) = run("DiptychPasteBack", image=filled, original=image, layout=layout)
    assert torch.equal(finished, filled) and torch.equal(finished[:, :, 24:], image[:, :32])
    crop, crop_mask, at = run("DiptychContextCrop", image=canvas, mask=mask, size=0, context=1.0, blend=0)
    (again,) = run("DiptychPasteBack", image=crop * 0, original=canvas, layout=at, match_colour=False)
    assert torch.equal(again == 0, (mask == 1)[..., None].expand_as(again))


def test_an_unpainted_mask_is_no_mask_where_one_may_be_left_out(image):
    empty = torch.zeros(1, 64, 64)  # ComfyUI's Load Image, for an image without alpha
    canvas, mask, layout = run("DiptychOutpaintCanvas", image=image, right=8, mask=empty)
    assert int(mask[:, :, :56].sum()) == 8 * 56  # the rows below that make 48
    (finished,) = run("DiptychPasteBack", image=canvas, original=image, layout=layout, mask=empty)
    assert torch.equal(finished[:, :, :56], image)


def test_in_a_batch_an_empty_mask_paints_nothing_more(image):
    masks = torch.zeros(2, 40, 56)
    masks[1, :5] = 1
    _, mask, _ = run("DiptychOutpaintCanvas", image=image, right=8, mask=masks, multiple=1)
    assert torch.equal(mask[:, :, :56], masks)


@pytest.mark.parametrize(
    "how, widgets, options",
    [
        ("colour", {"colour": "#102030"}, {"colour": "#102030"}),
        ("gaussian", {"fill_seed": 3}, {"seed": 3}),
        ("noise", {"fill_seed": 3, "noise_q": 0.5, "color_variation": 0.5}, None),
        ("perlin", {"cell": 9, "fill_seed": 4}, {"cell": 9, "seed": 4}),
        ("blur", {"cell": 9, "fill_seed": 4, "radius": 7}, {}),
    ],
)
def test_widgets_reach_their_fill_and_no_other(image, how, widgets, options):
    if options is None:
        options = {"seed": 3, "noise_q": 0.5, "color_variation": 0.5}
    mask = torch.zeros(1, 40, 56)
    mask[:, :, 30:] = 1
    (filled,) = run("DiptychFillHole", image=image, mask=mask, how=how, **widgets)
    assert torch.equal(filled, outpaint.fill(image, mask, how, **options))


def test_lama_files_come_from_both_folders(monkeypatch, tmp_path, image):
    for folder, file in (
        ("inpaint", "big-lama.pt"),
        ("upscale_models", "up/4x.pth"),
        ("inpaint", "notes.txt"),
    ):
        path = tmp_path / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    known = {"upscale_models": None}  # "inpaint" only exists where some pack registered it
    paths = SimpleNamespace(
        models_dir=str(tmp_path),
        folder_names_and_paths=known,
        get_folder_paths=lambda name: [str(tmp_path / name)],
    )
    assert menus.lama_files() == ["none"]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    assert menus.lama_files() == ["none", "inpaint/big-lama.pt", "upscale_models/up/4x.pth"]
    assert menus.lama_path("inpaint/big-lama.pt") == tmp_path / "inpaint" / "big-lama.pt"
    with pytest.raises(ValueError, match="lama_file is '../secret.pt'"):
        menus.lama_path("../secret.pt")
    with pytest.raises(ValueError, match="model is missing: fill 'lama' needs"):
        run("DiptychFillHole", image=image, mask=torch.ones(1, 40, 56).triu(), how="lama")
