"""What a multimodal model is made of, and the three sizes that have a name. No weights, no modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BERT = "google-bert/bert-base-uncased"
GPT2 = "openai-community/gpt2"


@dataclass(frozen=True)
class Architecture:
    """Every width of a model. `bert` and `gpt2` are keys of transformers' configurations, `unet` arguments of
    `ConditionalUNet2D`; what they leave out has the default of those."""

    image_size: int = 224
    embed_dim: int = 512
    latent_channels: int = 256
    encoder_widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # one stride-2 convolution each
    decoder_widths: tuple[int, ...] = (192, 128, 64, 32, 16)  # one doubling each
    unet: Mapping[str, Any] = field(default_factory=dict)
    bert: Mapping[str, Any] = field(default_factory=dict)
    gpt2: Mapping[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 4  # an embedding stands before a caption as this many vectors
    max_tokens: int = 64  # of a text, special tokens included; what is longer is cut, with a warning

    def __post_init__(self):
        steps, back = len(self.encoder_widths), len(self.decoder_widths)
        if steps != back or self.image_size % 2**steps:
            raise ValueError(
                f"image_size is {self.image_size} with {steps} encoder_widths and {back} decoder_widths: "
                f"give as many of both, and a size that divides by {2**steps}"
            )

    @property
    def latent_size(self) -> int:
        """Side of the latent: 7 in every preset."""
        return self.image_size // 2 ** len(self.encoder_widths)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` undoes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Architecture:
        """Raises ValueError for a key it does not know."""
        unknown = sorted(content.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"architecture has an unknown key {unknown[0]}: update the pack, or remove the key"
            )
        return cls(**_tuples({**content, "unet": _tuples(content.get("unet", {}))}))


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


_DRAWN_UNET = {"blocks": 1, "time_width": 512, "attention": "middle"}

# UNet parameters: tiny 0.37 M, drawn 17.5 M, full 47.6 M.
PRESETS: Mapping[str, Architecture] = {
    "tiny": Architecture(
        image_size=56,
        embed_dim=128,
        latent_channels=16,
        encoder_widths=(24, 48, 64),
        decoder_widths=(48, 32, 16),
        unet={"widths": (32, 32, 64), **_DRAWN_UNET, "time_width": 128},
        bert={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        gpt2={
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 52,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        max_tokens=48,
    ),
    "drawn": Architecture(unet=_DRAWN_UNET),  # the topology as the notes draw it: one block a level
    "full": Architecture(),  # as large as the notes say it is
}


def preset(name: str) -> Architecture:
    """The architecture of a preset. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
