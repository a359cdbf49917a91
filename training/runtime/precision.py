"""Whether bfloat16 is worth computing in: several times faster with units for it, far slower without."""

from __future__ import annotations

import torch

CPU_UNITS = ("amx_bf16", "avx512_bf16")


def bf16_is_fast(device: str) -> bool:
    """For a device type: "cuda", "cpu" (AMX or AVX-512 with bfloat16) or another (False)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    return any(capabilities.get(unit, False) for unit in CPU_UNITS)
