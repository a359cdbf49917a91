"""Sampler, scheduler, LoRA loader, score and reward nodes on whatever a graph can hand them.

ComfyUI's modules are stood in for by the few names that the samplers use.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import pytest
import torch
from comfyui_diptych.nodes import NODE_CLASS_MAPPINGS as NODES
from comfyui_diptych.samplers.rules import RULES
from hypothesis import given
from hypothesis import strategies as st
from strategies import filled, images, masks, tried, widgets


@pytest.fixture(autouse=True)
def comfy(monkeypatch):
    """The names of ComfyUI that the samplers import, and nothing else of it."""
    names = ("comfy", "comfy.model_management", "comfy.model_sampling", "comfy.samplers")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    modules["comfy.model_sampling"].CONST = type("CONST", (torch.nn.Module,), {})
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = lambda: None

    class KSampler:
        def __init__(self, function, extra_options):
            self.function, self.options = function, extra_options

        def run(self, model, x, sigmas, seed):
            return self.function(model, x, sigmas, {"seed": seed}, None, True, **self.options)

    modules["comfy.samplers"].KSAMPLER = KSampler
    package = NODES["DiptychBuilder"].__module__.removesuffix(".nodes.diptych")
    for name in ("comfy", "comfy_early_filter"):
        sys.modules.pop(f"{package}.samplers.{name}", None)
    yield modules
    for name in ("comfy", "comfy_early_filter"):
        sys.modules.pop(f"{package}.samplers.{name}", None)


class Velocity:
    """A model that ComfyUI would call: its data is a tenth of x."""

    def __init__(self, comfy, x):
        sampling = comfy["comfy.model_sampling"].CONST()
        sampling.noise_scaling = lambda sigma, noise, latent: sigma * noise + (1 - sigma) * latent
        inner = SimpleNamespace(model_sampling=sampling, process_latent_out=lambda latent: latent)
        self.inner_model = SimpleNamespace(inner_model=inner)
        self.noise, self.latent_image = x, torch.zeros_like(x)

    def __call__(self, x, sigma, **_):
        return x / 10


latents = st.sampled_from([(1, 16, 8, 8), (2, 16, 4, 6), (1, 4, 3, 5), (1, 16, 2, 8, 8), (1, 16, 0, 8)])
seeds = st.integers(0, 2**64 - 1)


@given(st.data())
def test_scheduler(data):
    options = widgets(
        data.draw,
        denoise=st.floats(0, 1),
        shift_mode=st.sampled_from(["dynamic", "fixed", "none"]),
        shift=st.floats(0.01, 100),
    )
    steps = data.draw(st.sampled_from([1, 2, 28, 1000, 0, None, 2.5]))
    latent = data.draw(st.none() | latents.map(lambda shape: {"samples": torch.zeros(shape)}))
    made = tried(NODES["DiptychFlowMatchScheduler"]().schedule, steps=steps, latent=latent, **options)
    if made is None or options.get("denoise", 1.0) == 0:
        return
    sigmas = made[0]
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and bool(sigmas.isfinite().all())
    assert 0 < sigmas[0] <= 1 and bool((sigmas.diff() <= 0).all())


@given(data=st.data())
def test_euler_sampler(comfy, data):
    options = widgets(
        data.draw,
        rule=st.sampled_from(RULES),
        eta=st.floats(-1, 2),
        window_start=st.integers(0, 10),
        window_end=st.integers(0, 10),
        sde_seed=seeds,
    )
    made = tried(NODES["DiptychFlowMatchEulerSampler"]().build, **options)
    if made is None:
        return
    steps, shape = data.draw(st.integers(1, 6)), data.draw(latents)
    x, sigmas = filled(shape, "uniform", torch.float32, 1), torch.linspace(1, 0, steps + 1)
    seed = data.draw(seeds)
    results = []
    with suppress(ValueError):  # an SDE step that the rule cannot make, said before the first model call
        results = [made[0].run(Velocity(comfy, x), x.clone(), sigmas, seed) for _ in range(2)]
    if results:
        assert results[0].shape == x.shape and bool(results[0].isfinite().all())
        assert torch.equal(*results)  # a seed means one path


@given(data=st.data())
def test_early_filter_sampler(comfy, data):
    (reward,) = NODES["DiptychReward"]().choose("jpeg_size")
    vae = SimpleNamespace(decode=lambda latent: latent[:, :3].movedim(1, -1).clamp(0, 1))
    options = widgets(
        data.draw,
        candidates=st.integers(1, 5),
        judge_steps=st.integers(1, 6),
        keep=st.integers(1, 4),
        together=st.integers(1, 4),
        rule=st.sampled_from(RULES),
        eta=st.floats(-1, 2),
        sde_seed=seeds,
    )
    options.setdefault("candidates", 3)
    made = tried(NODES["DiptychEarlyFilterSampler"]().build, reward=reward, vae=vae, **options)
    if made is None:
        return
    steps = data.draw(st.integers(1, 6))
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    model, sigmas = Velocity(comfy, x), torch.linspace(1, 0, steps + 1)
    try:
        result = made[0].run(model, x.clone(), sigmas, data.draw(st.integers(0, 99)))
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert result.shape == (2 * options.get("keep", 1), *x.shape[1:]) and bool(result.isfinite().all())
    assert model.noise is not None and model.latent_image.shape == x.shape


@given(data=st.data())
def test_lora_loader(data):
    from comfyui_diptych.models import lora as package

    loader = NODES["DiptychGRPOLoraLoader"]
    names = [
        name for name in loader.INPUT_TYPES()["required"]["lora"][0] if name.startswith("diptych tiny demo/")
    ]
    options = widgets(
        data.draw,
        sigma_start=st.floats(0, 1),
        sigma_end=st.floats(0, 1),
        file_window=st.booleans(),
        scale=st.floats(0, 100),
        top_k=st.integers(0, 64),
    )
    given_name = data.draw(st.sampled_from([*names, *names, "gone.safetensors", "", "../x", None, 5]))
    seen = {}

    def stand_in(model, weights, strength, *, window):
        seen.update(weights=weights, strength=strength, window=window)
        return model, "report"

    original, package.apply_to_comfy = package.apply_to_comfy, stand_in
    try:
        made = tried(loader().load, model=object(), lora=given_name, strength=1.0, **options)
    finally:
        package.apply_to_comfy = original
    if made is None:
        return
    _, report, curve = made["result"]
    assert seen["weights"].modules and report == "report" and curve.ndim == 4
    assert all(math.isfinite(module.scale) for module in seen["weights"].modules.values())


@given(st.data())
def test_reward_and_score(data):
    draw = data.draw
    extra = widgets(draw, question=st.sampled_from(["", "is it {prompt}?", "x" * 4000]))
    name = draw(st.sampled_from(["jpeg_size", "keep_l1", "keep_ssim", "shapes", "os:system", "", None]))
    weight = draw(st.sampled_from([1.0, -2.0, 0.0, math.nan, math.inf, None]))
    made = tried(NODES["DiptychReward"]().choose, name=name, weight=weight, **extra)
    if made is None:
        return
    both = tried(NODES["DiptychReward"]().choose, name="jpeg_size", weight=0.5, also=made[0])
    reward = (both or made)[0] if draw(st.booleans()) else made[0]
    batch = draw(images())
    beside = {
        key: draw(kind)
        for key, kind in {"source": images(), "mask": masks(), "target": images()}.items()
        if draw(st.booleans())
    }
    prompt = draw(st.sampled_from(["", "make the red circle blue", "x" * 3000]))
    score = NODES["DiptychRewardScore"]().score
    judged = tried(score, images=batch, reward=reward, prompt=prompt, **beside)
    if judged is None:
        return
    best, report, ranked, sheet = judged["result"]
    assert math.isfinite(best) and len(report) < 20_000 and sheet.ndim == 4
    count = len(batch) if batch.ndim == 4 else 1
    assert len(ranked) == count and report.count("image ") >= count


@given(st.data())
def test_edit_score(data):
    draw = data.draw
    edited = draw(images())
    same = draw(st.booleans())
    source = edited.clone() if same else draw(images())
    beside = {}
    if draw(st.booleans()):
        beside["mask"] = draw(masks())
    if draw(st.booleans()):
        beside["expected"] = edited.clone()
    words = draw(st.sampled_from(["", "make the red circle blue", "\ud800", "x" * 3000]))
    made = tried(NODES["DiptychEditScore"]().score, edited=edited, source=source, instruction=words, **beside)
    if made is None:
        return
    *numbers, report, sheet = made["result"]
    assert all(math.isfinite(number) for number in numbers), numbers
    assert sheet.ndim == 4 and "nan" not in report
