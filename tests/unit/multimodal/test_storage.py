"""The model's folder: what is saved comes back, and what is not ours is refused with a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.multimodal import GenerativeMultimodalModel
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

load = GenerativeMultimodalModel.from_pretrained


def test_a_model_comes_back_bit_for_bit(shared, tmp_path, images):
    again = load(shared.save_pretrained(tmp_path / "model"))
    ours, theirs = shared.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.architecture == shared.architecture
    assert not again.training
    assert torch.equal(
        again.generate_from_text("a red circle", num_inference_steps=2),
        shared.generate_from_text("a red circle", num_inference_steps=2),
    )
    assert again.generate_from_image(images, seed=1) == shared.generate_from_image(images, seed=1)


def test_the_folder_holds_safetensors_and_statistics_and_no_weight_twice(shared, tmp_path):
    folder = shared.save_pretrained(tmp_path, torch.float16)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files >= {"config.json", "model.safetensors", "tokenizer/tokenizer.json"}
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))]
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert "latent_diffusion.latent_mean" in state and "latent_diffusion.null_condition" in state
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in shared.parameters()) + 8


def test_half_the_size_loads_in_single_precision(shared, tmp_path):
    folder = shared.save_pretrained(tmp_path / "once", torch.float16)
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    twice = model.save_pretrained(tmp_path / "twice", torch.float16)
    first, second = (load_file(path / "model.safetensors") for path in (folder, twice))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load(folder, torch.bfloat16).log_scale.dtype == torch.bfloat16


def test_an_old_transformers_can_read_the_tokenizer(shared, tmp_path):
    folder = shared.save_pretrained(tmp_path)
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


OLD = {
    "image_encoder.conv.weight": torch.zeros(2),
    "diffusion.net.0.weight": torch.zeros(2, 2),
    "text_encoder.fc.bias": torch.zeros(1),
}


def _safetensors(path):
    save_file(OLD, path / "model.safetensors")
    return path


def _one_file(path):
    save_file(OLD, path / "old.safetensors")
    return path / "old.safetensors"


def _torch(path):
    torch.save(OLD, path / "best_model.pt")
    return path / "best_model.pt"


def _torch_in_a_folder(path):
    torch.save({"epoch": 3, "model_state_dict": OLD}, path / "best_model.pth")
    return path


def _parallel(path):
    torch.save({f"module.{key}": value for key, value in OLD.items()}, path / "old.bin")
    return path / "old.bin"


@pytest.mark.parametrize("write", [_safetensors, _one_file, _torch, _torch_in_a_folder, _parallel])
def test_a_checkpoint_of_the_old_design_is_refused_by_that_name(tmp_path, write):
    with pytest.raises(
        ValueError, match=r"holds (module\.)?diffusion\.net\.0\.weight: it is of the old design"
    ):
        load(write(tmp_path))


def test_old_weights_are_refused_by_a_new_model_too(model):
    with pytest.raises(ValueError, match="this state dict holds diffusion"):
        model.load_state_dict(OLD, strict=False)


class Dangerous:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"diffusion.weight": Dangerous()}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt cannot be read as a file of tensors"):
        load(tmp_path / "old.pt")
    assert "unpickled" not in capsys.readouterr().out


def _drop(folder, key):
    state = load_file(folder / "model.safetensors")
    state.pop(key)
    save_file(state, folder / "model.safetensors")


def _edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").rename(f / "x.json"), "tokenizer"),
        (lambda f: _drop(f, "log_scale"), r"disagree on 1 tensors \(log_scale"),
        (lambda f: _edit(f, version=2), "version 2 where"),
        (lambda f: _edit(f, format="flux"), "format 'flux'"),
        (lambda f: _edit(f, architecture={"depth": 1}), "unknown key depth"),
    ],
)
def test_a_broken_folder_is_refused(shared, tmp_path, spoil, message):
    folder = shared.save_pretrained(tmp_path / "model")
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_pretrained_text_parts_are_taken_and_saved_with_their_own_tokenizers(shared, tmp_path, tokenizer):
    """The Hub's way in, from folders: BERT's and GPT-2's weights, two vocabularies."""
    from comfyui_diptych.models.multimodal import PRESETS, word_tokenizer
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    other = word_tokenizer(["a", "red", "circle"])
    bert = BertModel(BertConfig.from_dict({**PRESETS["tiny"].bert, "vocab_size": len(tokenizer)}))
    gpt2 = GPT2LMHeadModel(
        GPT2Config.from_dict({**PRESETS["tiny"].gpt2, "vocab_size": len(other), "eos_token_id": 3})
    )
    for part, vocabulary, name in ((bert, tokenizer, "bert"), (gpt2, other, "gpt2")):
        part.save_pretrained(tmp_path / name)
        vocabulary.save_pretrained(tmp_path / name)
    model = GenerativeMultimodalModel.from_preset(
        "tiny", bert=str(tmp_path / "bert"), gpt2=str(tmp_path / "gpt2")
    ).eval()
    assert torch.equal(
        model.text_encoder.bert.get_input_embeddings().weight, bert.embeddings.word_embeddings.weight
    )
    assert torch.equal(model.text_decoder.gpt2.lm_head.weight, gpt2.lm_head.weight)
    again = load(model.save_pretrained(tmp_path / "model"))
    assert len(again.tokenizer) == len(tokenizer) != len(again.caption_tokenizer) == len(other)
    image = torch.rand(1, 56, 56, 3)
    assert again.generate_from_image(image, 1, 0) == model.generate_from_image(image, 1, 0)
    assert torch.allclose(again.encode_text("a red circle"), model.encode_text("a red circle"), atol=1e-5)


def test_half_a_download_is_said_to_be_one(shared, tmp_path):
    folder = shared.save_pretrained(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read .*: copy the whole folder"):
        type(shared).from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        type(shared).from_pretrained(folder)
