"""Claim: building diptychs and packing their masks in float tensors takes as long as through 8-bit images.

    python benchmarks/builder_packer.py [--size 1024] [--images 8] [--rounds 7]

Ours: the nodes DiptychBuilder and DiptychMaskPacker, one image at a time, preview included. The peer is a
route through PIL that does the work of ICEdit's official ComfyUI nodes: the tensor becomes an 8-bit image,
is resized to 512 wide with PIL's default bicubic filter (height from the aspect), pasted twice into a
image of twice the width, and turned back into a float tensor; a mask with a white right half is drawn, and
turned into a tensor. That route loses the fractions of 8-bit levels, ours does not; it does not pack the
mask, which our figure includes. Rounds alternate in one process, on one thread; the best of each is compared.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from comfyui_diptych.nodes.diptych import DiptychBuilder
from comfyui_diptych.nodes.masks import DiptychMaskPacker
from PIL import Image, ImageDraw


def ours(images: torch.Tensor) -> None:
    for image in images.split(1):
        _, mask, _, _ = DiptychBuilder().build(image, "make it red")
        DiptychMaskPacker().pack(mask)


def through_pil(images: torch.Tensor) -> None:
    for image in images:
        pil = Image.fromarray((image.numpy() * 255).clip(0, 255).astype(np.uint8))
        width, height = 512, round(512 * pil.height / pil.width)
        pil = pil.resize((width, height))
        diptych = Image.new("RGB", (2 * width, height))
        diptych.paste(pil, (0, 0))
        diptych.paste(pil, (width, 0))
        mask = Image.new("L", diptych.size, 0)
        ImageDraw.Draw(mask).rectangle((width, 0, 2 * width, height), fill=255)
        torch.from_numpy(np.array(diptych).astype(np.float32) / 255)[None]
        torch.from_numpy(np.array(mask).astype(np.float32) / 255)[None]


def seconds(call, images: torch.Tensor) -> float:
    start = time.process_time()
    call(images)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(options.images, options.size, options.size, 3)
    rounds = [(seconds(ours, images), seconds(through_pil, images)) for _ in range(options.rounds)]
    mine, theirs = (min(column) / options.images * 1000 for column in zip(*rounds, strict=True))
    print(f"{options.images} images of {options.size}x{options.size}, per image:")
    print(f"  diptych nodes {mine:.1f} ms, PIL route {theirs:.1f} ms")
    print(f"ratio ours / PIL: {mine / theirs:.2f} (below 1 is faster)")


if __name__ == "__main__":
    main()
