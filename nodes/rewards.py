"""Reward nodes: choose and weight rewards, judge images by them, improve a model by them.

Registered rewards and files in ComfyUI's own folders only: a shared workflow can neither import code nor
name an address or a repository of its choosing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import missing
from . import widgets
from .guard import validated
from .menus import REWARDS, reward_files, reward_path
from .shown import download, shown
from .widgets import choice, number, socket, text

PUBLISHED = "published"


class DiptychReward:
    """A choice of rewards by name, for the nodes that judge: `training/rewards/spec.py`."""

    DISPLAY_NAME = "Edit Reward"
    DESCRIPTION = (
        "Chooses who judges images: human-preference models (PickScore, HPSv2.1), text agreement (CLIP), "
        "likeness to the source (CLIP-I, DINO), a vision-language model that answers whether the edit was "
        "made, and measures of what was kept. Chain several: each is brought to one scale before they are "
        "weighted and summed."
    )
    CATEGORY = "diptych/rewards"
    RETURN_TYPES = ("DIPTYCH_REWARD",)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = (
        "For Edit Reward Score, Early Filter Sampler and Train GRPO LoRA, or for another Edit Reward node to "
        "add to.",
    )
    FUNCTION = "choose"
    NEEDS = ("transformers",)
    SEARCH_ALIASES = ["pickscore", "hpsv2", "clip score", "aesthetic", "judge", "dino", "vlm", "preference"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        from ..training.rewards import names

        return {
            "required": {
                "name": choice(names(), "pickscore")(
                    "pickscore, hpsv2, clip_l, clip_h: does it look as described. vlm_yes: was the edit "
                    "made. clip_i, dino: is it still the source. keep_l1, keep_ssim, keep_lpips: the rest "
                    "untouched. shapes: exact, for the demo images. multimodal: like its caption, for "
                    "demo images of one shape."
                ),
                "weight": number(1.0, -100.0, 100.0, step=0.05)(
                    "Share in the sum with other rewards; negative punishes."
                ),
            },
            "optional": {
                "also": socket("DIPTYCH_REWARD")("Rewards that judge too."),
                "weights_file": choice([PUBLISHED, *reward_files()], PUBLISHED, advanced=True)(
                    "published: the reward's own model, downloaded from Hugging Face once. Or a copy in "
                    "models/diptych_rewards; hpsv2 and aesthetic always need their file there."
                ),
                "question": text("", advanced=True)(
                    "Only for vlm_yes: a yes/no question of your own; the word prompt in braces stands for "
                    "the instruction."
                ),
                "device": choice(["cpu", "gpu"], "cpu", advanced=True)(
                    "Where the reward's model runs. gpu is faster and needs its memory beside the diffusion "
                    "model's: 2 to 4 GB, vlm_yes 17 GB."
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: object = None, weights_file: object = None) -> bool | str:
        """True, or which package or file the judge lacks; the hub is asked when it is loaded."""
        answer = validated(cls, name=name, weights_file=weights_file)
        if answer is not True or name is None:
            return answer
        from ..training.rewards import package_of

        if (package := package_of(name)) and (lacking := missing.lacking(package)):
            return f"reward {name} cannot judge: {lacking}"
        return _file_wanted(name, weights_file) or True

    def choose(
        self,
        name: str,
        weight: float = 1.0,
        also=None,
        weights_file: str = PUBLISHED,
        question: str = "",
        device: str = "cpu",
    ) -> tuple:
        """The rewards chosen so far and this one; nothing is loaded yet.

        Raises ValueError for a question or a file that the reward does not take, or a file that it lacks.
        """
        from ..training.rewards import Selection, Spec, options

        if wanted := _file_wanted(name, weights_file):
            raise ValueError(wanted)
        given: dict[str, str] = {}
        if weights_file != PUBLISHED:
            given["path"] = str(reward_path(weights_file))
        if question.strip():
            if "template" not in options(name):
                raise ValueError(f"question is for vlm_yes, but the reward is {name}: leave it empty.")
            given["template"] = question.strip()
        if "device" in options(name):
            given["device"] = _gpu() if device == "gpu" else "cpu"
        return ((also or Selection()).and_also(Spec(name, weight, tuple(given.items()))),)


NEEDS_FILE = {
    "hpsv2": ("HPS_v2.1_compressed.pt", "https://huggingface.co/xswu/HPSv2"),
    "aesthetic": (
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
}


def _file_wanted(name: object, weights_file: object) -> str:
    """What to say of a judge whose weights are no hub's; "" for any other, and where a file is chosen."""
    if weights_file not in (PUBLISHED, None) or name not in NEEDS_FILE:
        return ""
    file, link = NEEDS_FILE[name]
    return (
        f"reward {name} needs its weights: put {file} of {link} into models/{REWARDS} and choose it as "
        "weights_file."
    )


def _gpu() -> str:
    import comfy.model_management

    return str(comfy.model_management.get_torch_device())


class DiptychRewardScore:
    """`training/evaluate/judge.rank`."""

    DISPLAY_NAME = "Edit Reward Score"
    DESCRIPTION = (
        "Judges a batch of images by rewards: the numbers, the batch sorted best first, and a sheet with "
        "the scores written under the images. What a reward needs (instruction, source, mask) must be "
        "connected; an image it cannot judge counts as not judged, never as zero."
    )
    CATEGORY = "diptych/rewards"
    RETURN_TYPES = ("FLOAT", "STRING", "IMAGE", "IMAGE")
    RETURN_NAMES = ("best_score", "report", "sorted", "sheet")
    OUTPUT_TOOLTIPS = (
        "Of the best image: the reward's own number, or with several rewards the weighted sum of how many "
        "standard deviations it lies above the batch's mean.",
        "Every image's numbers, best first.",
        "The same images, best first.",
        "The images, best first, with their scores.",
    )
    FUNCTION = "score"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["rank images", "sort images", "pickscore", "clip score", "aesthetic score", "best"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "images": socket("IMAGE")("The images to judge; edits, from Diptych Split."),
                "reward": widgets.reward(),
            },
            "optional": {
                "source": socket("IMAGE")("The image before the edit; one serves all."),
                "mask": socket("MASK")("1 where the edit may change something."),
                "target": socket("IMAGE")("The target image, if it is known."),
                "prompt": text("", multiline=True)(
                    "The instruction, or for text agreement a description of the target image."
                ),
            },
        }

    def score(
        self,
        images: Tensor,
        reward,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        target: Tensor | None = None,
        prompt: str = "",
    ) -> dict[str, Any]:
        """(best score, report, images [N,H,W,3] best first, sheet), and what the node shows of them.

        Raises ValueError for images that no reward can judge.
        """
        from ..training.evaluate.judge import Judge, rank

        download(reward)
        ranking = rank(Judge.of(reward, prompt, source, mask, target), images)
        best = ranking.scores[0]
        return {
            "ui": shown(ranking.text, ranking.sheet),
            "result": (best, ranking.text, ranking.images, ranking.sheet),
        }


NODES = [DiptychReward, DiptychRewardScore]
