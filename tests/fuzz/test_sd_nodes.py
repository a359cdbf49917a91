"""The Stable Diffusion inpainting nodes on whatever a graph can hand them: a result or one sentence."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch
from comfyui_diptych.models import control_inpaint, inpaint_masks
from comfyui_diptych.nodes import NODE_CLASS_MAPPINGS as NODES
from hypothesis import given
from hypothesis import strategies as st
from strategies import images, masks, policies, tried, widgets


def control_module():
    """`models/comfy_control.py`, which imports ComfyUI's own module `nodes`; a stand-in is enough here."""
    had = "nodes" in sys.modules
    sys.modules.setdefault("nodes", ModuleType("nodes"))
    try:
        return importlib.import_module("comfyui_diptych.models.comfy_control")
    finally:
        if not had:
            del sys.modules["nodes"]


control = control_module()


class Vae:
    """8x average pooling to four channels; what it is given must be what a VAE takes."""

    def encode(self, image):
        assert image.ndim == 4 and image.shape[3] == 3 and not (image.shape[1] % 8 or image.shape[2] % 8)
        assert bool(image.isfinite().all())
        pooled = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
        return pooled[:, [0, 1, 2, 0]].contiguous()


@given(st.data())
def test_sd_inpaint_conditioner(data):
    draw = data.draw
    conditioning = [[torch.zeros(1, 4, 8), {}]]
    model = draw(st.sampled_from([None, None, SimpleNamespace(), SimpleNamespace(model=None)]))
    options = widgets(
        draw,
        mask_resize=st.sampled_from(inpaint_masks.MASK_RESIZE),
        strength=st.floats(0.01, 1),
        noise_mask=st.booleans(),
        edge=st.just("hard"),
        threshold=st.floats(0.01, 1),
        masked=st.sampled_from(inpaint_masks.MASKED),
        start=st.sampled_from(["image", "noise"]),
        policy=policies,
    )
    made = tried(
        NODES["DiptychSDInpaintConditioner"]().condition,
        positive=conditioning,
        negative=conditioning,
        vae=Vae(),
        image=draw(images()),
        mask=draw(masks()),
        model=model,
        **options,
    )
    assert conditioning == [[conditioning[0][0], {}]]
    if made is None:
        return
    positive, negative, latent, denoise, given_back = made
    values = positive[0][1]
    cells, samples = values["concat_mask"], latent["samples"]
    assert values.keys() == negative[0][1].keys() and given_back is model and 0 < denoise <= 1
    assert cells.shape[1:] == (1, *samples.shape[2:]) and len(cells) == len(samples)
    assert len(values["concat_latent_image"]) in (1, len(samples))
    assert set(cells.unique().tolist()) <= {0.0, 1.0} and bool(samples.isfinite().all())
    if options.get("mask_resize", "max") == "max":
        assert bool(cells.flatten(1).any(dim=1).all())  # nothing that was painted is lost
    if options.get("start") == "noise":
        assert not samples.any()


@given(st.data())
def test_controlnet_inpaint(data):
    draw = data.draw

    def apply(self, positive, negative, control_net, image, *_, vae=None, extra_concat=()):
        seen.append(image)
        return positive, negative

    seen = []
    control.core = SimpleNamespace(ControlNetApplyAdvanced=type("Apply", (), {"apply_controlnet": apply}))
    image, mask = draw(images()), draw(masks())
    options = widgets(
        draw,
        mode=st.sampled_from(["inpaint_only", "global_harmonious"]),
        prefill=st.sampled_from(["none", "blur", "edge", "mean", "neutral"]),
        strength=st.floats(0, 10),
        start_percent=st.floats(0, 0.5),
        end_percent=st.floats(0.4, 1),
        policy=policies,
    )
    made = tried(
        NODES["DiptychControlNetInpaint"]().condition,
        positive=[],
        negative=[],
        control_net=SimpleNamespace(concat_mask=draw(st.booleans())),
        vae=Vae(),
        image=image,
        mask=mask,
        **options,
    )
    if made is None:
        return
    _, _, latent, sized, composite = made
    assert sized.shape[:3] == composite.shape and len(latent["samples"]) == len(sized)
    assert seen[0].shape == sized.shape and control_inpaint.HOLE <= seen[0].min()
    if options.get("mode", "inpaint_only") == "inpaint_only":
        assert bool(latent["noise_mask"].flatten(1).any(dim=1).all())
