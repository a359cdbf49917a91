"""PowerPaint v1: Stable Diffusion inpainting with a learnt word for each task (Zhuang et al., 2023).

Its UNet is any nine-channel model to this pack. What is its own stands here: three task tokens of ten
vectors, cut out of its text encoder, and prompts of two variants whose embeddings are blended. Version 2,
which has a second UNet branch, is not covered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoints
from .denoiser import TextEmbedding
from .geometry import check_choice

CONTEXT, SHAPE, OBJECT = TOKENS = ("P_ctxt", "P_shape", "P_obj")
TASKS = ("remove", "outpaint", "shape", "text")
VECTORS = 10
KEY = "emb_params"  # of a textual-inversion file
BAD = ", worst quality, low quality, normal quality, bad quality, blurry "
_TRAINED = re.compile(r"(?:.*\.)?trainable_embeddings\.(\w+)")
_WRAPPED = "token_embedding.wrapped."
ENCODER, UNET = "text_encoder/text_encoder.safetensors", "unet/unet.safetensors"


class Prompts(NamedTuple):
    """Two variants of a text, of which the first has the weight of the fitting degree."""

    first: str
    second: str


def prompts(
    task: str, prompt: str, negative: str = "", word: Callable[[str], str] = str
) -> tuple[Prompts, Prompts]:
    """(positive, negative) of a task, as PowerPaint's own app writes them; `word` writes a task token.

    Raises ValueError for an unknown task.
    """
    check_choice("task", task, TASKS)
    context, shape, thing = (word(token) for token in TOKENS)
    if task in ("remove", "outpaint"):
        texts = [f"empty scene blur {prompt} {context}"] * 2, [f"{negative} {thing}"] * 2
    elif task == "shape":
        texts = (
            [f"{prompt} {shape}", f"{prompt} {context}"],
            [f"{negative}{BAD}{shape}", f"{negative}{BAD}{context}"],
        )
    else:
        texts = [f"{prompt} {thing}"] * 2, [f"{negative}{BAD}{thing}"] * 2
    return Prompts(*texts[0]), Prompts(*texts[1])


def used_tokens(task: str) -> list[str]:
    """The task tokens that a task's prompts hold."""
    texts = " ".join(text for pair in prompts(task, "") for text in pair)
    return [token for token in TOKENS if token in texts]


def blend(first: Tensor, second: Tensor, fitting: float) -> Tensor:
    """fitting * first + (1 - fitting) * second, of embeddings of one shape."""
    return fitting * first + (1 - fitting) * second


def task_tokens(path: str | Path) -> dict[str, Tensor]:
    """The vectors [10, D] of each task token in PowerPaint's text encoder file.

    Raises ValueError for a file without them.
    """
    with checkpoints.opened(path) as file:
        found = {match[1]: name for name in file.names() if (match := _TRAINED.fullmatch(name))}
        missing = [token for token in TOKENS if token not in found]
        if missing:
            raise ValueError(
                f"{path} has no trainable_embeddings.{missing[0]}: give text_encoder.safetensors of "
                "PowerPaint v1"
            )
        tokens = {token: file.read(found[token]).clone() for token in TOKENS}
    for token, vectors in tokens.items():
        if vectors.ndim != 2 or len(vectors) != VECTORS:
            raise ValueError(
                f"{path}: {token} has shape {tuple(vectors.shape)} instead of [{VECTORS}, width]"
            )
    return tokens


def write_encoder(path: Path, output: Path) -> None:
    """The text encoder without task tokens and wrapper, as ComfyUI's Load CLIP takes it."""
    with checkpoints.opened(path) as file:
        kept = {
            name.replace(_WRAPPED, "token_embedding."): name
            for name in file.names()
            if not _TRAINED.fullmatch(name)
        }
        plan = {name: file.describe(own) for name, own in kept.items()}
        checkpoints.stream(output, plan, lambda index, name: file.read(kept[name]))


def shell_word(token: str) -> str:
    """A task token as `teach` taught the tokenizer to read it."""
    return " ".join(f"{token}_{index}" for index in range(VECTORS))


def teach(tokenizer: Any, text_encoder: Any, tokens: Mapping[str, Tensor]) -> None:
    """Add the task tokens to transformers' tokenizer and CLIPTextModel, in place: ten new words for each."""
    from transformers import AddedToken

    words = [word for token in tokens for word in shell_word(token).split()]
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=False) for word in words])
    # Not len(tokenizer): SD's embedding table may be larger than the tokenizer's vocabulary.
    numbers = tokenizer.convert_tokens_to_ids(words)
    old = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        text_encoder.resize_token_embeddings(max(len(old), max(numbers) + 1), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        table[numbers] = torch.cat(list(tokens.values())).to(table)


def load_onto(denoiser: Any, folder: str | Path) -> None:
    """PowerPaint's folder onto an `SDInpaint`, in place: its UNet's and text encoder's weights, its tokens.

    Raises FileNotFoundError or ValueError for a folder that is not PowerPaint v1's.
    """
    folder = Path(folder)
    tokens = task_tokens(folder / ENCODER)
    for part, path in ((denoiser.text_encoder, folder / ENCODER), (denoiser.unet, folder / UNET)):
        with checkpoints.opened(path) as file:
            names = {_short(name): name for name in file.names() if not _TRAINED.fullmatch(name)}
            own = part.state_dict()
            if lacking := sorted(name for name in own if _short(name) not in names):
                raise ValueError(f"{path} lacks {lacking[0]}: it belongs to another model than --model")
            # Not strict the other way: older transformers also saved positions as a buffer.
            part.load_state_dict({name: file.read(names[_short(name)]) for name in own})
    teach(denoiser.tokenizer, denoiser.text_encoder, tokens)


def _short(name: str) -> str:
    """A weight's name without PowerPaint's wrapper, and without the prefix that transformers 5 dropped."""
    return name.replace(_WRAPPED, "token_embedding.").removeprefix("text_model.")


def encode(
    denoiser: Any, task: str, prompt: str, negative: str = "", fitting: float = 1.0
) -> tuple[TextEmbedding, TextEmbedding]:
    """(positive, negative) of a task, blended, on a denoiser that `teach` or `load_onto` prepared.

    fitting: 0 to 1, how closely a shape is followed. Raises ValueError for an unknown task.
    """
    both = []
    for pair in prompts(task, prompt, negative, shell_word):
        first, second = (denoiser.encode_text(text).tokens for text in pair)
        both.append(TextEmbedding(first if pair.first == pair.second else blend(first, second, fitting)))
    return both[0], both[1]
