"""How strong a LoRA was trained to be: which of the many places that may state alpha is believed.

Precedence: an override > the module's `.alpha` tensor > the safetensors header (`lora_adapter_metadata`) >
`adapter_config.json` > `lora_config.json` (DanceGRPO) > kohya's `ss_network_alpha` > 1.0, said aloud.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .weights import LoraError

ASSUMED = "not stored, scale 1 assumed"


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a peft LoraConfig that decide a module's scale."""

    source: str
    r: int | None = None
    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha_of(self, names: tuple[str, ...]) -> float | None:
        # peft's own rule: a pattern matches a whole module name or its tail after a dot.
        for pattern, alpha in self.alpha_pattern.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return float(alpha)
        return None if self.alpha is None else float(self.alpha)


@dataclass(frozen=True)
class ScaleRule:
    """Everything a file and its neighbours say about alpha, and one method to ask."""

    override: float | None = None
    configs: tuple[PeftConfig, ...] = ()
    kohya_alpha: float | None = None
    split_qkv: bool = False

    def of(self, names: tuple[str, ...], rank: int, alpha: float | None) -> tuple[float, str]:
        """The scale of a module of this rank and where it came from; alpha is its own tensor's value."""
        if self.override is not None:
            return self.override, "override"
        if alpha is not None:
            return alpha / rank, ".alpha in the file"
        for config in self.configs:
            value = config.alpha_of(names)
            if value is not None:
                return value / (math.sqrt(rank) if config.rslora else rank), config.source
        if self.kohya_alpha is not None:
            return self.kohya_alpha / rank, "ss_network_alpha in the header"
        return 1.0, ASSUMED


def scale_rule(
    header: Mapping[str, str], adapter: dict | None, dance: dict | None, override: float | None = None
) -> ScaleRule:
    """Collects the rule from the safetensors header and the JSON files lying beside the weights.

    Raises LoraError for what would change the weights in a way this reader does not carry (DoRA).
    """
    configs = []
    if (stored := parse_json(header.get("lora_adapter_metadata"))) is not None:
        # diffusers prefixes each field with the component it belongs to
        fields = {re.sub(r"^(transformer|unet)\.", "", k): v for k, v in stored.items()}
        configs.append(_peft_config(fields, "lora_adapter_metadata in the header"))
    if adapter is not None:
        configs.append(_peft_config(adapter, "adapter_config.json"))
    params = (dance or {}).get("lora_params", {})
    if params.get("lora_alpha") is not None:
        configs.append(PeftConfig("lora_config.json", params.get("lora_rank"), float(params["lora_alpha"])))
    kohya = header.get("ss_network_alpha")
    network_args = parse_json(header.get("ss_network_args")) or {}
    return ScaleRule(
        override=override,
        configs=tuple(configs),
        kohya_alpha=_number(kohya),
        split_qkv=str(network_args.get("split_qkv", "")).lower() == "true",
    )


def _peft_config(fields: Mapping, source: str) -> PeftConfig:
    if fields.get("use_dora"):
        raise LoraError(
            f"{source} says use_dora: DoRA is not supported, merge it with peft and extract a LoRA"
        )
    return PeftConfig(
        source=source,
        r=fields.get("r"),
        alpha=fields.get("lora_alpha"),
        alpha_pattern=fields.get("alpha_pattern") or {},
        rslora=bool(fields.get("use_rslora")),
    )


def parse_json(text: str | None) -> dict | None:
    """A JSON object, or None when there is none to be had (a header may hold anything)."""
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None or text == "None" else float(text)
    except ValueError:
        return None
