"""Makes `open_clip.safetensors`: a tiny model of open_clip's own code, what it was asked, and what it said.

open_clip needs torchvision, which is not installable beside every torch, so its answers are kept. Made with
open_clip_torch 3.3.0 and torch 2.13.0: `python make_open_clip.py`.
"""

from pathlib import Path

import open_clip.model
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
model = open_clip.model.CLIP(
    embed_dim=8,
    vision_cfg={"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    text_cfg={"context_length": 8, "vocab_size": 7, "width": 16, "heads": 2, "layers": 2},
    quick_gelu=False,
).eval()
with torch.no_grad():
    for parameter in model.parameters():  # as made, biases are 0 and norms 1: a mix-up would not show
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
pixels = torch.randn(3, 3, 32, 32)
# start 5, end 6 (the largest, where open_clip looks for the sentence), filled up with 0
tokens = torch.tensor([[5, 0, 1, 2, 6, 0, 0, 0], [5, 3, 6, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0, 4, 6]])
with torch.no_grad():
    asked = {"asked.pixels": pixels, "asked.tokens": tokens}
    said = {
        "said.image": model.encode_image(pixels, normalize=True),
        "said.text": model.encode_text(tokens, normalize=True),
    }
state = {f"state.{name}": value.clone().contiguous() for name, value in model.state_dict().items()}
save_file({**state, **asked, **said}, Path(__file__).with_name("open_clip.safetensors"))
