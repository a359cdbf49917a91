"""DoRA, GLoRA, OFT, BOFT and the Tucker forms, in LyCORIS' and kohya's naming, against dense matrices.

What peft itself writes is compared with peft in `parity/test_lora_peft.py`, core ComfyUI's reading in
`comfyui/comfy_cases/lora_kinds.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_diptych.models.lora import LoraError, LoraWeights, apply_to_diffusers, read
from comfyui_diptych.models.lora.merge import merge
from comfyui_diptych.models.lora.rotations import InputBoft
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

H, R = 8, 3
TO_Q, MLP = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"
FLAT = {TO_Q: "lycoris_transformer_blocks_0_attn_to_q", MLP: "lora_unet_double_blocks_0_img_mlp_2"}
QKV, LINEAR1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
FINAL = "lora_unet_final_layer_adaLN_modulation_1"
Q_K_V = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")]
SINGLE = [
    *(f"single_transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")),
    "single_transformer_blocks.0.proj_mlp",
]


def random(*shape, seed=0, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape))) * size


def written(folder, layer, tensors, header=None):
    path = folder / "lora.safetensors"
    save_file({f"{layer}.{k}": t.contiguous() for k, t in tensors.items()}, path, metadata=header)
    return path


def orthogonal(blocks, limit=None):
    """Cayley's rotations of LyCORIS, by the inverse."""
    q = blocks - blocks.mT
    if limit is not None and q.norm() > limit:
        q = q * (limit / q.norm())
    eye = torch.eye(q.shape[-1])
    return (eye + q) @ torch.linalg.inv(eye - q)


def turned(weight, blocks, limit=None):
    return torch.block_diag(*orthogonal(blocks, limit)).T @ weight


def butterfly(weight, blocks):
    for i, r in enumerate(orthogonal(blocks)):
        k = 2**i * blocks.shape[-1] // 2
        weight = rearrange(weight, "(c g k) x -> (c k g) x", g=2, k=k)
        weight = torch.block_diag(*r) @ weight
        weight = rearrange(weight, "(c k g) x -> (c g k) x", g=2, k=k)
    return weight


def dora(weight, change, magnitude, dim):
    merged = weight + change
    return magnitude * merged / merged.norm(dim=dim, keepdim=True)


def pair(out, width):
    return {
        "lora_down.weight": random(R, width),
        "lora_up.weight": random(out, R, seed=1),
        "alpha": torch.tensor(1.5),
    }


def change_of(parts):
    return 0.5 * parts["lora_up.weight"] @ parts["lora_down.weight"]


KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


# Each: (tensors, function of the base weight) of a layer with `out` outputs and `width` inputs.


@kind
def dora_by_output(out, width):
    parts, m = pair(out, width), 1 + random(out, 1, size=0.1)
    return {**parts, "dora_scale": m}, lambda w: dora(w, change_of(parts), m, 1)


@kind
def dora_by_input(out, width):
    parts, m = pair(out, width), 1 + random(1, width, size=0.1)
    return {**parts, "dora_scale": m}, lambda w: dora(w, change_of(parts), m, 0)


@kind
def dora_of_ai_toolkit(out, width):
    parts, m = pair(out, width), 1 + random(out, size=0.1)
    return {**parts, "magnitude": m}, lambda w: dora(w, change_of(parts), m[:, None], 1)


@kind
def dora_of_a_loha(out, width):
    a, b, c, d = random(out, R), random(R, width), random(out, R, seed=4), random(R, width, seed=5)
    m = 1 + random(out, 1, size=0.1)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "dora_scale")
    return dict(zip(names, (a, b, c, d, m), strict=True)), lambda w: dora(w, (a @ b) * (c @ d), m, 1)


@kind
def oft(out, width):
    blocks = random(out // 4, 4, 4, size=0.3)
    return {"oft_blocks": blocks}, lambda w: turned(w, blocks)


@kind
def oft_whose_blocks_span_layers(out, width):
    blocks = random(1, out, out, size=0.1)
    return {"oft_blocks": blocks}, lambda w: turned(w, blocks)


@kind
def oft_in_the_older_name_with_rescale(out, width):
    blocks, rescale = random(out // 4, 4, 4, size=0.3), 1 + random(out, 1, size=0.1)
    return {"oft_diag": blocks, "rescale": rescale}, lambda w: rescale * turned(w, blocks)


@kind
def oft_with_a_constraint(out, width):
    blocks, alpha = random(out // 4, 4, 4), 0.01
    parts = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
    return parts, lambda w: turned(w, blocks, limit=alpha * out)


@kind
def boft(out, width):
    blocks = random(2, out // 4, 4, 4, size=0.3)
    return {"oft_blocks": blocks}, lambda w: butterfly(w, blocks)


@kind
def glora(out, width):
    a1, a2 = random(width, R, size=0.3), random(R, width)
    b1, b2 = random(out, R, seed=2), random(R, width, seed=3)
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(1.5)}
    return parts, lambda w: w + 0.5 * (w @ a1 @ a2 + b1 @ b2)


@kind
def glora_of_older_lycoris(out, width):
    a1, a2 = random(R, width), random(width, R, size=0.3)
    b1, b2 = random(R, width, seed=3), random(out, R, seed=2)
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    return parts, lambda w: w + w @ a2 @ a1 + b2 @ b1


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_of_its_own(name, tmp_path):
    tensors, want = KINDS[name](H, H + 4)
    weights = read(written(tmp_path, FLAT[MLP], tensors))
    weight = random(H, H + 4, seed=9)
    (path,) = weights.modules
    assert path == MLP and not weights.skipped
    got = weight + weights.modules[path].change(weight)
    torch.testing.assert_close(got, want(weight), atol=1e-5, rtol=1e-5)


class Flux(nn.Module):
    """The layers of a small FLUX under their diffusers paths."""

    def __init__(self):
        super().__init__()
        sizes = dict.fromkeys([*Q_K_V, *SINGLE[:3]], (H, H)) | {
            SINGLE[3]: (4 * H, H),
            "norm_out.linear": (2 * H, H),
        }
        for seed, (path, shape) in enumerate(sizes.items()):
            owner = self
            *folders, leaf = path.split(".")
            for folder in folders:
                if not hasattr(owner, folder):
                    owner.add_module(folder, nn.Module())
                owner = getattr(owner, folder)
            owner.add_module(leaf, nn.Linear(shape[1], shape[0]))
            getattr(owner, leaf).weight.data = random(*shape, seed=seed + 20)

    def fused(self, paths):
        return torch.cat([self.get_submodule(p).weight.detach() for p in paths])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layer", [QKV, LINEAR1, FINAL])
def test_a_layer_that_diffusers_splits_or_turns_round(name, layer, tmp_path):
    """As BFL's layout has it: the change of the fused weight, cut; of the final layer, halves exchanged."""
    model = Flux()
    paths = {QKV: Q_K_V, LINEAR1: SINGLE, FINAL: ["norm_out.linear"]}[layer]
    whole = model.fused(paths)
    tensors, change = KINDS[name](*whole.shape)

    def exchanged(w):
        return torch.cat(w.chunk(2)[::-1]) if layer == FINAL else w

    want = exchanged(change(exchanged(whole)))
    before = copy.deepcopy(model.state_dict())
    weights = read(written(tmp_path, layer, tensors))
    assert set(weights.modules) == set(paths) and not weights.skipped
    handle = apply_to_diffusers(model, weights)
    x = random(5, H, seed=8)
    outputs = torch.cat([model.get_submodule(p)(x) - model.get_submodule(p).bias for p in paths], dim=1)
    torch.testing.assert_close(outputs, x @ want.T, atol=1e-4, rtol=1e-4)
    handle.unpatch()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    merge(model, weights)
    torch.testing.assert_close(model.fused(paths), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dora_by_output", "oft", "boft", "glora"])
def test_strength_is_linear_in_the_weight(name, tmp_path):
    tensors, want = KINDS[name](3 * H, H)
    model = Flux()
    whole = model.fused(Q_K_V)
    handle = apply_to_diffusers(model, read(written(tmp_path, QKV, tensors)), 0.25)
    torch.testing.assert_close(model.fused(Q_K_V), whole + 0.25 * (want(whole) - whole), atol=1e-5, rtol=1e-5)
    handle.at_sigma(0.5)
    handle.set_strength(0.0)
    assert torch.equal(model.fused(Q_K_V), whole)


def test_two_that_rewrite_one_layer_come_off_in_any_order(tmp_path):
    model, files = Flux(), []
    for name in ("oft", "dora_by_output"):
        (tmp_path / name).mkdir()
        files.append(read(written(tmp_path / name, QKV, KINDS[name](3 * H, H)[0])))
    whole = model.fused(Q_K_V)
    apply_to_diffusers(model, files[1])
    alone = model.fused(Q_K_V)
    model = Flux()
    first, second = (apply_to_diffusers(model, weights) for weights in files)
    first.unpatch()
    assert torch.equal(model.fused(Q_K_V), alone)
    second.unpatch()
    assert torch.equal(model.fused(Q_K_V), whole)


@pytest.mark.parametrize(
    "name", ["dora_by_output", "dora_by_input", "oft_whose_blocks_span_layers", "boft", "glora"]
)
def test_weights_too_coarse_to_rewrite_are_added_to_at_run_time(name, tmp_path):
    """float8 layers, as layerwise casting stores them: the output is that of the change of their values."""
    tensors, want = KINDS[name](3 * H, H)
    model = Flux()
    for path in Q_K_V:
        layer = model.get_submodule(path)
        layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight.float(), layer.bias)
    whole = model.fused(Q_K_V).float()
    handle = apply_to_diffusers(model, read(written(tmp_path, QKV, tensors)))
    assert set(handle.report.runtime) == set(Q_K_V)
    x = random(5, H, seed=8)
    outputs = torch.cat([model.get_submodule(p)(x) - model.get_submodule(p).bias for p in Q_K_V], dim=1)
    torch.testing.assert_close(outputs, x @ want(whole).T, atol=1e-4, rtol=1e-4)
    handle.unpatch()
    assert torch.equal(model.fused(Q_K_V).float(), whole)


def test_kohya_trains_an_oft_for_each_part_of_a_fused_layer(tmp_path):
    blocks = [random(2, 4, 4, seed=i, size=0.3) for i in range(3)]
    tensors = {f"oft_blocks.{i}": b for i, b in enumerate(blocks)} | {"alpha": torch.tensor(1e-3)}
    weights = read(written(tmp_path, "oft_unet_double_blocks_0_img_attn_qkv", tensors))
    model = Flux()
    for path, b in zip(Q_K_V, blocks, strict=True):
        weight = model.get_submodule(path).weight.detach()
        got = weight + weights.modules[path].change(weight)
        torch.testing.assert_close(got, turned(weight, b, limit=1e-3 * H), atol=1e-5, rtol=1e-5)


def test_core_comfyuis_own_trainer_limits_oft_by_alpha_itself(tmp_path):
    blocks = random(2, 4, 4)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.5)}
    weights = read(written(tmp_path, "diffusion_model.double_blocks.0.img_mlp.2", tensors))
    weight = random(H, 12, seed=2)
    got = weight + weights.modules[MLP].change(weight)
    torch.testing.assert_close(got, turned(weight, blocks, limit=0.5), atol=1e-5, rtol=1e-5)


def test_peft_boft_of_several_factors_is_the_product_of_permuted_blocks(tmp_path):
    """peft builds it only with CUDA; here from its definition (arXiv 2311.06243), one matrix per factor."""
    m, count, size, out = 3, 8, 4, 6
    blocks, s = random(m, count, size, size, size=0.3), 1 + random(out, 1, size=0.1)
    weights = read(written(tmp_path, f"base_model.model.{MLP}", {"boft_R": blocks, "boft_s": s}))
    assert isinstance(weights.modules[MLP], InputBoft)
    whole = torch.eye(count * size)
    for i in range(m):
        run = 2**i * size  # inputs that one factor mixes; half-blocks of `size / 2`, even ones first
        halves = [list(range(a, a + size // 2)) for a in range(0, run, size // 2)]
        order = [j for part in (halves[::2], halves[1::2]) for half in part for j in half]
        P = torch.zeros(count * size, count * size)
        for start in range(0, count * size, run):
            for row, column in enumerate(order):
                P[start + row, start + column] = 1
        skew = 0.5 * (blocks[i] - blocks[i].mT)
        eye = torch.eye(size)
        rotations = torch.block_diag(*((eye - skew) @ torch.linalg.inv(eye + skew)))
        whole = P @ rotations @ P.T @ whole
    weight = random(out, count * size, seed=3)
    got = weight + weights.modules[MLP].change(weight)
    torch.testing.assert_close(got, (whole @ weight.T).T * s, atol=1e-5, rtol=1e-5)


CONV = "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("form", ["loha, tucker", "lokr, tucker", "lokr, flat", "lokr, whole", "lora, mid"])
def test_convolutions_in_every_lycoris_form(form, tmp_path):
    out, width, k = 8, 6, 3
    if form == "loha, tucker":
        t1, t2 = random(R, R, k, k), random(R, R, k, k, seed=1)
        a, b, c, d = random(R, out), random(R, width), random(R, out, seed=2), random(R, width, seed=3)
        tensors = {
            "hada_t1": t1,
            "hada_t2": t2,
            "hada_w1_a": a,
            "hada_w1_b": b,
            "hada_w2_a": c,
            "hada_w2_b": d,
        }
        want = product(t1, a, b) * product(t2, c, d)
    elif form == "lokr, tucker":
        w1, t2, a, b = random(2, 3), random(R, R, k, k), random(R, 4), random(R, 2)
        tensors = {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a, "lokr_w2_b": b}
        want = kron(w1, product(t2, a, b))
    elif form == "lokr, flat":
        w1, a, b = random(2, 3), random(4, R), random(R, 2 * k * k)
        tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
        want = kron(w1, (a @ b).reshape(4, 2, k, k))
    elif form == "lokr, whole":
        w1, w2 = random(2, 3), random(4, 2, k, k)
        tensors, want = {"lokr_w1": w1, "lokr_w2": w2}, kron(w1, w2)
    else:
        mid, a, b = random(R, R, k, k), random(R, width, 1, 1), random(out, R, 1, 1)
        tensors = {"lora_mid.weight": mid, "lora_down.weight": a, "lora_up.weight": b}
        want = product(mid, b[..., 0, 0].T, a[..., 0, 0])
    module = nn.Module()
    owner = module
    for name in CONV.split(".")[:-1]:
        owner.add_module(name, nn.Module())
        owner = getattr(owner, name)
    owner.conv1 = nn.Conv2d(width, out, k, padding=1)
    weights = read(written(tmp_path, "lora_unet_" + CONV.replace(".", "_"), tensors))
    x, conv = random(1, width, 5, 5, seed=7), owner.conv1
    base, before = conv(x), conv.weight.detach().clone()
    handle = apply_to_diffusers(module, weights, 0.5)
    got = module.get_submodule(CONV)(x) - base
    torch.testing.assert_close(got, nn.functional.conv2d(x, 0.5 * want, padding=1), atol=1e-4, rtol=1e-4)
    handle.unpatch()
    merge(module, weights)
    torch.testing.assert_close(conv.weight.detach() - before, want, atol=1e-5, rtol=1e-5)


def product(core, a, b):
    """core[i, j] a[i, out] b[j, in], summed by loops over i and j."""
    return sum(
        core[i, j] * torch.outer(a[i], b[j])[..., None, None]
        for i in range(core.shape[0])
        for j in range(core.shape[1])
    )


def kron(w1, w2):
    """Each element of w1 times w2, put block by block."""
    return torch.cat([torch.cat([e * w2 for e in row], dim=1) for row in w1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_products_are_not_rounded_to_the_files_type(dtype, tmp_path):
    a, b, c = (random(*s).to(dtype) for s in ((4, R), (R, 4), (2, 3)))
    tensors = {"lokr_w1": c, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(0.7)}
    module = read(written(tmp_path, FLAT[MLP], tensors)).modules[MLP]
    want = 0.7 / R * torch.kron(c.double(), a.double() @ b.double())
    torch.testing.assert_close(module.dense().double(), want, atol=1e-6, rtol=1e-6)


def test_a_whole_bias_of_the_final_layer_is_turned_round_too(tmp_path):
    model, bias = Flux(), random(2 * H)
    tensors = {**pair(2 * H, H), "diff_b": bias}
    before = model.norm_out.linear.bias.detach().clone()
    apply_to_diffusers(model, read(written(tmp_path, FINAL, tensors)))
    want = before + torch.cat([bias[H:], bias[:H]])
    linear = model.norm_out.linear
    torch.testing.assert_close(getattr(linear, "base_layer", linear).bias.detach(), want)


@pytest.mark.parametrize("how", ["applied", "merged"])
def test_a_layer_with_factors_and_a_whole_difference_gets_both(how, tmp_path):
    model, parts, diff = Flux(), pair(3 * H, H), random(3 * H, H, seed=6)
    want = model.fused(Q_K_V) + change_of(parts) + diff
    weights = read(written(tmp_path, QKV, {**parts, "diff": diff}))
    apply_to_diffusers(model, weights) if how == "applied" else merge(model, weights)
    x = random(5, H, seed=8)
    outputs = torch.cat([model.get_submodule(p)(x) - model.get_submodule(p).bias for p in Q_K_V], dim=1)
    torch.testing.assert_close(outputs, x @ want.T, atol=1e-5, rtol=1e-5)


def test_merging_refuses_before_it_changes_anything(tmp_path):
    model = Flux()
    before = copy.deepcopy(model.state_dict())
    weights = read(written(tmp_path, QKV, pair(3 * H, H)))
    stranger = read(written(tmp_path, FLAT[MLP], pair(H, 4 * H))).modules
    with pytest.raises(LoraError, match="has no transformer_blocks.0.ff.net.2"):
        merge(model, LoraWeights({**weights.modules, **stranger}))
    model.get_submodule(Q_K_V[2]).weight.data = model.get_submodule(Q_K_V[2]).weight.data.to(
        torch.float8_e4m3fn
    )
    with pytest.raises(LoraError, match="float8_e4m3fn.*quantise afterwards"):
        merge(model, weights)
    assert torch.equal(model.get_submodule(Q_K_V[0]).weight, before[f"{Q_K_V[0]}.weight"])
