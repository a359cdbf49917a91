"""The model as a reward, by name and from the similarity node; the sheet of images against texts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comfyui_diptych.training import rewards
from comfyui_diptych.training.evaluate.judge import Judge, rank
from comfyui_diptych.training.evaluate.likeness import compare
from comfyui_diptych.training.rewards import Context, from_recipe


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return shared.save_pretrained(tmp_path_factory.mktemp("multimodal") / "model")


def test_it_is_the_cosine_of_each_image_and_its_own_prompt(shared, folder, images):
    prompts = ["a small red circle", "a blue square", "a small red circle"]
    reward = rewards.create("multimodal", path=str(folder), device="cpu")
    scores = reward.score(images, Context(prompts))
    seen, read = shared.encode_image(images), shared.encode_text(prompts)
    torch.testing.assert_close(scores, torch.cosine_similarity(seen, read).detach(), rtol=0, atol=1e-6)
    assert scores.std() > 0


def test_a_prompt_without_a_known_word_is_not_judged(folder, images):
    reward = rewards.create("multimodal", path=str(folder))
    scores = reward.score(images, Context(["Sonnenuntergang", "a red sunset", "a circle"]))
    assert scores.isnan().tolist() == [True, False, False]
    with pytest.raises(ValueError, match="multimodal needs prompts"):
        reward.score(images)


def test_a_recipe_names_it(folder, images):
    chosen = from_recipe(["multimodal=0.5"], [f"multimodal.path={folder}", "multimodal.device=cpu"])
    assert from_recipe(**chosen.recipe()) == chosen
    assert rank(Judge.of(chosen, "a red circle"), images).scores[0] <= 1
    with pytest.raises(ValueError, match="multimodal has no weights: .*gone does not exist"):
        rewards.create("multimodal", path=str(folder / "gone"))


def test_the_bundled_model_is_the_default(shared, tmp_path, monkeypatch, images):
    monkeypatch.setenv("DIPTYCH_TINY_FOLDER", str(tmp_path))
    with pytest.raises(ValueError, match="multimodal cannot be loaded .*reinstall the whole pack"):
        rewards.create("multimodal")
    shared.save_pretrained(tmp_path / "multimodal")
    context = Context(["a red circle"] * 3)
    expected = rewards.create("multimodal", path=str(tmp_path / "multimodal")).score(images, context)
    assert torch.equal(rewards.create("multimodal").score(images, context), expected)


def test_for_each_text_the_image_most_like_it(images):
    cosines = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.4, 0.3]])
    found = compare(images, ["first", "second"], cosines)
    assert found.best == [1, 0] and found.cosines == pytest.approx([0.5, 0.9])
    assert torch.equal(found.images, images[[1, 0]])
    assert found.text.splitlines()[:4] == [
        "first",
        "  +0.500  image 2",
        "  +0.400  image 3",
        "  +0.100  image 1",
    ]
    assert found.sheet.ndim == 4 and found.sheet.shape[-1] == 3
