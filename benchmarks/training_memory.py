"""Claim: the icedit recipe takes at most 0.85 of the original trainer's GPU memory, and 24 GB suffice.

Named peer: ICEdit's own trainer, which keeps T5 and CLIP on the GPU and encodes every step; its authors
report 37, 39 and 42 GB at 512, 768 and 1024 pixels with gradient checkpointing (ICEdit, Section "training").

Nothing here needs a GPU. Weights are counted on FLUX's real architecture. What the backward pass keeps is
measured on one and two real-width blocks with the recipe's own adapters, in the recipe's precision, and is
linear in the number of tokens; the rest is arithmetic:

    weights      base in its storage type, VAE in float32; an fp8 base is widened to bfloat16 layer by layer,
                 and the backward pass keeps the copies: of one block with checkpointing, of all without
    trained      LoRA in float32 with gradient and AdamW's two moments: 16 bytes a parameter (Prodigy: 24)
    activations  with checkpointing: every block's input, and what one block keeps, twice (gradients);
                 without: everything that all blocks keep
    rest         1.5 GB: CUDA context, workspaces, fragmentation

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

GB = 1e9
FLUX = {
    "patch_size": 1,
    "in_channels": 384,
    "out_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
DOUBLE, SINGLE, WIDTH = 19, 38, 3072
TEXT_ENCODERS = (4_762_310_656 + 123_060_480) * 2  # T5-XXL encoder and CLIP-L, bfloat16
VAE = 83_819_683 * 4
REST = 1.5 * GB
LIMIT, CARD = 0.85, 24  # of the peer; GB
PUBLISHED = {512: 37, 768: 39, 1024: 42}
LORA = SimpleNamespace(rank=32, alpha=32.0, method="lora", moe_experts=4, moe_top_k=1, moe_gate="softmax_all")


def transformer(double: int, single: int, device: str, dtype: torch.dtype = torch.bfloat16):
    """FLUX with that many blocks and the recipe's LoRA; (module, trained parameters, base parameters)."""
    from comfyui_diptych.training.tasks import adapters
    from comfyui_diptych.training.tasks.fill import FillTask
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=double, num_single_layers=single, **FLUX)
        module = torch.nn.Module.to(module, dtype)
        base = sum(p.numel() for p in module.parameters())
        adapters.add_lora(module, FillTask.target_modules, LORA)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if device != "meta":
        module.to_empty(device=device)
        for parameter in module.parameters():
            parameter.data.fill_(0.01)
    return module, trained, base


def kept(double: int, single: int, tokens: int, text: int) -> int:
    """Bytes that autograd keeps for the backward pass of one row, parameters left out."""
    module, _, _ = transformer(double, single, "cpu")
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # keeps its address from being used again
        return tensor

    held: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        module(
            hidden_states=torch.zeros(1, tokens, 384, dtype=torch.bfloat16),
            encoder_hidden_states=torch.zeros(1, text, 4096, dtype=torch.bfloat16),
            pooled_projections=torch.zeros(1, 768, dtype=torch.bfloat16),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]),
            img_ids=torch.zeros(tokens, 3),
            txt_ids=torch.zeros(text, 3),
        )
    return sum(seen.values())


def per_token() -> tuple[float, float]:
    """Bytes a token costs in a double and in a single block, from differences (constants cancel)."""
    few, many = (24, 8), (96, 32)
    counts = [kept(d, s, *size) for d, s in ((1, 1), (2, 1), (1, 2)) for size in (few, many)]
    step = sum(many) - sum(few)
    one, two_double, two_single = ((b - a) / step for a, b in zip(counts[::2], counts[1::2], strict=True))
    return two_double - one, two_single - one


def tokens_of(side: int, text: int = 512) -> int:
    """Of a diptych of two square panels, with its prompt; a Kontext edit of that size has as many."""
    return 2 * (side // 16) ** 2 + text


def activations(tokens: int, double: float, single: float, checkpointing: bool) -> float:
    if not checkpointing:
        return tokens * (DOUBLE * double + SINGLE * single)
    return tokens * ((DOUBLE + SINGLE) * WIDTH * 2 + 2 * max(double, single))


def weights(kind: str, base: int, block: int, checkpointing: bool) -> float:
    """Bytes of the base; `block` is the parameters of its largest block."""
    if kind == "bfloat16":
        return 2 * base
    return base + 2 * (block if checkpointing else base)


def main() -> int:
    _, trained, base = transformer(DOUBLE, SINGLE, "meta")
    block = transformer(2, 1, "meta")[2] - transformer(1, 1, "meta")[2]
    double, single = per_token()
    states = 16 * trained
    out = sys.stdout.write
    out(
        f"base {base / 1e9:.2f} B parameters, LoRA rank 32 {trained / 1e6:.1f} M "
        f"({states / GB:.1f} GB with gradient and moments)\n"
    )
    out(f"kept per token: double block {double / 1e6:.3f} MB, single block {single / 1e6:.3f} MB\n\n")
    out("side  tokens  checkpointing   fp8 base   bf16 base   (GB, batch 1)\n")
    ours = {}
    for side in PUBLISHED:
        for checkpointing in (True, False):
            fixed = VAE + states + activations(tokens_of(side), double, single, checkpointing) + REST
            fp8, bf16 = (
                (weights(kind, base, block, checkpointing) + fixed) / GB
                for kind in ("float8_e4m3fn", "bfloat16")
            )
            out(
                f"{side:4}  {tokens_of(side):6}  {'on' if checkpointing else 'off':13}  "
                f"{fp8:9.1f}  {bf16:10.1f}\n"
            )
            if checkpointing:
                ours[side] = (fp8, bf16)
    out("\nagainst the original's published figures, checkpointing on, bf16 base:\n")
    for side, published in PUBLISHED.items():
        resident = ours[side][1] + TEXT_ENCODERS / GB
        out(
            f"{side:4}: {ours[side][1]:.1f} / {published} GB = {ours[side][1] / published:.2f} "
            f"(this formula with the encoders resident: {resident:.1f})\n"
        )
    ratio = max(ours[side][1] / published for side, published in PUBLISHED.items())
    largest = max(fp8 for fp8, _ in ours.values())
    holds = ratio <= LIMIT and largest < CARD
    out(
        f"claim {'holds' if holds else 'FAILS'}: ratio {ratio:.2f} at most, "
        f"{largest:.1f} GB with an fp8 base\n"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
