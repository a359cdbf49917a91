"""Whatever a LoRA file holds: it is read, applied and taken off again, or refused by one LoraError.

Three ways to be wrong: keys and shapes of every kind mixed up, headers and JSON files of any content, bytes
changed anywhere in a good file.
"""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.lora import LoraError, apply_to_diffusers, read
from comfyui_diptych.models.lora.merge import merge
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

H = 8
LAYERS = [
    "transformer.transformer_blocks.0.attn.to_q",
    "base_model.model.transformer_blocks.0.attn.to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lycoris_transformer_blocks_0_attn_to_k",
    "oft_unet_double_blocks_0_img_attn_qkv",
    "diffusion_model.final_layer.adaLN_modulation.1",
    "transformer.conv",
    "x_embedder",
    "",
    "transformer",
    "no.such.layer",
]
ROLES = """
lora_A.weight lora_B.weight lora_A.default.weight lora_B.bias lora_down.weight lora_up.weight lora_mid.weight
lora_A.expert_0.weight lora_A.expert_1.weight lora_B.expert_0.weight lora_B.expert_1.weight lora_route.weight
alpha scale dora_scale lora_magnitude_vector rescale scalar diff diff_b set_weight w_norm b_norm weight bias
lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 hada_w1_a hada_w1_b hada_w2_a hada_w2_b
hada_t1 hada_t2 oft_blocks oft_blocks.0 oft_blocks.1 oft_diag oft_R.weight boft_R boft_s a1.weight a2.weight
b1.weight b2.weight bm.weight reshape_weight wd_for_diff lora_embedding_A on_input oft_r
""".split()
GROUPS = [  # roles that belong together, so that shapes often nearly fit
    ["lora_A.weight", "lora_B.weight", "alpha", "dora_scale"],
    ["lora_down.weight", "lora_up.weight", "lora_mid.weight"],
    ["lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"],
    ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
    ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    ["oft_blocks", "rescale", "alpha"],
    ["boft_R", "boft_s"],
    ["lora_A.expert_0.weight", "lora_B.expert_0.weight", "lora_route.weight"],
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
size = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24])
shape = st.lists(size, max_size=4)
value = st.sampled_from([0.0, 1.0, -0.5, 1e-30, 1e30, float("nan"), float("inf")])


@st.composite
def a_tensor(draw):
    dims = draw(shape)
    fill = draw(st.one_of(st.just(0.25), value))
    return torch.full(dims, fill).to(draw(st.sampled_from(DTYPES[:1] * 6 + DTYPES)))


@st.composite
def tensors(draw):
    found = {}
    for layer in draw(st.lists(st.sampled_from(LAYERS[:3] * 3 + LAYERS), min_size=1, max_size=3)):
        roles = draw(st.one_of(st.sampled_from(GROUPS), st.lists(st.sampled_from(ROLES), max_size=4)))
        for role in roles:
            found[f"{layer}.{role}"] = draw(a_tensor())
    if draw(st.booleans()):
        found[draw(st.text(max_size=30))] = draw(a_tensor())
    return found


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = """
lora_alpha r alpha_pattern rank_pattern use_rslora use_dora peft_type lora_params step base alpha moe_gate
moe_top_k sigma_window curve reward algorithm num_cayley_neumann_terms block_share coft transformer.lora_alpha
""".split()
facts = st.dictionaries(st.sampled_from(FIELDS), json_value, max_size=5)
text = st.one_of(
    facts.map(json.dumps), st.text(max_size=20), st.sampled_from(["nan", "inf", "1e999", "8", "{"])
)
HEADERS = """diptych lora_adapter_metadata ss_network_alpha ss_network_args alpha lora_alpha adapter_config
modelspec.architecture""".split()


class Model(nn.Module):
    """A few layers of a FLUX, a convolution among them."""

    def __init__(self):
        super().__init__()
        block = nn.Module()
        block.attn = nn.Module()
        block.attn.to_q, block.attn.to_k, block.attn.to_v = (nn.Linear(H, H) for _ in range(3))
        self.transformer_blocks = nn.ModuleList([block])
        self.x_embedder, self.conv = nn.Linear(64, H), nn.Conv2d(2, 4, 3)
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(H, 2 * H)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def use(model, path):
    """Reads, applies and merges; anything but a LoraError is a failure of the test."""
    before = {k: t.clone() for k, t in model.state_dict().items()}
    try:
        weights = read(path)
        str(apply_to_diffusers(model, weights, 0.5).unpatch())
        after = model.state_dict()
        merge(Model(), weights)
    except LoraError as error:
        assert "\n" not in str(error)
        after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], t) for k, t in before.items())


@given(tensors(), st.dictionaries(st.sampled_from(HEADERS), text, max_size=3))
def test_any_tensors_under_any_names(model, tmp_path, found, header):
    try:
        save_file(found, tmp_path / "x.safetensors", metadata=header)
    except Exception:  # what safetensors itself does not write
        return
    use(model, tmp_path / "x.safetensors")


def good_tensors():
    layer = "base_model.model.transformer_blocks.0.attn.to_q"
    return {f"{layer}.lora_A.weight": torch.ones(2, H), f"{layer}.lora_B.weight": torch.ones(H, 2)}


@given(facts, st.sampled_from(["adapter_config.json", "lora_config.json"]), text)
def test_any_json_beside_the_weights(model, tmp_path, content, name, header):
    weights = {"adapter_config.json": "adapter_model", "lora_config.json": "pytorch_lora_weights"}[name]
    folder = tmp_path / weights
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    save_file(good_tensors(), folder / f"{weights}.safetensors", metadata={"diptych": header})
    use(model, folder)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 400),
)
def test_any_bytes_changed_in_a_safetensors_file(model, tmp_path, changes, cut):
    path = tmp_path / "x.safetensors"
    save_file(good_tensors(), path, metadata={"lora_alpha": "4"})
    damage(path, changes, cut)
    use(model, path)


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 400),
)
def test_any_bytes_changed_in_a_torch_file(model, tmp_path, changes, cut):
    path = tmp_path / "x.pt"
    torch.save(good_tensors(), path)
    damage(path, changes, cut)
    use(model, path)


def damage(path, changes, cut):
    raw = bytearray(path.read_bytes())
    for at, byte in changes:
        raw[at % len(raw)] = byte
    path.unlink()  # the old one may still be mapped
    path.write_bytes(raw[: len(raw) - cut] if cut > 300 else raw)
