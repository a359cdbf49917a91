"""Text to image, image to text, and how like they are: the small multimodal model (`docs/multimodal.md`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import widgets
from .menus import BUNDLED_MULTIMODAL, multimodal_folder, multimodal_models
from .shown import shown
from .widgets import choice, integer, number, socket, switch, text

CATEGORY = "diptych/multimodal"
MODEL = "DIPTYCH_MULTIMODAL"
EXAMPLE = "a white background with a small red circle at the top left"
MOST = 1024  # images, or captions, of one call


def _model() -> widgets.Row:
    return socket(MODEL)("From Load Multimodal Model.")


def _lines(name: str, texts: str) -> list[str]:
    """One text for each line that is not empty. Raises ValueError if there is none."""
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{name} is empty: write at least one line.")
    return lines


class DiptychMultimodalLoader:
    """`models/multimodal/comfy.load`."""

    DISPLAY_NAME = "Load Multimodal Model"
    DESCRIPTION = (
        "Loads a small multimodal model, which draws images for texts, writes texts for images, and says "
        "how like they are. The one that comes with the pack knows 56x56 images of one coloured shape and "
        "runs anywhere; your own, trained by `diptych train multimodal`, go into models/diptych_multimodal."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("For Text to Image, Image to Text and Image-Text Similarity.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ["text to image model", "caption model", "tiny multimodal", "latent diffusion"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": choice([BUNDLED_MULTIMODAL, *multimodal_models()], BUNDLED_MULTIMODAL)(
                    "tiny (bundled): comes with the pack. Others: folders in models/diptych_multimodal."
                )
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: object = None, **_: Any) -> str:
        """A text that changes when the model was trained anew."""
        folder = multimodal_models().get(model) if isinstance(model, str) else None
        return "" if folder is None else str((folder / "model.safetensors").stat().st_mtime_ns)

    def load(self, model: str) -> tuple[Any]:
        """The model in ComfyUI's care. Raises ValueError or FileNotFoundError for another folder."""
        folder = multimodal_folder(model)
        from ..models.multimodal import comfy

        return (comfy.load(folder),)


class DiptychTextToImage:
    """`GenerativeMultimodalModel.generate_from_text`."""

    DISPLAY_NAME = "Text to Image (Multimodal)"
    DESCRIPTION = (
        "Draws images for texts with a multimodal model: the text becomes a vector, a diffusion model draws "
        "the 7x7 latent that belongs to it, a decoder turns that into the image. Each line is a prompt of "
        "its own. The same seed gives the same image as `diptych generate`."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "report")
    OUTPUT_TOOLTIPS = (
        "The images of the first prompt, then those of the second, ...",
        "Which images belong to which prompt, and which of its words the model does not know.",
    )
    FUNCTION = "draw"
    SEARCH_ALIASES = ["generate image", "txt2img", "prompt to image", "ddim", "draw"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": _model(),
                "prompts": text(EXAMPLE, multiline=True)(
                    "What the images show, one prompt a line, in the words of the model's training captions; "
                    "for the bundled model like the example."
                ),
                "count": integer(1, 1, 64)("Images of each prompt."),
                "steps": integer(50, 1, 1000)("DDIM steps. 10 to 20 for a preview, 30 to 50 usually."),
                "cfg": number(2.0, -10.0, 30.0, step=0.1)(
                    "How far to go beyond what the model draws without a text; 1 = off."
                ),
                "seed": widgets.seed()("Of the noise: the same seed, the same images."),
            },
            "optional": {
                "diffusion": switch(True, advanced=True)(
                    "Off: decode the text's own vector, without diffusion. Then steps, cfg and seed do "
                    "nothing, and all images of a prompt are the same."
                )
            },
        }

    def draw(
        self,
        model: Any,
        prompts: str,
        count: int = 1,
        steps: int = 50,
        cfg: float = 2.0,
        seed: int = 0,
        diffusion: bool = True,
    ) -> dict:
        """(IMAGE [prompts * count, S, S, 3], report), and what the node shows.

        Raises ValueError for no prompt, one of which the model knows no word, or too many images.
        """
        lines = _lines("prompts", prompts)
        if len(lines) * count > MOST:
            raise ValueError(
                f"{len(lines)} prompts and count {count} are {len(lines) * count} images: {MOST} "
                "is the most, take fewer."
            )
        from ..models.multimodal import comfy
        from ..models.multimodal.reading import remarks

        told = remarks(model.model, lines)
        images = comfy.text_to_image(
            model, lines, count, steps=steps, cfg=cfg, seed=seed, diffusion=diffusion
        )
        report = "\n".join([_which(lines, count), *told])
        return {"ui": shown(report), "result": (images, report)}


def _which(prompts: list[str], count: int) -> str:
    """Which images of the batch show which prompt, counted from 1."""
    last = "" if count == 1 else "-{}"
    return "\n".join(
        f"image {row * count + 1}{last.format((row + 1) * count)}: {prompt}"
        for row, prompt in enumerate(prompts)
    )


class DiptychImageToText:
    """`GenerativeMultimodalModel.generate_from_image`."""

    DISPLAY_NAME = "Image to Text (Multimodal)"
    DESCRIPTION = (
        "Writes captions for images with a multimodal model: the image becomes a vector, and a small GPT-2 "
        "writes the text behind it, word by word. The likeliest caption, or several drawn at random. It "
        "sees the middle square of an image."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("captions", "text")
    OUTPUT_IS_LIST = (True, False)
    OUTPUT_TOOLTIPS = (
        "One text for each caption: what follows runs once for each. The captions of an image side by side.",
        "All of them, one a line: as prompts for Text to Image, an image each in one batch.",
    )
    FUNCTION = "read"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["caption", "describe image", "interrogate", "img2txt", "captioning"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": _model(),
                "images": socket("IMAGE")("The images to caption, of any size."),
                "greedy": switch(True)(
                    "On: the likeliest caption of each image; what follows does nothing. Off: draw captions."
                ),
                "count": integer(1, 1, 64)("Captions of each image; more than one only if not greedy."),
                "temperature": number(0.9, 0.01, 10.0, step=0.05)(
                    "Below 1 the likely words become likelier, above 1 the unlikely."
                ),
                "top_k": integer(50, 0, 100_000)("Draw among so many of the likeliest words; 0 = all."),
                "top_p": number(0.9, 0.01, 1.0, step=0.01)(
                    "Draw among the likeliest words that together have this probability; 1 = all."
                ),
                "repetition_penalty": number(1.3, 0.1, 10.0, step=0.05)(
                    "Above 1, words that were used become less likely; 1 = none."
                ),
                "seed": widgets.seed()("Of the draw: the same seed, the same captions."),
            }
        }

    def read(
        self,
        model: Any,
        images: Tensor,
        greedy: bool = True,
        count: int = 1,
        temperature: float = 0.9,
        top_k: int = 50,
        top_p: float = 0.9,
        repetition_penalty: float = 1.3,
        seed: int = 0,
    ) -> dict:
        """(captions, a list; all of them as one text), shown on the node too.

        Raises ValueError for several captions that would all be the same.
        """
        if greedy and count > 1:
            raise ValueError(
                f"count is {count}, but greedy gives one caption: switch greedy off, or count 1."
            )
        if len(images) * count > MOST:
            raise ValueError(
                f"{len(images)} images and count {count} are more than {MOST} captions: take fewer."
            )
        from ..models.multimodal import comfy

        drawn = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
        likeliest = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
        sampling = {"top_k": top_k, **(likeliest if greedy else drawn)}
        rows = comfy.image_to_text(model, images, count, seed, **sampling)
        captions = [caption for row in rows for caption in row]
        joined = "\n".join(captions)
        return {"ui": shown(joined), "result": (captions, joined)}


class DiptychMultimodalScore:
    """`GenerativeMultimodalModel.similarity`, and the model as a reward."""

    DISPLAY_NAME = "Image-Text Similarity"
    DESCRIPTION = (
        "Says how like images and texts are, by a multimodal model: the cosine of their vectors, 1 at most. "
        "For each text it picks the image that is most like it, so that the best of several drawings goes "
        "on. The reward output lets the model judge elsewhere; for that alone no image is needed."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "INT", "FLOAT", "STRING", "IMAGE", "DIPTYCH_REWARD")
    RETURN_NAMES = ("best_image", "best_index", "similarity", "report", "sheet", "reward")
    OUTPUT_IS_LIST = (False, True, True, False, False, False)
    OUTPUT_TOOLTIPS = (
        "For each text the image most like it, in the order of the texts.",
        "Their places in the batch, from 0, one for each text.",
        "Their cosines, one for each text.",
        "Every text with all images, most like it first.",
        "The images, each with its cosine and the text that is most like it.",
        "This model as a judge of how like an image is to its prompt, for Edit Reward Score, Early Filter "
        "Sampler and Train GRPO LoRA, or for another Edit Reward node to add to.",
    )
    FUNCTION = "score"
    OUTPUT_NODE = True
    SEARCH_ALIASES = ["clip score", "retrieval", "rank images", "best of n", "cosine similarity", "reward"]

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The table of inputs, as ComfyUI's schema has it."""
        return {
            "required": {
                "model": _model(),
                "texts": text(EXAMPLE, multiline=True)("What to compare the images with, one text a line."),
            },
            "optional": {
                "images": socket("IMAGE")("The images, of any size. Without any, only the reward comes out.")
            },
        }

    def score(self, model: Any, texts: str, images: Tensor | None = None) -> dict:
        """(best images, their numbers, cosines, report, sheet, reward), and what the node shows of them.

        Raises ValueError for no text, or one of which the model knows no word.
        """
        from ..training.rewards import Selection, Spec

        reward = Selection((Spec("multimodal", 1.0, (("path", str(model.folder)), ("device", "cpu"))),))
        if images is None:
            return {"ui": shown("no images: only the reward"), "result": (*_nothing(5), reward)}
        lines = _lines("texts", texts)
        from ..models.multimodal import comfy
        from ..models.multimodal.reading import remarks
        from ..training.evaluate.likeness import compare

        told = remarks(model.model, lines)
        found = compare(images, lines, comfy.similarity(model, images, lines))
        report = "\n".join([found.text, *told])
        result = (found.images, found.best, found.cosines, report, found.sheet, reward)
        return {"ui": shown(report, found.sheet), "result": result}


def _nothing(count: int) -> list[Any]:
    """Outputs behind which nothing runs."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return [ExecutionBlocker(None)] * count


NODES = [DiptychMultimodalLoader, DiptychTextToImage, DiptychImageToText, DiptychMultimodalScore]
