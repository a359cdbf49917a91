"""Trains the small VAEs of the bundled models on the shapes world (recipes with `task: vae`).

Pictures are drawn as they are needed: single panels, diptychs, and both with quadrants or a panel greyed
out, since a Fill model encodes masked pictures and GroupNorm sees the whole canvas. What is learned is an
ordinary `AutoencoderKL`; its `scaling_factor` and `shift_factor` are measured on training scenes at the
end, so that latents in model space have zero mean and unit deviation.

Not a VAE trainer for photographs: no perceptual or adversarial loss.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.tiny import build
from ..runtime.precision import bf16_is_fast
from . import shapes

log = logging.getLogger(__name__)


@dataclass
class VaeRecipe:
    """How a tiny VAE is trained; every field is a key of the YAML recipe."""

    output_dir: str = "runs/tiny_vae"  # where vae/ and state.pt go
    architecture: str = "flux"  # "flux": 16 latent channels; "sd": 4
    decoder_only: bool = False  # keep the encoder, and with it every cached latent, as it is
    start_from: str = ""  # a vae folder to start from; empty: fresh weights
    text: str = ""  # folder with the text encoders; pipelines with untrained denoisers are written too
    steps: int = 15_000
    batch_size: int = 8  # panels a step; a diptych counts as two
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    kl_weight: float = 2e-5  # times the mean KL of a latent element; the rate-distortion balance near 37 dB
    l1_weight: float = 0.05
    latent_noise: float = 0.0  # deviation of extra noise on the decoder's input, in units of the latents' own
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    bf16: bool = True  # where the CPU has units for it
    scenes: int = 60_000
    seed: int = 0
    save_every: int = 1000


def pictures(recipe: VaeRecipe, start: int = 0) -> Iterator[Tensor]:
    """Endless batches `[B,3,64,W]` in -1..1, W 64 or 128; step `start` onwards of one fixed order."""
    bank = [(e.source, e.target) for e in shapes.random_edits(recipe.seed, recipe.scenes // 2, "train")]
    sources, targets = (shapes.codes(side) for side in zip(*bank, strict=True))
    step = start
    while True:
        rng = random.Random(f"{recipe.seed} {step}")
        wide, greyed = rng.random() < 0.3, rng.random() < 0.25
        rows = torch.tensor([rng.randrange(len(bank)) for _ in range(max(1, recipe.batch_size // 2))])
        panels = [shapes.render_codes(*(code[rows] for code in side)) for side in (sources, targets)]
        batch = torch.cat(panels, 2 if wide else 0).permute(0, 3, 1, 2) * 2 - 1
        if greyed:
            batch = batch * (1 - _grey(rng, len(batch), wide))
        yield batch
        step += 1


def _grey(rng: random.Random, n: int, wide: bool) -> Tensor:
    """1 where a picture is greyed out: one to four quadrants of a panel, or the right panel of a diptych."""
    rows = [[p for p in shapes.PLACES if rng.random() < 0.5] for _ in range(n)]
    panel = shapes.place_masks(rows)[:, None]
    if not wide:
        return panel
    right = torch.ones_like(panel) if rng.random() < 0.7 else panel
    return torch.cat([torch.zeros_like(right), right], -1)


def train(
    recipe: VaeRecipe,
    progress: Callable[[int, int, float], None] | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Runs a recipe and returns the folder of the trained VAE; continues from `state.pt` if there is one.

    Stopped before the end, it writes `state.pt` and returns that.
    `progress(step, steps, loss)` is called every 100 steps. Raises ValueError when the loss is not finite.
    """
    from diffusers import AutoencoderKL

    out = Path(recipe.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    vae = (
        AutoencoderKL.from_pretrained(recipe.start_from)
        if recipe.start_from
        else build.vae(recipe.architecture)
    )
    vae.train().to(memory_format=torch.channels_last)
    if recipe.decoder_only:
        vae.encoder.requires_grad_(False)
    trained = {k: p for k, p in vae.named_parameters() if p.requires_grad}
    ema = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    start, spent, state = 0, 0.0, out / "state.pt"
    if resume and state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["model"])
        ema = saved["ema"]
        optimizer.load_state_dict(saved["optimizer"])
        start, spent = saved["step"], saved["cpu_seconds"]
    clock, source = time.process_time(), pictures(recipe, start)
    running = math.nan
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        batch = next(source).contiguous(memory_format=torch.channels_last)
        loss, error = _loss(vae, batch, recipe)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)
        running = error if math.isnan(running) else 0.99 * running + 0.01 * error
        if not math.isfinite(error):
            raise ValueError(
                f"the loss is {error} at step {step}: lower learning_rate ({recipe.learning_rate})"
            )
        if progress and step % 100 == 99:
            progress(step + 1, recipe.steps, running)
        last, stop = step + 1 == recipe.steps, should_stop()
        if step % recipe.save_every == recipe.save_every - 1 or last or stop:
            cpu = spent + time.process_time() - clock
            content = {"model": vae.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
            torch.save({**content, "step": step + 1, "cpu_seconds": cpu}, out / "state.tmp")
            (out / "state.tmp").replace(state)
            log.info("step %d: %.2f dB, %.0f CPU s", step + 1, -10 * math.log10(running / 4), cpu)
        if stop and not last:
            return state
    vae.load_state_dict(ema, strict=False)
    if not recipe.decoder_only:
        measure_latents(vae, recipe.seed)
    vae.eval().to(memory_format=torch.contiguous_format).save_pretrained(out / "vae")
    if recipe.text:
        _write_pipelines(out, vae, recipe)
    return out / "vae"


def _write_pipelines(out: Path, vae, recipe: VaeRecipe) -> None:
    """The folders that the denoisers' trainings start from, with untrained denoisers."""
    from ...models.tiny import folders

    text = Path(recipe.text)
    if recipe.architecture == "sd":
        folders.write_sd(out / "pipeline", vae=vae, text=text, unet=build.sd_unet())
        return
    for name, channels in (("fill", 384), ("kontext", 64)):
        folders.write_flux(
            out / name,
            vae=out / "vae",
            text=text,
            transformer=build.flux_transformer(channels),
            kontext=name == "kontext",
        )


def _schedule(step: int, recipe: VaeRecipe) -> float:
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def _loss(vae, batch: Tensor, recipe: VaeRecipe) -> tuple[Tensor, float]:
    """The training loss and the mean square error in -1..1 units."""
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16 and bf16_is_fast("cpu")):
        with torch.set_grad_enabled(not recipe.decoder_only):
            posterior = vae.encode(batch).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        if recipe.latent_noise:
            z = z + recipe.latent_noise * mean.detach().std() * torch.rand(
                len(z), 1, 1, 1
            ) * torch.randn_like(z)
        out = vae.decode(z).sample.float()
    square = F.mse_loss(out, batch)
    loss = square + recipe.l1_weight * F.l1_loss(out, batch)
    if not recipe.decoder_only:
        loss = loss + recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss, square.item()


@torch.no_grad()
def measure_latents(vae, seed: int = 0, scenes: int = 2000) -> tuple[float, float]:
    """Writes shift and scale of the latents of training scenes into the VAE's config, and returns them."""
    rng = random.Random(seed)
    drawn = shapes.render_many([shapes.random_scene(rng, "train") for _ in range(scenes)])
    means = [vae.encode(b.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean for b in drawn.split(100)]
    latents = torch.cat(means)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    if vae.config.shift_factor is None:  # Stable Diffusion 1.x knows no shift
        shift, scale = 0.0, 1 / latents.square().mean().sqrt().item()
        vae.register_to_config(scaling_factor=scale)
    else:
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    return shift, scale


@torch.no_grad()
def evaluate(vae, n: int = 500, seed: int = 1, split: str = "test") -> dict[str, float]:
    """Mean PSNR in dB of reconstructions (pictures in 0..1) and the share the checker reads back exactly."""
    rng = random.Random(seed)
    scenes = [shapes.random_scene(rng, split) for _ in range(n)]
    pictures = shapes.render_many(scenes)
    done = []
    for batch in pictures.split(100):
        latents = vae.encode(batch.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
        done.append((vae.decode(latents).sample.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1))
    out = torch.cat(done)
    psnr = -10 * (out - pictures).square().mean((1, 2, 3)).log10()
    exact = shapes.read(out).matches(scenes)
    return {"psnr": psnr.mean().item(), "read_back": exact.float().mean().item(), "pictures": n}
