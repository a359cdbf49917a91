"""The model families a trainer knows: how pictures and prompts become tensors, and those a per-row loss.

A task loads the frozen encoders (for caching), then the denoiser, and hides behind one batch dictionary:
`latents` [B,C,h,w], `tokens` [B,L,D], `pooled` [B,P] and, by family, `masked_latents`, `mask` [B,1,H,W],
`references` [B,16,h,w]. The prediction itself is the denoisers' of `models/`, so what is trained is what
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import model_index
from ...models.denoiser import posterior
from ...models.flux import check_folder
from ...models.lora.files import with_strength
from ...samplers import flow_match, schedule
from ...samplers.gaussian import per_sample
from ..data.cache import fingerprint
from ..data.preprocess import Arranged
from ..data.sample import Sample
from ..runtime.fingerprints import files_stamp, stamp
from ..runtime.random_streams import row_uniform
from . import adapters, initial, losses, padding
from .sampling import Recorded, RolloutSettings, lora_at

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def component(model: str, name: str, dtype: torch.dtype | None = None, *, random: bool = False) -> Any:
    """One part of a diffusers folder or hub id by its name in model_index.json.

    Raises ValueError if it is absent, or no class of diffusers or transformers.
    """
    from diffusers import DiffusionPipeline

    cls = model_index.part_class(DiffusionPipeline.load_config(model), name, model)
    if random:
        return cls.from_config(cls.load_config(model, subfolder=name)).to(dtype)
    kwargs = {"torch_dtype": dtype} if dtype is not None else {}
    return cls.from_pretrained(model, subfolder=name, **kwargs)


class Task:
    """Base of the families; `denoiser_part` is the trained component's folder."""

    name: str
    denoiser_part: str
    denoiser_input: tuple[int, str]  # input channels, and what has so many
    text_parts: tuple[str, ...]
    default_template = "{instruction}"

    def __init__(self, config, device: torch.device | str = "cpu"):
        if not config.model:
            raise ValueError("model is empty: set it to a diffusers folder or hub id")
        channels, what = self.denoiser_input
        check_folder(config.model, self.denoiser_part, channels, what)
        initial.check_loras(config)
        self.config, self.device = config, torch.device(device)
        self.lora_window: tuple[float, float] | None = (
            None  # noise levels outside of which samples go without
        )
        self.load_device = self.device  # of the denoiser; the CPU where it is to be sharded
        self.dtype = DTYPES.get(config.base_dtype, torch.bfloat16)
        self.vae: Any = None
        self.parts: dict[str, Any] = {}
        self.module: nn.Module | None = None
        self.host: Any = None

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

    def wake_text(self) -> None:
        """The text encoders on the device; T5 alone takes 10 GB there, so not before they are used."""
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

    def load_denoiser(self) -> nn.Module:
        """The module to train: base weights in base_dtype, frozen, before any adapter."""
        random, source = self.config.init == "random", self.config.init_from or self.config.model
        module = component(source, self.denoiser_part, self.dtype, random=random)
        for text in self.config.fuse_loras:  # before float8, whose steps are wider than a LoRA's change
            adapters.fuse(module, *with_strength(text))
        if self.config.base_dtype == "float8_e4m3fn":
            module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        module = self.begin(module)
        self.module = module.requires_grad_(False).to(self.load_device)
        if self.config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        return module

    def begin(self, module: nn.Module) -> nn.Module:
        """What becomes of a module that was just built or loaded."""
        return module

    def draw(self, seed: int, positions: list[int]) -> dict[str, Tensor]:
        """What else is random in the rows at these places of the random stream, beside noise and sigma."""
        return {}

    def targets(self) -> list[str]:
        return self.config.target_modules or adapters.TARGETS[self.name]

    def latents(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B,3,H,W] in -1..1 to model-space latents float32."""
        found = posterior(self.vae, pixels.to(self.device, self.vae.dtype))
        z = found.sample(generator) if self.config.vae_sample else found.mode()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (z.float() - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_pictures(self, rows: list[Arranged]) -> dict[str, Tensor]:
        """Same-sized rows to `latents` and whatever the family's condition needs, batched."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_touched(self, rows: list[Arranged]) -> dict[str, Tensor]:
        """Share of every latent cell that the edit touches [B,1,h,w], where the rows know it."""
        if rows[0].touched is None:
            return {}
        return {"touched": nn.functional.avg_pool2d(torch.stack([r.touched for r in rows]), 8)}

    @torch.no_grad()
    def encode_masked(self, rows: list[Arranged]) -> dict[str, Tensor]:
        """`encode_pictures` of the families that repaint: picture, picture with a mid-grey hole, mask."""
        pixels = torch.stack([r.pixels for r in rows])
        mask = torch.stack([r.mask for r in rows])
        return {
            "latents": self.latents(pixels),
            "masked_latents": self.latents(pixels * (1 - mask)),
            "mask": mask.to(torch.uint8),
            **self.encode_touched(rows),
        }

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to `tokens` (and `pooled`), batched; with gradient if the text encoders are trained."""
        raise NotImplementedError

    def make_host(self, module: nn.Module) -> None:
        """Wrap the (possibly distributed) module as the denoiser of `models/`."""
        raise NotImplementedError

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        """Loss per row [B] from clean latents, noise and one uniform number per row."""
        raise NotImplementedError

    def cells(self, batch: dict[str, Any], latents: Tensor) -> Tensor | None:
        """Weights of the latents' cells [B,1,h,w] in the loss; None = every cell alike."""
        c = self.config
        cells = losses.region(batch.get("mask"), latents, *c.regions)
        if "touched" in batch:
            cells = losses.emphasised(cells, batch["touched"], c.edit_loss_weight)
        return cells

    def check_widths(self, sample: Sample) -> None:
        """Raise ValueError for a precomputed row whose text is another model's."""

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        raise NotImplementedError

    def guided(self, batch: dict[str, Any], text: Callable, guidance: float) -> dict[str, Any]:
        """The batch with whatever sampling at this guidance needs beside the condition.

        text: prompts to what `encode_text` gives, for frozen text encoders (`Batches.text`).
        """
        return batch

    # ---------------------------------------------------------------- prediction and sampling

    def predict(
        self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float | Tensor
    ) -> Tensor:
        """The family's prediction at latents x [B,C,h,w] and time (sigma or timestep, one or [B]).

        Differentiable in the weights.
        """
        raise NotImplementedError

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(x, time) of clean latents x0 at noise levels [B] in 0..1."""
        raise NotImplementedError

    def data_prediction(self, x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction at x and time [B] amounts to."""
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
    ) -> tuple[Tensor, list[Recorded]]:
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

    def sample(self, batch: dict[str, Any], noise: Tensor) -> Tensor:
        """Images [B,H,W,3] in 0..1 made by the plain ODE from the batch's condition (`guided` at
        sample_guidance)."""
        c = self.config
        settings = RolloutSettings(c.sample_steps, c.sample_guidance, lora_window=self.lora_window)
        return self.host.decode(self.rollout(batch, noise, settings)[0])


class FluxTask(Task):
    denoiser_part = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    @property
    def tokens(self) -> int:
        return min(self.config.max_sequence_length, self.parts["tokenizer_2"].model_max_length)

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        from ...models.flux_text import _token_ids

        clip = _token_ids(self.parts["tokenizer"], prompts, self.parts["tokenizer"].model_max_length)
        t5 = _token_ids(self.parts["tokenizer_2"], prompts, self.tokens)
        pooled = self.parts["text_encoder"](clip.to(self.device)).pooler_output
        tokens = self.parts["text_encoder_2"](t5.to(self.device))[0]
        out = {"tokens": tokens, "pooled": pooled.to(tokens.dtype)}
        if self.config.text_lengths:
            out["words"] = (t5 != self.parts["tokenizer_2"].pad_token_id).sum(1).to(tokens.device)
            padding.check_alike(tokens, out["words"])
        return out

    def text_fingerprint(self) -> str:
        kind = "words " if self.config.text_lengths else ""
        return kind + super().text_fingerprint()

    @cached_property
    def text_widths(self) -> tuple[int, int]:
        """Widths of T5 tokens and pooled CLIP vector that the denoiser takes."""
        from diffusers import FluxTransformer2DModel

        config = FluxTransformer2DModel.load_config(self.config.model, subfolder=self.denoiser_part)
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def check_widths(self, sample: Sample) -> None:
        ready = sample.encoded
        widths = (ready.prompt_embed.shape[-1], ready.pooled_prompt_embeds.shape[-1])
        if widths != self.text_widths:
            wanted = " and ".join(map(str, self.text_widths))
            raise ValueError(
                f"{sample.name}: prompt_embed and pooled_prompt_embeds are {widths[0]} and {widths[1]} wide "
                f"where {self.config.model} takes {wanted}: set model to the one that encoded the data"
            )

    def begin(self, module: nn.Module) -> nn.Module:
        if self.config.init == "random":
            initial.zero_modulation(module)
        return initial.with_inputs(module, self.denoiser_input[0])

    def draw(self, seed: int, positions: list[int]) -> dict[str, Tensor]:
        c, out = self.config, {}
        if c.guidance_max:
            u = row_uniform(seed, positions, "guidance").float()
            out["guidance"] = c.guidance + (c.guidance_max - c.guidance) * u
        if c.text_lengths:
            u = row_uniform(seed, positions, "text length")
            out["text_lengths"] = torch.tensor(c.text_lengths)[(u * len(c.text_lengths)).long()]
        return out

    def text(self, batch: dict[str, Any]) -> Any:
        """The batch's prompts as the denoiser takes them."""
        from ...models.denoiser import TextEmbedding

        if "words" not in batch:
            ids = batch["text_ids"][0] if "text_ids" in batch else None
            return TextEmbedding(batch["tokens"], batch["pooled"], batch.get("text_bias"), ids)
        words = batch["words"]
        lengths = batch.get("text_lengths", torch.full_like(words, self.tokens))
        tokens, bias = padding.merged(batch["tokens"], words, lengths)
        return TextEmbedding(tokens, batch["pooled"], bias)

    def make_host(self, module: nn.Module) -> None:
        from ...models.flux_text import FluxText

        text = FluxText(
            *(self.parts.get(n) for n in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))
        )
        kwargs = {
            "device": self.device,
            "max_text_tokens": self.tokens if "tokenizer_2" in self.parts else 512,
        }
        self.host = self.host_class()(self.module, self.vae, text, **kwargs)
        self.host.transformer = module
        if self.config.method == "full":
            self.host.dtype = torch.float32
        elif self.config.base_dtype == "float8_e4m3fn":
            self.host.dtype = torch.bfloat16

    def host_class(self) -> type:
        raise NotImplementedError

    def row_losses(self, batch: dict[str, Any], noise: Tensor, u: Tensor) -> Tensor:
        c = self.config
        sigma = losses.sigma_from_uniform(u, *c.sigmas).to(noise.device)
        x, target = losses.noised(batch["latents"], noise, sigma)
        prediction = self.host.velocity(x, sigma, self.condition(batch, batch.get("guidance", c.guidance)))
        rows = losses.weighted_mse(prediction, target, self.cells(batch, x), batch.get("weight"))
        return rows * losses.sigma_weight(sigma, c.loss_weighting)

    # ---------------------------------------------------------------- prediction and sampling
    # Predictions are velocities, times are sigmas, and so are noise levels.

    def predict(
        self, x: Tensor, time: float | Tensor, batch: dict[str, Any], guidance: float | Tensor
    ) -> Tensor:
        return self.host.velocity(x.float(), time, self.condition(batch, guidance))

    @staticmethod
    def noised(x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return losses.noised(x0, noise, level)[0], level

    @staticmethod
    def data_prediction(x: Tensor, time: Tensor, prediction: Tensor) -> Tensor:
        return x - per_sample(time, x, "time") * prediction

    @staticmethod
    def data_weight(time: Tensor) -> Tensor:
        return torch.ones_like(time)

    @staticmethod
    def noise_share(time: Tensor) -> Tensor:
        return time**2

    def rollout(self, batch, noise, settings, generators=None, *, steps=None, callback=None):
        sigmas = schedule.sigmas(settings.steps, seq_len=schedule.token_count(*noise.shape[-2:]))
        start, end = steps or (0, settings.steps)
        window, condition = settings.window, self.condition(batch, settings.guidance)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with lora_at(self.module, float(sigma), settings.lora_window):
                return self.host.velocity(x, sigma, condition)

        return flow_match.sample(
            velocity,
            noise,
            sigmas[start : end + 1],
            rule="ode" if window is None else settings.rule,
            eta=None if window is None else settings.eta,
            window=None if window is None else (window[0] - start, window[1] - start),
            generator=generators,
            callback=callback,
            record=True,
            storage_dtype=settings.storage_dtype,
        )

    def level_range(
        self, steps: int, window: tuple[int, int], height: int, width: int
    ) -> tuple[float, float]:
        sigmas = schedule.sigmas(steps, seq_len=schedule.token_count(height, width))
        return float(sigmas[window[0]]), float(sigmas[window[1]])


class FillTask(FluxTask):
    """FLUX.1 Fill and ICEdit: masked picture and mask beside the noisy latents."""

    name = "fill"
    denoiser_input = (384, "FLUX.1 Fill")

    @property
    def default_template(self) -> str:
        from ...models.diptych import ICEDIT_TEMPLATE

        return ICEDIT_TEMPLATE

    def host_class(self) -> type:
        from ...models.flux_fill import FluxFill

        return FluxFill

    def encode_pictures(self, rows: list[Arranged]) -> dict[str, Tensor]:
        return self.encode_masked(rows)

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        from ...models.denoiser import Condition
        from ...models.packing import pack_latents, pack_mask

        masked = pack_latents(batch["masked_latents"])
        features = torch.cat([masked, pack_mask(batch["mask"].float()).to(masked)], dim=-1)
        return Condition(
            text=self.text(batch),
            guidance=self.host.guidance_tensor(guidance, len(masked)),
            features=features,
        )


class KontextTask(FluxTask):
    """FLUX.1 Kontext: the source picture as further tokens with index 1; the loss is on the target's tokens
    only."""

    name = "kontext"
    denoiser_input = (64, "FLUX.1 Kontext")

    def host_class(self) -> type:
        from ...models.flux_kontext import FluxKontext

        return FluxKontext

    @torch.no_grad()
    def encode_pictures(self, rows: list[Arranged]) -> dict[str, Tensor]:
        out = {"latents": self.latents(torch.stack([r.pixels for r in rows]))}
        if rows[0].reference is not None:
            out["references"] = self.latents(torch.stack([r.reference for r in rows]))
        return out | self.encode_touched(rows)

    def condition(self, batch: dict[str, Any], guidance: float | Tensor) -> Any:
        from ...models.denoiser import Condition

        tokens = ids = None
        if "references" in batch:
            tokens, ids = self.host.place([batch["references"]])
        return Condition(
            text=self.text(batch),
            guidance=self.host.guidance_tensor(guidance, len(batch["latents"])),
            references=tokens,
            reference_ids=ids,
        )


def make_task(config: Any, device: torch.device | str = "cpu") -> Task:
    """The task named by the configuration."""
    if config.task == "sd_inpaint":
        from .sd_inpaint import SDInpaintTask

        return SDInpaintTask(config, device)
    return {"fill": FillTask, "kontext": KontextTask}[config.task](config, device)
