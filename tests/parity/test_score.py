"""Scoring drives the real denoisers: what it scores is what the stock pipeline would have made."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.cli import main
from comfyui_diptych.models.diptych import format_prompt
from comfyui_diptych.models.flux_fill import FluxFill
from comfyui_diptych.models.flux_kontext import FluxKontext
from comfyui_diptych.models.sd_inpaint import SDInpaint
from comfyui_diptych.training.evaluate import sampling
from comfyui_diptych.training.evaluate.cases import shapes_cases
from comfyui_diptych.training.evaluate.measures import similarities
from comfyui_diptych.training.evaluate.sampling import ScoreSettings
from comfyui_diptych.training.evaluate.score import QUESTIONS, score
from safetensors.torch import save_file

SETTINGS = ScoreSettings(steps=2, batch=2, guidance=7.0)


@pytest.fixture(scope="module")
def cases():
    return shapes_cases(3, size=32)


def test_an_icedit_score_looks_at_the_right_half_of_fluxfillpipeline(fill_pipeline, cases, mode_posterior):
    denoiser = FluxFill.from_pipeline(fill_pipeline)
    sample = cases[0].sample
    edited = sampling.edit(denoiser, sample.source[None], [sample.prompt], SETTINGS, number=5)
    diptych = torch.cat([sample.source, sample.source], 1)
    mask = torch.cat([torch.zeros(32, 32), torch.ones(32, 32)], 1)
    noise = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(5))
    packed = noise.reshape(1, 16, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 8, 64)
    theirs = fill_pipeline(
        prompt=format_prompt(sample.prompt),
        image=diptych.movedim(-1, 0)[None],
        mask_image=mask[None, None],
        height=32,
        width=64,
        guidance_scale=7.0,
        num_inference_steps=2,
        max_sequence_length=denoiser.max_text_tokens,
        latents=packed,
        output_type="pt",
    ).images[0]
    assert (edited[0] - theirs.movedim(0, -1)[:, 32:]).abs().max() < 1e-3


@pytest.mark.parametrize("engine", ["fill", "kontext"])
def test_every_engine_gives_one_row_per_image(engine, fill_pipeline, kontext_pipeline, cases):
    host = (
        FluxFill.from_pipeline(fill_pipeline)
        if engine == "fill"
        else FluxKontext.from_pipeline(kontext_pipeline)
    )
    scores = score(host, cases, QUESTIONS["edit"], SETTINGS)
    assert [row["name"] for row in scores.rows] == ["shapes 0", "shapes 1", "shapes 2"]
    assert {"success", "made", "kept", "kept_l1", "psnr", "ssim"} <= set(scores.figures())
    again = score(host, cases, QUESTIONS["edit"], SETTINGS)
    assert [r["psnr"] for r in again.rows] == [r["psnr"] for r in scores.rows]


def test_sd_inpainting_is_scored_as_a_base_model_and_refused_as_an_editor(sd_inpaint_pipeline, cases):
    host = SDInpaint.from_pipeline(sd_inpaint_pipeline)
    assert "caption" in score(host, cases, QUESTIONS["fill"], SETTINGS).figures()
    assert "checker" in score(host, cases, QUESTIONS["vae"], SETTINGS).figures()
    with pytest.raises(ValueError, match="score it as fill or vae"):
        score(host, cases, QUESTIONS["edit"], SETTINGS)


def test_the_command_scores_a_folder_on_disk(fill_pipeline, tmp_path, capsys):
    fill_pipeline.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--n", "2", "--size", "32", "--steps", "1", "--autocast"]
    lora = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 384),
        "transformer.x_embedder.lora_B.weight": torch.ones(48, 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    reports = {}
    for name, more in {"base": [], "lora": ["--lora", str(tmp_path / "lora.safetensors")]}.items():
        assert main(["score", *arguments, *more, "-o", str(tmp_path / name)]) == 0
        reports[name] = json.loads((tmp_path / name / "score.json").read_text())
        assert (tmp_path / name / "contact-sheet.png").is_file()
        assert "success" in capsys.readouterr().out
    assert reports["base"]["pictures"] == 2 and reports["base"]["about"]["engine"] == "fill"
    assert reports["base"]["figures"]["psnr"] != reports["lora"]["figures"]["psnr"]
    assert "loaded 1 modules" in reports["lora"]["about"]["lora_report"]


def test_the_command_refuses_nonsense_in_one_sentence(tmp_path, capsys):
    assert main(["score", "--size", "40", "-o", str(tmp_path)]) == 2
    assert "size is 40" in capsys.readouterr().err


def test_clip_and_dino_are_measured_when_they_are_on_disk(fill_pipeline, tmp_path, cases):
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = fill_pipeline.tokenizer
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": len(tokenizer) - 1,
    }
    vision = tower | {"image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    ViTModel(ViTConfig(**tower, image_size=224, patch_size=56)).save_pretrained(tmp_path / "dino")
    notes = {}
    measures = similarities(notes, str(tmp_path / "clip"), str(tmp_path / "dino"))
    assert len(measures) == 2 and not notes
    targets = torch.stack([case.sample.target for case in cases])
    equal, other = ({k: v for m in measures for k, v in m(cases, p).items()} for p in (targets, 1 - targets))
    assert set(equal) == {"clip_i", "clip_t", "dino"} and all(len(column) == 3 for column in equal.values())
    torch.testing.assert_close(equal["clip_i"], torch.ones(3))
    torch.testing.assert_close(equal["dino"], torch.ones(3))
    assert (other["clip_i"] < 1 - 1e-6).all() and (other["dino"] < 1 - 1e-6).all()
