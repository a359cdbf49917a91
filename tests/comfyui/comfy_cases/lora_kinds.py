"""LoHa, LoKr, GLoRA, DoRA, OFT and BOFT inside ComfyUI: core's change where core is right, windows too.

Where core is not right (a DoRA's rows over the norm of the old weight, OFT's strength squared, half-swapped
rows, OFT's rescale) the reference is a formula, here or in `unit/test_lora_based.py`.
"""

from __future__ import annotations

import torch

from . import SkipCase, case
from .lora import HIDDEN as H
from .lora import apply, change, patched_weights, predict, tiny_flux

R = 3
QKV, FINAL = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_final_layer_adaLN_modulation_1"
MLP, SWAPPED = "lycoris_single_transformer_blocks_0_proj_mlp", "lycoris_norm_out_linear"
SIZES = {QKV: (3 * H, H), FINAL: (2 * H, H), MLP: (4 * H, H), SWAPPED: (2 * H, H)}


def random(*shape, seed=0, size=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape))) * size


def _lora(o, i):
    return {
        "lora_down.weight": random(R, i),
        "lora_up.weight": random(o, R, seed=1),
        "alpha": torch.tensor(1.5),
    }


def _loha(o, i):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {n: random(*((o, R) if n[-1] == "a" else (R, i)), seed=k) for k, n in enumerate(names)}


def _lokr(o, i):
    return {
        "lokr_w1": random(4, 8),
        "lokr_w2_a": random(o // 4, R),
        "lokr_w2_b": random(R, i // 8),
        "alpha": torch.tensor(2.0),
    }


def _glora(o, i):
    return {
        "a1.weight": random(i, R),
        "a2.weight": random(R, i),
        "b1.weight": random(o, R),
        "b2.weight": random(R, i, seed=1),
        "alpha": torch.tensor(1.0),
    }


# kind -> (tensors of a layer, whether its change does not depend on the weight)
KINDS = {
    "lora": (_lora, True),
    "loha": (_loha, True),
    "lokr": (_lokr, True),
    "glora": (_glora, False),
    "dora by input": (lambda o, i: {**_lora(o, i), "dora_scale": 1 + random(1, i)}, False),
    "oft": (lambda o, i: {"oft_blocks": random(o // 16, 16, 16)}, False),
    "oft, one block": (lambda o, i: {"oft_blocks": random(1, o, o, size=0.02)}, False),
    "boft": (lambda o, i: {"oft_blocks": random(2, o // 16, 16, 16), "alpha": torch.tensor(0.0)}, False),
}


def both(host, model, tensors: dict):
    """(core's patcher, ours, our report) of one file."""
    import comfy.lora
    import comfy.lora_convert

    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    theirs = model.clone()
    theirs.add_patches(comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map), 1.0)
    raw = host.pack("models.lora.files").RawFile(host.base / "kind.safetensors", tensors, {})
    weights = host.pack("models.lora.read").canonical(raw)
    return theirs, *apply(host, model, weights), weights


def file_of(kind: str) -> dict:
    make, plain = KINDS[kind]
    layers = [QKV, FINAL, MLP] + ([SWAPPED] if plain else [])
    if plain:
        layers.remove(FINAL)  # the same layer under another name
    return {f"{name}.{k}": t for name in layers for k, t in make(*SIZES[name]).items()}


@case(each=lambda: list(KINDS))
def every_kind_changes_the_weights_as_core_does(host, kind):
    model = tiny_flux()
    theirs, ours, report, _ = both(host, model, file_of(kind))
    assert not report.skipped and not report.runtime, str(report)
    want, got, base = patched_weights(theirs), patched_weights(ours), model.model.state_dict()
    assert set(got) == set(want)
    for key, weight in want.items():
        assert change(got[key], weight) < 1e-4 < change(weight, base[key]), (key, change(got[key], weight))


@case(each=lambda: list(KINDS))
def every_kind_in_a_window_equals_the_same_merged(host, kind):
    model = tiny_flux()
    _, merged, _, weights = both(host, model, file_of(kind))
    windowed, report = apply(host, model, weights, 1.0, window=(0.9, 0.4))
    assert set(report.runtime) or not report.loaded
    want, outside = predict(merged), predict(model, 0.95)
    assert change(predict(windowed), want) < 1e-3 < change(want, predict(model))
    assert change(predict(windowed, 0.95), outside) < 1e-6
    assert change(predict(windowed, low_memory=True), want) < 1e-3


@case
def a_dora_by_rows_is_divided_by_the_norm_of_the_merged_weight(host):
    model, parts = tiny_flux(), _lora(*SIZES[MLP])
    m = 1 + random(4 * H, 1)
    _, ours, report, _ = both(host, model, {f"{MLP}.{k}": t for k, t in {**parts, "dora_scale": m}.items()})
    key = "diffusion_model.single_blocks.0.linear1.weight"
    weight = model.model.state_dict()[key].clone()
    merged = weight[3 * H :] + 0.5 * parts["lora_up.weight"] @ parts["lora_down.weight"]
    weight[3 * H :] = m * merged / merged.norm(dim=1, keepdim=True)
    assert report.info.format == "DoRA" and change(patched_weights(ours)[key], weight) < 1e-5


@case
def the_strength_of_a_rotation_is_linear(host):
    model = tiny_flux()
    _, full, _, weights = both(host, model, file_of("oft"))
    half, _ = apply(host, model, weights, 0.5)
    base, one, some = model.model.state_dict(), patched_weights(full), patched_weights(half)
    assert all(change(some[k], (base[k] + one[k]) / 2) < 1e-5 for k in one)


@case
def a_changed_layer_with_two_entries_gets_both(host):
    """A LoRA and a whole difference of one weight, as LyCORIS' presets mix them."""
    model, parts = tiny_flux(), _lora(*SIZES[QKV])
    diff = random(3 * H, H, seed=5)
    _, ours, report, _ = both(host, model, {f"{QKV}.{k}": t for k, t in {**parts, "diff": diff}.items()})
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    want = model.model.state_dict()[key] + 0.5 * parts["lora_up.weight"] @ parts["lora_down.weight"] + diff
    assert not report.skipped and change(patched_weights(ours)[key], want) < 1e-5


@case
def whole_tensors_keep_to_a_sigma_window(host):
    model = tiny_flux()
    tensors = {
        f"{QKV}.diff": random(3 * H, H),
        f"{QKV}.diff_b": random(3 * H),
        f"{FINAL}.diff_b": random(2 * H),
    }
    _, merged, _, weights = both(host, model, tensors)
    windowed, report = apply(host, model, weights, 1.0, window=(0.9, 0.4))
    assert "stays active" not in str(report)
    want = predict(merged)
    assert change(predict(windowed), want) < 1e-4 < change(want, predict(model))
    assert torch.equal(predict(windowed, 0.95), predict(model, 0.95))


@case
def unpatching_restores_every_bit(host):
    model = tiny_flux()
    before = {k: t.clone() for k, t in model.model.state_dict().items()}
    for kind in KINDS:
        _, ours, _, _ = both(host, model, file_of(kind))
        predict(ours)
        ours.unpatch_model()
    assert all(torch.equal(t, before[k]) for k, t in model.model.state_dict().items())


@case(each=lambda: list(KINDS))
def core_can_remake_a_patch_with_tensors_it_moved(host, kind):
    import comfy.lora

    if not hasattr(comfy.lora, "prefetch_prepared_value"):
        raise SkipCase("this ComfyUI does not prefetch patches")
    model = tiny_flux()
    _, ours, _, _ = both(host, model, file_of(kind))
    base, want = model.model.state_dict(), patched_weights(ours)
    for key, patches in ours.patches.items():
        again = [
            (p[0], comfy.lora.prefetch_prepared_value(p[1], [0], None, None, False), *p[2:]) for p in patches
        ]
        assert torch.equal(comfy.lora.calculate_weight(again, base[key].clone(), key), want[key])


@case
def a_lora_of_another_flux_is_told_in_the_report(host):
    model = tiny_flux()
    raw = host.pack("models.lora.files").RawFile(
        host.base / "k.safetensors",
        {f"{QKV}.{k}": t for k, t in _lora(*SIZES[QKV]).items()},
        {"modelspec.architecture": "flux-1-kontext-dev/lora"},
    )
    _, report = apply(host, model, host.pack("models.lora.read").canonical(raw))
    assert "kontext" in str(report) and "FLUX Fill" in str(report)
