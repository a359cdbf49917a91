"""Pixel rewards, failures, groups, and what a recipe may name."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from comfyui_diptych.training import rewards
from comfyui_diptych.training.rewards.base import Reward
from comfyui_diptych.training.rewards.composite import Composite, group_normalise
from comfyui_diptych.training.rewards.external import CallableReward, HttpReward
from PIL import Image


class Fixed(Reward):
    def __init__(self, name, values):
        self.name, self.values = name, torch.tensor(values)

    def _score(self, images, prompts, sources, masks, targets):
        return self.values[: len(images)]


def pictures(count, size=16):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(count))


def test_kept_area_counts_only_pixels_outside_the_mask():
    source = torch.zeros(1, 16, 16, 3)
    image, mask = source.clone(), torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    image[:, :8] = 1.0
    assert rewards.create("keep_l1").score(image, sources=source, masks=mask).item() == 1.0
    image[:, 8:] = 0.25
    assert rewards.create("keep_l1").score(image, sources=source, masks=mask).item() == pytest.approx(0.75)


def test_kept_area_of_a_full_mask_is_nan():
    score = rewards.create("keep_l1").score(pictures(2), sources=pictures(2), masks=torch.ones(2, 16, 16))
    assert score.isnan().all()


def test_jpeg_size_is_the_size_of_the_file():
    image = pictures(1)
    buffer = io.BytesIO()
    Image.fromarray(np.round(image[0].numpy() * 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    assert rewards.create("jpeg_size").score(image).item() == pytest.approx(-len(buffer.getvalue()) / 500_000)


def test_missing_input_and_wrong_count_are_one_sentence():
    with pytest.raises(ValueError, match="keep_l1 needs sources"):
        rewards.create("keep_l1").score(pictures(2), masks=torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="1 prompts were given for 2 images"):
        rewards.create("jpeg_size").score(pictures(2), ["one"])
    with pytest.raises(ValueError, match="choose one of"):
        rewards.create("nonsense")


def test_group_normalisation_equals_numpy_and_skips_nan():
    scores = torch.tensor([1.0, 2.0, torch.nan, 4.0, 10.0, 10.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    got = group_normalise(scores, groups, eps=0.0 + 1e-4).numpy()
    first = np.array([1.0, 2.0, 4.0])
    expected = (first - first.mean()) / (first.std() + 1e-4)
    np.testing.assert_allclose(got[[0, 1, 3]], expected, rtol=1e-5)
    assert np.isnan(got[2]) and (got[4:] == 0).all()


def test_composite_is_scale_free_and_judges_by_what_succeeded():
    wide = Fixed("wide", [0.0, 100.0, 200.0, float("nan")])
    narrow = Fixed("narrow", [0.2, 0.1, 0.0, 0.3])
    scores = Composite([wide, narrow], {"wide": 1.0, "narrow": 1.0}).score(pictures(4), None)
    assert scores.failures == {"wide": 1, "narrow": 0}
    assert scores.combined.isfinite().all()
    alone = Composite([narrow]).score(pictures(4), None).combined
    torch.testing.assert_close(scores.combined[3], alone[3] * 2)


def test_failed_callable_is_nan_and_a_recipe_can_name_one():
    def broken(*_):
        raise RuntimeError("no judge today")

    assert CallableReward(broken, "broken").score(pictures(2)).isnan().all()
    reward = rewards.from_recipe("math:fsum")
    assert isinstance(reward, CallableReward)
    with pytest.raises(ValueError, match="module:function"):
        rewards.from_recipe("no_such_module_at_all:f")


def test_registered_names_hold_no_way_out():
    assert not any(":" in name or "http" in name for name in rewards.names())


def test_http_reward_sends_png_and_reads_json_with_null_as_nan():
    seen = {}

    class Judge(BaseHTTPRequestHandler):
        tries = 0

        def do_POST(self):
            Judge.tries += 1
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.update(body)
            self.send_response(500 if Judge.tries == 1 else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [0.5, None]}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reward = HttpReward(f"http://127.0.0.1:{server.server_port}", wait=0.0)
        scores = reward.score(pictures(2), ["a", "b"])
    finally:
        server.shutdown()
    assert scores[0] == 0.5 and scores[1].isnan() and seen["prompts"] == ["a", "b"]
    assert Judge.tries == 2


def test_unreachable_endpoint_is_nan_not_zero():
    reward = HttpReward("http://127.0.0.1:9", retries=0, timeout=1.0)
    assert reward.score(pictures(1)).isnan().all()


def test_shapes_reward_tells_success_from_near_miss():
    from comfyui_diptych.training import shapes
    from comfyui_diptych.training.rewards.shapes import ShapesEdit

    pairs = list(shapes.edit_pairs(0, 4, "test"))
    targets = torch.stack([pair.target for pair in pairs])
    done = ShapesEdit().score(targets, targets=targets)
    not_done = ShapesEdit().score(torch.stack([pair.source for pair in pairs]), targets=targets)
    assert (done == 1.0).all() and (not_done < 0.5).all() and (not_done > 0).any()
