"""Reward training from Flux Fill data that was encoded beforehand, in the format of its table: tensors and a
caption, no target image."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from comfyui_diptych import cli
from comfyui_diptych.models import lora, tiny
from comfyui_diptych.models.prompt import ICEDIT_TEMPLATE
from comfyui_diptych.training import config, recipes
from comfyui_diptych.training import trainer as sft
from comfyui_diptych.training.data import specs
from comfyui_diptych.training.data.sample import read_image, to_pil
from comfyui_diptych.training.data.sources import open_source
from comfyui_diptych.training.data.specs import spec_of
from comfyui_diptych.training.reinforce import scoring
from comfyui_diptych.training.reinforce import trainer as grpo
from comfyui_diptych.training.reinforce.config import GRPOConfig
from comfyui_diptych.training.tiny import shapes
from PIL import Image

PRESETS = ("fast", "dance", "flow", "mixgrpo", "nft", "winner")
WIDE = {"sizes": ((8, 16),) * 4}
QUICK = {
    "task": "fill",
    "model": str(tiny.folder() / "fill"),
    "max_steps": 1,
    "mixed_precision": "no",
    "base_dtype": "float32",
    "cache_dtype": "float32",
    "gradient_checkpointing": False,
    "log_with": ["none"],
    "rank": 4,
    "max_sequence_length": 24,
    "sample_steps": 2,
}
REWARD = {"rewards": ["keep_l1", "jpeg_size=0.2"], "group_size": 2, "micro_batch": 2, "groups_per_update": 2}


@pytest.fixture(scope="module")
def widths():
    from diffusers import FluxTransformer2DModel

    c = FluxTransformer2DModel.load_config(QUICK["model"], subfolder="transformer")
    return c["joint_attention_dim"], c["pooled_projection_dim"]


@pytest.fixture
def write(tmp_path, widths):
    """A function that writes rows of the format and returns their spec and the tensors."""

    def rows(
        name="data",
        sizes=((8, 8), (12, 8), (8, 8), (12, 8)),
        lengths=(24,) * 4,
        ids=0.0,
        caption="a red car",
        **change,
    ):
        folder, index, tensors = tmp_path / name, [], []
        for number, ((height, width), length) in enumerate(zip(sizes, lengths, strict=True)):
            generator = torch.Generator().manual_seed(number)
            mask = torch.zeros(1, height, width)
            mask[:, 2:6, 3:] = 1
            parts = {
                "prompt_embed": torch.randn(length, widths[0], generator=generator),
                "pooled_prompt_embeds": torch.randn(widths[1], generator=generator),
                "text_ids": torch.full((length, 3), ids),
                "masked_latents": torch.randn(16, height, width, generator=generator),
                "mask_latents": mask,
            } | {key: make(height, width) for key, make in change.items()}
            row = {"caption": caption}
            for part, tensor in parts.items():
                (folder / part).mkdir(parents=True, exist_ok=True)
                torch.save(tensor, folder / part / f"fill_{number}.pt")
                row["text_ids" if part == "text_ids" else f"{part}_path"] = f"fill_{number}.pt"
            index.append(row)
            tensors.append(parts)
        (folder / "index.json").write_text(json.dumps(index))
        return f"precomputed:{folder / 'index.json'}", tensors

    return rows


def trainer_of(tmp_path, data, kind=GRPOConfig, **options):
    values = {
        **QUICK,
        **(REWARD if kind is GRPOConfig else {}),
        "data": [data],
        "output_dir": str(tmp_path / "out"),
    }
    trainer = (grpo.GRPOTrainer if kind is GRPOConfig else sft.Trainer)(
        recipes.from_dict({**values, **options}, kind)
    )
    trainer.prepare()
    return trainer


def command(name, recipe, **options):
    argv = [name, recipe]
    for key, value in options.items():
        argv += ["--set", f"{key}={json.dumps(value)}"]
    return cli.main(argv)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_rolls_out_judges_and_learns(write, tmp_path, preset):
    options = {**QUICK, **REWARD, "data": [write()[0]], "output_dir": str(tmp_path / "out")}
    assert command("grpo", f"grpo_{preset}", **options) == 0
    (line,) = (tmp_path / "out" / "rewards.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["reward/keep_l1"] < 1 and json.loads(line)["kept"] > 0
    weights = lora.read(tmp_path / "out" / f"grpo_{preset}.safetensors")
    assert any(module.dense().abs().max() > 0 for module in weights.modules.values())
    assert (tmp_path / "out" / "before_after.png").is_file()


def test_ten_updates_raise_the_reward(write, tmp_path, monkeypatch):
    from comfyui_diptych.training.rewards import base

    class Bright(base.Reward):
        name = "bright"

        def _score(self, images, context):
            return images.mean((1, 2, 3))

    monkeypatch.setitem(base._REGISTRY, "bright", Bright)
    options = {**QUICK, "rewards": ["bright"], "group_size": 4, "micro_batch": 8, "groups_per_update": 2}
    options |= {"data": [write(sizes=((8, 8),) * 4)[0]], "output_dir": str(tmp_path / "out"), "max_steps": 10}
    assert command("grpo", "grpo_fast", **options, lr=2e-3, rollout_steps=2, save_every=100) == 0
    lines = (tmp_path / "out" / "rewards.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/bright"] for line in lines]
    assert len(rewards) == 10 and min(rewards[-2:]) > max(rewards[:2]) + 0.1


def test_supervised_training_says_in_one_sentence_why_it_cannot(write, tmp_path, capsys):
    assert command("train", "icedit", **QUICK, data=[write()[0]], output_dir=str(tmp_path / "out")) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diptych train")]
    assert "index.json[0] has no latents_path" in sentence and "diptych grpo" in sentence


def test_the_model_sees_what_is_stored(write, tmp_path):
    """Against diffusers' own packing, and the transformer called as its pipeline calls it."""
    from diffusers import FluxFillPipeline

    spec, (parts, *_) = write(ids=3.0, **WIDE)
    trainer = trainer_of(tmp_path, spec)
    batch = trainer.sampling_batch(trainer.data.batches, [0])
    pack = FluxFillPipeline._pack_latents
    mask = parts["mask_latents"][None].expand(1, 64, 8, 16)  # one cell stands for its 64 pixels
    features = torch.cat([pack(parts["masked_latents"][None], 1, 16, 8, 16), pack(mask, 1, 64, 8, 16)], -1)
    condition = trainer.task.condition(batch, 30.0)
    assert torch.equal(condition.features, features) and features.shape == (1, 32, 320)
    x = torch.randn(1, 16, 8, 16)
    with torch.no_grad():
        mine = trainer.task.host.velocity(x, 0.7, condition)
        theirs = trainer.model.parts["transformer"](
            hidden_states=torch.cat([pack(x, 1, 16, 8, 16), features], -1),
            timestep=torch.tensor([0.7]),
            guidance=torch.tensor([30.0]),
            pooled_projections=parts["pooled_prompt_embeds"][None],
            encoder_hidden_states=parts["prompt_embed"][None],
            txt_ids=parts["text_ids"],
            img_ids=FluxFillPipeline._prepare_latent_image_ids(1, 4, 8, "cpu", torch.float32),
            return_dict=False,
        )[0]
    assert torch.equal(pack(mine, 1, 16, 8, 16), theirs)


def test_texts_of_any_length_share_a_batch_unchanged(write, tmp_path):
    """Each row's prediction in a batch of several lengths is that of the row alone at its own length."""
    spec, parts = write(lengths=(24, 7, 13, 24), **WIDE)
    trainer = trainer_of(tmp_path, spec)
    x = torch.randn(3, 16, 8, 16)
    with torch.no_grad():
        condition = trainer.task.condition(trainer.sampling_batch(trainer.data.batches, [1, 0, 2]), 30.0)
        together = trainer.task.host.velocity(x, 0.5, condition)
        for place, number in enumerate([1, 0, 2]):
            batch = trainer.sampling_batch(trainer.data.batches, [number])
            batch["tokens"] = parts[number]["prompt_embed"][None]
            del batch["text_bias"]
            alone = trainer.task.host.velocity(x[place : place + 1], 0.5, trainer.task.condition(batch, 30.0))
            assert torch.allclose(together[place], alone[0], atol=2e-5)


def test_a_dropped_prompt_is_the_encoders_own_beside_stored_texts(write, tmp_path):
    """Supervised training, with targets: a dropped row of another length than its stored text."""
    spec, parts = write(lengths=(24, 7, 7, 24), latents=lambda h, w: torch.ones(16, h, w), **WIDE)
    options = {"prompt_drop": 0.5, "optimizer": "adamw", "lr": 1e-3, "max_sequence_length": 16}
    trainer = trainer_of(tmp_path, spec, config.TrainConfig, **options)
    batch = trainer.data.batches([1, 2], [False, True])
    assert batch["tokens"].shape[1] == 24 and batch["text_bias"].isinf().sum(1).tolist() == [17, 8]
    assert torch.equal(batch["tokens"][0, :7], parts[1]["prompt_embed"])
    trainer.task.text_to_device()
    with torch.no_grad():
        dropped = trainer.task.encode_text([" "])["tokens"][0]
    assert torch.allclose(batch["tokens"][1, :16], dropped, atol=1e-5)
    trainer.train_step()
    assert all(value.isfinite().all() for value in trainer.model.parameters.values())


def test_rows_with_one_caption_keep_their_own_text(write, tmp_path):
    spec, parts = write(**WIDE)
    batch = trainer_of(tmp_path, spec).data.batches([2, 3], [False, False])
    assert torch.equal(batch["tokens"], torch.stack([parts[2]["prompt_embed"], parts[3]["prompt_embed"]]))


def test_soft_masks_keep_their_values(write, tmp_path):
    spec, _ = write(mask_latents=lambda h, w: torch.full((1, h, w), 0.25))
    trainer = trainer_of(tmp_path, spec)
    assert (trainer.data.batches([0], [False])["mask"] == 0.25).all()


def test_judges_see_the_decoded_masked_image(write, tmp_path):
    spec, (parts, *_) = write(**WIDE)
    trainer = trainer_of(tmp_path, spec)
    row = scoring.read_row(trainer.data.batches, 0)
    with torch.no_grad():
        decoded = trainer.task.host.decode(parts["masked_latents"][None])[0]
    assert torch.allclose(row.source, decoded, atol=1e-5) and row.target is None and row.prompt == "a red car"
    assert torch.equal(row.mask, parts["mask_latents"][0].repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_a_target_that_is_there_is_shown_to_rewards(write, tmp_path):
    spec, (parts, *_) = write(latents=lambda h, w: torch.full((16, h, w), 0.3), **WIDE)
    trainer = trainer_of(tmp_path, spec)
    with torch.no_grad():
        wanted = trainer.task.host.decode(parts["latents"][None])[0]
    assert torch.allclose(scoring.read_row(trainer.data.batches, 0).target, wanted, atol=1e-5)
    assert trainer.scorer(trainer.data.batches).targets
    blind = trainer_of(tmp_path / "blind", write(**WIDE)[0])
    assert not blind.scorer(blind.data.batches).targets


@pytest.mark.parametrize("named", ["by its caption", "by the option"])
def test_a_diptych_is_judged_by_its_edited_half(write, tmp_path, named):
    right = torch.cat([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)], -1)
    words = (
        ICEDIT_TEMPLATE.replace("{instruction}", "make it blue")
        if named == "by its caption"
        else "make it blue"
    )
    spec, (parts, *_) = write(caption=words, mask_latents=lambda h, w: right, **WIDE)
    options = {} if named == "by its caption" else {"layout": "diptych"}
    trainer = trainer_of(tmp_path, spec, rewards=["jpeg_size"], **options)
    row = scoring.read_row(trainer.data.batches, 0)
    with torch.no_grad():
        decoded = trainer.task.host.decode(parts["masked_latents"][None])[0]
    assert row.prompt == "make it blue" and torch.allclose(row.source, decoded[:, :64], atol=1e-5)
    assert row.diptych and row.mask is None  # the hole is the whole panel: what may change is not known
    scores = trainer.scorer(trainer.data.batches).score(torch.rand(2, 64, 128, 3), [0, 1])
    assert scores["jpeg_size"].shape == (2,)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"data_rows": 2}, "has no latents_path"),
        ({"task": "kontext", "model": str(tiny.folder() / "kontext")}, "set task=fill"),
        ({"rewards": ["shapes_of_targets"]}, "needs targets, which the data has not"),
    ],
    ids=["supervised rows", "task", "reward"],
)
def test_what_such_data_cannot_do_is_one_sentence(write, tmp_path, monkeypatch, options, sentence):
    from comfyui_diptych.training.rewards import base

    class OfTargets(base.Reward):
        name, needs = "shapes_of_targets", frozenset({"targets"})

    monkeypatch.setitem(base._REGISTRY, "shapes_of_targets", OfTargets)
    with pytest.raises(ValueError, match=sentence):
        trainer_of(tmp_path, write()[0], **options)


def test_text_of_another_model_is_one_sentence(write, tmp_path, widths):
    spec, _ = write(prompt_embed=lambda h, w: torch.zeros(24, widths[0] + 1))
    with pytest.raises(
        ValueError, match=f"{widths[0] + 1} and {widths[1]} wide where .* takes {widths[0]} and"
    ):
        trainer_of(tmp_path, spec)


def test_tensors_written_anew_are_read_anew(write, tmp_path):
    spec, _ = write(**WIDE)
    trainer_of(tmp_path, spec)
    before = open_source(spec).fingerprint
    spec, parts = write(masked_latents=lambda h, w: torch.full((16, h, w), 0.5), **WIDE)
    assert open_source(spec).fingerprint != before
    batch = trainer_of(tmp_path, spec).data.batches([0], [False])
    assert (batch["masked_latents"] == 0.5).all()


# ------------------------------------------------------------- written by the precompute command


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for number, pair in enumerate(shapes.edit_pairs(3, 4, "train", size=64)):
        to_pil(pair.source).save(folder / f"{number}_source.png")
        to_pil(pair.target).save(folder / f"{number}_target.png")
        (folder / f"{number}.txt").write_text(pair.instruction)
    return folder


@pytest.fixture(scope="module")
def encoded(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    assert precompute(f"pairs:{pairs}", folder) == 0
    return folder


def precompute(source, folder, *more):
    options = ("resolution=64", "max_sequence_length=64", "base_dtype=float32", "cache_dtype=float32")
    sets = [word for option in options for word in ("--set", option)]
    return cli.main(["precompute", source, "--model", QUICK["model"], "-o", str(folder), *sets, *more])


def test_precompute_writes_exactly_the_format(encoded):
    rows = json.loads((encoded / "index.json").read_text())
    keys = {"prompt_embed_path", "pooled_prompt_embeds_path", "text_ids", "masked_latents_path"}
    assert len(rows) == 4 and all(
        set(row) == keys | {"mask_latents_path", "caption", "layout"} for row in rows
    )
    folders = ("prompt_embed", "pooled_prompt_embeds", "text_ids", "masked_latents", "mask_latents")
    shapes_of = {
        name: tuple(torch.load(encoded / name / rows[0]["text_ids"], weights_only=True).shape)
        for name in folders
    }
    assert shapes_of["masked_latents"] == (16, 8, 16) and shapes_of["mask_latents"] == (1, 8, 16)
    assert shapes_of["text_ids"] == (64, 3) and shapes_of["prompt_embed"][0] == 64


def test_the_mask_of_an_edit_pair_reaches_the_rewards(pairs, tmp_path):
    """keep_l1 judges a precomputed pair by its NAME_mask.png, and says at the start where there is none."""
    folder = tmp_path / "masked"
    shutil.copytree(pairs, folder)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 13, 64))
    for number in range(4):
        mask.save(folder / f"{number}_mask.png")
    assert precompute(f"pairs:{folder}", tmp_path / "encoded") == 0
    spec = f"precomputed:{tmp_path / 'encoded' / 'index.json'}"
    trainer = trainer_of(tmp_path / "run", spec, resolution=64)
    row = scoring.read_row(trainer.data.batches, 0)
    assert row.mask.shape == (64, 64) and row.mask[:, :16].all() and not row.mask[:, 16:].any()
    assert trainer.data.batches([0], [False])["mask"][..., 64:].all()  # the panel is repainted all the same
    assert (
        trainer.scorer(trainer.data.batches).score(torch.rand(1, 64, 128, 3), [0])["keep_l1"].isfinite().all()
    )


def test_pairs_without_masks_say_so_before_the_model_is_loaded(encoded, tmp_path):
    with pytest.raises(ValueError, match="keep_l1 needs masks, which the data has not"):
        trainer_of(tmp_path, f"precomputed:{encoded / 'index.json'}", rewards=["keep_l1"])


def test_a_folder_of_such_rows_is_recognised(encoded):
    """So ComfyUI's training nodes offer it; and rows may not reach outside of it there."""
    assert spec_of(encoded, inside=True) == f"precomputed:{encoded / 'index.json'}?inside=true"
    assert specs.has_targets(encoded) and len(open_source(spec_of(encoded))) == 4


def test_precomputed_rows_are_what_training_from_the_images_sees(encoded, pairs, tmp_path):
    spec = f"precomputed:{encoded / 'index.json'}"
    there, here = (
        trainer_of(tmp_path / name, data, resolution=64, max_sequence_length=64, rewards=["jpeg_size"])
        for name, data in (("there", f"pairs:{pairs}"), ("here", spec))
    )
    rows = [0, 1, 2, 3]
    wanted, got = (trainer.data.batches(rows, [False] * 4) for trainer in (there, here))
    assert "latents" in wanted and "latents" not in got
    for name in ("tokens", "pooled", "masked_latents"):
        assert torch.allclose(got[name], wanted[name], atol=1e-5), name
    assert torch.equal(got["mask"], wanted["mask"])
    mine, theirs = scoring.read_row(here.data.batches, 2), scoring.read_row(there.data.batches, 2)
    assert mine.prompt == theirs.prompt and mine.source.shape == theirs.source.shape
    assert (mine.source - theirs.source).abs().mean() < 0.02  # the VAE's round trip


def test_from_images_to_an_edit_without_a_target_image(encoded, tmp_path, capsys):
    """precompute -> grpo -> LoRA -> edit; the checker judges by the decoded source and the instruction."""
    options = {**QUICK, **REWARD, "rewards": ["shapes", "jpeg_size=0.1"], "group_size": 4, "micro_batch": 4}
    options |= {"output_dir": str(tmp_path / "run"), "max_steps": 2}
    base = str(tiny.folder() / "loras" / "icedit.safetensors")
    data = [f"precomputed:{encoded / 'index.json'}"]
    assert command("grpo", "grpo_winner", **options, data=data, fuse_loras=[base], rollout_guidance=30) == 0
    line = json.loads((tmp_path / "run" / "rewards.jsonl").read_text().splitlines()[-1])
    assert line["reward/shapes"] > 0.5 and "failed/shapes" not in line
    file, out = tmp_path / "run" / "grpo_winner.safetensors", tmp_path / "edited.png"
    capsys.readouterr()
    argv = [
        "edit",
        "make the background red",
        "--lora",
        base,
        "--lora",
        str(file),
        "--steps",
        "2",
        "-o",
        str(out),
    ]
    assert cli.main(argv) == 0 and out.is_file()
    assert "shapes" in capsys.readouterr().out  # the LoRA's report names its rewards


def test_an_interrupted_precompute_goes_on_and_never_mixes(encoded, pairs, tmp_path, monkeypatch, capsys):
    from comfyui_diptych.training import precompute as module

    written, write_row = [], module.write_row

    def stop_after_two(folder, file, parts):
        written.append(file)
        write_row(folder, file, parts)
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_row", stop_after_two)
        assert precompute(f"pairs:{pairs}", tmp_path, "--set", "encode_batch=1") == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "index.json").read_text())) == 2
    monkeypatch.setattr(module, "write_row", lambda *args: written.append(args[1]) or write_row(*args))
    assert precompute(f"pairs:{pairs}", tmp_path) == 0
    assert written == [f"fill_{number}.pt" for number in range(4)]
    assert (tmp_path / "index.json").read_text() == (encoded / "index.json").read_text()
    # A later run that is stopped forgets nothing that is there. Shells start what is in the background with
    # SIGINT ignored, and the command leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "text_ids" / "fill_1.pt").unlink()
    real = module._encode
    monkeypatch.setattr(module, "_encode", lambda *args: signal.raise_signal(signal.SIGINT) or real(*args))
    assert precompute(f"pairs:{pairs}", tmp_path) == 130
    signal.signal(signal.SIGINT, before)
    assert [row["text_ids"] for row in json.loads((tmp_path / "index.json").read_text())] == [
        f"fill_{number}.pt" for number in (0, 2, 3)
    ]
    monkeypatch.undo()
    assert precompute(f"pairs:{pairs}", tmp_path) == 0
    assert (tmp_path / "index.json").read_text() == (encoded / "index.json").read_text()
    assert precompute(f"pairs:{pairs}", tmp_path, "--targets") == 2
    assert "holds rows of other data, options or weights" in capsys.readouterr().err


def test_a_stroke_thinner_than_a_cell_is_still_repainted_and_targets_train(pairs, tmp_path):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (21, 0, 22, 64))
    mask.save(tmp_path / "mask.png")
    row = {"prompt": "a red circle", "image": str(pairs / "0_target.png"), "mask": "mask.png", "weight": 2.0}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    folder = tmp_path / "encoded"
    assert precompute(f"jsonl:{tmp_path / 'data.jsonl'}", folder, "--targets") == 0
    spec = f"precomputed:{folder / 'index.json'}"
    trainer = trainer_of(tmp_path, spec, config.TrainConfig, optimizer="adamw", lr=1e-4, resolution=64)
    batch = trainer.data.batches([0], [False])
    cells = torch.zeros(8, 8)
    cells[:, 2] = 1
    assert torch.equal(batch["mask"][0, 0].float(), cells.repeat_interleave(8, 0).repeat_interleave(8, 1))
    image = read_image(pairs / "0_target.png", "").movedim(-1, 0)[None] * 2 - 1
    with torch.no_grad():
        assert torch.allclose(batch["latents"], trainer.task.latents(image), atol=1e-5)
        hidden = trainer.task.latents(image * (1 - batch["mask"].float()))
    assert torch.allclose(batch["masked_latents"], hidden, atol=1e-5) and batch["weight"] == 2
    trainer.train_step()


def test_a_disk_without_room_is_found_before_rows_are_written(pairs, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert precompute(f"pairs:{pairs}", tmp_path / "out") == 2
    assert "its disk has 1 kB left" in capsys.readouterr().err and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "more, sentence",
    [
        (("--set", "task=kontext"), "set task=fill"),
        (("--set", "class_images=folder?prompt=a dog"), "leave them out"),
        (("--set", "resolution"), "not of the form key=value"),
    ],
)
def test_precompute_refuses_in_one_sentence(pairs, tmp_path, capsys, more, sentence):
    assert precompute(f"pairs:{pairs}", tmp_path, *more) == 2
    assert sentence in capsys.readouterr().err
    (tmp_path / "index.json").write_text("[]")
    assert precompute(f"pairs:{pairs}", tmp_path) == 2
    assert "of another origin" in capsys.readouterr().err
