"""The images of docs/how-it-works.md, made by the inspect nodes themselves inside a ComfyUI.

    ~/ComfyUI/.venv/bin/python scripts/how_it_works.py ~/ComfyUI

No model file is needed: full-size models are built without memory (torch's meta device), tokenizers are
ComfyUI's own. Runs in the environment of that ComfyUI, in seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
SD15 = {
    "image_size": 32,
    "in_channels": 9,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
PROMPT = (
    "A diptych with two side-by-side images of the same scene. On the right, the scene is exactly the same "
    "as on the left but make the (sky:1.3) orange, and let there be a small red fishing boat on the water "
    "with a man in a yellow raincoat who is pulling in a net full of silver fish while many white seagulls "
    "circle above him and the boat"
)


def pack():
    """The pack as a package, from this folder."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_diptych", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_diptych"] = module
    spec.loader.exec_module(module)
    return module


def model(family: str, config: dict):
    """A full-size MODEL without memory."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    chosen = getattr(comfy.supported_models, family)(dict(config))
    chosen.set_inference_dtype(torch.bfloat16, None)
    return comfy.model_patcher.ModelPatcher(
        chosen.get_model({}, "", device=torch.device("meta")), torch.device("cpu"), torch.device("cpu")
    )


def calls():
    """(file name, model, latents' shape, text's shape, values of the conditioning) for Shape Walk."""
    import torch

    def latents(*shape):
        return torch.zeros(1, 16, *shape)

    known = {"concat_latent_image": latents(64, 128)}
    yield "how_fill", model("FluxInpaint", {**FLUX, "in_channels": 96}), latents(64, 128), (512, 4096), known
    reference = {"reference_latents": [latents(128, 128)]}
    yield "how_kontext", model("Flux", FLUX), latents(128, 128), (512, 4096), reference
    four = torch.zeros(1, 4, 64, 64)
    known = {"concat_latent_image": four}
    yield "how_sd", model("SD15", SD15), four, (77, 768), known


def main(comfyui: str) -> None:
    """Write the images into docs/."""
    sys.argv, sys.path = [sys.argv[0], "--cpu"], [comfyui, *sys.path]
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch

    nodes = pack().NODE_CLASS_MAPPINGS
    from comfyui_diptych.models.image_files import to_pil

    made = {
        "how_tokens": nodes["DiptychTokenInspector"]().inspect(PROMPT),
        "how_schedules": nodes["DiptychSchedulePlot"]().plot(20, 1024, 512),
    }
    for name, patcher, latents, text, values in calls():
        conditioning = [[torch.empty(1, *text, device="meta"), values]]
        made[name] = nodes["DiptychShapeWalk"]().walk(patcher, {"samples": latents}, conditioning)
        print(made[name]["result"][1])
    for name, answer in made.items():
        image = to_pil(answer["result"][0][0]).quantize(64, dither=0)
        image.save(ROOT / "docs" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
