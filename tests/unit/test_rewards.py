"""Pixel rewards, failures, groups, and what a recipe may name."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from comfyui_diptych.training import rewards
from comfyui_diptych.training.rewards import Context, Spec, external, weights
from comfyui_diptych.training.rewards.base import Reward
from comfyui_diptych.training.rewards.composite import Composite, group_normalise
from comfyui_diptych.training.rewards.external import CallableReward, HttpReward
from PIL import Image


class Fixed(Reward):
    def __init__(self, name, values):
        self.name, self.values = name, torch.tensor(values)

    def _score(self, images, context):
        return self.values[: len(images)]


def random_images(count, size=16):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(count))


def test_kept_area_counts_only_pixels_outside_the_mask():
    source = torch.zeros(1, 16, 16, 3)
    image, mask = source.clone(), torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    image[:, :8] = 1.0
    assert rewards.create("keep_l1").score(image, Context(sources=source, masks=mask)).item() == 1.0
    image[:, 8:] = 0.25
    assert rewards.create("keep_l1").score(
        image, Context(sources=source, masks=mask)
    ).item() == pytest.approx(0.75)


def test_kept_area_of_a_full_mask_is_nan():
    score = rewards.create("keep_l1").score(
        random_images(2), Context(sources=random_images(2), masks=torch.ones(2, 16, 16))
    )
    assert score.isnan().all()


def test_jpeg_size_is_the_size_of_the_file():
    image = random_images(1)
    buffer = io.BytesIO()
    Image.fromarray(np.round(image[0].numpy() * 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    assert rewards.create("jpeg_size").score(image).item() == pytest.approx(-len(buffer.getvalue()) / 500_000)


def test_missing_input_and_wrong_count_are_one_sentence():
    with pytest.raises(ValueError, match="keep_l1 needs sources"):
        rewards.create("keep_l1").score(random_images(2), Context(masks=torch.zeros(2, 16, 16)))
    with pytest.raises(ValueError, match="1 prompts were given for 2 images"):
        rewards.create("jpeg_size").score(random_images(2), Context(["one"]))
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
    scores = Composite([wide, narrow], {"wide": 1.0, "narrow": 1.0}).score(random_images(4))
    assert scores.failures == {"wide": 1, "narrow": 0}
    assert scores.combined.isfinite().all()
    alone = Composite([narrow]).score(random_images(4)).combined
    torch.testing.assert_close(scores.combined[3], alone[3] * 2)


def test_failed_callable_is_nan_and_a_recipe_can_name_one():
    def broken(*_):
        raise RuntimeError("no judge today")

    assert CallableReward(broken, "broken").score(random_images(2)).isnan().all()
    reward = Spec("math:fsum", external=True).create()
    assert isinstance(reward, CallableReward)
    with pytest.raises(ValueError, match="module:function"):
        Spec("no_such_module_at_all:f", external=True).create()
    with pytest.raises(ValueError, match="math:fsum has no option 'path': it takes none"):
        rewards.from_recipe(["math:fsum"], ["math:fsum.path=x"])
    with pytest.raises(ValueError, match="no option 'device': it takes timeout, retries"):
        rewards.from_recipe(["http://127.0.0.1:9"], ["http://127.0.0.1:9.device=cpu"])


def test_registered_names_hold_no_way_out():
    assert not any(":" in name or "http" in name for name in rewards.names())


@pytest.fixture
def endpoint():
    """A function that serves `reply(handler, body, number of the try)` and gives a reward that asks it."""
    servers, done = [], threading.Event()

    def serve(reply, **options):
        tries = itertools.count()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with contextlib.suppress(OSError):  # the client may have gone
                    reply(self, body, next(tries))

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.done = True, done
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return HttpReward(f"http://127.0.0.1:{server.server_port}", **{"wait": 0.0, **options})

    yield serve
    done.set()
    for server in servers:
        server.shutdown()


def answer(handler, content, status=200):
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_http_reward_sends_png_and_reads_json_with_null_as_nan(endpoint):
    seen = []

    def reply(handler, body, number):
        seen.append(body)
        answer(handler, {"scores": [0.5, None]}, 500 if number == 0 else 200)

    scores = endpoint(reply).score(random_images(2), Context(["a", "b"]))
    assert scores[0] == 0.5 and scores[1].isnan() and len(seen) == 2
    assert seen[1]["prompts"] == ["a", "b"]
    sent = Image.open(io.BytesIO(base64.b64decode(seen[1]["images"][0])))
    assert np.array_equal(np.asarray(sent), np.round(random_images(2)[0].numpy() * 255))


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[1, 2]",
        b'{"scores": {"0": 1, "1": 2}}',
        b'{"scores": "12"}',
        b'{"scores": [1]}',
        b'{"scores": [1, "2"]}',
        b'{"scores": [1, true]}',
        b'{"scores": [1, [2]]}',
        b'{"scores": [1, 1' + b"0" * 400 + b"]}",
        b"[" * 100_000,
        b'{"scores": [1, 2], "more": "' + b"x" * external.LARGEST_REPLY + b'"}',
    ],
    ids=range(12),
)
def test_a_reply_that_is_no_list_of_scores_is_no_score(endpoint, content):
    reward = endpoint(lambda handler, body, number: answer(handler, content), retries=0)
    assert reward.score(random_images(2)).isnan().all()


def test_scores_that_are_not_finite_are_none(endpoint):
    reward = endpoint(lambda handler, body, number: answer(handler, b'{"scores": [NaN, 1e999, 2]}'))
    scores = reward.score(random_images(3))
    assert scores[:2].isnan().all() and scores[2] == 2


def test_a_reply_that_breaks_off_is_no_score(endpoint):
    def reply(handler, body, number):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1, 2]}')
        handler.close_connection = True

    def hang_up(handler, body, number):
        handler.connection.close()

    assert endpoint(hang_up, retries=1).score(random_images(2)).isnan().all()
    assert endpoint(reply, retries=0).score(random_images(2)).isnan().all()


@pytest.mark.parametrize("where", ["status", "header", "body"])
def test_a_dripping_reply_ends_at_the_deadline(endpoint, where):
    """Every byte arrives within the time-out of a read; all of them never do."""
    start = {"status": b"", "header": b"HTTP/1.0 200 OK\r\n", "body": b"HTTP/1.0 200 OK\r\n\r\n"}[where]

    def reply(handler, body, number):
        handler.wfile.write(start)
        while not handler.server.done.wait(0.02):
            handler.wfile.write(b"H" if where == "status" else b"X")
            handler.wfile.flush()

    started = time.monotonic()
    assert endpoint(reply, retries=0, timeout=0.3).score(random_images(1)).isnan().all()
    assert time.monotonic() - started < 30  # it ends


def test_unreachable_endpoint_is_nan_not_zero():
    reward = HttpReward("http://127.0.0.1:9", retries=0, timeout=1.0)
    assert reward.score(random_images(1)).isnan().all()


def test_shapes_reward_tells_success_from_near_miss():
    from comfyui_diptych.training.rewards.shapes import ShapesEdit
    from comfyui_diptych.training.tiny import shapes

    pairs = list(shapes.edit_pairs(0, 4, "test"))
    targets = torch.stack([pair.target for pair in pairs])
    done = ShapesEdit().score(targets, Context(targets=targets))
    not_done = ShapesEdit().score(torch.stack([pair.source for pair in pairs]), Context(targets=targets))
    assert (done == 1.0).all() and (not_done < 0.5).all() and (not_done > 0).any()


@pytest.mark.parametrize(
    "name, options, words",
    [
        (
            "pickscore",
            {},
            "pickscore has no weights: yuvalkirstain/PickScore_v1 is not on.*no network",
        ),
        (
            "pickscore",
            {},
            "hf download yuvalkirstain/PickScore_v1 and .* laion/CLIP",
        ),
        ("hpsv2", {}, "hpsv2 needs the option path"),
        (
            "hpsv2",
            {"path": "gone.pt"},
            "hpsv2 has no weights: gone.pt does not exist; .*laion/CLIP",
        ),
        ("aesthetic", {"path": "gone/away.pth"}, "gone/away.pth"),
        ("clip_l", {"weights": 3}, "clip_l has no option 'weights': it takes path, device"),
    ],
)
def test_rewards_that_cannot_be_loaded_say_so_before_anything_is(monkeypatch, tmp_path, name, options, words):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for made in (rewards.check, rewards.create):
        with pytest.raises(ValueError, match=words):
            made(name, **options)


def test_weights_on_this_machine_need_no_network(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert rewards.check("clip_l")["path"] == "openai/clip-vit-large-patch14"


def test_rewards_run_where_the_training_does(monkeypatch):
    """The device of this process in a training, else the best there is, else what was said."""
    import sys
    from types import ModuleType, SimpleNamespace

    from comfyui_diptych.models import flux

    state = ModuleType("accelerate.state")
    state.PartialState = lambda: SimpleNamespace(device="cuda:3")
    state.PartialState._shared_state = {"device": "cuda:3"}
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    monkeypatch.setattr(flux, "default_device", lambda: torch.device("cuda"))
    assert weights.device_of() == torch.device("cuda:3") and weights.device_of("cpu") == torch.device("cpu")
    state.PartialState._shared_state = {}
    assert weights.device_of() == torch.device("cuda")
    assert all(default == "" for name in rewards.names() for default in _defaults(name, "device"))


def _defaults(name, option):
    """The default of a reward's option, if it has that option."""
    import inspect

    from comfyui_diptych.training.rewards import base

    parameters = inspect.signature(base._REGISTRY[name]).parameters
    return [parameters[option].default] if option in parameters else []
