"""Every kind of data goes through the trainer: files in, the right pixels, masks and prompts in the batch."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_diptych.models.prompt import ICEDIT_TEMPLATE
from comfyui_diptych.training import trainer as sft
from PIL import Image
from toys import train_config

BASE = {"rank": 2, "max_steps": 2, "prompt_drop": 0.0}


@pytest.fixture(scope="session")
def fill_folder(folders):
    return folders / "fill"


def prepared(folder, output, **options):
    trainer = sft.Trainer(train_config(folder.parent, output, folder.name, **{**BASE, **options}))
    trainer.prepare()
    return trainer


def write_image(path, colour, size):
    Image.new("RGB", size, colour).save(path)


def pairs(folder, sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        write_image(folder / f"{number}_source.png", (255, 0, 0), size)
        write_image(folder / f"{number}_target.png", (0, 0, 255), size)
        (folder / f"{number}.txt").write_text(f"make it blue {number}", encoding="utf-8")
    return f"pairs:{folder}"


def test_pairs_become_diptychs_with_the_right_half_masked(fill_folder, tmp_path):
    trainer = prepared(fill_folder, tmp_path / "out", data=[pairs(tmp_path / "p", [(48, 48)] * 3)])
    batch, noise, _ = trainer._batch()
    assert batch["latents"].shape == (2, 16, 4, 8) == noise.shape
    assert batch["mask"].float().mean((0, 1, 2)).tolist() == [0.0] * 32 + [1.0] * 32
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    blue = red.flip(1)
    wanted = trainer.task.latents(torch.cat([red, blue], -1))
    assert torch.allclose(batch["latents"][:1], wanted, atol=1e-5)
    hidden = trainer.task.latents(torch.cat([red, torch.zeros_like(red)], -1))
    assert torch.allclose(batch["masked_latents"][:1], hidden, atol=1e-5)
    start = ICEDIT_TEMPLATE.split("{instruction}")[0]
    assert all(prompt.startswith(start + "make it blue") for prompt in batch["prompts"])


def test_buckets_never_mix_sizes_and_two_runs_share_their_cache(fill_folder, tmp_path):
    data = [pairs(tmp_path / "p", [(64, 32), (32, 64), (64, 32), (48, 48), (32, 64), (64, 32)])]
    options = {"data": data, "sizing": "buckets", "bucket_step": 16, "cache_dir": str(tmp_path / "cache")}
    trainer = prepared(fill_folder, tmp_path / "one", resolution=48, **options)
    sizes = {entry.size for entry in trainer.data.batches.entries}
    assert len(sizes) == 3 and all(h * (w // 2) <= 48 * 48 for h, w in sizes)
    for _ in range(8):
        trainer._batch()
    seen = []
    again = sft.Trainer(trainer.config, progress=lambda items, label: seen.append(len(items)) or items)
    again.prepare()
    assert seen == [0, 0] and [e.key for e in again.data.batches.entries] == [
        e.key for e in trainer.data.batches.entries
    ]


def test_jsonl_rows_keep_their_masks_weights_and_drawn_masks(fill_folder, tmp_path):
    write_image(tmp_path / "a.png", (10, 20, 30), (32, 32))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "m.png")
    rows = [
        {"prompt": "a", "image": "a.png", "mask": "m.png", "weight": 3.0},
        {"prompt": "b", "image": "a.png", "mask": None},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = [f"jsonl:{tmp_path / 'data.jsonl'}"]
    trainer = prepared(fill_folder, tmp_path / "out", data=data, mask_variants=3, batch_size=4)
    entries = trainer.data.batches.entries
    assert [(e.prompt, e.variant, e.weight) for e in entries] == [
        ("a", 0, 3.0),
        ("b", 0, 1.0),
        ("b", 1, 1.0),
        ("b", 2, 1.0),
    ]
    batch = trainer.data.batches([0, 1, 2, 3], [False] * 4)
    assert batch["mask"][0].float().mean((0, 1)).tolist() == [1.0] * 16 + [0.0] * 16
    assert len({batch["mask"][i].numpy().tobytes() for i in (1, 2, 3)}) == 3


def test_precomputed_rows_reach_the_batch_unchanged(fill_folder, tmp_path):
    torch.manual_seed(0)
    parts = {
        "prompt_embed": torch.randn(24, 32),
        "pooled_prompt_embeds": torch.randn(32),
        "text_ids": torch.zeros(24, 3),
        "masked_latents": torch.randn(16, 4, 8),
        "mask_latents": torch.ones(1, 4, 8),
        "latents": torch.randn(16, 4, 8),
    }
    for name, tensor in parts.items():
        (tmp_path / name).mkdir()
        torch.save(tensor, tmp_path / name / "0.pt")
    columns = ("prompt_embed_path", "pooled_prompt_embeds_path", "text_ids", "masked_latents_path")
    row = {c: "0.pt" for c in (*columns, "mask_latents_path", "latents_path")} | {"caption": "a car"}
    (tmp_path / "index.json").write_text(json.dumps([row]))
    options = {"data": [f"precomputed:{tmp_path / 'index.json'}"], "batch_size": 1}
    with pytest.raises(ValueError, match="leave them out"):
        prepared(fill_folder, tmp_path / "edit", edit_loss_weight=2.0, **options)
    trainer = prepared(fill_folder, tmp_path / "out", **options)
    batch, _, _ = trainer._batch()
    for name, part in (
        ("latents", "latents"),
        ("masked_latents", "masked_latents"),
        ("tokens", "prompt_embed"),
    ):
        assert torch.equal(batch[name][0], parts[part])
    trainer.train_step()


def test_a_mix_keeps_its_shares(fill_folder, tmp_path):
    one, two = pairs(tmp_path / "a", [(32, 32)] * 2), pairs(tmp_path / "b", [(32, 32)] * 6)
    trainer = prepared(fill_folder, tmp_path / "out", data=[f"{one}@3", f"{two}@1"])
    names = [trainer.data.batches.corpus.source.name(e.index) for e in trainer.data.batches.entries]
    assert sum(str(tmp_path / "a") in name for name in names) == len(names) * 3 // 4


def test_broken_rows_are_named_and_too_many_of_them_stop_the_run(fill_folder, tmp_path, caplog):
    data = pairs(tmp_path / "p", [(32, 32)] * 24)
    (tmp_path / "p" / "7_target.png").write_bytes(b"no image")
    trainer = prepared(fill_folder, tmp_path / "one", data=[data])
    assert len(trainer.data.batches.entries) == 23 and "1 of 24" in caplog.text and "7" in caplog.text
    (tmp_path / "p" / "8.txt").unlink()
    with pytest.raises(ValueError, match="2 of 24 examples are broken"):
        prepared(fill_folder, tmp_path / "two", data=[data])


def test_a_missing_column_is_one_sentence(fill_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"source_img": ["x"], "instruction": ["y"]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    with pytest.raises(ValueError, match="target_img"):
        prepared(fill_folder, tmp_path / "out", data=[f"magicbrush:{tmp_path}"])


def test_tensorboard_gets_loss_and_sample_images(fill_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = [pairs(tmp_path / "p", [(32, 32)] * 2)]
    options = {"log_with": ["tensorboard"], "log_every": 1, "sample_every": 2, "sample_steps": 1}
    sft.Trainer(train_config(fill_folder.parent, tmp_path / "o", data=data, **BASE, **options)).run()
    events = EventAccumulator(str(next((tmp_path / "o" / "logs").rglob("events*")).parent))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert {"grad_norm", "lr", "rows_per_second"} <= set(events.Tags()["scalars"])
    assert events.Images("samples")


def test_a_draw_from_the_posterior_is_the_images_own(fill_folder, tmp_path):
    trainer = prepared(
        fill_folder, tmp_path / "out", data=[pairs(tmp_path / "p", [(48, 48)])], vae_sample=True
    )
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn, backwards = trainer.task.latents(images), trainer.task.latents(images.flip(0)).flip(0)
    assert torch.allclose(drawn, backwards, atol=1e-5)
    vae = trainer.task.vae
    found = vae.encode(images).latent_dist
    mean = (found.mean - vae.config.shift_factor) * vae.config.scaling_factor
    units = (drawn - mean) / (found.std * vae.config.scaling_factor)
    assert abs(float(units.mean())) < 0.1 and abs(float(units.std()) - 1) < 0.1
