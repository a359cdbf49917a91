"""A multimodal model of a few thousand weights: the real assembly at 28 pixels and width 16."""

from __future__ import annotations

import pytest
import torch

WORDS = "a the small large red green blue circle square cross background with and at top bottom left right"
CAPTIONS = ["a small red circle at the top left", "a blue square", "a small red circle at the top left"]


@pytest.fixture(scope="session")
def architecture():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from comfyui_diptych.models.multimodal import Architecture

    return Architecture(
        image_size=28,
        embed_dim=16,
        latent_channels=4,
        encoder_widths=(8, 8),
        decoder_widths=(8, 8),
        unet={"widths": (16, 16, 32), "time_width": 32},
        bert={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        gpt2={
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        prefix_tokens=2,
        max_tokens=12,
    )


@pytest.fixture(scope="session")
def tokenizer():
    pytest.importorskip("transformers")
    from comfyui_diptych.models.multimodal import word_tokenizer

    return word_tokenizer(WORDS.split())


def build(architecture, tokenizer, seed: int = 0):
    from comfyui_diptych.models.multimodal import GenerativeMultimodalModel

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = GenerativeMultimodalModel(architecture, tokenizer)
        with torch.no_grad():  # as fresh from training: a null vector and statistics of its own
            model.latent_diffusion.null_condition.normal_()
            model.latent_diffusion.update_statistics(3 + 2 * torch.randn(64, 4, 7, 7))
    return model.eval()


@pytest.fixture(scope="session")
def shared(architecture, tokenizer):
    """The model in eval mode; for tests that change nothing of it."""
    return build(architecture, tokenizer)


@pytest.fixture
def model(architecture, tokenizer):
    """The same, for one test alone."""
    return build(architecture, tokenizer)


@pytest.fixture(scope="session")
def images():
    return torch.rand(3, 36, 30, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def captions():
    return list(CAPTIONS)
