"""Before and After without ComfyUI: both images in one, and what is no pair."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_diptych.models import pixels
from comfyui_diptych.models.compare import GAP, side_by_side
from comfyui_diptych.nodes.compare import DiptychCompare


def test_both_stand_side_by_side_at_the_size_of_after():
    before, after = torch.rand(1, 8, 10, 3), torch.rand(3, 6, 5, 3)
    both = side_by_side(before, after)
    assert both.shape == (3, 6, 2 * 5 + GAP, 3)
    assert torch.equal(both[:, :, 5 + GAP :], after) and (both[:, :, 5 : 5 + GAP] == 1).all()
    assert torch.equal(both[2, :, :5], pixels.resize_image(before, 6, 5)[0])


def test_hidden_colours_stay_hidden_and_gray_has_three_channels():
    clear = torch.cat([torch.rand(1, 4, 4, 3), torch.zeros(1, 4, 4, 1)], dim=-1)
    both = side_by_side(clear, torch.full((1, 4, 4, 1), 0.5))
    assert (both[:, :, :4] == 1).all() and (both[:, :, -4:] == 0.5).all()


def test_batches_that_do_not_go_together_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="before has 2 images but after has 3"):
        side_by_side(torch.rand(2, 4, 4, 3), torch.rand(3, 4, 4, 3))


def test_the_slider_is_an_input_only_where_core_has_its_node(monkeypatch):
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS={}))
    assert "optional" not in DiptychCompare.INPUT_TYPES()
    assert set(DiptychCompare().compare(torch.rand(1, 4, 4, 3), torch.rand(1, 4, 4, 3))) == {"ui", "result"}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS={"ImageCompare": object}))
    assert DiptychCompare.INPUT_TYPES()["optional"]["compare_view"][0] == "IMAGECOMPARE"
    shown = DiptychCompare().compare(torch.rand(1, 4, 4, 3), torch.rand(1, 4, 4, 3))["ui"]
    assert set(shown) == {"a_images", "b_images"}
