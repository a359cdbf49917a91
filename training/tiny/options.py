"""Options that only the trainings of the tiny models have, and what every other training has in their place.

They build a model from nothing, or lean on what holds for the tiny text encoders and the shapes world alone.
`recipes.from_dict` takes the configuration with them where a recipe sets one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runtime.options import group

_tiny = group("Only for the tiny models")


class Neutral:
    """What code that serves every training reads where a recipe sets none of these options."""

    init = "pretrained"
    init_from = ""
    text_lengths = ()
    guidance_max = 0.0
    noise_offset = 0.0
    vae_sample = False
    threads = 0

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        """All of these by name."""
        values = {name: value for name, value in vars(Neutral).items() if not name.startswith("_")}
        del values["neutral"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass
class TinyOptions:
    """Mixed into a configuration, before it."""

    init: str = _tiny(
        Neutral.init,
        "random builds the denoiser of a full training from its config.json alone.",
        choices=("pretrained", "random"),
    )
    init_from: str = _tiny(
        Neutral.init_from,
        "Full training: folder or hub id of a sibling whose denoiser to start from (Fill for Kontext); its "
        "input is cut, or filled up with zeros.",
    )
    text_lengths: list[int] = _tiny(
        [],
        "Padded prompt lengths to train for, one drawn per row; all padding becomes one token of the same "
        "weight. Right only for a T5 encoder to which padding is all alike, as the tiny one is built.",
        low=1,
        high=100_000,
    )
    guidance_max: float = _tiny(
        Neutral.guidance_max,
        "Draw the embedded guidance between `guidance` and this, so that it comes to mean nothing; 0 = off. "
        "A published model has learnt its guidance and keeps it.",
        low=0,
    )
    noise_offset: float = _tiny(
        Neutral.noise_offset,
        "Strength of a per-channel constant added to the noise, without which a flat ground is seen through "
        "the last timestep of an epsilon model.",
        low=0,
    )
    vae_sample: bool = _tiny(
        Neutral.vae_sample,
        "Draw latents from the VAE's posterior (once, at caching) instead of its mode: for rows seen many "
        "hundred times.",
    )
    threads: int = _tiny(
        Neutral.threads,
        "torch CPU threads, on which the order of sums, and so the last bits of a CPU's figures, depend; 0 = "
        "leave as it is (OMP_NUM_THREADS).",
        low=0,
        high=100_000,
    )

    def __post_init__(self) -> None:
        """Raise ValueError where an option does not go with the others of the configuration."""
        self.init_from = bundled(self.init_from)
        super().__post_init__()
        if self.init == "random" and self.method != "full":
            raise ValueError(f"init is random with method {self.method}: an adapter needs pretrained weights")
        flux = self.task in ("fill", "kontext")
        if self.init_from and (self.method != "full" or self.init == "random" or not flux):
            raise ValueError("init_from is for method full of fill and kontext, with init: pretrained")
        if self.text_lengths and self.train_text_encoder:
            raise ValueError("text_lengths is for frozen T5 encoders: leave it empty")
        for name in ("text_lengths", "guidance_max"):
            if getattr(self, name) and not flux:
                raise ValueError(f"{name} is for fill and kontext: leave it out with {self.task}")


def bundled(text: str) -> str:
    """`tiny:NAME` as the path of that file or folder of the tiny models; other texts as they are."""
    from ...models import tiny

    return str(tiny.folder() / text.removeprefix("tiny:")) if text.startswith("tiny:") else text
