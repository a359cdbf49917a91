"""What the model families share: frozen encoders, the denoiser, and the interface that training calls.

A family turns images and prompts into one batch dictionary: `latents` [B,C,h,w], `tokens` [B,L,D], `pooled`
[B,P] and, by family, `masked_latents`, `mask` [B,1,H,W], `references` [B,16,h,w]. From it it predicts, gives
the loss of every row and samples rollouts. The prediction is that of the denoisers in `models/`, so what is
trained is what runs. A new family is a file with a subclass of `Task`, and a line in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import model_index
from ...models.denoiser import posterior
from ...models.flux import check_folder
from ...models.lora.files import with_strength
from ...samplers.gaussian import Transition
from ..data.cache import fingerprint, image_key
from ..data.dataset import latents_like
from ..data.preprocess import Preprocessed
from ..data.sample import Sample
from ..runtime.fingerprints import files_stamp, stamp
from ..runtime.random_streams import row_noise
from . import adapters, initial, losses
from .sampling import RolloutSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def component(model: str, name: str, dtype: torch.dtype | None = None, *, random: bool = False) -> Any:
    """One part of a diffusers folder or hub id by its name in model_index.json.

    random: with fresh weights of the part's config. Raises ValueError if the part is absent, or no class of
    diffusers or transformers.
    """
    from diffusers import DiffusionPipeline

    cls = model_index.part_class(DiffusionPipeline.load_config(model), name, model)
    if random:
        return cls.from_config(cls.load_config(model, subfolder=name)).to(dtype)
    kwargs = {"torch_dtype": dtype} if dtype is not None else {}
    return cls.from_pretrained(model, subfolder=name, **kwargs)


class Task:
    """Base of the families. Raises ValueError at construction for a model or LoRAs that do not fit.

    denoiser_part: folder of the trained part. denoiser_input: its input channels, and what has so many.
    text_parts: folders of text encoders and tokenizers. target_modules: regular expressions (full match) of
    the linears that a LoRA is trained on by default. lora_base: the model's name in the header of LoRA files.
    pipeline: the class of diffusers that a trained folder is for, where the base's may be another. null_text:
    the model has a learned vector in place of a dropped text, so that prompts stay as they are.
    """

    name: str
    denoiser_part: str
    denoiser_input: tuple[int, str]
    text_parts: tuple[str, ...]
    target_modules: tuple[str, ...]
    lora_base: str
    pipeline = ""
    null_text = False
    default_template = "{instruction}"

    def __init__(self, config, device: torch.device | str = "cpu"):
        if not config.model:
            raise ValueError("model is empty: set it to a diffusers folder or hub id")
        self.config, self.device = config, torch.device(device)
        self.check_model()
        initial.check_loras(config)
        self.lora_window: tuple[float, float] | None = (
            None  # noise levels outside of which samples go without
        )
        self.load_device = self.device  # of the denoiser; the CPU where it is to be sharded
        self.dtype = DTYPES.get(config.base_dtype, torch.bfloat16)
        self.vae: Any = None
        self.parts: dict[str, Any] = {}  # text encoders and tokenizers
        self.module: nn.Module | None = None  # the denoiser's weights
        self.host: Any = None  # the denoiser of `models/` around them

    def check_model(self) -> None:
        """Raise ValueError or FileNotFoundError for a local base model that is not of this family."""
        channels, what = self.denoiser_input
        check_folder(self.config.model, self.denoiser_part, channels, what)

    # ---------------------------------------------------------------- frozen encoders

    @property
    def text_dtype(self) -> torch.dtype:
        """What the denoiser computes text in: a batch of T5 tokens in float32 would be gigabytes."""
        return torch.float32 if self.host is None else self.host.dtype

    def load_encoders(self) -> None:
        """VAE (float32, frozen) and tokenizers; text encoders only come with `load_text`."""
        vae = component(self.config.model, "vae", torch.float32)
        # Convolutions are faster in this layout, on CPUs too (1.35x for the tiny VAE's decoder).
        self.vae = vae.to(self.device, memory_format=torch.channels_last).requires_grad_(False).eval()
        for name in self.text_parts:
            if "encoder" not in name:
                self.parts[name] = component(self.config.model, name)

    def load_text(self) -> None:
        """The text encoders, frozen, on the CPU."""
        for name in self.text_parts:
            if name not in self.parts:
                part = component(self.config.model, name, self.dtype)
                self.parts[name] = part.requires_grad_(False).eval()

    def text_to_device(self) -> None:
        """Load the text encoders onto the device; T5 alone takes 10 GB there, so not before they are used."""
        self.load_text()
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                part.to(self.device)

    def text_fingerprint(self) -> str:
        """Identifies text encoders and tokenizers, local ones by their files, without loading them."""
        folder = Path(self.config.model)
        how = (str(self.config.max_sequence_length), self.config.cache_dtype, str(self.dtype))
        if folder.is_dir():
            return stamp(*how, *(files_stamp(folder / name) for name in self.text_parts))
        self.load_text()
        encoders = [self.parts[name] for name in self.text_parts if "encoder" in name]
        return fingerprint(self.config.model, *encoders, *how)

    def free_text(self) -> None:
        """Drop the text encoders (not the tokenizers) once every prompt is cached."""
        self.parts = {k: v for k, v in self.parts.items() if not isinstance(v, nn.Module)}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to `tokens` [B,L,D] (and `pooled` [B,P]); with gradient if text encoders are trained."""
        raise NotImplementedError

    def check_widths(self, sample: Sample) -> None:
        """Raise ValueError for a precomputed row whose text is another model's."""

    def latents(self, pixels: Tensor) -> Tensor:
        """Images [B,3,H,W] in -1..1 to model-space latents [B,C,h,w] float32.

        With `vae_sample` an image's draw from the posterior is a function of its pixels alone, as a cache
        that runs of other seeds and other orders share has to hold it.
        """
        found = posterior(self.vae, pixels.to(self.device, self.vae.dtype))
        z = found.mode()
        if self.config.vae_sample:
            seeds = [int(image_key(image.cpu(), "posterior")[:15], 16) for image in pixels]
            noise = torch.cat([row_noise(seed, [0], tuple(z.shape[1:])) for seed in seeds])
            z = z + found.std * noise.to(z)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (z.float() - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """Same-sized rows to `latents` and whatever images the family's condition needs, batched."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_touched(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """Share of every latent cell that the edit touches [B,1,h,w], where the rows know it."""
        if rows[0].touched is None:
            return {}
        return {"touched": nn.functional.avg_pool2d(torch.stack([r.touched for r in rows]), 8)}

    @torch.no_grad()
    def encode_masked(self, rows: list[Preprocessed]) -> dict[str, Tensor]:
        """`encode_images` of the families that repaint: image, image with a mid-grey hole, mask."""
        pixels = torch.stack([r.pixels for r in rows])
        mask = torch.stack([r.mask for r in rows])
        return {
            "latents": self.latents(pixels),
            "masked_latents": self.latents(pixels * (1 - mask)),
            "mask": mask.to(torch.uint8),
            **self.encode_touched(rows),
        }

    # ---------------------------------------------------------------- the denoiser

    def load_denoiser(self) -> nn.Module:
        """The module to train: base weights in base_dtype, frozen, before any adapter."""
        random, source = self.config.init == "random", self.config.init_from or self.config.model
        module = component(source, self.denoiser_part, self.dtype, random=random)
        for text in self.config.fuse_loras:  # before float8, whose steps are wider than a LoRA's change
            initial.fuse(module, *with_strength(text))
        if self.config.base_dtype == "float8_e4m3fn":
            module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        module = self.fitted(module)
        self.module = module.requires_grad_(False).to(self.load_device)
        if self.config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        return module

    def fitted(self, module: nn.Module) -> nn.Module:
        """A denoiser that was just built or loaded from another family's weights, made this family's."""
        return module

    def freeze(self, module: nn.Module) -> None:
        """Take out of a full training what is not to be trained of the module."""

    def targets(self, part: str) -> list[str]:
        """Regular expressions (full match) of the linears that are trained in this part of the model."""
        if part != self.denoiser_part:
            return adapters.TEXT_TARGETS
        return self.config.target_modules or list(self.target_modules)

    def make_host(self, module: nn.Module) -> None:
        """Wrap the (possibly distributed) module as the denoiser of `models/`."""
        raise NotImplementedError

    # ---------------------------------------------------------------- what a run keeps and says of it

    def state(self) -> dict[str, Tensor]:
        """What follows the training beside the trained weights, for checkpoints."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""

    def told(self) -> dict[str, float]:
        """Figures of the log beside the loss, means since they were asked for last."""
        return {}

    def measure(self, batches: Any) -> None:
        """Set what the exported model needs to know of all rows (`data.dataset.Batches`)."""

    # ---------------------------------------------------------------- batches and their loss

    def noise_shape(self, batch: dict[str, Any]) -> tuple[int, ...]:
        """Of one row's noise, [C,h,w]."""
        return tuple(latents_like(batch).shape[1:])

    def draw(self, seed: int, positions: list[int]) -> dict[str, Tensor]:
        """What else is random in the rows at these places of the random stream, beside noise and sigma."""
        return {}

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        """The batch as a `models.denoiser.Condition`. guidance: embedded, or cfg for sd_inpaint."""
        raise NotImplementedError

    def guided(self, batch: dict[str, Any], text: Callable, guidance: float) -> dict[str, Any]:
        """The batch with whatever sampling at this guidance needs beside the condition.

        text: prompts to what `encode_text` gives, for frozen text encoders (`Batches.text`).
        """
        return batch

    def cells(self, batch: dict[str, Any], latents: Tensor) -> Tensor | None:
        """Weights of the latents' cells [B,1,h,w] in the loss; None = every cell alike."""
        c = self.config
        cells = losses.region(batch.get("mask"), latents, *c.regions)
        if "touched" in batch:
            cells = losses.emphasised(cells, batch["touched"], c.edit_loss_weight)
        return cells

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """Loss per row [B] from clean latents, noise of their shape and one uniform number per row [B]."""
        raise NotImplementedError

    # ---------------------------------------------------------------- prediction and sampling

    def predict(
        self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float | Tensor
    ) -> Tensor:
        """The family's prediction at latents x [B,C,h,w] and time (sigma or timestep, one or [B]), float32.

        Differentiable in the weights.
        """
        raise NotImplementedError

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, time) of clean latents x0 [B,C,h,w] at noise levels [B] in 0..1."""
        raise NotImplementedError

    def data_prediction(self, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents [B,C,h,w] that a prediction at x and time [B] amounts to."""
        raise NotImplementedError

    def data_weight(self, time: Tensor) -> Tensor:
        """What keeps errors of `data_prediction` comparable over times [B]."""
        raise NotImplementedError

    def noise_share(self, time: Tensor) -> Tensor:
        """The squared error of `data_prediction` for each of the prediction, at times [B]."""
        raise NotImplementedError

    def rollout(
        self,
        batch: dict[str, Any],
        noise: Tensor,
        settings: RolloutSettings,
        generators: Sequence[torch.Generator] | None = None,
        *,
        steps: tuple[int, int] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Tensor, list[Transition]]:
        """Latents [B,C,h,w] sampled from noise of their shape, and the random steps, recorded.

        generators: one per sample, of the random steps' noise. steps: the part [start, end) of the schedule
        to run, all by default; noise is the latents at its start. callback: as of `flow_match.sample` or
        `ddim.sample`.
        """
        raise NotImplementedError

    def level_range(
        self, steps: int, window: tuple[int, int], height: int, width: int
    ) -> tuple[float, float]:
        """Noise levels in 0..1 at the start and end of a window in a schedule of so many steps.

        height, width: of the latents, in cells.
        """
        raise NotImplementedError

    def source(self, batch: dict[str, Any]) -> Tensor | None:
        """The images [B,H,W,3] that a batch is sampled from, masked or references; None where all is
        painted."""
        latents = batch.get("masked_latents", batch.get("references"))
        return None if latents is None else self.host.decode(latents)

    def shown(self, batch: dict[str, Any], noise: Tensor, targets: bool) -> dict[str, Tensor | None]:
        """The images [1,H,W,3] of a row of the sample sheet, by the name of their column."""
        return {
            "source": self.source(batch),
            "sample": self.sample(batch, noise),
            "target": self.host.decode(batch["latents"]) if targets else None,
        }

    def title(self, batch: dict[str, Any], prompt: str) -> str:
        """The words under a row of the sample sheet."""
        return prompt

    def sample(self, batch: dict[str, Any], noise: Tensor) -> Tensor:
        """Images [B,H,W,3] in 0..1 made by the plain ODE from the batch's condition (`guided` at
        sample_guidance)."""
        c = self.config
        settings = RolloutSettings(c.sample_steps, c.sample_guidance, lora_window=self.lora_window)
        return self.host.decode(self.rollout(batch, noise, settings)[0])
