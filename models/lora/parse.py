"""What one key of a LoRA file is: which layer, which role (A, B, alpha, router, expert, ...).

The suffix half of the naming zoo; the layer half is `names.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .errors import LoraError

_AB = re.compile(
    r"^(?P<layer>.+?)\.lora_(?P<role>A|B|route)(?P<mid>(?:\.[\w-]+)*?)(?:\.(?P<leaf>weight|bias))?$"
)
_UP_DOWN = re.compile(
    r"^(?P<layer>.+?)(?:\.lora_linear_layer\.|\.lora_|_lora\.|\.lora\.|\.)(?P<role>down|up|mid)\.weight$"
)
_NAMED = re.compile(
    r"^(?P<layer>.+)\.(?P<role>(?:lokr|hada)_\w+|oft_(?:blocks|diag|R)|boft_[Rs]|lora_magnitude_vector|magnitude)"
    r"(?P<mid>(?:\.[\w-]+)*?)(?:\.weight)?$"
)
_PLAIN = re.compile(
    r"^(?P<layer>.+)\.(?P<role>alpha|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|dora_scale|rescale"
    r"|scalar|wd_for_diff|[ab][12]\.weight|bm\.weight)$"
)
_OTHER_KINDS = re.compile(
    r"\.(?:(ia3_\w*|on_input)|(vera_\w*)|(oft_[rs])|(lora_embedding_[AB]|lora_E|ranknum)|(glora_\w*)|(hra_u|ether_\w*)"
    r"|(fourierft_\w*)|(waveft_\w*)|(randlora_\w*)|(c3a_\w*)|(miss_\w*|bone_\w*))(?:\.|$)"
)
LONGEST_KEY = 256  # twice the longest layer's name; the patterns here are quadratic in the worst case
_QUANTISED = re.compile(
    r"(\.qweight|\.wscales|\.wzeros|\.smooth(_orig|_factor)?|\.proj_down|\.proj_up|svdq|\.SCB|\.absmax"
    r"|\.quant_state|\.lora_down|\.lora_up|\.qzeros)$"
)
_ROLES = {"down": "A", "up": "B", "route": "router", "magnitude": "lora_magnitude_vector"}
# Nearly every key of nearly every file; the patterns above would find the same, slower.
_USUAL = {"A.weight": "A", "B.weight": "B", "down.weight": "A", "up.weight": "B"}


# The kind of adapter that a role (or its beginning) gives away.
STYLES = {
    "lokr": "lokr",
    "hada": "loha",
    "oft": "oft",
    "oft_R": "peft oft",
    "boft": "peft boft",
    "dora": "dora",
    "lora_magnitude_vector": "dora",
    "a1": "glora",
}


class Part(NamedTuple):
    """layer as written in the file; role A, B, mid, alpha, router, diff, ...; number of expert or part."""

    layer: str
    role: str
    expert: int | None = None
    adapter: str = ""


def refuse_unsupported(name: str, keys: Iterable[str]) -> None:
    """Raise LoraError, in one sentence, for a file that no honest low-rank reading exists for."""
    for key in keys:
        if key.partition(".lora_")[2] in _USUAL or len(key) > LONGEST_KEY:
            continue
        if _QUANTISED.search(key):
            raise LoraError(
                f"{name} is quantised ({key}; Nunchaku/SVDQuant or bitsandbytes): "
                "use the original LoRA here, or Nunchaku's own loader for this file"
            )
        if _OTHER_KINDS.search(key):
            raise LoraError(
                f"{name} holds {key}, an adapter kind that is neither a LoRA, LoHa, LoKr, DoRA, GLoRA, OFT "
                "nor BOFT of today: merge it with the library that trained it"
            )


def classify(key: str) -> Part | None:
    """The part a key is, or None for a plain parameter (`...weight`, `...bias`)."""
    layer, _, rest = key.partition(".lora_")
    if rest in _USUAL and layer:
        return Part(layer, _USUAL[rest])
    if len(key) > LONGEST_KEY:
        return None
    if (match := _AB.match(key)) is not None:
        expert, adapter = _expert(match["mid"])
        role = _ROLES.get(match["role"], match["role"])
        return Part(match["layer"], f"{role}_bias" if match["leaf"] == "bias" else role, expert, adapter)
    if (match := _NAMED.match(key)) is not None:
        number, adapter = _expert(match["mid"])
        return Part(match["layer"], _ROLES.get(match["role"], match["role"]), number, adapter)
    if (match := _PLAIN.match(key)) is not None:
        return Part(match["layer"], match["role"].removesuffix(".weight"))
    if (match := _UP_DOWN.match(key)) is not None:
        return Part(match["layer"], _ROLES.get(match["role"], match["role"]))
    return None


def _expert(mid: str) -> tuple[int | None, str]:
    """`.expert_2` -> (2, ""); `.default` -> (None, "default"); `.2` -> (2, "")."""
    expert, adapter = None, []
    for word in mid.strip(".").split("."):
        number = word.removeprefix("expert_")
        if number.isascii() and number.isdecimal() and len(number) <= 4:
            expert = int(number)
        elif word:
            adapter.append(word)
    return expert, ".".join(adapter)
