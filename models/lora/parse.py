"""What one key of a LoRA file is: which layer, which role (A, B, alpha, router, expert, ...).

The suffix half of the naming zoo; the layer half is `names.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .weights import LoraError

_AB = re.compile(
    r"^(?P<layer>.+?)\.lora_(?P<role>A|B|route)(?P<mid>(?:\.[\w-]+)*?)(?:\.(?P<leaf>weight|bias))?$"
)
_UP_DOWN = re.compile(
    r"^(?P<layer>.+?)(?:\.lora_linear_layer\.|\.lora_|_lora\.|\.lora\.|\.)(?P<role>down|up|mid)\.weight$"
)
_LYCORIS = re.compile(r"^(?P<layer>.+)\.(?P<role>(?:lokr|hada)_\w+)$")
_PLAIN = re.compile(
    r"^(?P<layer>.+)\.(?P<role>alpha|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|dora_scale)$"
)
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)")
_OTHER_KINDS = re.compile(
    r"\.(oft_|boft_|ia3_|on_input|vera_|a1\.weight|b1\.weight|hada_t\d|lokr_t\d|lora_embedding_)"
)
_QUANTISED = re.compile(
    r"(\.qweight|\.wscales|\.wzeros|\.smooth(_orig|_factor)?|\.proj_down|\.proj_up|svdq|\.SCB|\.absmax"
    r"|\.quant_state|\.lora_down|\.lora_up|\.qzeros)$"
)
_ROLES = {"down": "A", "up": "B", "route": "router"}
# Nearly every key of nearly every file; the patterns above would find the same, slower.
_USUAL = {"A.weight": "A", "B.weight": "B", "down.weight": "A", "up.weight": "B"}


class Part(NamedTuple):
    """layer as written in the file; role A, B, mid, alpha, router, diff, ...; expert number or None."""

    layer: str
    role: str
    expert: int | None = None
    adapter: str = ""


def refuse_unsupported(name: str, keys: Iterable[str]) -> None:
    """One sentence for files that hold something no honest low-rank reading exists for."""
    for key in keys:
        if key.partition(".lora_")[2] in _USUAL:
            continue
        if _QUANTISED.search(key):
            raise LoraError(
                f"{name} is quantised ({key}; Nunchaku/SVDQuant or bitsandbytes): "
                "use the original LoRA here, or Nunchaku's own loader for this file"
            )
        if _DORA.search(key):
            raise LoraError(
                f"{name} is a DoRA ({key}), which is not supported: merge it with peft and extract a LoRA"
            )
        if _OTHER_KINDS.search(key):
            raise LoraError(
                f"{name} holds {key}: this adapter kind is not supported, use core's Load LoRA for it"
            )


def classify(key: str) -> Part | None:
    """The part a key is, or None for a plain parameter (`...weight`, `...bias`)."""
    layer, _, rest = key.partition(".lora_")
    if rest in _USUAL:
        return Part(layer, _USUAL[rest])
    if (match := _AB.match(key)) is not None:
        expert, adapter = _expert(match["mid"])
        role = _ROLES.get(match["role"], match["role"])
        return Part(match["layer"], f"{role}_bias" if match["leaf"] == "bias" else role, expert, adapter)
    if key.endswith(".weight"):
        if (match := _UP_DOWN.match(key)) is not None:
            return Part(match["layer"], _ROLES.get(match["role"], match["role"]))
        return None
    if (match := _PLAIN.match(key) or _LYCORIS.match(key)) is not None:
        return Part(match["layer"], match["role"])
    return None


def _expert(mid: str) -> tuple[int | None, str]:
    """`.expert_2` -> (2, ""); `.default` -> (None, "default"); `.2` -> (2, "")."""
    expert, adapter = None, []
    for word in mid.strip(".").split("."):
        number = word.removeprefix("expert_")
        if number.isdigit():
            expert = int(number)
        elif word:
            adapter.append(word)
    return expert, ".".join(adapter)
