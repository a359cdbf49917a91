"""A finetune as an inpainting model: core's merge nodes behind Widen Model Input equal the command."""

from __future__ import annotations

import torch

from . import case

SMALL = {  # SD 1.5's UNet in everything but width and depth
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}


def unet(seed: int, channels: int, dtype=torch.float32):
    """A small SD 1.5 of random weights as ComfyUI's own MODEL."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({**SMALL, "in_channels": channels, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        model = config.get_model({}, "", device=torch.device("cpu"))
        for parameter in model.diffusion_model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.requires_grad_(False)
    devices = management.get_torch_device(), management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=devices[0], offload_device=devices[1])


def merged_by_nodes(host, custom, inpaint, base):
    nodes = host.nodes
    widen = nodes["DiptychWidenInput"]()
    (learnt,) = nodes["ModelMergeSubtract"]().merge(inpaint, widen.widen(base, 9)[0], 1.0)
    return nodes["ModelMergeAdd"]().merge(learnt, widen.widen(custom, 9)[0])[0]


def weights(model) -> dict[str, torch.Tensor]:
    """What a MODEL samples with, patches in."""
    import comfy.model_management as management

    management.load_models_gpu([model], force_full_load=True)
    found = {name: tensor.clone().cpu() for name, tensor in model.model.diffusion_model.state_dict().items()}
    management.unload_all_models()
    return found


@case(each=lambda: ["float32", "float16"])
def the_nodes_equal_the_command(host, dtype):
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, dtype)
    models = {"custom": unet(1, 4, dtype), "inpaint": unet(2, 9, dtype), "base": unet(3, 4, dtype)}
    prefix, paths = host.pack("models.checkpoints").DENOISER, {}
    for name, model in models.items():
        state = model.model.diffusion_model.state_dict()
        paths[name] = host.base / f"merge_{name}.safetensors"
        save_file({prefix + key: tensor.contiguous() for key, tensor in state.items()}, paths[name])
    out = host.base / "merged.safetensors"
    host.pack("models.merge_inpaint").merge(*paths.values(), out)
    file = load_file(out)
    made = weights(merged_by_nodes(host, **models))
    assert made["input_blocks.0.0.weight"].shape[1] == 9
    assert {prefix + name for name in made} == file.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, file[prefix + name], rtol=0, atol=0)


@case
def the_merged_model_inpaints_and_the_others_are_as_before(host):
    models = {"custom": unet(1, 4), "inpaint": unet(2, 9), "base": unet(3, 4)}
    before = weights(models["custom"])
    merged = merged_by_nodes(host, **models)
    generator = torch.Generator().manual_seed(0)
    text, latent = torch.randn(1, 7, 64, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    condition = [[text, {"concat_latent_image": latent, "concat_mask": torch.ones(1, 1, 8, 8)}]]
    (made,) = host.nodes["KSampler"]().sample(
        merged, 1, 2, 1.0, "euler", "simple", condition, condition, {"samples": latent}, 1.0
    )
    assert made["samples"].isfinite().all()
    after = weights(models["custom"])
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


@case
def one_of_that_width_is_left_alone_and_others_are_refused(host):
    widen = host.nodes["DiptychWidenInput"]()
    assert not widen.widen(unet(2, 9), 9)[0].patches
    flux = host.nodes["DiptychTinyModelLoader"]().load("fill")[0]
    for model, channels, message in (
        (unet(2, 9), 8, "model takes 9 channels already"),
        (flux, 9, "not a Stable Diffusion UNet"),
    ):
        try:
            widen.widen(model, channels)
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError(message)
