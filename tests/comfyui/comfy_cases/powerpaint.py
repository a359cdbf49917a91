"""PowerPaint Prompt in ComfyUI: its own CLIP with the cut-out embeddings is the extended encoder, by hand."""

from __future__ import annotations

import copy

import torch

from . import case

WIDTH = 64
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "projection_dim": WIDTH,
}
TASKS = [("remove", 1.0), ("outpaint", 1.0), ("shape", 1.0), ("shape", 0.3), ("text", 1.0)]


def write_embeddings(host, width: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """PowerPaint's text encoder file of random tokens, cut by the pack into ComfyUI's embeddings folder."""
    import folder_paths
    from safetensors.torch import save_file

    powerpaint, checkpoints = host.pack("models.powerpaint"), host.pack("models.checkpoints")
    generator = torch.Generator().manual_seed(5)
    tokens = {t: torch.randn(10, width, generator=generator) * scale for t in powerpaint.TOKENS}
    prefix = "text_model.embeddings.token_embedding."
    state = {f"{prefix}trainable_embeddings.{token}": vectors for token, vectors in tokens.items()}
    file = host.base / "powerpaint_encoder.safetensors"
    save_file(state | {f"{prefix}wrapped.weight": torch.zeros(4, width)}, file)
    folder = host.base / "models" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    for token, vectors in powerpaint.task_tokens(file).items():
        checkpoints.write(folder / f"{token}.safetensors", {powerpaint.KEY: vectors})
    folder_paths.filename_list_cache.clear()
    return tokens


def clips(host):
    """(a small comfy.sd.CLIP of SD 1's kind, transformers' encoder of the same weights, its tokenizer)"""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import folder_paths
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        reference = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval()
        reference.get_input_embeddings().weight.mul_(10)

    def small_model(**options):
        return comfy.sd1_clip.SDClipModel(textmodel_json_config=dict(CONFIG), **options)

    def small_tokenizer(**options):
        return comfy.sd1_clip.SDTokenizer(embedding_size=WIDTH, **options)

    target = comfy.supported_models_base.ClipTarget(
        lambda embedding_directory=None, tokenizer_data=None: comfy.sd1_clip.SD1Tokenizer(
            embedding_directory, tokenizer_data or {}, tokenizer=small_tokenizer
        ),
        lambda **options: comfy.sd1_clip.SD1ClipModel(
            clip_model=small_model, **{k: options[k] for k in ("device", "dtype", "model_options")}
        ),
    )
    folder = folder_paths.get_folder_paths("embeddings")
    with torch.inference_mode(False), torch.no_grad():
        clip = comfy.sd.CLIP(target, embedding_directory=folder, model_options={"dtype": torch.float32})
        weights = {k.removeprefix("text_model."): v for k, v in reference.state_dict().items()}
        own = clip.cond_stage_model.clip_l.transformer.text_model
        result = own.load_state_dict(weights, strict=False)
        assert not result.missing_keys, result
    return clip, reference, CLIPTokenizer.from_pretrained(f"{host.comfyui}/comfy/sd1_tokenizer")


def by_hand(reference, tokenizer, tokens, text: str) -> torch.Tensor:
    """The text's embedding with each placeholder's ten vectors in its place."""
    table, rows = reference.get_input_embeddings().weight, []
    for word in text.replace(",", " , ").split():
        numbers = tokenizer(word, add_special_tokens=False).input_ids
        rows += list(tokens[word]) if word in tokens else [table[number] for number in numbers]
    rows = [table[49406], *rows, *[table[49407]] * (76 - len(rows))]
    extended = copy.deepcopy(reference)
    extended.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.stack(rows)))
    with torch.no_grad():
        return extended(torch.arange(77)[None]).last_hidden_state


@case(each=lambda: [f"{task} {fitting}" for task, fitting in TASKS])
def the_node_encodes_and_blends_as_by_hand(host, setting):
    task, fitting = setting.split()
    tokens = write_embeddings(host, WIDTH)
    clip, reference, tokenizer = clips(host)
    graph = host.graph()
    made = graph.add(
        "DiptychPowerPaintPrompt",
        clip=graph.given(clip),
        prompt="a red cat",
        negative_prompt="dog",
        task=task,
        fitting=float(fitting),
    )
    kept = host.run(graph.keep(positive=made[0], negative=made[1])).kept
    texts = host.pack("models.powerpaint").prompts(task, "a red cat", "dog")
    for name, pair in zip(("positive", "negative"), texts, strict=True):
        first, second = (by_hand(reference, tokenizer, tokens, text) for text in pair)
        expected = float(fitting) * first + (1 - float(fitting)) * second
        (embedding, options), *rest = kept[name]
        assert not rest and embedding.shape == (1, 77, WIDTH) and "pooled_output" in options
        torch.testing.assert_close(embedding.cpu(), expected, atol=1e-5, rtol=1e-4)


@case
def a_missing_embedding_is_said_where_comfyui_would_leave_it_out(host):
    import folder_paths

    write_embeddings(host, WIDTH)
    (host.base / "models" / "embeddings" / "P_shape.safetensors").unlink()
    folder_paths.filename_list_cache.clear()
    clip, *_ = clips(host)
    node = host.nodes["DiptychPowerPaintPrompt"]()
    inputs = {"clip": clip, "prompt": "", "negative_prompt": "", "fitting": 1.0}
    with torch.inference_mode():
        assert len(node.encode(task="remove", **inputs)) == 2
        try:
            node.encode(task="shape", **inputs)
        except ValueError as error:
            assert "embedding P_shape is not in models/embeddings" in str(error)
        else:
            raise AssertionError("a missing embedding was left out in silence")


@case
def core_takes_its_unet_for_nine_channel_stable_diffusion(host):
    import comfy.model_detection
    import comfy.utils
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # shapes are all that is looked at
        unet = UNet2DConditionModel(
            in_channels=9,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in unet.state_dict().items()}
    config = comfy.model_detection.model_config_from_diffusers_unet(state)
    assert type(config).__name__ == "SD15" and config.inpaint_model()
    known = comfy.utils.unet_to_diffusers(config.unet_config)
    assert state.keys() <= known.keys(), sorted(state.keys() - known.keys())[:3]
