"""Options that only the multimodal model has, and the two runs that its training is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.options import group

_pairs = group("Only for the multimodal model")

STAGES = ("both", "align", "diffuse")


@dataclass
class MultimodalOptions:
    """Mixed into a configuration, before it; `recipes.from_dict` takes it for `task: multimodal`."""

    stage: str = _pairs(
        "both",
        "align: encoders and decoders by contrast, reconstruction and captions; diffuse: the diffusion on "
        "frozen latents of what align wrote; both: one after the other, align in OUTPUT_DIR/align.",
        choices=STAGES,
    )
    joint: bool = _pairs(False, "All losses in one run instead of two stages.")
    align_steps: int = _pairs(
        1000, "Optimiser steps of stage align; those of diffuse are max_steps.", low=1, high=10**9
    )
    align_lr: float = _pairs(0.0, "Learning rate of stage align; 0 = lr, which is that of diffuse.", low=0)
    words: str = _pairs(
        "",
        "Begin a preset with untrained text parts that know these words: `shapes` for the shapes world, or a "
        "UTF-8 text file; empty: BERT and GPT-2 from the Hub.",
    )
    contrastive_weight: float = _pairs(1.0, "Weight of the contrastive loss.", low=0)
    reconstruction_weight: float = _pairs(1.0, "Weight of the reconstruction loss.", low=0)
    caption_weight: float = _pairs(1.0, "Weight of the caption loss.", low=0)
    diffusion_weight: float = _pairs(1.0, "Weight of the diffusion loss, where there are others.", low=0)
    even_ground: bool = _pairs(
        False,
        "The images show things on an even ground, and reconstruction weighs the things: what differs from "
        "an image's median colour by more than 0.2.",
    )
    prompt_part: float = _pairs(
        0.0,
        "Share of rows of which the text encoder reads only a phrase of the caption, or some in a row, so "
        "that short prompts work; the caption is learnt whole.",
        low=0,
        high=1,
    )
    foreground_weight: float = _pairs(5.0, "even_ground: the weight of the things against the ground.", low=1)

    def __post_init__(self) -> None:
        """Raise ValueError where an option does not go with the others of the configuration."""
        self.train_text_encoder = True  # which is a part of the model
        super().__post_init__()
        if self.task != "multimodal":
            raise ValueError(f"task is {self.task}: these options are for multimodal")
        if self.method != "full":
            raise ValueError(f"method is {self.method}: the multimodal model is trained in full, set it so")
        if self.joint and self.stage != "both":
            raise ValueError(f"stage is {self.stage} with joint: true, which has no stages: leave one out")
        for name in ("class_images", "init_from", "text_lengths", "guidance_max", "edit_loss_weight"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for multimodal: leave it out")

    def _check_sizes(self) -> None:
        """Any size will do here; whether it is the model's says the task."""
        if self.resolution < 8 or self.sizing == "buckets":
            raise ValueError(
                f"resolution is {self.resolution} with sizing {self.sizing}: give the model's size, 56 or "
                "224 in the presets, with sizing crop (or squash)"
            )

    def runs(self) -> list[Any]:
        """One run of the trainer per stage; the second begins with the folder that the first exports."""
        if self.joint or self.stage != "both":
            return [self]
        first = Path(self.output_dir) / "align"
        resume, within = self.resume, Path(self.resume or ".").resolve()
        align = dataclasses.replace(
            self,
            stage="align",
            max_steps=self.align_steps,
            lr=self.align_lr or self.lr,
            output_dir=str(first),
            cache_dir=self.cache_dir or str(Path(self.output_dir) / "cache"),
            save_dtype="float32",
        )
        diffuse = dataclasses.replace(self, stage="diffuse", model=str(first / "model"), words="")
        if resume in ("", "auto"):
            return [align, diffuse]
        if first.resolve() in within.parents:  # a checkpoint of the first stage
            return [align, dataclasses.replace(diffuse, resume="")]
        return [diffuse]
