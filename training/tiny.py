"""Trains the tiny FLUX models of the shapes world: Fill base, ICEdit LoRA and MoE-LoRA, Kontext.

The loss is that of `training/losses.py`, the packing and ids those of `models/`; what is particular is the
speed: one process, one device, latents and text cached in memory, text of just the length that is needed
(`tiny_data.Texts`). Not the trainer for real models: that is `training/sft.py`.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.prompt import ICEDIT_TEMPLATE
from . import adapters, export, losses, shapes, tiny_data
from .tiny_data import Rows
from .tiny_model import Velocity, transformer_for

log = logging.getLogger(__name__)


@dataclass
class TinyRecipe:
    """How a tiny denoiser is trained; every field is a key of the YAML recipe."""

    family: str = "fill"  # fill | edit | kontext
    method: str = "full"  # full | lora | moe_lora
    output_dir: str = "runs/tiny_fill"
    vae: str = "runs/tiny_vae/vae"
    text: str = "runs/tiny_text"
    start_from: str = ""  # transformer folder: base of a LoRA, or warm start of a full training
    merge_lora: str = ""  # LoRA file added to `start_from` for good
    start_lora: str = ""  # state.pt or file of a plain LoRA to start from
    text_modules: bool = (
        False  # LoRA on the text stream of the double blocks too, not only on ICEdit's modules
    )
    rank: int = 32
    lora_alpha: float = 32.0
    moe_experts: int = 4
    moe_top_k: int = 1
    moe_gate: str = "softmax_all"
    moe_balance: float = 0.01
    lora_dropout: float = 0.0
    examples: int = 30_000
    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 1e-3
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    mask_loss_weight: float = 4.0  # of the repainted cells against 1 elsewhere
    edit_loss_weight: float = (
        0.0  # added in the quadrants that an edit touches, a small part of what is repainted
    )
    logit_mean: float = 0.0
    logit_std: float = 1.0
    prompt_drop: float = 0.03
    bf16: bool = True
    seed: int = 0
    save_every: int = 500
    score_every: int = 1000
    score_pairs: int = 100

    @property
    def alpha(self) -> float:
        return self.lora_alpha

    @property
    def task(self) -> str:
        return "kontext" if self.family == "kontext" else "fill"


def load_rows(recipe: TinyRecipe, n: int, split: str, seed: int) -> list[Rows]:
    """Encoded examples, one `Rows` per canvas width; cached in the output folder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(recipe.vae).eval()
    drawn = tiny_data.canvases(recipe.family, seed, n, split)
    kontext = recipe.family == "kontext"
    groups = [drawn] if kontext else [[c for c in drawn if len(c.panels) == k] for k in (1, 2)]
    out = []
    for number, group in enumerate(g for g in groups if g):
        cache = Path(recipe.output_dir) / f"rows_{recipe.family}_{split}_{seed}_{n}_{number}.pt"
        if cache.exists():
            *pictures, tokens, pooled, pad = torch.load(cache, weights_only=True)
            rows = Rows(group, *pictures, tiny_data.Texts(tokens, pooled, pad))
        else:
            rows = tiny_data.encode(group, vae, reference=kontext, seed=seed)
            rows.text = text = tiny_data.embed([c.prompt for c in group], Path(recipe.text))
            torch.save([rows.latents, rows.condition, rows.mask, text.tokens, text.pooled, text.pad], cache)
        out.append(rows)
    return out


def _pick(rows: Rows, index: list[int]) -> dict[str, Tensor]:
    return {
        "latents": rows.latents[index].float(),
        "condition": rows.condition[index].float(),
        "mask": rows.mask[index].float(),
    }


def step_loss(velocity: Velocity, rows: Rows, index: list[int], recipe: TinyRecipe, generator, rng) -> Tensor:
    """Flow-matching loss of one batch: random sigma, guidance value and padded length."""
    batch = _pick(rows, index)
    length = rng.choice((64, 64, 64, 128, 256, 512))
    text = rows.text.batch(index, length)
    x0 = batch["latents"]
    u = torch.rand(len(index), generator=generator)
    sigma = losses.sigma_from_uniform(
        u, "logit_normal", logit_mean=recipe.logit_mean, logit_std=recipe.logit_std
    )
    noise = torch.randn(x0.shape, generator=generator)
    x, target = losses.noised(x0, noise, sigma)
    guidance = 1 + 59 * torch.rand(len(index), generator=generator)
    prediction = velocity(x, sigma, batch, text, guidance)
    weighted = "all" if recipe.family == "kontext" else "weighted"
    cells = losses.region(batch["mask"][:, None], x0, weighted, recipe.mask_loss_weight)
    if recipe.edit_loss_weight:
        touched = shapes.place_masks([rows.canvases[i].edit.places for i in index], 8)[:, None]
        left = torch.nn.functional.pad(touched, (x0.shape[-1] - 8, 0))
        cells = (torch.ones_like(left) if cells is None else cells) + recipe.edit_loss_weight * left
    return losses.weighted_mse(prediction, target, cells).mean()


@torch.no_grad()
def generate(
    velocity: Velocity, rows: Rows, index: list[int], vae: Any, steps: int = 16, seed: int = 0
) -> Tensor:
    """Pictures `[B,H,W,3]` in 0..1 by Euler steps on FLUX's shifted schedule, guidance 30."""
    from ..samplers.schedule import sigmas

    batch = _pick(rows, index)
    text = rows.text.batch(index, 64)
    x = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(seed))
    schedule = sigmas(steps, seq_len=x.shape[-1] * x.shape[-2] // 4).tolist()
    for now, then in zip(schedule[:-1], schedule[1:], strict=True):
        sigma = torch.full((len(x),), now)
        x = x + (then - now) * velocity(x, sigma, batch, text, torch.full((len(x),), 30.0))
    z = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def score(velocity: Velocity, held_out: list[Rows], vae: Any, n: int, steps: int = 16) -> dict[str, float]:
    """Share of held-out rows that come out right: edit success, or in-hole caption accuracy."""
    rows = held_out[-1]
    index = list(range(min(n, len(rows))))
    pictures = torch.cat(
        [generate(velocity, rows, index[i : i + 100], vae, steps, seed=i) for i in range(0, len(index), 100)]
    )
    panels = pictures[:, :, -pictures.shape[1] :]
    chosen = [rows.canvases[i] for i in index]
    if chosen[0].edit is not None:
        result = shapes.edit_success(panels, [c.edit for c in chosen])
        out = {name: value.float().mean().item() for name, value in result.items()}
        for operation in shapes.OPERATIONS:
            here = [i for i, c in enumerate(chosen) if c.edit.operation == operation]
            out[operation] = result["success"][here].float().mean().item() if here else math.nan
        return out
    match = shapes.places_match(panels, [c.panels[-1] for c in chosen], [c.holes for c in chosen])
    return {"in_mask": match.float().mean().item()}


def train(recipe: TinyRecipe, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """Runs a recipe, going on from `state.pt` in its output folder; returns that folder."""
    from diffusers import AutoencoderKL

    out = Path(recipe.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(recipe.vae).eval()
    clock = time.process_time()
    data = load_rows(recipe, recipe.examples, "train", recipe.seed)
    held_out = load_rows(recipe, max(recipe.score_pairs, 100), "val", 1)
    log.info("rows %s, %.0f CPU s", [len(r) for r in data], time.process_time() - clock)
    module = transformer_for(recipe).train()
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    log.info("%.3f M trained parameters", sum(p.numel() for p in trained.values()) / 1e6)
    ema = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    start, spent, state = 0, 0.0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        module.load_state_dict(saved["trained"], strict=False)
        ema = saved["ema"]
        optimizer.load_state_dict(saved["optimizer"])
        start, spent = saved["step"], saved["cpu_seconds"]
    velocity = Velocity(module, recipe.family, recipe.bf16)
    running, weights = math.nan, [len(r) for r in data]
    for step in range(start, recipe.steps):
        rng = random.Random(f"{recipe.seed} {step}")
        generator = torch.Generator().manual_seed(recipe.seed * 10_000_019 + step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        rows = rng.choices(data, weights)[0]
        index = [rng.randrange(len(rows)) for _ in range(recipe.batch_size)]
        loss = step_loss(velocity, rows, index, recipe, generator, rng)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {step}: lower learning_rate ({recipe.learning_rate})"
            )
        balance = adapters.balance_loss(module)
        if balance is not None:
            loss = loss + recipe.moe_balance * balance
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)
        running = value if math.isnan(running) else 0.99 * running + 0.01 * value
        last = step + 1 == recipe.steps
        if progress and step % 50 == 49:
            progress(step + 1, recipe.steps, running)
        if step % recipe.save_every == recipe.save_every - 1 or last:
            cpu = spent + time.process_time() - clock
            current = {k: p.detach() for k, p in trained.items()}
            content = {"trained": current, "ema": ema, "optimizer": optimizer.state_dict()}
            torch.save({**content, "step": step + 1, "cpu_seconds": cpu}, out / "state.tmp")
            (out / "state.tmp").replace(state)
        if step % recipe.score_every == recipe.score_every - 1 or last:
            kept = {k: p.detach().clone() for k, p in trained.items()}
            _copy(trained, ema)
            module.eval()
            result = score(velocity, held_out, vae, recipe.score_pairs)
            log.info("step %d: %s", step + 1, {k: round(v, 3) for k, v in result.items()})
            if last:
                save(module, recipe, out, {"steps": recipe.steps, **result})
            _copy(trained, kept)
            module.train()
    return out


def save(module: nn.Module, recipe: TinyRecipe, out: Path, figures: dict[str, float]) -> None:
    """Full training: a `transformer` folder. LoRA: `lora.safetensors` in float16, by `export`."""
    if recipe.method == "full":
        module.save_pretrained(out / "transformer")
        return
    tensors = {name: value.half() for name, value in adapters.trained_state(module).items()}
    header = {
        "base": "tiny Fill of the shapes world",
        "recipe": f"tiny {recipe.family} {recipe.method}",
        "steps": recipe.steps,
        "prompt_template": ICEDIT_TEMPLATE,
        "validation": {name: round(value, 4) for name, value in figures.items()},
    }
    export.save_lora(out / "lora.safetensors", {"transformer": tensors}, recipe, header)


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def schedule(step: int, recipe: TinyRecipe) -> float:
    """Linear warm-up, then cosine to 1 % of the learning rate."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
