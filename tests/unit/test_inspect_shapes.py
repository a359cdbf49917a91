"""What Shape Walk says of a model call, against hooks on the running modules and counted operations."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from comfyui_diptych.models import tiny
from comfyui_diptych.models.inspect import flux_shapes, shapes, unet_shapes
from comfyui_diptych.models.inspect.shapes import Call
from comfyui_diptych.models.packing import pack_latents
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

FLUX = {  # the released FLUX.1-Fill-dev, in ComfyUI's names
    "img_in.weight": (3072, 384),
    "txt_in.weight": (3072, 4096),
    "time_in.in_layer.weight": (3072, 256),
    "time_in.out_layer.weight": (3072, 3072),
    "vector_in.in_layer.weight": (3072, 768),
    "vector_in.out_layer.weight": (3072, 3072),
    "guidance_in.in_layer.weight": (3072, 256),
    "guidance_in.out_layer.weight": (3072, 3072),
    "final_layer.linear.weight": (64, 3072),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
}
for _i in range(19):
    for _s in ("img", "txt"):
        _name = f"double_blocks.{_i}.{_s}"
        FLUX |= {
            f"{_name}_mod.lin.weight": (18432, 3072),
            f"{_name}_attn.qkv.weight": (9216, 3072),
            f"{_name}_attn.norm.query_norm.scale": (128,),
            f"{_name}_attn.norm.key_norm.scale": (128,),
            f"{_name}_attn.proj.weight": (3072, 3072),
            f"{_name}_mlp.0.weight": (12288, 3072),
            f"{_name}_mlp.2.weight": (3072, 12288),
        }
for _i in range(38):
    _name = f"single_blocks.{_i}"
    FLUX |= {
        f"{_name}.linear1.weight": (21504, 3072),
        f"{_name}.linear2.weight": (3072, 15360),
        f"{_name}.modulation.lin.weight": (9216, 3072),
        f"{_name}.norm.query_norm.scale": (128,),
    }


def load(which: str):
    import diffusers

    folder, part, cls = tiny.folder() / which, "transformer", "FluxTransformer2DModel"
    if which == "sd_inpaint":
        part, cls = "unet", "UNet2DConditionModel"
    return getattr(diffusers, cls).from_pretrained(folder / part, torch_dtype=torch.float32).eval()


@contextmanager
def watched(model, stages):
    """The shapes of the outputs of every module that a stage names."""
    seen, handles = {}, []

    def hook(name):
        def keep(module, inputs, output):
            outputs = output if isinstance(output, tuple) else (output,)
            seen[name] = [tuple(t.shape) for t in outputs if isinstance(t, torch.Tensor)]

        return keep

    modules = dict(model.named_modules())
    for stage in stages:
        handles += [modules[name].register_forward_hook(hook(name)) for name in stage.modules]
    yield seen
    for handle in handles:
        handle.remove()


@contextmanager
def counted_attention(monkeypatch):
    """Operations of every scaled dot product that runs, from the shapes of its queries and keys."""
    real, total = functional.scaled_dot_product_attention, [0]

    def counting(query, key, value, *args, **kwargs):
        total[0] += 4 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
        return real(query, key, value, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", counting)
        yield total


def run_flux(model, call: Call):
    config, generator = model.config, torch.Generator().manual_seed(0)
    channels = config.in_channels // 4

    def tokens(size):
        return pack_latents(torch.randn(call.batch, channels, *size, generator=generator))

    image = torch.cat([tokens(s) for s in ((call.height, call.width), *call.references)], dim=1)
    with torch.no_grad():
        model(
            image,
            torch.randn(call.batch, call.text_tokens, call.text_width, generator=generator),
            torch.randn(call.batch, config.pooled_projection_dim, generator=generator),
            torch.full((call.batch,), 0.5),
            torch.zeros(image.shape[1], 3),
            torch.zeros(call.text_tokens, 3),
            torch.full((call.batch,), 2.5),
        )


@pytest.mark.parametrize(
    ("which", "call"),
    [
        ("fill", Call(2, 16, 8, 16, 9, 64)),
        ("fill", Call(1, 16, 8, 8, 64, 64)),
        ("kontext", Call(1, 16, 8, 8, 12, 64, ((8, 8),))),
        ("kontext", Call(2, 16, 8, 12, 5, 64, ((8, 8), (4, 6)))),
    ],
)
def test_flux_stages_and_operations_are_those_of_the_running_model(which, call, monkeypatch):
    model = load(which)
    walk = flux_shapes.walk(shapes.weights(model.state_dict()), call)
    with watched(model, walk.stages) as seen, counted_attention(monkeypatch) as attention:
        with FlopCounterMode(display=False) as counter:
            run_flux(model, call)
    text = call.text_tokens
    for stage in walk.stages:
        for name in stage.modules:
            expected = sorted(stage.shapes)
            if name.startswith("single") and len(seen[name]) == 2:  # diffusers parts the sequence again
                (whole,) = stage.shapes
                expected = sorted([(whole[0], text, whole[2]), (whole[0], whole[1] - text, whole[2])])
            assert sorted(seen[name]) == expected, name
    assert sum(len(stage.modules) for stage in walk.stages) == len(seen) == 2 + 3 + 4
    assert walk.attention_flops == attention[0] > 0
    linear = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    assert walk.linear_flops == sum(linear.values()) > 0


def test_sd_stages_and_attention_are_those_of_the_running_model(monkeypatch):
    model = load("sd_inpaint")
    heads = {n: m.heads for n, m in model.named_modules() if n.endswith("attn1")}
    for size in ((8, 8), (7, 10)):
        call = Call(2, 4, *size, 77, 64)
        walk = unet_shapes.walk(shapes.weights(model.state_dict()), call, heads=heads)
        with watched(model, walk.stages) as seen, counted_attention(monkeypatch) as attention:
            with torch.no_grad():
                model(torch.randn(2, 9, *size), 10, encoder_hidden_states=torch.randn(2, 77, 64))
        for stage in walk.stages:
            for name in stage.modules:
                assert seen[name][0] == stage.shapes[0], name
        assert len(seen) == 7
        assert walk.attention_flops == attention[0] > 0
        assert sum(layer.layers for layer in walk.attention) == 2 * len(heads)
        assert "9 channels" in walk.kind and all(layer.heads for layer in walk.attention)


def test_a_flux_sized_state_dict_is_read_without_its_tensors():
    on_meta = {f"model.diffusion_model.{n}": torch.empty(s, device="meta") for n, s in FLUX.items()}
    on_meta["first_stage_model.decoder.conv_in.weight"] = torch.empty(512, 16, 3, 3, device="meta")
    found = shapes.weights(on_meta)
    size = flux_shapes.sizes(found)
    assert (size.double, size.single, size.hidden, size.head) == (19, 38, 3072, 128)
    assert (size.channels_in, size.channels_out, size.text_width, size.guidance) == (384, 64, 4096, True)
    walk = flux_shapes.walk(found, Call(1, 16, 64, 128, 512, 4096))  # a diptych of two 512 x 512 panels
    image, text = 2048, 512
    assert walk.attention_flops == 57 * 4 * (image + text) ** 2 * 3072
    assert walk.attention[0].heads == 24
    per_token = 19 * (4 * 3072**2 + 2 * 4 * 3072**2), 38 * (7 * 3072**2 + 5 * 3072**2)
    large = 2 * (image + text) * sum(per_token)
    assert large < walk.linear_flops < 1.01 * large
    report = shapes.report(walk)
    assert "19 double + 38 single blocks" in report and "16 noisy + 16 known + 64 of the mask" in report
    assert "[1, 2048, 384]" in report and "[1, 2560, 3072]" in report
    assert shapes.image(walk).shape[::3] == (1, 3)


def test_references_are_placed_as_comfyui_places_them():
    call = Call(1, 16, 8, 8, 4, 64, ((8, 8), (8, 8)))
    found = shapes.weights(load("kontext").state_dict())
    report = shapes.report(flux_shapes.walk(found, call))
    assert "(1, 0, 0) to (1, 3, 3)" in report and "(1, 4, 0) to (1, 7, 3)" in report
    assert flux_shapes.positions("index_timestep_zero", (4, 4), [(4, 4), (2, 2)]) == [(1, 0, 0), (2, 0, 0)]
    assert flux_shapes.positions("uxo", (4, 5), [(4, 4), (2, 2)]) == [(0, 4, 5), (0, 8, 9)]


def test_text_of_another_width_is_refused():
    found = shapes.weights(load("kontext").state_dict())
    with pytest.raises(ValueError, match="width 768, but this model takes 64"):
        flux_shapes.walk(found, Call(1, 16, 8, 8, 4, 768))
