"""What the tiny denoisers learn from and are scored on: shapes canvases as cached latents, prompts as
embeddings.

Families: `fill` (the base: captioned pictures and diptychs with a hole, never an edit instruction), `edit`
(ICEdit: a diptych whose right panel is the edit), `kontext` (target and reference panel) and `sd_inpaint` (a
captioned panel with a hole). Everything is encoded once; a row is then a few kilobytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shapes
from .shapes.edits import Edit
from .text import DIPTYCH_CAPTION, DIPTYCH_PROMPT

FAMILIES = ("fill", "edit", "kontext", "sd_inpaint")
COPY_PROMPTS = (
    "A diptych with two side-by-side images of the same scene.",
    DIPTYCH_PROMPT.removesuffix(" but "),
    "two side-by-side images of the same scene",
)


@dataclass
class Canvas:
    """One training or scoring example before encoding."""

    prompt: str
    panels: tuple[shapes.Scene, ...]  # left to right
    holes: tuple[str, ...]  # quadrants of the last panel to repaint
    edit: Edit | None = None


@dataclass
class Rows:
    """Encoded examples of one canvas size; latents are model space, fp16 on disk."""

    canvases: list[Canvas]
    latents: Tensor  # [N,C,h,w]
    condition: Tensor  # [N,C,h,w] latents of the masked canvas, or of the reference panel
    mask: Tensor  # [N,H,W] uint8, 1 = repaint
    text: Texts | None = field(default=None)

    def __len__(self) -> int:
        return len(self.canvases)


@dataclass
class Texts:
    """Embeddings of prompts without padding, and the one embedding that every pad has."""

    tokens: list[Tensor]  # [n_i, D]
    pooled: Tensor  # [N, P]
    pad: Tensor  # [D]

    def batch(self, rows: Sequence[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens `[B,L,D]`, pooled `[B,P]`, bias `[B,L]`) standing for prompts padded to `length` tokens.

        L is just long enough: pads are all alike and FLUX gives text no positions, so n pads are one pad
        whose attention logit has log n added.
        """
        longest = max(len(self.tokens[r]) for r in rows) + 1
        out = self.pad.expand(len(rows), longest, -1).clone()
        bias = torch.zeros(len(rows), longest)
        for i, r in enumerate(rows):
            n = len(self.tokens[r])
            out[i, :n] = self.tokens[r]
            bias[i, n:] = torch.tensor(max(1, length - n) / (longest - n)).log()
        return out, self.pooled[list(rows)], bias


def canvases(family: str, seed: int, n: int, split: str = "train") -> list[Canvas]:
    """`n` examples of a family, the same for the same arguments. Raises ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}: use one of {', '.join(FAMILIES)}")
    rng = random.Random(f"{family} {seed} {split} canvases")
    rows = []
    for edit in shapes.random_edits(seed, n, split):
        if family == "edit":
            rows.append(
                Canvas(DIPTYCH_PROMPT + edit.instruction, (edit.source, edit.target), shapes.PLACES, edit)
            )
        elif family == "kontext":
            rows.append(Canvas(edit.instruction, (edit.source, edit.target), (), edit))
        elif family == "sd_inpaint":
            rows.append(Canvas(edit.target.caption, (edit.target,), _holes(rng), None))
        else:
            rows.append(_fill_canvas(rng, edit, split))
    return rows


def _fill_canvas(rng: random.Random, edit: Edit, split: str) -> Canvas:
    kind = rng.random()
    if split != "train" or kind < 0.35:
        return Canvas(edit.target.caption, (edit.target,), _holes(rng))
    holes = shapes.PLACES if rng.random() < 0.7 else _holes(rng)
    if kind < 0.65:
        return Canvas(DIPTYCH_CAPTION + edit.target.caption, (edit.source, edit.target), holes)
    return Canvas(rng.choice(COPY_PROMPTS), (edit.source, edit.source), holes)


def _holes(rng: random.Random) -> tuple[str, ...]:
    count = rng.choice((1, 1, 2, 2, 3, 4))
    return tuple(sorted(rng.sample(shapes.PLACES, count), key=shapes.PLACES.index))


@torch.no_grad()
def encode(rows: list[Canvas], vae: Any, *, reference: bool = False, seed: int = 0) -> Rows:
    """Encodes canvases of one width; with `reference` (Kontext) the first panel is the condition.

    Half of the conditions are samples of the posterior and half its mode: diffusers' Fill pipeline samples,
    ComfyUI does not.
    """
    generator = torch.Generator().manual_seed(seed)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    channels_last = torch.channels_last
    vae = vae.to(memory_format=channels_last)
    parts = []
    for first in range(0, len(rows), 64):
        chunk = rows[first : first + 64]
        panels = [shapes.render_many(list(column)) for column in zip(*(c.panels for c in chunk), strict=True)]
        mask = shapes.place_masks([c.holes for c in chunk])
        if reference:
            picture, other = panels[-1], panels[0]
        else:
            picture = torch.cat(panels, 2)
            mask = torch.cat([torch.zeros_like(mask)] * (len(panels) - 1) + [mask], 2)
            other = None
        picture = picture.permute(0, 3, 1, 2) * 2 - 1
        other = picture * (1 - mask[:, None]) if other is None else other.permute(0, 3, 1, 2) * 2 - 1
        target = vae.encode(picture.contiguous(memory_format=channels_last)).latent_dist.mode()
        posterior = vae.encode(other.contiguous(memory_format=channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator) * posterior.std
        use = (torch.rand(len(chunk), 1, 1, 1, generator=generator) < 0.5).float()
        condition = posterior.mean + (0 if reference else use * noise)
        latents = [((z - shift) * scale).to(torch.float16).contiguous() for z in (target, condition)]
        parts.append((*latents, mask.to(torch.uint8)))
    return Rows(rows, *(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def embed(prompts: Sequence[str], folder: Path) -> Texts:
    """Embeds prompts with the encoders of `folder` (see `Texts`)."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    clip_tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5_tokens = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").float().eval()
    unique = list(dict.fromkeys(prompts))
    order = sorted(range(len(unique)), key=lambda i: len(unique[i]))
    tokens, pooled, pad = [None] * len(unique), [None] * len(unique), None
    for first in range(0, len(order), 256):
        rows = order[first : first + 256]
        text = [unique[r] for r in rows]
        ids = t5_tokens(text, padding=True, return_tensors="pt")
        ids.input_ids = torch.nn.functional.pad(ids.input_ids, (0, 1), value=t5_tokens.pad_token_id)
        states = t5(ids.input_ids)[0]
        pad = states[0, -1].clone()
        lengths = ids.attention_mask.sum(1).tolist()
        clip_ids = clip_tokens(
            text, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        vectors = clip(clip_ids).pooler_output
        for i, r in enumerate(rows):
            tokens[r], pooled[r] = states[i, : lengths[i]].clone(), vectors[i]
    where = {prompt: i for i, prompt in enumerate(unique)}
    picks = [where[p] for p in prompts]
    return Texts([tokens[i] for i in picks], torch.stack([pooled[i] for i in picks]), pad)
