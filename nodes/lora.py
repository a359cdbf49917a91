"""GRPO LoRA Loader: any LoRA file or folder onto a MODEL, mixtures of experts and sigma windows included."""

from __future__ import annotations

from torch import Tensor

from .guard import short
from .menus import lora_fingerprint, lora_names, lora_path
from .shown import shown
from .widgets import automatic, choice, number, socket, switch

# models.lora is imported where it is used: it is a third of what importing the pack would cost.


class DiptychGRPOLoraLoader:
    """`models/lora`'s reader and its way onto a ComfyUI MODEL."""

    DISPLAY_NAME = "GRPO LoRA Loader"
    DESCRIPTION = (
        "Loads a LoRA of any format at its trained strength and says what it did: diffusers, ICEdit and its "
        "mixture of experts, PEFT and DanceGRPO folders (alpha read from their JSON), kohya, ai-toolkit, "
        "XLabs, BFL, LyCORIS, DoRA, OFT. Can confine it to a range of noise levels, where reward tuning "
        "helps most."
    )
    CATEGORY = "diptych"
    RETURN_TYPES = ("MODEL", "STRING", "IMAGE")
    RETURN_NAMES = ("model", "report", "reward_curve")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRA; the one given stays as it was.",
        "What was loaded, what was not and why, rank, alpha and where it came from; of reward-trained files "
        "also the algorithm and the rewards.",
        "The reward over the training, where the file brings it (Train GRPO LoRA); else an empty plot.",
    )
    FUNCTION = "load"
    SEARCH_ALIASES = ["load lora", "icedit lora", "moe lora", "peft lora", "dancegrpo", "flow grpo", "lora"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": socket("MODEL")("From any loader: plain, fp8, GGUF, with LoRAs or not."),
                "lora": choice(lora_names())(
                    "A file in the loras folder, or a folder in it as PEFT and DanceGRPO save them (names "
                    "that end in /). Alpha is found in either."
                ),
                "strength": number(1.0, -20.0, 20.0, step=0.01)(
                    "1 is the strength it was trained at. 0 switches it off."
                ),
            },
            "optional": {
                "sigma_start": number(1.0, 0.0, 1.0, step=0.01, advanced=True)(
                    "Active from this noise level on (1 = pure noise, the first step)."
                ),
                "sigma_end": number(0.0, 0.0, 1.0, step=0.01, advanced=True)(
                    "Off at and below this noise level (0 = never off). Reward-tuned LoRAs often spoil the "
                    "last, fine steps: try 0.4."
                ),
                "file_window": switch(True, advanced=True)(
                    "While sigma_start is 1 and sigma_end 0, use the window stored in the file, if there is "
                    "one."
                ),
                "scale": automatic("FLOAT", 0.0, 0.0, 100.0, advanced=True)(
                    "alpha / rank, if the file does not say it. auto: as the file says."
                ),
                "top_k": automatic("INT", 0, 0, 64, advanced=True)(
                    "Mixture of experts: experts per token. auto: as the file says, else 1."
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: object = None) -> bool | str:
        """True, or the sentence that ComfyUI shows for a LoRA that is not there."""
        if lora is None or lora_path(lora) is not None:  # None: it comes by a link
            return True
        return f"lora is {short(lora)}, which is not in ComfyUI's loras folder: refresh, or put it there"

    @classmethod
    def IS_CHANGED(cls, lora: object = None, **_: object) -> str:
        """A text that changes when a file of the input changes, so that ComfyUI runs the node again."""
        path = lora_path(lora)
        return "missing" if path is None else lora_fingerprint(path)

    def load(
        self,
        model,
        lora: str,
        strength: float,
        sigma_start: float = 1.0,
        sigma_end: float = 0.0,
        file_window: bool = True,
        scale: float = 0.0,
        top_k: int = 0,
    ) -> dict:
        """(patched clone of the model, report, reward curve [1,H,W,3]), and the report on the node.

        Raises ValueError for a name that is gone, LoraError for a file that cannot be used.
        """
        path = lora_path(lora)
        if path is None:
            raise ValueError(f"lora is {short(lora)}, which is not in ComfyUI's loras folder: put it there")
        from ..models.lora import apply_to_comfy, read

        weights = read(path, scale=scale or None, top_k=top_k or None)
        whole = (sigma_start, sigma_end) == (1.0, 0.0)
        window = "file" if whole and file_window else (sigma_start, sigma_end)
        patched, report = apply_to_comfy(model, weights, strength, window=window)
        result = (patched, str(report), _reward_curve(weights.info))
        return {"ui": shown(str(report)), "result": result}


def _reward_curve(info) -> Tensor:
    """IMAGE of the curve that a reward-trained file carries."""
    from ..training.evaluate.plots import as_image, curve

    title = f"reward: {info.reward}" if info.curve else "this file carries no reward curve"
    return as_image(curve(info.curve, title=title))


NODES = [DiptychGRPOLoraLoader]
