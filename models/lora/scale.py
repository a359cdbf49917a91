"""How strong a LoRA was trained to be: which of the many places that may state alpha is believed.

Precedence: an override > the module's `.scale` or `.alpha` tensor > the safetensors header (peft's fields,
any of the usual names) > `adapter_config.json` (peft) > `lora_config.json` (DanceGRPO) > `<name>.json` >
kohya's `ss_network_alpha` > 1.0, said aloud.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import LoraError
from .patterns import Patterns

ASSUMED = "not stored, scale 1 assumed"
WHOLE = "lokr with whole factors: 1"
_METADATA = "lora_adapter_metadata"
_COMPONENTS = ("transformer.", "unet.", "lora.", "network.")
_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_RANKS = ("r", "lora_rank", "rank", "network_dim", "lora_dim")
_LONGEST_BLOCK = 1_000_000


@dataclass(frozen=True)
class PeftConfig:
    """What one place says of alpha: peft's fields, which other trainers copy."""

    source: str
    r: float | None = None
    alpha: float | None = None
    patterns: Patterns | None = field(default=None, repr=False)
    pattern_ranks: frozenset[float] = frozenset()
    rslora: bool = False
    kind: str = ""
    dora: bool = False

    def alpha_of(self, names: tuple[str, ...]) -> float | None:
        """alpha by the first name that a pattern matches, else the default; None if it says neither."""
        if self.patterns is not None:
            for name in names:
                if (value := self.patterns.value(name)) is not None:
                    return value
        return self.alpha

    def describes(self, ranks: set[int]) -> bool:
        """False when it speaks of ranks that this file does not have: it belongs to another."""
        return self.r is None or not ranks or bool(ranks & {self.r, *self.pattern_ranks})


@dataclass(frozen=True)
class ScaleRule:
    """Everything a file and its neighbours say about alpha, and one method to ask."""

    override: float | None = None
    configs: tuple[PeftConfig, ...] = ()
    kohya_alpha: float | None = None
    split_qkv: bool = False
    notes: tuple[str, ...] = ()

    def of(self, names: tuple[str, ...], rank: int | None, alpha: float | None) -> tuple[float, str]:
        """The scale of a module of this rank and where it came from; alpha is its own tensor's value.

        rank None: LoKr with whole factors, which only peft scales (by its config's r).
        """
        if self.override is not None:
            return self.override, "override"
        if rank is None:
            for config in self.configs:
                if config.kind == "LOKR" and config.r and (value := config.alpha_of(names)) is not None:
                    return value / config.r, config.source
            return 1.0, WHOLE
        root = any(config.rslora for config in self.configs)
        if alpha is not None:
            return alpha / (math.sqrt(rank) if root else rank), ".alpha in the file"
        for config in self.configs:
            value = config.alpha_of(names)
            if value is not None:
                return value / (math.sqrt(rank) if root else rank), config.source
        if self.kohya_alpha is not None:
            return self.kohya_alpha / rank, "ss_network_alpha in the header"
        return 1.0, ASSUMED


def scale_rule(
    header: Mapping[str, str],
    sidecars: Mapping[str, dict],
    ranks: set[int],
    override: float | None = None,
) -> ScaleRule:
    """Collects the rule from the safetensors header and the JSON files that belong to the weights.

    sidecars: file name -> its object; ranks: those of the file's factors.
    Raises LoraError for a number that is none.
    """
    if override is not None and not math.isfinite(override):
        raise LoraError(f"scale is {override}: it must be a finite number")
    configs, notes = _header_configs(header), []
    for name, content in sidecars.items():
        params = content.get("lora_params")
        if params is not None and not isinstance(params, dict):
            raise LoraError(
                f"{name}: lora_params is {_short(params)}, not an object: repair it, or remove it"
            )
        config = _config(content if params is None else params, name)
        if config.describes(ranks):
            configs.append(config)
        else:
            notes.append(f"{name} speaks of rank {config.r:g}, which this file has nowhere: not used")
    args = parse_json(header.get("ss_network_args")) or {}
    return ScaleRule(
        override=override,
        configs=tuple(configs),
        kohya_alpha=_loose(header.get("ss_network_alpha"), "ss_network_alpha in the header"),
        split_qkv=str(args.get("split_qkv", "")).lower() == "true",
        notes=tuple(notes),
    )


def _header_configs(header: Mapping[str, str]) -> list[PeftConfig]:
    """peft's fields as one JSON block (diffusers, OneTrainer, ...) or as entries of their own."""
    configs = []
    for key in sorted(header, key=lambda k: (k != _METADATA, k)):
        if key == "diptych":  # ours: its factors already hold alpha
            continue
        text = header[key]
        if key == _METADATA or (text[:1] == "{" and "lora_alpha" in text):
            block = parse_json(text)
            if block is not None and (key == _METADATA or "lora_alpha" in _plain(block)):
                configs.append(_config(_plain(block), f"{key} in the header"))
    flat = _plain(header)
    for name in _ALPHAS:
        if name in flat and (value := _loose(flat[name], f"{name} in the header")) is not None:
            rslora = str(flat.get("use_rslora", "")).lower() in ("true", "1")
            configs.append(PeftConfig(f"{name} in the header", alpha=value, rslora=rslora))
            break
    return configs


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without the component that diffusers writes before each (`transformer.lora_alpha`)."""
    out: dict[str, Any] = {}
    for key, value in fields.items():
        prefix = next((p for p in _COMPONENTS if key.startswith(p)), "")
        out.setdefault(key.removeprefix(prefix), value)
    return out


def _config(fields: Mapping[str, Any], source: str) -> PeftConfig:
    kind = str(fields.get("peft_type") or "").rpartition(".")[2].upper()
    alpha = next((fields[n] for n in _ALPHAS if fields.get(n) is not None), None)
    rank = next((fields[n] for n in _RANKS if fields.get(n) is not None), None)
    alphas, ranks = (_numbers(fields.get(n), f"{n} of {source}") for n in ("alpha_pattern", "rank_pattern"))
    return PeftConfig(
        source=source,
        r=number(rank, f"the rank of {source}"),
        alpha=number(alpha, f"lora_alpha of {source}"),
        patterns=Patterns(alphas, f"alpha_pattern of {source}") if alphas else None,
        pattern_ranks=frozenset(ranks.values()),
        rslora=fields.get("use_rslora") is True,
        kind=kind,
        dora=fields.get("use_dora") is True,
    )


def _numbers(value: object, where: str) -> dict[str, float]:
    if value is None or value == {}:
        return {}
    if not isinstance(value, dict):
        raise LoraError(f"{where} is {_short(value)}, not an object of numbers: repair it, or remove it")
    return {str(k): number(v, where) or 0.0 for k, v in value.items()}


def number(value: object, where: str) -> float | None:
    """A finite number, or None for None. Raises LoraError naming the place."""
    if value is None:
        return None
    try:
        result = (
            float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        )
    except (ValueError, OverflowError):
        result = None
    if result is None or not math.isfinite(result):
        raise LoraError(
            f"{where} is {_short(value)}, not a finite number: repair it, or set the scale yourself"
        )
    return result


def _loose(value: object, where: str) -> float | None:
    """The number of a header entry that may hold anything; None where it is no number."""
    try:
        result = float(str(value))
    except ValueError:
        return None
    return number(result, where)


def parse_json(text: str | None) -> dict | None:
    """A JSON object, or None when there is none to be had (a header may hold anything)."""
    try:
        value = json.loads(text) if text and len(text) <= _LONGEST_BLOCK else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _short(value: object) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
