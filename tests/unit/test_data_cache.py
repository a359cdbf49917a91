"""The cache is keyed by content: no order of the data can pair a prompt with another image."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from comfyui_diptych.training.data.cache import ContentCache, fingerprint, image_key, text_key
from comfyui_diptych.training.runtime import disk
from safetensors import SafetensorError


def encoder(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def numbered(n):
    """n prompts and images that say their own number."""
    return [(f"prompt {i}", torch.full((4, 4, 3), i / n)) for i in range(n)]


def test_reshuffled_epochs_never_mix_prompt_and_image(tmp_path):
    cache, data = ContentCache(tmp_path, shard_bytes=16), numbered(20)
    cache.fill(
        [(text_key(p, "t"), p) for p, _ in data],
        lambda prompts: [{"embed": torch.tensor([float(p.split()[1])])} for p in prompts],
        batch_size=3,
    )
    cache.fill(
        [(image_key(x, "v"), x) for _, x in data],
        lambda images: [{"latents": x[:1, :1]} for x in images],
        batch_size=7,
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for epoch in range(3):
        random.Random(epoch).shuffle(data)
        for prompt, image in data:
            number = cache.get(text_key(prompt, "t"))["embed"].item()
            assert prompt == f"prompt {number:.0f}"
            assert torch.equal(cache.get(image_key(image, "v"))["latents"], image[:1, :1])


def test_a_killed_run_encodes_only_what_is_missing(tmp_path):
    items = [(text_key(p, "t"), p) for p, _ in numbered(10)]

    def dies_at_six(prompts):
        if "prompt 6" in prompts:
            raise KeyboardInterrupt
        return [{"x": torch.ones(1)} for _ in prompts]

    with pytest.raises(KeyboardInterrupt):
        ContentCache(tmp_path).fill(items, dies_at_six)
    (tmp_path / "torn.partial").write_bytes(b"half a shard")
    (tmp_path / "torn.safetensors").write_bytes(b"half a shard")
    seen = []
    again = ContentCache(tmp_path)
    assert len(again) == 6
    again.fill(items, lambda p: seen.extend(p) or [{"x": torch.ones(1)} for _ in p])
    assert seen == [f"prompt {i}" for i in range(6, 10)]
    assert all(key in ContentCache(tmp_path) for key, _ in items)


def test_room_for_all_is_looked_for_after_the_first_batch(tmp_path, monkeypatch):
    asked = []

    def usage(folder):
        asked.append(folder)
        return shutil._ntuple_diskusage(1 << 40, 0, 4 * 10 * 100)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)
    items = [(text_key(p, "t"), p) for p, _ in numbered(101)]
    seen = []
    with pytest.raises(ValueError, match="cache of 101 entries in .* needs about 4 kB but its disk has 4 kB"):
        ContentCache(tmp_path).fill(
            items, lambda p: seen.extend(p) or [{"x": torch.ones(10)} for _ in p], batch_size=2
        )
    assert seen == ["prompt 0", "prompt 1"] and len(asked) == 1
    assert len(ContentCache(tmp_path)) == 2  # what was encoded is kept
    ContentCache(tmp_path).fill(items[:100], lambda p: [{"x": torch.ones(10)} for _ in p])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    cache = ContentCache(tmp_path)
    cache.put("a", {"x": torch.ones(1)})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ValueError, match="cannot write to .*No space left.*free space or choose another"):
        cache.flush()


def test_two_processes_share_one_folder(tmp_path):
    one, two = ContentCache(tmp_path), ContentCache(tmp_path)
    one.put("a", {"x": torch.arange(3)})
    one.flush()
    assert "a" not in two
    two.refresh()
    assert torch.equal(two.get("a")["x"], torch.arange(3))


def test_what_was_stored_comes_back_with_its_dtype_and_does_not_alias_the_input(tmp_path):
    cache, value = ContentCache(tmp_path), torch.ones(2, dtype=torch.bfloat16)
    cache.put("a", {"x": value, "y": torch.arange(2)})
    value.zero_()
    cache.flush()
    stored = ContentCache(tmp_path).get("a")
    assert (
        stored["x"].dtype == torch.bfloat16
        and stored["x"].tolist() == [1, 1]
        and stored["y"].tolist() == [0, 1]
    )


def test_keys_change_with_content_shape_encoder_and_companions():
    x, mask = torch.zeros(4, 2, 3), torch.ones(4, 2)
    keys = [
        image_key(x, "v"),
        image_key(x.reshape(2, 4, 3), "v"),
        image_key(x.half(), "v"),
        image_key(x + 1e-6, "v"),
        image_key(x, "w"),
        image_key(x, "v", mask),
        text_key("a", "v"),
        text_key("a ", "v"),
    ]
    assert len(set(keys)) == len(keys)
    assert image_key(x.clone(), "v") == keys[0]


def test_fingerprint_follows_weights_type_and_settings():
    prints = [
        fingerprint(encoder()),
        fingerprint(encoder(1)),
        fingerprint(encoder().half()),
        fingerprint(encoder(), "512"),
    ]
    assert len(set(prints)) == 4
    assert fingerprint(encoder()) == prints[0]
