"""Trains the two tiny text encoders of the bundled models (recipes with `task: text`).

FLUX gives text tokens no positions, so a text encoder must put into each token what it means where it
stands. Ours learn that by naming what captions and instructions of the shapes world say (what is in each
quadrant; which operation on what) through heads that are thrown away; afterwards they stay frozen.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.prompt import KEEP_REST
from ...models.tiny import build
from . import shapes
from .shapes.canvases import DIPTYCH_CAPTION, DIPTYCH_PROMPT
from .shapes.edits import WORDINGS, Edit
from .shapes.scenes import TEMPLATES

log = logging.getLogger(__name__)

_COLOURS, _NONE = tuple(shapes.COLOURS), 0
SLOTS = (
    ("background", len(_COLOURS)),
    *((f"shape {place}", 1 + len(TEMPLATES)) for place in shapes.PLACES),
    *((f"colour {place}", 1 + len(_COLOURS)) for place in shapes.PLACES),
    ("operation", len(shapes.OPERATIONS)),
    ("old kind", 1 + len(shapes.KINDS)),
    ("old colour", 1 + len(_COLOURS)),
    ("new kind", 1 + len(shapes.KINDS)),
    ("new size", 1 + len(shapes.SIZES)),
    ("new colour", 1 + len(_COLOURS)),
    ("new place", 1 + len(shapes.PLACES)),
)
_SCENE_SLOTS = 9


@dataclass
class TextRecipe:
    """How the text encoders are trained; every field is a key of the YAML recipe."""

    output_dir: str = "runs/tiny_text"  # where tokenizer/, text_encoder/, tokenizer_2/ and text_encoder_2/ go
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


def words() -> list[str]:
    """Every word of the shapes world, of the diptych prompt, and a few that people use about images."""
    extra = "a background with nothing and image picture photo color bigger smaller stacked"
    text = [DIPTYCH_PROMPT, KEEP_REST, extra]
    text += [w for rows in WORDINGS.values() for w in rows]
    text += [*shapes.COLOURS, *shapes.KINDS, *shapes.SIZES, *shapes.PLACES]
    plain = " ".join(text).lower()
    for gap in ("{old}", "{new}", "{new_colour}", "{new_kind}", "{place}", "{source}", ".", ","):
        plain = plain.replace(gap, " ")
    return sorted(set(plain.split()) | {part for w in plain.split() for part in w.split("-")})


def _edit_slots(edit: Edit) -> list[int]:
    """The values of an instruction's slots, those after the scene's."""
    old = next((s for s in edit.source.shapes if s not in edit.target.shapes), None)
    new = next((s for s in edit.target.shapes if s not in edit.source.shapes), None)
    kinds, sizes = tuple(shapes.KINDS), tuple(shapes.SIZES)
    operation = edit.operation
    if operation == "background":
        new_colour = 1 + _COLOURS.index(edit.target.background)
    else:
        new_colour = 1 + _COLOURS.index(new.colour) if operation in ("recolour", "add") else _NONE
    return [
        shapes.OPERATIONS.index(operation),
        1 + kinds.index(old.kind) if old and operation != "background" else _NONE,
        1 + _COLOURS.index(old.colour) if old and operation != "background" else _NONE,
        1 + kinds.index(new.kind) if operation in ("replace", "add") else _NONE,
        1 + sizes.index(new.size) if operation == "add" else _NONE,
        new_colour,
        1 + shapes.PLACES.index(new.place) if operation in ("move", "add") else _NONE,
    ]


def _example(rng: random.Random, edit: Edit, scene: list[int]) -> tuple[str, list[int]]:
    """A caption or an instruction of an edit, bare or as FLUX is prompted with it, and its slots.

    scene: the slots of the edit's target.
    """
    if rng.random() < 0.5:
        prompt = edit.target.caption
        prompt = DIPTYCH_CAPTION + prompt + "." if rng.random() < 0.3 else prompt
        row = scene + [-1] * (len(SLOTS) - _SCENE_SLOTS)
    else:
        prompt = edit.instruction
        prompt = DIPTYCH_PROMPT + prompt + "." if rng.random() < 0.7 else prompt
        row = [-1] * _SCENE_SLOTS + _edit_slots(edit)
    if rng.random() < 0.3:
        prompt = prompt[0].upper() + prompt[1:] if rng.random() < 0.5 else prompt.rstrip(".") + "."
    return prompt, row


def examples(seed: int, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Endless (prompts, slots `[B, len(SLOTS)]`); -1 where a slot does not apply."""
    chunk = 0
    while True:
        edits = list(shapes.random_edits(seed + 7919 * chunk, 64 * batch_size, "train"))
        chunk += 1
        rng = random.Random(f"{seed} {chunk} wrap")
        background, template, colour = shapes.codes([e.target for e in edits])
        scene = torch.cat([background[:, None], template, torch.where(template > 0, colour + 1, 0)], 1)
        rows = [_example(rng, edit, slots) for edit, slots in zip(edits, scene.tolist(), strict=True)]
        for first in range(0, len(rows), batch_size):
            prompts, slots = zip(*rows[first : first + batch_size], strict=True)
            yield list(prompts), torch.tensor(slots)


class SlotHeads(nn.Module):
    """Throw-away heads: a learned query per slot looks at the tokens once; a linear layer names the value."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.names = nn.ModuleList(nn.Linear(width, n) for _, n in SLOTS)

    def forward(self, tokens: Tensor, padding: Tensor) -> list[Tensor]:
        """Tokens [B,L,D], True [B,L] where they are padding -> logits [B,n] of every slot's values."""
        queries = self.queries.expand(len(tokens), -1, -1)
        seen = self.attention(queries, tokens, tokens, key_padding_mask=padding, need_weights=False)[0]
        return [name(seen[:, i]) for i, name in enumerate(self.names)]


def _slot_loss(logits: list[Tensor], slots: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the slots that apply, and whether every one of them is named right, `[B]`."""
    losses = [
        F.cross_entropy(row, slots[:, i], ignore_index=-1, reduction="sum") for i, row in enumerate(logits)
    ]
    right = torch.stack([(row.argmax(-1) == slots[:, i]) | (slots[:, i] < 0) for i, row in enumerate(logits)])
    return torch.stack(losses).sum() / (slots >= 0).sum(), right.all(0)


def train(
    recipe: TextRecipe,
    progress: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Runs a recipe; returns the folder of both tokenizers and encoders. `progress(step, steps, loss)`.

    It takes minutes and keeps no state, so `should_stop` is never asked.
    """
    torch.manual_seed(recipe.seed)
    out = Path(recipe.output_dir)
    clip_tokens = build.clip_tokenizer(out / "tokenizer", words())
    t5_tokens = build.t5_tokenizer(out / "tokenizer_2", words())
    clip, t5 = build.clip_text(len(clip_tokens)), build.t5_text(len(t5_tokens))
    heads = nn.ModuleList([SlotHeads(build.TEXT_WIDTH) for _ in range(2)])
    pooled = nn.ModuleList(nn.Linear(build.TEXT_WIDTH, n) for _, n in SLOTS)
    parameters = [*clip.parameters(), *t5.parameters(), *heads.parameters(), *pooled.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1
    )
    clock, right = time.process_time(), torch.zeros(3)
    for step, (prompts, slots) in zip(
        range(recipe.steps), examples(recipe.seed, recipe.batch_size), strict=False
    ):
        t5_in = t5_tokens(prompts, padding=True, return_tensors="pt")
        clip_in = clip_tokens(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        tokens = t5(t5_in.input_ids)[0]
        seen = clip(clip_in.input_ids)
        rows = (
            heads[0](tokens, t5_in.attention_mask == 0),
            heads[1](seen.last_hidden_state, clip_in.attention_mask == 0),
            [name(seen.pooler_output) for name in pooled],
        )
        losses, exact = zip(*(_slot_loss(row, slots) for row in rows), strict=True)
        loss = sum(losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        build.isolate_padding(t5)
        right = 0.98 * right + 0.02 * torch.stack([e.float().mean() for e in exact])
        if progress and step % 100 == 99:
            progress(step + 1, recipe.steps, loss.item())
            log.info("all slots right: T5 %.3f, CLIP tokens %.3f, CLIP pooled %.3f", *right.tolist())
    log.info("text encoders: %.0f CPU s", time.process_time() - clock)
    clip.eval().save_pretrained(out / "text_encoder")
    t5.eval().save_pretrained(out / "text_encoder_2")
    return out
