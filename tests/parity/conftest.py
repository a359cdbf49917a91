"""Tiny random diffusers pipelines: real architectures, real processing, widths of 32, built in a second."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `import toys`

CLIP_TOKENS = 16
T5_TOKENS = 24
WORDS = (
    "make the sky red blue cat dog remove a an of left right scene same exactly but turn into green".split()
)


def word_tokenizer(length: int, starts: bool):
    """A whitespace tokenizer framed as CLIP's (start, end) or T5's (end); the end id is the largest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<unk>", "<start>", *WORDS, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>" if starts else "$A <end>",
        special_tokens=[("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=length,
    )


def clip_text_model(vocab: int, width: int = 32):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=2,
        eos_token_id=vocab - 1,
        pad_token_id=0,
    )
    return CLIPTextModel(config).eval()


def t5_encoder(vocab: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def autoencoder(latent_channels: int, **kwargs):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **kwargs,
    ).eval()


def flux_parts(in_channels: int) -> dict:
    """Modules of a tiny FLUX pipeline, the same for the same `in_channels`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(in_channels)
    tokenizer, tokenizer_2 = word_tokenizer(CLIP_TOKENS, True), word_tokenizer(T5_TOKENS, False)
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        transformer.proj_out.weight.mul_(3)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "text_encoder": clip_text_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_2": t5_encoder(len(tokenizer_2)),
        "tokenizer_2": tokenizer_2,
        "vae": autoencoder(
            16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        "transformer": transformer,
    }


@pytest.fixture(scope="session")
def fill_pipeline():
    from diffusers import FluxFillPipeline

    pipeline = FluxFillPipeline(**flux_parts(384))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def kontext_pipeline():
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline(**flux_parts(64))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def sd_inpaint_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

    torch.manual_seed(9)
    tokenizer = word_tokenizer(CLIP_TOKENS, True)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    pipeline = StableDiffusionInpaintPipeline(
        vae=autoencoder(4, scaling_factor=0.18215),
        text_encoder=clip_text_model(len(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory, fill_pipeline, kontext_pipeline, sd_inpaint_pipeline):
    """A folder with the pipelines' folders by task, and modules with rewards, which are importable."""
    root = tmp_path_factory.mktemp("toys")
    pipelines = {"fill": fill_pipeline, "kontext": kontext_pipeline, "sd_inpaint": sd_inpaint_pipeline}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    (root / "toy_judge.py").write_text(
        "def brightness(images, prompts, sources, masks):\n"
        "    return images.mean((1, 2, 3))\n\n\n"
        "def nothing(images, prompts, sources, masks):\n"
        "    return images.mean((1, 2, 3)) * float('nan')\n\n\n"
        "def one_fails(images, prompts, sources, masks):\n"
        "    scores = images.mean((1, 2, 3))\n    scores[0] = float('nan')\n    return scores\n"
    )
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture
def random_image():
    """A function (batch, height, width, seed) -> IMAGE of smooth random colour plus grain."""

    def make(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        grain = torch.rand(batch, 3, height, width, generator=generator)
        return (0.8 * smooth + 0.2 * grain).movedim(1, -1).contiguous()

    return make


@pytest.fixture
def mode_posterior(monkeypatch):
    """Make `posterior.sample` return the mode: the pipelines that sample then condition as ours does."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
