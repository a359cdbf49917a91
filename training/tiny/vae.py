"""Trains the small VAEs of the bundled models on the shapes world (recipes with `task: vae`).

Images are drawn as they are needed: single panels, diptychs, and both with quadrants or a panel greyed
out, since a Fill model encodes masked images and GroupNorm sees the whole canvas. What is learned is an
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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.tiny import build
from ..runtime.precision import bf16_is_fast
from . import shapes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

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


def images(recipe: VaeRecipe, start: int = 0) -> Iterator[Tensor]:
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
    """[N,1,64,W], 1 where an image is greyed out: quadrants of a panel, or the right panel of a diptych."""
    rows = [[p for p in shapes.PLACES if rng.random() < 0.5] for _ in range(n)]
    panel = shapes.place_masks(rows)[:, None]
    if not wide:
        return panel
    right = torch.ones_like(panel) if rng.random() < 0.7 else panel
    return torch.cat([torch.zeros_like(right), right], -1)


class _Run:
    """A VAE in training: weights, their moving average, the optimiser, and how far it is."""

    def __init__(self, recipe: VaeRecipe):
        from diffusers import AutoencoderKL

        fresh = not recipe.start_from
        vae = build.vae(recipe.architecture) if fresh else AutoencoderKL.from_pretrained(recipe.start_from)
        self.vae = vae.train().to(memory_format=torch.channels_last)
        if recipe.decoder_only:
            vae.encoder.requires_grad_(False)
        self.recipe = recipe
        self.trained = {k: p for k, p in vae.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.done, self.cpu_seconds, self.clock = 0, 0.0, time.process_time()

    def step(self, batch: Tensor) -> float:
        """Learn from images [B,3,H,W] in -1..1; returns their mean square error."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(self.done, recipe)
        loss, error = _loss(self.vae, batch.contiguous(memory_format=torch.channels_last), recipe)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(recipe.ema_decay, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay
        )
        self.done += 1
        return error

    def load(self, file: Path) -> None:
        """Go on from what `save` wrote."""
        saved = torch.load(file, weights_only=True)
        self.vae.load_state_dict(saved["model"])
        self.average = saved["ema"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done, self.cpu_seconds = saved["step"], saved["cpu_seconds"]

    def save(self, file: Path) -> float:
        """Write all of it; the file is whole or the one before. Returns the CPU seconds spent so far."""
        cpu = self.cpu_seconds + time.process_time() - self.clock
        content = {"model": self.vae.state_dict(), "ema": self.average, "step": self.done}
        content |= {"optimizer": self.optimizer.state_dict(), "cpu_seconds": cpu}
        torch.save(content, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        return cpu

    def finished(self) -> AutoencoderKL:
        """The VAE with its averaged weights, and the shift and scale of its latents measured."""
        self.vae.load_state_dict(self.average, strict=False)
        if not self.recipe.decoder_only:
            measure_latents(self.vae, self.recipe.seed)
        return self.vae.eval().to(memory_format=torch.contiguous_format)


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
    out = Path(recipe.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    run, state, running = _Run(recipe), out / "state.pt", math.nan
    if resume and state.exists():
        run.load(state)
    source = images(recipe, run.done)
    while run.done < recipe.steps:
        error = run.step(next(source))
        running = error if math.isnan(running) else 0.99 * running + 0.01 * error
        if not math.isfinite(error):
            raise ValueError(
                f"the loss is {error} at step {run.done - 1}: lower learning_rate ({recipe.learning_rate})"
            )
        if progress and run.done % 100 == 0:
            progress(run.done, recipe.steps, running)
        last, stop = run.done == recipe.steps, should_stop()
        if run.done % recipe.save_every == 0 or last or stop:
            cpu = run.save(state)
            log.info("step %d: %.2f dB, %.0f CPU s", run.done, -10 * math.log10(running / 4), cpu)
        if stop and not last:
            return state
    vae = run.finished()
    vae.save_pretrained(out / "vae")
    if recipe.text:
        _write_pipelines(out, vae, recipe)
    return out / "vae"


def _write_pipelines(out: Path, vae: AutoencoderKL, recipe: VaeRecipe) -> None:
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


def _loss(vae: AutoencoderKL, batch: Tensor, recipe: VaeRecipe) -> tuple[Tensor, float]:
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
def measure_latents(vae: AutoencoderKL, seed: int = 0, scenes: int = 2000) -> tuple[float, float]:
    """Writes shift and scale of the latents of so many training scenes into the VAE's config.

    Returns (shift, scale): model space is (latents - shift) * scale.
    """
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
