"""The one configuration of supervised training: a documented dataclass, read from YAML plus overrides.

Every field's `metadata["help"]` is its documentation (`diptych train --help-config` prints it). Nothing here
imports torch; the trainer reads the dataclass, it never reads YAML.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

from . import notation
from .runtime.disk import check_name, reason

RECIPES = Path(__file__).parent / "recipes"

TASKS = ("fill", "kontext", "sd_inpaint")
CHOICES = {
    "task": TASKS,
    "method": ("lora", "moe_lora", "full"),
    "init": ("pretrained", "random"),
    "layout": ("auto", "diptych", "inpaint"),
    "sizing": ("squash", "buckets"),
    "loss_weighting": ("none", "sigma_sqrt", "cosmap"),
    "moe_gate": ("softmax_topk", "softmax_all"),
    "optimizer": ("adamw", "prodigy", "adamw8bit"),
    "lr_schedule": ("constant", "cosine", "linear"),
    "mixed_precision": ("no", "bf16", "fp16", "auto"),
    "base_dtype": ("float32", "bfloat16", "float16", "float8_e4m3fn"),
    "cache_dtype": ("float32", "bfloat16", "float16"),
    "save_dtype": ("float32", "bfloat16", "float16"),
}


# What ICEdit's YAML and diffusers' DreamBooth scripts call an option.
ELSEWHERE = {
    "flux_path": "model (the recipes icedit and icedit_moe are ICEdit's two configurations)",
    "train": "not a section of its own (the recipes icedit and icedit_moe are ICEdit's two configurations)",
    "pretrained_model_name_or_path": "model",
    "dtype": "base_dtype",
    "condition_size": "resolution",
    "target_size": "resolution",
    "drop_text_prob": "prompt_drop",
    "accumulate_grad_batches": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "train_batch_size": "batch_size",
    "save_interval": "save_every",
    "sample_interval": "sample_every",
    "r": "rank",
    "learning_rate": "lr",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "lr_warmup",
    "max_train_steps": "max_steps",
    "max_grad_norm": "grad_clip",
    "use_8bit_adam": "optimizer=adamw8bit",
    "use_ema": "ema",
    "guidance_scale": "guidance (sample_guidance, rollout_guidance where images are made)",
    "num_inference_steps": "sample_steps (rollout_steps of reward training)",
    "instance_data_dir": "data=images:FOLDER?prompt=WORDS",
    "instance_prompt": "data=images:FOLDER?prompt=WORDS",
    "class_data_dir": "class_images=FOLDER?prompt=WORDS",
    "with_prior_preservation": "class_images=FOLDER?prompt=WORDS (prior preservation is on where it is set)",
    "class_data_root": "class_images=FOLDER?prompt=WORDS",
}

# The smallest value of every number that has one; all numbers are finite.
LOWEST = {
    1: "max_steps batch_size accumulation rank save_every keep_last log_every bucket_step mask_variants "
    "max_sequence_length encode_batch moe_experts sample_steps",
    0: "threads seed sample_every sample_count lr_warmup lr weight_decay grad_clip "
    "noise_offset guidance_max edit_loss_weight moe_balance ema prompt_drop adam_beta2",
}
HIGHEST = {
    1: "ema prompt_drop adam_beta2",
    2**32 - 1: "seed",
    16_384: "resolution",
    100_000: "rank batch_size accumulation keep_last sample_count sample_steps mask_variants threads "
    "max_sequence_length encode_batch",
}


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


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation; mutable defaults are copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """What to train, on what, how. The defaults are ICEdit's where ICEdit has one."""

    gone: ClassVar[dict[str, str]] = GONE

    # what
    task: str = option("fill", "fill | kontext | sd_inpaint: which model family and training target.")
    model: str = option(
        "",
        "Base model: a diffusers folder or hub id with VAE and text encoders beside it; tiny:fill, "
        "tiny:kontext and tiny:sd_inpaint are the bundled ones.",
    )
    init: str = option("pretrained", "pretrained, or random: build the denoiser from its config.json only.")
    init_from: str = option(
        "",
        "method full: folder or hub id of a sibling whose denoiser to start from (FLUX.1-dev for Fill, Fill "
        "for Kontext); its input is cut, or filled up with zeros.",
    )
    init_lora: str = option("", "LoRA file that the new adapters (each expert of a MoE-LoRA) start from.")
    method: str = option("lora", "lora | moe_lora | full: what is trained.")
    train_text_encoder: bool = option(
        False, "Train the text encoder(s) too (full: all weights; lora: q,k,v,out)."
    )
    recipe: str = option(
        "", "Name written into the saved file's header; the file name of the recipe if empty."
    )
    output_dir: str = option("output", "Folder for checkpoints, samples, logs and the final weights.")
    output_name: str = option("", "File name of the saved LoRA without extension; recipe name if empty.")
    save_dtype: str = option("float32", "Type of the saved weights: float32 | bfloat16 | float16.")

    # data
    data: list[str] = option(
        [],
        "Sources as KIND:LOCATION[?option=value][@WEIGHT]; KIND is pairs, jsonl, magicbrush, omniedit, "
        "precomputed or shapes (see training/data/sources.py).",
    )
    sample_data: list[str] = option([], "Sources of the sample pictures; the first rows of `data` if empty.")
    layout: str = option(
        "auto", "fill: diptych (source|target) or inpaint; auto = diptych if rows have a source."
    )
    resolution: int = option(512, "Side of one panel in pixels (squash) or sqrt of the area (buckets); k*16.")
    sizing: str = option("squash", "squash to a square like ICEdit, or aspect buckets of equal area.")
    bucket_step: int = option(
        64, "buckets: sides are multiples of this many pixels (itself a multiple of 16)."
    )
    edit_masks: bool = option(
        False, "Diptychs: repaint only the row's own mask where it has one, not the whole panel."
    )
    prompt_template: str = option(
        "", "Text around the instruction, with {instruction}; ICEdit's for a diptych if empty."
    )
    prompt_drop: float = option(0.1, "Chance of replacing the whole prompt by one space.")
    max_sequence_length: int = option(
        512, "T5 tokens per prompt; 128 is ample for instructions and 4x cheaper."
    )
    text_lengths: list[int] = option(
        [],
        "Padded prompt lengths to train for, one drawn per row; all padding becomes one token of the same "
        "weight. Only for T5 encoders to which padding is all alike (the tiny ones).",
    )
    mask_kinds: list[str] = option(
        ["noise", "rectangles", "ellipses", "strokes"],
        "Random masks where a row has none: noise, rectangles, ellipses, strokes, full, half.",
    )
    mask_variants: int = option(1, "Random masks drawn (and cached) per row.")
    class_images: str = option(
        "",
        "Prior preservation (inpainting): FOLDER?prompt=WORDS[&count=N][@WEIGHT], a folder that the model "
        "itself fills with N (100) images of what the subject is a kind of, and their loss's weight (1); "
        "empty = off.",
    )

    # cache
    cache_dir: str = option("", "Folder of the latent and text caches; output_dir/cache if empty.")
    cache: bool = option(True, "Encode pictures and prompts once; off = every step, as the original does.")
    cache_dtype: str = option(
        "bfloat16", "Storage type of cached latents and text: float32 | bfloat16 | float16."
    )
    cache_in_memory: bool = option(False, "Hold the cache in memory (small worlds).")
    encode_batch: int = option(8, "Most pictures per VAE call while caching; never above 2 megapixels.")
    vae_sample: bool = option(
        False, "Draw latents from the VAE posterior (once, at caching) instead of its mode."
    )

    # loss
    loss_on: str = option(
        "all",
        "all: both panels (ICEdit) | edited: the repainted area only | weighted:W: the repainted area with "
        "weight W against 1 elsewhere.",
    )
    edit_loss_weight: float = option(
        0.0, "Weight added where the row's own mask says that the edit is (fill diptychs, kontext)."
    )
    time_sampling: str = option(
        "logit_normal",
        "How sigma is drawn: logit_normal:MEAN,STD (without numbers 0,1, as ICEdit) | uniform.",
    )
    loss_weighting: str = option("none", "none | sigma_sqrt | cosmap: SD3's weights of the squared error.")
    guidance: float = option(1.0, "Embedded guidance value during training.")
    guidance_max: float = option(
        0.0,
        "Draw the embedded guidance between `guidance` and this, so that it comes to mean nothing; 0 = off.",
    )
    noise_offset: float = option(0.0, "Strength of a per-channel constant added to the noise (0.1 is usual).")

    # adapters
    fuse_loras: list[str] = option(
        [], "LoRA files of any format but MoE, merged into the frozen base, as PATH or PATH:STRENGTH."
    )
    rank: int = option(32, "LoRA rank.")
    lora_alpha: Optional[float] = option(None, "LoRA alpha; the rank if empty.")  # noqa: UP045
    target_modules: list[str] = option(
        [], "Regular expressions (full match) of trained linears; the task's default if empty."
    )
    moe_experts: int = option(4, "moe_lora: experts on ff.net.2 and single proj_out.")
    moe_top_k: int = option(1, "moe_lora: experts per token.")
    moe_gate: str = option(
        "softmax_all",
        "softmax_topk: the original's gate, whose router gets no gradient; softmax_all: trained.",
    )
    moe_balance: float = option(0.01, "Weight of the load-balance loss (softmax_all only).")

    # optimisation
    max_steps: int = option(1000, "Optimiser steps.")
    batch_size: int = option(1, "Rows per process and micro-step.")
    accumulation: int = option(1, "Micro-steps per optimiser step.")
    optimizer: str = option("prodigy", "prodigy (lr 1) | adamw | adamw8bit (bitsandbytes).")
    lr: float = option(1.0, "Learning rate; 1 for Prodigy.")
    adam_beta2: float = option(
        0.999, "Decay of the second moment; 0.98 settles sooner in short runs of large batches."
    )
    weight_decay: float = option(0.01, "Decoupled weight decay.")
    lr_schedule: str = option("constant", "constant | cosine | linear, all after the warm-up.")
    lr_warmup: int = option(0, "Optimiser steps of linear warm-up.")
    grad_clip: float = option(0.5, "Largest gradient norm; 0 = off.")
    ema: float = option(0.0, "Decay of the moving average of the trained weights; 0 = off.")
    mixed_precision: str = option(
        "bf16",
        "Autocast: no | bf16 | fp16 | auto (bf16 where the device has units for it, as CPUs with AMX have, "
        "else no).",
    )
    base_dtype: str = option(
        "bfloat16", "Storage of the frozen base: float32 | bfloat16 | float16 | float8_e4m3fn."
    )
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass.")
    seed: int = option(0, "Seed of weights, order, noise, sigma and prompt drop.")
    threads: int = option(0, "torch CPU threads; 0 = leave as it is.")

    # watching and stopping
    save_every: int = option(500, "Optimiser steps between checkpoints.")
    keep_last: int = option(2, "Checkpoints kept.")
    sample_every: int = option(1000, "Optimiser steps between sample pictures; 0 = none.")
    sample_count: int = option(4, "Sample pictures.")
    sample_steps: int = option(28, "Denoising steps of the sample pictures.")
    sample_guidance: float = option(50.0, "Embedded guidance (cfg for sd_inpaint) of the sample pictures.")
    log_every: int = option(10, "Optimiser steps between log lines.")
    log_with: list[str] = option(
        ["tensorboard"], "Trackers of accelerate: tensorboard, wandb, ...; `none` for none."
    )
    resume: str = option("", "auto: newest checkpoint of output_dir if any; or a checkpoint folder.")

    def __post_init__(self) -> None:
        for name in ("model", "init_from", "init_lora"):
            setattr(self, name, bundled(getattr(self, name)))
        self.fuse_loras = [bundled(text) for text in self.fuse_loras]
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
        check_numbers(self, LOWEST, HIGHEST)
        self.sigmas, self.regions, self.prior  # raise ValueError where they are written wrongly  # noqa: B018
        for name in ("output_name", "recipe"):
            if getattr(self, name):
                check_name(getattr(self, name), name)
        for pattern in self.target_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"target_modules has {pattern!r}, no regular expression: {error}") from None
        if self.resolution < 16 or self.resolution % 16:
            near = max(16, round(self.resolution / 16) * 16)
            raise ValueError(f"resolution is {self.resolution}: use a multiple of 16, for example {near}")
        if self.bucket_step % 16:
            raise ValueError(f"bucket_step is {self.bucket_step}: use a multiple of 16")
        if self.method == "moe_lora" and not 1 <= self.moe_top_k <= self.moe_experts:
            raise ValueError(
                f"moe_top_k is {self.moe_top_k}: it must lie in 1..moe_experts ({self.moe_experts})"
            )
        if self.train_text_encoder and self.task != "sd_inpaint" and self.method != "full":
            raise ValueError(
                "train_text_encoder with a FLUX LoRA: no loader reads it; use it with full training"
            )
        if self.init == "random" and self.method != "full":
            raise ValueError(f"init is random with method {self.method}: an adapter needs pretrained weights")
        if self.init_from and (self.method != "full" or self.init == "random" or self.task == "sd_inpaint"):
            raise ValueError("init_from is for method full of fill and kontext, with init: pretrained")
        if self.init_lora and self.method == "full":
            raise ValueError("init_lora with method full: merge the LoRA with fuse_loras instead")
        if self.text_lengths and self.train_text_encoder:
            raise ValueError("text_lengths is for frozen T5 encoders: leave it empty")
        for name in ("text_lengths", "guidance_max", "edit_loss_weight"):
            if getattr(self, name) and self.task == "sd_inpaint":
                raise ValueError(f"{name} is for fill and kontext: leave it out with sd_inpaint")

    @property
    def needs_targets(self) -> bool:
        """Whether rows without a finished image are of no use."""
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
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)


def bundled(text: str) -> str:
    """`tiny:NAME` as the path of that file or folder of the tiny models; other texts as they are."""
    from ..models import tiny

    return str(tiny.folder() / text.removeprefix("tiny:")) if text.startswith("tiny:") else text


def check_numbers(config: Any, lowest: dict[float, str], highest: dict[float, str]) -> None:
    """Raise ValueError for a number that is not finite, or below or above what its option allows."""
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field_.name} is {number}: give a finite number")
    for low, names in lowest.items():
        for name in names.split():
            if getattr(config, name) < low:
                raise ValueError(f"{name} is {getattr(config, name)}: it must be {low} or more")
    for high, names in highest.items():
        for name in names.split():
            if getattr(config, name) > high:
                raise ValueError(f"{name} is {getattr(config, name)}: it must be at most {high}")


def recipe_path(name: str) -> Path:
    """A YAML file, or the bundled recipe of that name. Raises ValueError naming the bundled ones."""
    path = Path(name)
    bundled = RECIPES / (name if name.endswith(".yaml") else f"{name}.yaml")
    with contextlib.suppress(OSError, ValueError):  # too long, or not a name at all
        if path.is_file():
            return path
        if bundled.is_file():
            return bundled
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(Path(name).stem, names, 1)
    hint = f"did you mean {near[0]}? There are" if near else "use one of"
    raise ValueError(f"recipe {name!r} is neither a file nor a bundled recipe: {hint} {', '.join(names)}")


def load(recipe: str, overrides: list[str] | None = None) -> TrainConfig:
    """A recipe with overrides, typed and checked. Raises ValueError on any mistake."""
    return from_dict(read(recipe, overrides))


def read(recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Keys and values of a recipe (its `extends:` recipe first) and `key=value` overrides, not yet
    checked."""
    path = recipe_path(recipe)
    values = overridden(_read(path), overrides or [])
    if values.get("task", "fill") in TASKS:
        values.setdefault("recipe", path.stem)
    return values


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The values with `key=value` texts, the value as in YAML, laid over them. Raises ValueError."""
    import yaml

    values = dict(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {text!r} is not of the form key=value")
        try:
            values[key.strip()] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise ValueError(
                f"--set {text!r}: the value is not YAML; put quotes around what holds ? : & or [, "
                f"""for example --set '{key.strip()}=["..."]'"""
            ) from None
    return values


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    import yaml

    if path.resolve() in children:
        raise ValueError(f"recipe {path} extends itself: name another recipe in extends, or none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError:
        raise ValueError(f"recipe {path} is not UTF-8 text: save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"recipe {path} is nested too deeply: it is one level of keys and values") from None
    except (yaml.YAMLError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ValueError(f"recipe {path} is not YAML{line}: quote values that hold ? : & or [") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} is not a YAML mapping of keys to values")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"recipe {path} has the key {odd[0]!r}: keys are names of options")
    parent = values.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise ValueError(f"recipe {path} extends {parent!r}: give the name of a recipe, or a file")
    if parent:
        beside = path.parent / f"{parent}.yaml"
        above = _read(beside if beside.is_file() else recipe_path(parent), (*children, path.resolve()))
        values = {**above, **values}
    return values


def from_dict(values: dict[str, Any], kind: type = TrainConfig) -> Any:
    """Type and check the values with transformers' HfArgumentParser ("1e-4" and 1e-4 are the same there).

    kind: the configuration's dataclass. Raises ValueError naming the option.
    """
    from transformers import HfArgumentParser

    names = [f.name for f in dataclasses.fields(kind)]
    gone = getattr(kind, "gone", {})  # the small trainers of the tiny models have none
    argv: list[str] = []
    empty: list[str] = []
    for key, value in values.items():
        if key in gone:
            raise ValueError(f"option {key} is gone: {gone[key]}")
        if key not in names:
            hint = difflib.get_close_matches(key, names, 1)
            remedy = f"did you mean {hint[0]!r}?" if hint else "see `diptych train --help-config`"
            if key in ELSEWHERE:
                remedy = f"here it is {ELSEWHERE[key]}"
            raise ValueError(f"unknown option {key!r} in the recipe: {remedy}")
        if value is False and kind.__dataclass_fields__[key].type in (str, "str"):
            value = "no"  # YAML reads a bare no as false
        many = str(kind.__dataclass_fields__[key].type).startswith("list")
        parts = value if isinstance(value, list) and many else [value]
        if any(isinstance(part, (list, dict)) for part in parts):
            raise ValueError(f"{key} is {value!r}: it takes {'a list of values' if many else 'one value'}")
        if value is None or value == []:
            empty.append(key)
        elif isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        elif many:
            argv += [f"--{key}", str(value)]
        else:
            argv.append(f"--{key}={value}")
    parser = HfArgumentParser(kind, allow_abbrev=False)

    def fail(message: str) -> None:
        raise ValueError(f"recipe: {message}")

    parser.error = fail  # argparse would print its usage and exit
    (config,) = parser.parse_args_into_dataclasses(args=argv)
    for key in empty:
        if values[key] == []:
            setattr(config, key, [])
    return config


def describe(kind: type = TrainConfig) -> str:
    """All options with defaults and help, one per line."""
    lines = []
    for f in dataclasses.fields(kind):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        lines.append(f"{f.name} = {default!r}\n    {f.metadata['help']}")
    return "\n".join(lines)
