"""The one configuration of supervised training, and what reward training builds on.

Every option carries its group, help, choices and range (`runtime/options.py`); `diptych train --help` lists
them. `recipes` reads the dataclass from YAML; the trainer reads the dataclass. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Optional

from . import notation
from .multimodal.options import MultimodalOptions
from .runtime import options
from .runtime.disk import check_name
from .runtime.options import group
from .tiny.options import Neutral, TinyOptions, bundled

TASKS = ("fill", "kontext", "sd_inpaint", "glid", "multimodal")
FLUX = ("fill", "kontext")
DTYPES = ("float32", "bfloat16", "float16")
MANY = 100_000

# Options of earlier versions, and what to do instead.
GONE = {
    **dict.fromkeys(("class_prompt", "class_dir"), "write class_images: FOLDER?prompt=WORDS"),
    "num_class_images": "write class_images: FOLDER?prompt=WORDS&count=N",
    "prior_loss_weight": "write class_images: FOLDER?prompt=WORDS@WEIGHT; rows of a table have weights",
    "data_limit": "give a smaller source: a folder or table with fewer rows, shapes:COUNT",
    "mask_downsample": "leave it out: a latent cell is repainted where any of its pixels is",
    "logit_mean": "write time_sampling: logit_normal:MEAN,STD",
    "logit_std": "write time_sampling: logit_normal:MEAN,STD",
    "mode_scale": "use time_sampling: logit_normal:MEAN,STD, a mean above 0 for more of high noise",
    "mask_loss_weight": "write loss_on: weighted:WEIGHT",
    "lora_dropout": "leave it out; against overfitting use fewer steps, a lower rank or more data",
    "adam_beta1": "leave it out: it is 0.9",
}

_model = group("Model and method")
_adapter = group("LoRA")
_data = group("Data")
_masks = group("Masks and class images of inpainting")
_loss = group("Loss")
_optimiser = group("Optimiser")
_memory = group("Precision, memory and cache")
_watching = group("Checkpoints, samples and log")


@dataclass
class TrainConfig(Neutral):
    """What to train, on what, how. The defaults are ICEdit's where ICEdit has one."""

    gone: ClassVar[dict[str, str]] = GONE
    essentials: ClassVar[tuple[str, ...]] = ("model", "data", "output_dir", "max_steps", "lr")
    unused: ClassVar[tuple[str, ...]] = ()  # inherited options that say nothing here
    tiny: ClassVar[type]  # the same with the options of the tiny models
    families: ClassVar[dict[str, type]] = {}  # and with those of a family that has some, by its name

    task: str = _model("fill", "Model family, and with it the training target.", choices=TASKS)
    model: str = _model(
        "",
        "Base model: a diffusers folder or hub id with VAE and text encoders beside it; tiny:fill, "
        "tiny:kontext, tiny:sd_inpaint and tiny:glid are the bundled ones. Full training of sd_inpaint and "
        "glid also begins with a model of 4 channels.",
    )
    method: str = _model(
        "lora",
        "What is trained: a LoRA, a mixture of LoRA experts, or all weights.",
        choices=("lora", "moe_lora", "full"),
    )
    train_text_encoder: bool = _model(
        False, "Train the text encoder(s) too (full: all weights; lora of sd_inpaint and glid: q, k, v, out)."
    )
    fuse_loras: list[str] = _model(
        [], "LoRA files of any format but MoE, merged into the frozen base, as PATH or PATH:STRENGTH."
    )
    init_lora: str = _model(
        "", "Initial weights of the new adapters (of each expert of a MoE-LoRA): a plain LoRA file."
    )

    rank: int = _adapter(32, "Rank.", low=1, high=MANY)
    lora_alpha: Optional[float] = _adapter(None, "Alpha; the rank if empty.")  # noqa: UP045
    target_modules: list[str] = _adapter(
        [], "Regular expressions (full match) of the trained layers; the family's own if empty."
    )
    moe_experts: int = _adapter(4, "moe_lora: experts on ff.net.2 and single proj_out.", low=1)
    moe_top_k: int = _adapter(1, "moe_lora: experts per token.")
    moe_gate: str = _adapter(
        "softmax_all",
        "moe_lora: softmax_topk is the original's, whose router gets no gradient; softmax_all is trained.",
        choices=("softmax_topk", "softmax_all"),
    )
    moe_balance: float = _adapter(0.01, "moe_lora: weight of the load-balance loss (softmax_all).", low=0)

    data: list[str] = _data(
        [],
        "Sources as KIND:LOCATION[?option=value][@WEIGHT]; KIND is pairs, images, jsonl, captions, "
        "magicbrush, omniedit, precomputed or shapes (docs/training.md).",
    )
    sample_data: list[str] = _data([], "Sources of the sample images; the first rows of `data` if empty.")
    layout: str = _data(
        "auto",
        "fill: [source | edit] side by side, or one image with a hole; auto: by whether rows have a source.",
        choices=("auto", "diptych", "inpaint"),
    )
    resolution: int = _data(
        512,
        "Side of one panel in pixels (squash) or the root of its area (buckets), a multiple of 16.",
        high=16_384,
    )
    sizing: str = _data(
        "squash",
        "Squash to a square like ICEdit, crop to its middle square, or aspect buckets of equal area.",
        choices=("squash", "crop", "buckets"),
    )
    bucket_step: int = _data(64, "buckets: sides are multiples of this many pixels, itself one of 16.", low=1)
    prompt_template: str = _data(
        "", "Text around the instruction, with {instruction}; ICEdit's for a diptych if empty."
    )
    prompt_drop: float = _data(0.1, "Chance of replacing the whole prompt by one space.", low=0, high=1)
    max_sequence_length: int = _data(
        512, "T5 tokens per prompt; 128 is ample for instructions and 4x cheaper.", low=1, high=MANY
    )

    edit_masks: bool = _masks(
        False, "Diptychs: repaint only the row's own mask where it has one, not the whole panel."
    )
    mask_kinds: list[str] = _masks(
        ["noise", "rectangles", "ellipses", "strokes"],
        "Random masks where a row has none: noise, rectangles, ellipses, strokes, full, half, "
        "outpaint_sides, glid, dreambooth.",
    )
    mask_variants: int = _masks(1, "Random masks drawn (and cached) per row.", low=1, high=MANY)
    class_images: str = _masks(
        "",
        "Prior preservation: FOLDER?prompt=WORDS[&count=N][@WEIGHT], a folder that the model itself fills "
        "with N (100) images of what the subject is a kind of, and their loss's weight (1); empty = off.",
    )

    loss_on: str = _loss(
        "all",
        "all: both panels (ICEdit) | edited: the repainted area only | weighted:W: the repainted area with "
        "weight W against 1 elsewhere.",
    )
    edit_loss_weight: float = _loss(
        0.0, "Weight added where the row's own mask says that the edit is (fill diptychs, kontext).", low=0
    )
    time_sampling: str = _loss(
        "logit_normal",
        "How sigma is drawn: logit_normal:MEAN,STD (without numbers 0,1, as ICEdit) | uniform.",
    )
    loss_weighting: str = _loss(
        "none", "SD3's weights of the squared error.", choices=("none", "sigma_sqrt", "cosmap")
    )
    guidance: float = _loss(1.0, "Embedded guidance value during training.")

    max_steps: int = _optimiser(1000, "Optimiser steps.", low=1)
    batch_size: int = _optimiser(1, "Rows per process and micro-step.", low=1, high=MANY)
    accumulation: int = _optimiser(1, "Micro-steps per optimiser step.", low=1, high=MANY)
    optimizer: str = _optimiser(
        "prodigy",
        "prodigy finds the learning rate itself (lr 1); adamw8bit needs bitsandbytes.",
        choices=("adamw", "prodigy", "adamw8bit"),
    )
    lr: float = _optimiser(1.0, "Learning rate; 1 for Prodigy, 1e-4 for AdamW.", low=0)
    adam_beta2: float = _optimiser(
        0.999,
        "Decay of the second moment; 0.98 settles sooner in short runs of large batches.",
        low=0,
        high=1,
    )
    weight_decay: float = _optimiser(0.01, "Decoupled weight decay.", low=0)
    lr_schedule: str = _optimiser(
        "constant", "Course of the learning rate after the warm-up.", choices=("constant", "cosine", "linear")
    )
    lr_warmup: int = _optimiser(0, "Optimiser steps of linear warm-up.", low=0)
    grad_clip: float = _optimiser(0.5, "Largest gradient norm; 0 = off.", low=0)
    ema: float = _optimiser(
        0.0, "Decay of the moving average of the trained weights; 0 = off.", low=0, high=1
    )
    seed: int = _optimiser(0, "Seed of weights, order, noise, sigma and prompt drop.", low=0, high=2**32 - 1)

    mixed_precision: str = _memory(
        "bf16",
        "Autocast; auto: bf16 where the device has units for it, as CPUs with AMX have, else no.",
        choices=("no", "bf16", "fp16", "auto"),
    )
    base_dtype: str = _memory("bfloat16", "Storage of the frozen base.", choices=(*DTYPES, "float8_e4m3fn"))
    gradient_checkpointing: bool = _memory(True, "Recompute activations in the backward pass.")
    cache: bool = _memory(
        True, "Encode images and prompts once; false = at every step, as the original does."
    )
    cache_dir: str = _memory("", "Folder of the latent and text caches; output_dir/cache if empty.")
    cache_dtype: str = _memory("bfloat16", "Storage type of cached latents and text.", choices=DTYPES)
    cache_in_memory: bool = _memory(False, "Hold the cache in memory (small datasets).")
    encode_batch: int = _memory(
        8, "Most images per VAE call while caching; never above 2 megapixels.", low=1, high=MANY
    )

    output_dir: str = _watching("output", "Folder for checkpoints, samples, logs and the final weights.")
    output_name: str = _watching("", "File name of the saved LoRA without extension; recipe name if empty.")
    recipe: str = _watching(
        "", "Name written into the saved file's header; the file name of the recipe if empty."
    )
    save_dtype: str = _watching("float32", "Type of the saved weights.", choices=DTYPES)
    resume: str = _watching("", "auto: newest checkpoint of output_dir if any; or a checkpoint folder.")
    save_every: int = _watching(500, "Optimiser steps between checkpoints.", low=1)
    keep_last: int = _watching(2, "Checkpoints kept.", low=1, high=MANY)
    sample_every: int = _watching(1000, "Optimiser steps between sample images; 0 = none.", low=0)
    sample_count: int = _watching(4, "Sample images.", low=0, high=MANY)
    sample_steps: int = _watching(28, "Denoising steps of the sample images.", low=1, high=MANY)
    sample_guidance: float = _watching(
        50.0, "Embedded guidance (cfg for sd_inpaint, glid) of the sample images."
    )
    log_every: int = _watching(10, "Optimiser steps between log lines.", low=1)
    log_with: list[str] = _watching(
        ["tensorboard"], "Trackers of accelerate: tensorboard, wandb, ...; `none` for none."
    )

    def __post_init__(self) -> None:
        """Resolve `tiny:` names and check every option. Raises ValueError with the remedy."""
        self.model, self.init_lora = bundled(self.model), bundled(self.init_lora)
        self.fuse_loras = [bundled(text) for text in self.fuse_loras]
        options.check(self)
        self.check_notations()
        self._check_names()
        self._check_sizes()
        self._check_method()

    def check_notations(self) -> None:
        """Raise ValueError for an option of several values that is written wrongly."""
        for read in (lambda: self.sigmas, lambda: self.regions, lambda: self.prior):
            read()

    def _check_names(self) -> None:
        for name in ("output_name", "recipe"):
            if getattr(self, name):
                check_name(getattr(self, name), name)
        for pattern in self.target_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"target_modules has {pattern!r}, no regular expression: {error}") from None

    def _check_sizes(self) -> None:
        if self.resolution < 16 or self.resolution % 16:
            near = max(16, round(self.resolution / 16) * 16)
            raise ValueError(f"resolution is {self.resolution}: use a multiple of 16, for example {near}")
        if self.bucket_step % 16:
            raise ValueError(f"bucket_step is {self.bucket_step}: use a multiple of 16")

    def _check_method(self) -> None:
        if self.method == "moe_lora" and not 1 <= self.moe_top_k <= self.moe_experts:
            raise ValueError(
                f"moe_top_k is {self.moe_top_k}: it must lie in 1..moe_experts ({self.moe_experts})"
            )
        if self.train_text_encoder and self.task in FLUX and self.method != "full":
            raise ValueError(
                "train_text_encoder with a FLUX LoRA: no loader reads it; use it with full training"
            )
        if self.init_lora and self.method == "full":
            raise ValueError("init_lora with method full: merge the LoRA with fuse_loras instead")
        if self.edit_loss_weight and self.task not in FLUX:
            raise ValueError(f"edit_loss_weight is for fill and kontext: leave it out with {self.task}")

    def runs(self) -> list[TrainConfig]:
        """The runs of the trainer that make up this training, in their order."""
        return [self]

    @property
    def needs_targets(self) -> bool:
        """Whether rows without a target image are of no use."""
        return True

    @property
    def held_out_rows(self) -> int:
        """Rows of `sample_data` that are prepared."""
        return self.sample_count

    @property
    def sigmas(self) -> notation.TimeSampling:
        """What `time_sampling` says."""
        return notation.TimeSampling.read(self.time_sampling)

    @property
    def regions(self) -> notation.LossOn:
        """What `loss_on` says."""
        return notation.LossOn.read(self.loss_on)

    @property
    def prior(self) -> notation.ClassImages | None:
        """What `class_images` says; None without prior preservation."""
        return notation.ClassImages.read(self.class_images)

    @property
    def alpha(self) -> float:
        """`lora_alpha`, by default the rank."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)


@dataclass
class TinyTrainConfig(TinyOptions, TrainConfig):
    """Supervised training with the options that only the tiny models have."""


@dataclass
class MultimodalTrainConfig(MultimodalOptions, TinyTrainConfig):
    """Training of the multimodal model."""


TrainConfig.tiny = TinyTrainConfig
TrainConfig.families = {"multimodal": MultimodalTrainConfig}
