"""Architectures of the bundled tiny models, and the standard diffusers folders they are shipped in.

Everything about their shape stands here once; what they learn comes from `training/`. Build, do not load:
`models.tiny.folder` finds the weights that ship with the pack.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

PANEL = 64  # pixels; a diptych is 128 x 64
FLUX_LATENTS = 16
SD_LATENTS = 4
TEXT_WIDTH = 64
T5_TOKENS = 64  # the longest prompt of the shapes world has 46 tokens
PAD_MARK = 1e4


def vae(architecture: str = "flux"):
    """A fresh `AutoencoderKL`, 8x: "flux" has 16 latent channels, "sd" 4 and quant convolutions.

    One normalisation group: groups as narrow as these channels would erase flat colours. Raises ValueError
    for another architecture.
    """
    from diffusers import AutoencoderKL

    if architecture not in ("flux", "sd"):
        raise ValueError(f"architecture is {architecture!r}: use flux or sd")
    flux = architecture == "flux"
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=FLUX_LATENTS if flux else SD_LATENTS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64) if flux else (16, 16, 24, 32),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=PANEL,
        scaling_factor=1.0,
        shift_factor=0.0 if flux else None,
        use_quant_conv=not flux,
        use_post_quant_conv=not flux,
        mid_block_add_attention=False,
    )


def clip_tokenizer(folder: Path, words: Sequence[str]):
    """Writes a `CLIPTokenizer` folder whose byte pairs join each of `words` into one token; returns it."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    alphabet = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz,.-'"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(sorted(set(words)), trainer)
    trained = json.loads(bpe.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].get)
    pieces += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in trained["vocab"]]
    special = [
        "<|startoftext|>",
        "<|endoftext|>",
    ]  # the end has the highest id: old transformers pool at the argmax
    vocab = {piece: index for index, piece in enumerate(pieces + special)}
    merges = [" ".join(m) if isinstance(m, list) else m for m in trained["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": special[0],
        "eos_token": special[1],
        "unk_token": special[1],
        "pad_token": special[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path, words: Sequence[str]):
    """Writes a `T5TokenizerFast` folder (a unigram per word in either case); returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({form for word in words for form in (word.lower(), word.lower().capitalize())})
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", ",", ".", "-", "'", *(f"\u2581{name}" for name in names)]
    unigram = Tokenizer(models.Unigram([(p, 0.0 if i < 3 else -2.0) for i, p in enumerate(pieces)], unk_id=2))
    split = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    unigram.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    unigram.add_special_tokens(["<pad>", "</s>", "<unk>"])
    unigram.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": T5_TOKENS,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return T5TokenizerFast.from_pretrained(folder)


def clip_text(vocab_size: int):
    """A fresh `CLIPTextModel`: 2 layers of width 64, 77 positions; pooled output 64."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config)


def t5_text(vocab_size: int):
    """A fresh `T5EncoderModel`: 3 layers of width 64, with `isolate_padding` applied."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    isolate_padding(model)
    return model


def isolate_padding(model) -> None:
    """Makes a T5 encoder blind to padding, to be called after every training step.

    FLUX pipelines pass no attention mask, so an encoder trained with 20 pads would see others at the default
    512. Channel 0 is kept for "this is padding" (so large there that every pad comes out the same), channel 1
    for "this is a word"; one channel of each head gives every pad a logit near -30.
    """
    import torch

    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, 0], table[:, 1] = 0.0, 2.0
        table[0] = 0.0
        table[0, 0] = PAD_MARK
        for block in model.encoder.block:
            attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            attention.o.weight[:2] = 0.0
            feed_forward.wo.weight[:2] = 0.0
            first = slice(None, None, attention.key_value_proj_dim)
            attention.k.weight[:, 0] = 0.0
            attention.q.weight[first] = 0.0
            attention.k.weight[first] = 0.0
            attention.q.weight[first, 1] = 2.5
            attention.k.weight[first, 0] = -2.5
            block.layer[0].layer_norm.weight[:2] = 1.0
        model.encoder.final_layer_norm.weight[0] = 0.25


def flux_transformer(in_channels: int):
    """A fresh `FluxTransformer2DModel`: 2 double and 3 single blocks, width 128; Fill has 384 channels in."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=4 * FLUX_LATENTS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def sd_unet():
    """A fresh 9-channel `UNet2DConditionModel` for epsilon inpainting on 8 x 8 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PANEL // 8,
        in_channels=2 * SD_LATENTS + 1,
        out_channels=SD_LATENTS,
        block_out_channels=(24, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
