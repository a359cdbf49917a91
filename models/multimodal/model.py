"""The whole system: parts, training forward, and both directions of generation.

Image to text is autoregressive and text to image is diffusion, each what its kind of data asks for. How it is
stored stands in `storage.py`, what it optimises in `losses.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import check_choice, place
from ..pixels import as_image, fit_image, on_white
from . import storage, tokens
from .images import ImageDecoder, ImageEncoder
from .latent_diffusion import LatentDiffusionUNet
from .losses import FOREGROUND_WEIGHT, Losses, caption_loss, contrastive_loss, reconstruction_loss
from .pairs import Pairs, make_pairs
from .presets import BERT, GPT2, Architecture, preset
from .text import TextDecoder, TextEncoder, fresh_bert, fresh_gpt2

STAGES = ("align", "diffuse", "joint")
MAX_SCALE = 100.0  # of the contrastive similarities, as in CLIP
BATCH = 16  # images at a time


class GenerativeMultimodalModel(nn.Module):
    """Text -> embedding -> diffusion -> latent -> image; image -> embedding -> GPT-2 -> text."""

    def __init__(
        self,
        architecture: Architecture,
        tokenizer: Any,
        caption_tokenizer: Any = None,
        *,
        bert: Any = None,
        gpt2: Any = None,
    ):
        """tokenizer: of the text encoder, and of the decoder too unless `caption_tokenizer` is given.

        bert, gpt2: a `BertModel` and a `GPT2LMHeadModel`; where not given, fresh ones as large as the
        architecture says, with the tokenizers' vocabularies.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.caption_tokenizer = caption_tokenizer or tokenizer
        bert = bert or fresh_bert(architecture.bert, tokenizer)
        gpt2 = gpt2 or fresh_gpt2(architecture.gpt2, self.caption_tokenizer)
        self.architecture = a = replace(
            architecture, bert=bert.config.to_diff_dict(), gpt2=gpt2.config.to_diff_dict()
        )
        self.image_encoder = ImageEncoder(a.embed_dim, a.image_size, a.encoder_widths)
        self.image_decoder = ImageDecoder(a.embed_dim, a.latent_channels, a.latent_size, a.decoder_widths)
        self.text_encoder = TextEncoder(bert, a.embed_dim)
        self.text_decoder = TextDecoder(gpt2, a.embed_dim, a.prefix_tokens, a.max_tokens)
        self.latent_diffusion = LatentDiffusionUNet(
            a.latent_channels, a.latent_size, a.embed_dim, unet=a.unet
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_preset(
        cls,
        name: str,
        tokenizer: Any = None,
        *,
        bert: str = BERT,
        gpt2: str = GPT2,
        cache_dir: str | None = None,
    ) -> GenerativeMultimodalModel:
        """An untrained model of a preset: tiny, drawn or full.

        With a tokenizer (`word_tokenizer(words)`) its text parts are fresh and know that vocabulary. Without
        one they are pretrained: `bert` and `gpt2` name Hub models or folders, downloaded once to `cache_dir`.
        """
        architecture = preset(name)
        if tokenizer is not None:
            return cls(architecture, tokenizer)
        from transformers import AutoTokenizer, BertModel, GPT2LMHeadModel

        return cls(
            architecture,
            AutoTokenizer.from_pretrained(bert, cache_dir=cache_dir),
            AutoTokenizer.from_pretrained(gpt2, cache_dir=cache_dir),
            bert=BertModel.from_pretrained(bert, add_pooling_layer=False, cache_dir=cache_dir),
            gpt2=GPT2LMHeadModel.from_pretrained(gpt2, cache_dir=cache_dir),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GenerativeMultimodalModel:
        """What `save_pretrained` wrote, in eval mode.

        Raises ValueError or FileNotFoundError for anything else; checkpoints of the old design by that name.
        """
        folder = Path(folder)
        architecture = storage.read_architecture(folder)
        model = cls(architecture, *storage.load_tokenizers(folder))
        storage.load_weights(model, folder)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes a folder with safetensors weights (in `dtype`, by default as they are); returns it."""
        return storage.save(
            folder, self.state_dict(), self.architecture, self.tokenizer, self.caption_tokenizer, dtype
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any):
        """As in torch, after refusing the keys of the old design with a ValueError."""
        storage.refuse_old_design(state_dict, "this state dict")
        return super().load_state_dict(state_dict, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.log_scale.device

    # images and texts to embeddings

    def pixels(self, images: Tensor) -> Tensor:
        """IMAGE [B,H,W,C] in 0..1 of any size to pixels [B,3,S,S] in -1..1: middle square, antialiased.

        What is transparent lies on white.
        """
        images = on_white(as_image(images, "images"))
        size = self.architecture.image_size
        square = fit_image(images, place(tuple(images.shape[1:3]), (size, size), "crop"))
        return (square.movedim(-1, 1) * 2 - 1).to(self.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """IMAGE [B,H,W,C] to embeddings [B,512]."""
        return self.image_encoder(self.pixels(images).to(self.log_scale.dtype))

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """Texts to embeddings [B,512]. Raises ValueError for no text."""
        prompts = tokens.check_texts("prompts", prompts)
        ids, mask = tokens.text_ids(self.tokenizer, prompts, self.architecture.max_tokens)
        return self.text_encoder(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def similarity(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Cosine similarity [images, prompts], float32 in -1..1."""
        seen = torch.cat(
            [self.encode_image(part) for part in as_image(images, "images").split(BATCH)]
        ).float()
        read = self.encode_text(prompts).float()
        return F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T

    # training

    def pairs(
        self,
        images: Tensor,
        captions: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        even_ground: bool = False,
    ) -> Pairs:
        """A training batch from IMAGE [B,H,W,C] and B captions, on the model's device.

        prompts: what the text encoder reads instead of the captions, such as parts of them.
        even_ground: the images show things on an even ground, so that reconstruction can weigh the things.
        Raises ValueError if there are not as many captions as images.
        """
        captions, limit = tokens.check_texts("captions", captions), self.architecture.max_tokens
        prompts = captions if prompts is None else tokens.check_texts("prompts", prompts)
        return make_pairs(
            self.pixels(images),
            captions,
            prompts,
            self.tokenizer,
            self.caption_tokenizer,
            limit,
            even_ground,
        )

    def forward(
        self,
        pairs: Pairs,
        stage: str = "joint",
        *,
        foreground_weight: float = FOREGROUND_WEIGHT,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Losses:
        """The losses of a batch.

        stage: "align" gives contrastive, reconstruction and caption; "diffuse" the diffusion loss alone, on
        embeddings without a gradient (whose encoders should be in eval mode); "joint" all four, with a
        gradient to the text but never to the latents. noise, timesteps, drop: see
        `LatentDiffusionUNet.loss`.
        """
        check_choice("stage", stage, STAGES)
        draws = {"noise": noise, "timesteps": timesteps, "drop": drop}
        with torch.set_grad_enabled(torch.is_grad_enabled() and stage != "diffuse"):
            image = self.image_encoder(pairs.pixels.to(self.log_scale.dtype))
            text = self.text_encoder(pairs.input_ids, pairs.attention_mask)
        if stage == "diffuse":
            return Losses(diffusion=self.compute_diffusion_loss(image, text, **draws))
        scale = self.log_scale.exp().clamp(max=MAX_SCALE)
        logits = self.text_decoder(image, pairs.caption_ids)
        return Losses(
            contrastive=contrastive_loss(image, text, scale, pairs.same),
            reconstruction=reconstruction_loss(
                self.image_decoder(image), pairs.pixels, pairs.foreground, foreground_weight
            ),
            caption=caption_loss(logits, pairs.caption_ids, pairs.caption_mask),
            diffusion=self.compute_diffusion_loss(image, text, **draws) if stage == "joint" else None,
        )

    def compute_diffusion_loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Text-conditioned denoising of the image latent, from embeddings [B,512] of pairs.

        The latents get no gradient: they would shrink to what is easy to predict. The rest is
        `LatentDiffusionUNet.loss`.
        """
        latents = self.image_decoder.get_latent_from_embedding(image_features).detach()
        return self.latent_diffusion.loss(text_features, latents, noise=noise, timesteps=timesteps, drop=drop)

    @torch.no_grad()
    def update_latent_statistics(self, images: Tensor, momentum: float = 1.0) -> None:
        """Stores what the diffusion normalises latents by, from IMAGE [N,H,W,C], N large.

        Call it after "align" and before "diffuse", or now and then with a small momentum in "joint".
        """
        embeddings = torch.cat([self.encode_image(part) for part in images.split(BATCH)])
        latents = self.image_decoder.get_latent_from_embedding(embeddings)
        self.latent_diffusion.update_statistics(latents, momentum)

    # generation

    @torch.no_grad()
    def generate_image_from_text(
        self,
        text_embeddings: Tensor,
        num_inference_steps: int = 50,
        *,
        cfg: float = 2.0,
        noise: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Text embeddings [B,512] to IMAGE [B,S,S,3] float32 in 0..1; see `LatentDiffusionUNet.sample`."""
        latents = self.latent_diffusion.sample(
            text_embeddings, num_inference_steps, cfg=cfg, noise=noise, callback=callback
        )
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,256,7,7] to IMAGE [B,S,S,3] float32 in 0..1."""
        parts = latents.to(self.log_scale.dtype).split(BATCH)
        pixels = torch.cat([self.image_decoder.decode_from_latent(part) for part in parts]).float()
        return (pixels / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    @torch.no_grad()
    def generate_text_from_image(self, image_embeddings: Tensor, **sampling: Any) -> list[str]:
        """Image embeddings [B,512] to captions, by default the likeliest; see `TextDecoder.generate`."""
        ids = self.text_decoder.generate(image_embeddings, **sampling)
        return self.caption_tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def generate_from_text(
        self,
        prompts: str | Sequence[str],
        num_samples_per_prompt: int = 2,
        use_diffusion: bool = True,
        num_inference_steps: int = 50,
        seed: int | None = 42,
        *,
        cfg: float = 2.0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Prompts to IMAGE [prompts * samples, S, S, 3] in 0..1, the samples of a prompt side by side.

        A seed stands for the same noise on every device; None draws one. Without use_diffusion the text's
        embedding is decoded directly, and all samples of a prompt are the same. callback: see
        `LatentDiffusionUNet.sample`; the steps are counted anew for every 16 images. Raises ValueError for
        less than one sample a prompt.
        """
        if num_samples_per_prompt < 1:
            raise ValueError(f"num_samples_per_prompt is {num_samples_per_prompt}: give at least 1")
        embeddings = self.encode_text(prompts)
        if not use_diffusion:
            latents = self.image_decoder.get_latent_from_embedding(embeddings)
            return self.decode(latents).repeat_interleave(num_samples_per_prompt, dim=0)
        embeddings = embeddings.repeat_interleave(num_samples_per_prompt, dim=0)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        shape = self.latent_diffusion.latent_shape
        noise = torch.stack([torch.randn(shape, generator=generator) for _ in embeddings])
        parts = zip(embeddings.split(BATCH), noise.split(BATCH), strict=True)
        return torch.cat(
            [
                self.generate_image_from_text(e, num_inference_steps, cfg=cfg, noise=n, callback=callback)
                for e, n in parts
            ]
        )

    @torch.no_grad()
    def generate_from_image(
        self,
        images: Tensor,
        num_captions_per_image: int = 3,
        temperature: float = 0.9,
        top_k: int = 50,
        top_p: float = 0.9,
        repetition_penalty: float = 1.3,
        *,
        seed: int | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> list[list[str]]:
        """IMAGE [B,H,W,C] in 0..1 to B lists of captions; see `TextDecoder.generate`.

        16 images are read at a time, the next 16 with the next seed; callback(images read so far) after each.
        """
        count, captions = num_captions_per_image, []
        for number, part in enumerate(as_image(images, "images").split(BATCH)):
            captions += self.generate_text_from_image(
                self.encode_image(part),
                num_captions=count,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=None if seed is None else (seed + number) % 2**64,
            )
            if callback is not None:
                callback(len(captions) // count)
        return [captions[first : first + count] for first in range(0, len(captions), count)]

    def cross_modal_generation(self, source: Any, **options: Any) -> Any:
        """Deprecated: forwards texts to `generate_from_text` and an IMAGE to `generate_from_image`."""
        target = self.generate_from_image if isinstance(source, Tensor) else self.generate_from_text
        warnings.warn(
            f"cross_modal_generation is deprecated: call {target.__name__}", DeprecationWarning, stacklevel=2
        )
        return target(source, **options)
