"""Early Filter Sampler: score several candidates after a few steps by a reward, finish only the best."""

from __future__ import annotations

from typing import Any

from ..samplers.rules import RULES
from . import widgets
from .shown import download, report_to
from .widgets import choice, integer, socket, text


class DiptychEarlyFilterSampler:
    """Best of N while sampling: `samplers/comfy_early_filter.py` with a judge of `training/evaluate/`."""

    DISPLAY_NAME = "Early Filter Sampler (Best of N)"
    DESCRIPTION = (
        "Starts several images at once, looks after a few steps where each is heading, and finishes only the "
        "one that a reward likes best. Much cheaper than making them all: 6 candidates judged after 4 of 28 "
        "steps cost 48 model evaluations instead of 168. One candidate is the plain sampler, exactly."
    )
    CATEGORY = "diptych/sampling"
    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    OUTPUT_TOOLTIPS = (
        "For SamplerCustomAdvanced with RandomNoise. Candidates use the noise of seed, seed + 1, ... so the "
        "best one, whose seed is reported, can be made again without this node.",
    )
    FUNCTION = "build"
    SEARCH_ALIASES = ["best of n", "inference scaling", "icedit early filter", "reward sampling", "judge"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "reward": widgets.reward(),
                "vae": socket("VAE")("Decodes what the judge looks at: the VAE of the model."),
                "candidates": integer(6, 1, 64)(
                    "How many samples compete. ICEdit found 6 a good number; 12 adds little."
                ),
                "judge_steps": integer(4, 1, 10000)(
                    "Steps every candidate makes before it is judged. More steps show the judge a clearer "
                    "image and cost more; 4 to 10 of 28 work."
                ),
            },
            "optional": {
                "layout": socket("DIPTYCH_LAYOUT")(
                    "From the Diptych Builder: the judge then sees the edited panel alone, at the source's "
                    "size, and source and mask are known."
                ),
                "source": socket("IMAGE")("The image before the edit; with a layout, its own."),
                "mask": socket("MASK")("1 where the edit may change something, for kept-area rewards."),
                "instruction": text("", multiline=True)(
                    "What was asked for, for rewards that read: the instruction, or for text agreement "
                    "(CLIP, PickScore, HPS) a description of the target image."
                ),
                "keep": integer(1, 1, 64, advanced=True)(
                    "How many of the best are finished, as a batch, best first."
                ),
                "together": integer(1, 1, 64, advanced=True)(
                    "Candidates per model call. More is faster on a large GPU with small images and takes "
                    "more memory; the result differs by rounding only."
                ),
                "rule": choice(RULES, "ode", advanced=True)(
                    "Step rule, as in the Flow-Match Euler Sampler; ode is euler."
                ),
                "eta": widgets.eta(advanced=True)(
                    "Noise of the SDE rules. auto: the rule's own value; 0: none."
                ),
                "sde_seed": widgets.seed(advanced=True)(
                    "Picks other paths from the same starting noise, for the SDE rules."
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def build(
        self,
        reward,
        vae,
        candidates: int = 6,
        judge_steps: int = 4,
        layout=None,
        source=None,
        mask=None,
        instruction: str = "",
        keep: int = 1,
        together: int = 1,
        rule: str = "ode",
        eta: float = -1.0,
        sde_seed: int = 0,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        """The SAMPLER. Raises ValueError for more kept than candidates."""
        if keep > candidates:
            raise ValueError(f"keep is {keep} but there are {candidates} candidates: keep fewer.")
        from ..samplers.comfy_early_filter import Settings, early_filter_sampler
        from ..training.evaluate.judge import Judge

        download(reward)
        judge = Judge.of(reward, instruction, source, mask, layout=layout)
        settings = Settings(
            judge=judge,
            vae=vae,
            candidates=candidates,
            judge_steps=judge_steps,
            keep=keep,
            together=together,
            rule=rule,
            eta=None if eta < 0 else eta,
            stream=sde_seed,
            report=report_to(unique_id),
        )
        return (early_filter_sampler(settings),)


NODES = [DiptychEarlyFilterSampler]
