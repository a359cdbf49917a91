"""Load Edit Model: all that an edit needs in one node, so that a blueprint needs one menu for it."""

from __future__ import annotations

from typing import Any

from .guard import short
from .menus import TINY, comfy_folders
from .widgets import choice, socket

AUTO = "auto"
TINY_FLUX = {name: which for name, which in TINY.items() if which in ("fill", "kontext")}
FOLDERS = {
    "unet_name": "diffusion_models",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
}
# What auto looks for: how the published files are called, whatever their precision and folder.
PUBLISHED = {
    "clip_name1": ("clip_l", "clip_l.safetensors of comfyanonymous/flux_text_encoders"),
    "clip_name2": ("t5xxl", "t5xxl_fp16.safetensors of comfyanonymous/flux_text_encoders"),
    "vae_name": ("ae.", "ae.safetensors of Comfy-Org/Lumina_Image_2.0_Repackaged"),
}
SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]


class DiptychEditModelLoader:
    """ComfyUI's own loaders, or `models/tiny/comfy.load`."""

    DISPLAY_NAME = "Load Edit Model"
    DESCRIPTION = (
        "Loads FLUX.1 Fill or Kontext with its text encoders and its autoencoder in one node, through "
        "ComfyUI's own loaders, or one of the bundled tiny models. What is connected (a GGUF model, a "
        "checkpoint's parts) takes the place of the file."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    RETURN_NAMES = ("model", "clip", "vae")
    OUTPUT_TOOLTIPS = (
        "The diffusion model.",
        "The text encoders, for CLIP Text Encode.",
        "The autoencoder, for encoding and decoding.",
    )
    FUNCTION = "load"
    SEARCH_ALIASES = ["load flux", "flux loader", "unet loader", "fill model", "kontext model", "all in one"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        auto = {name: [AUTO, *_files(name)] for name in PUBLISHED}
        return {
            "required": {
                "unet_name": choice([*_files("unet_name"), *TINY_FLUX])(
                    "A file in models/diffusion_models: FLUX.1 Fill or Kontext. The bundled tiny ones need "
                    "no file; they know only the demo images."
                ),
                "clip_name1": choice(auto["clip_name1"], AUTO)(
                    "CLIP-L, in models/text_encoders. auto: the file called clip_l."
                ),
                "clip_name2": choice(auto["clip_name2"], AUTO)(
                    "T5-XXL, in models/text_encoders. auto: a file called t5xxl, of the highest precision "
                    "there is."
                ),
                "vae_name": choice(auto["vae_name"], AUTO)(
                    "FLUX's autoencoder, in models/vae. auto: the file called ae."
                ),
            },
            "optional": {
                "weight_dtype": choice(DTYPES, "default", advanced=True)(
                    "How the diffusion model is held in memory. default: as the file is."
                ),
                "model": socket("MODEL")("Used instead of unet_name: from a GGUF loader, with LoRAs, ..."),
                "clip": socket("CLIP")("Used instead of clip_name1 and clip_name2."),
                "vae": socket("VAE")("Used instead of vae_name."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, unet_name: str = "", clip_name1: str = "", clip_name2: str = "", vae_name: str = ""
    ) -> bool:
        """True: whether a file is needed depends on what is connected, which only `load` sees."""
        return True

    def load(
        self,
        unet_name: str,
        clip_name1: str,
        clip_name2: str,
        vae_name: str,
        weight_dtype: str = "default",
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
    ) -> tuple[Any, Any, Any]:
        """(MODEL, CLIP, VAE). Raises ValueError, before anything is loaded, for a file that is not there."""
        names = {"unet_name": unet_name, "clip_name1": clip_name1, "clip_name2": clip_name2}
        names["vae_name"] = vae_name
        for name, value in names.items():
            _check(name, value)
        if model is None and unet_name in TINY_FLUX:
            from ..models import tiny
            from ..models.tiny import comfy

            loaded = comfy.load(tiny.folder() / TINY_FLUX[unet_name])
            given = (model, clip, vae)
            return tuple(its if own is None else own for own, its in zip(given, loaded, strict=True))
        from ..models import comfy_files

        given = {"unet_name": model, "clip_name1": clip, "clip_name2": clip, "vae_name": vae}
        files = {name: _file(name, value) for name, value in names.items() if given[name] is None}
        if clip is None:
            clip = comfy_files.load_flux_text(files["clip_name1"], files["clip_name2"])
        if vae is None:
            vae = comfy_files.load_flux_vae(files["vae_name"])
        if model is None:
            model = comfy_files.load_flux_model(files["unet_name"], weight_dtype)
        return model, clip, vae


def _files(name: str) -> list[str]:
    """What the menu `name` offers: the files of its folder."""
    folders = comfy_folders()
    return list(folders.get_filename_list(FOLDERS[name])) if folders else []


def _check(name: str, value: object) -> None:
    """Raise ValueError for what can be no entry of the menu; a file that is not needed may be missing."""
    entries = TINY_FLUX if name == "unet_name" else (AUTO,)
    if not isinstance(value, str) or not (
        value in entries or value.endswith(SUFFIXES) or value in _files(name)
    ):
        raise ValueError(f"{name} is {short(value)}, which is no model file: choose one from the menu.")


def _file(name: str, value: str) -> str:
    """The file that an entry of the menu `name` stands for. Raises ValueError when it is not there."""
    known = _files(name)
    if value in known:
        return value
    if value != AUTO or name not in PUBLISHED:
        raise ValueError(
            f"{name} is {short(value)}, which is not in models/{FOLDERS[name]}: put it there and refresh, or "
            "choose another."
        )
    start, published = PUBLISHED[name]
    found = [file for file in known if file.replace("\\", "/").rpartition("/")[2].startswith(start)]
    if not found:
        raise ValueError(
            f"{name} is auto, but models/{FOLDERS[name]} holds no file called {start.rstrip('.')}: put "
            f"{published} there, or choose one."
        )
    return min(found, key=lambda file: ("fp8" in file, "fp16" not in file, file))


NODES = [DiptychEditModelLoader]
