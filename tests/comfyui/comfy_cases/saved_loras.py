"""LoRAs as the trainer writes them, read by ComfyUI's core: the trained change, key for key."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from . import case
from .lora import change, layers, predict, tiny_flux, weights_of


def saved(host, name: str, part: str, tensors: dict, task: str, rank: int = 4, alpha: float = 6.0):
    """The file that a run with these trained tensors would leave, as core reads it."""
    import comfy.utils
    import folder_paths

    config = SimpleNamespace(
        task=task, rank=rank, alpha=alpha, moe_gate="softmax_all", moe_top_k=1, method="lora"
    )
    path = Path(folder_paths.get_folder_paths("loras")[0]) / f"{name}.safetensors"
    host.pack("training.tasks.export").save_lora(path, {part: tensors}, config, {"recipe": "case"})
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def trained(shapes: dict[str, tuple[int, int]], rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    out = {}
    for name, (o, i) in shapes.items():
        out[f"{name}.lora_A.weight"] = torch.randn(rank, i, generator=generator) * 0.1
        out[f"{name}.lora_B.weight"] = torch.randn(o, rank, generator=generator) * 0.1
    return out


@case
def core_applies_a_trained_flux_lora_as_our_loader_does(host):
    import comfy.sd

    model, tensors = tiny_flux(), trained(layers())
    file = saved(host, "saved_flux", "transformer", tensors, "fill")
    theirs, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0)
    pairs = {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in layers()}
    with torch.inference_mode():
        ours, _ = host.pack("models.lora").apply_to_comfy(model, weights_of(host, pairs, 6.0 / 4), 1.0)
    base, want, got = predict(model), predict(ours), predict(theirs)
    assert change(got, want) < 1e-5 and change(want, base) > 1e-2


@case
def core_patches_every_module_of_a_trained_sd15_lora(host):
    """What the trainer adapts in the full-size SD 1.5 inpainting UNet, by the scale alpha / rank."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.supported_models

    with torch.device("meta"):
        model = comfy.supported_models.SD15(sd15()).get_model({}, "")
    keys = comfy.lora.model_lora_keys_unet(model, {})
    shapes = adapted(host)
    tensors = trained(shapes)
    file = saved(host, "saved_sd15", "unet", tensors, "sd_inpaint")
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), keys)
    targets = {name: keys["lora_unet_" + name.replace(".", "_")] for name in shapes}
    assert set(patches) == set(targets.values()) and len(patches) == len(shapes) == 128
    weights = model.state_dict()
    assert {target for target in weights if "attn" in target and target.endswith(".weight")} == set(patches)
    for name, target in targets.items():
        assert weights[target].shape == shapes[name]
    for name in list(shapes)[::17]:
        weight = torch.zeros(shapes[name])
        patch = patches[targets[name]]
        got = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, targets[name])
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert change(got, b @ a * (6.0 / 4)) < 1e-4


def adapted(host) -> dict[str, tuple[int, int]]:
    """Module -> (rows, columns) of what a LoRA of `sd_inpaint` trains in SD 1.5's UNet of nine channels."""
    from diffusers import UNet2DConditionModel

    config = host.pack("training.recipes").from_dict({"task": "sd_inpaint", "rank": 4})
    targets = host.pack("training.tasks.sd_inpaint").SDInpaintTask.target_modules
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=9, cross_attention_dim=768)
        host.pack("training.tasks.adapters").add_lora(unet, targets, config)
    layers = {name: m for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    return {name: (m.out_features, m.in_features) for name, m in layers.items()}


@case
def core_and_our_loader_apply_the_shipped_sd_lora_as_diffusers_does(host):
    """It adapts convolutions too: the UNet's prediction, three ways."""
    import comfy.sd
    import comfy.utils
    from diffusers import StableDiffusionInpaintPipeline

    tiny = host.pack("models.tiny").folder()
    path = tiny / "loras" / "sd_inpaint_grpo.safetensors"
    with torch.inference_mode():
        model, _, _ = host.nodes["DiptychTinyModelLoader"]().load("sd_inpaint")
    weights = host.pack("models.lora").read(path)
    assert any(module.A.ndim == 4 for module in weights.modules.values())
    theirs, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(str(path), safe_load=True), 1.0, 0
    )
    assert len(theirs.patches) == len(weights.modules)
    ours, report = host.pack("models.lora").apply_to_comfy(model, weights, 1.0)
    assert not report.skipped
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tiny / "sd_inpaint", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    x, step = torch.randn(1, 9, 8, 8, generator=generator), torch.tensor([601])
    text = torch.randn(1, 7, pipe.unet.config.cross_attention_dim, generator=generator)

    def prediction(patcher):
        patcher = patcher.clone()
        patcher.patch_model()
        try:
            with torch.no_grad():
                return patcher.model.diffusion_model(x, step, context=text)
        finally:
            patcher.unpatch_model()

    base, core, mine = (prediction(m) for m in (model, theirs, ours))
    pipe.load_lora_weights(str(path))
    with torch.no_grad():
        want = pipe.unet(x, step, encoder_hidden_states=text).sample
    torch.testing.assert_close(core, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine, want, atol=1e-4, rtol=1e-4)
    assert (want - base).abs().max() > 1e-2


def sd15() -> dict:
    return {
        "image_size": 32,
        "in_channels": 9,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "channel_mult": (1, 2, 4, 4),
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }
