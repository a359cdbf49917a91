"""The multimodal nodes make what `generate_from_text` and `generate_from_image` make outside ComfyUI."""

from __future__ import annotations

import torch

from . import SkipCase, case

PROMPTS = ["a white background with a small red circle at the top left", "a red square"]
FOLDER = "diptych_multimodal"
WORDS = "a white red blue background with small large circle square cross at the top bottom left right"


def make_model(host, name: str = "mine"):
    """An untrained model in ComfyUI's models folder, as `diptych train` leaves one; the same each time."""
    room = host.pack("models.multimodal")
    folder = host.base / "models" / FOLDER / name
    if not folder.is_dir():
        with torch.random.fork_rng([]):
            torch.manual_seed(4)
            model = room.GenerativeMultimodalModel.from_preset("tiny", room.word_tokenizer(WORDS.split()))
            with torch.no_grad():
                model.latent_diffusion.null_condition.normal_()
                model.latent_diffusion.update_statistics(torch.randn(64, 16, 7, 7))
        model.save_pretrained(folder)
    return room.GenerativeMultimodalModel.from_pretrained(folder)


def loaded(host, graph, name: str = "mine"):
    return graph.add("DiptychMultimodalLoader", model=name)[0]


def images(count: int = 3, channels: int = 3):
    return torch.rand(count, 60, 72, channels, generator=torch.Generator().manual_seed(count))


def same(host, ours, theirs) -> None:
    """Bit for bit on the CPU."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    if ours.device.type == "cpu" and host.within(0) == 0 and host.args.cpu:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=0, atol=host.within(1e-3))


def bundled(host):
    try:
        return host.pack("models.multimodal.storage").bundled()
    except ValueError as missing:
        raise SkipCase(str(missing)) from missing


@case(each=lambda: ["diffusion", "direct", "one of each", "twenty"])
def the_images_are_those_of_the_same_call_outside(host, how):
    model = make_model(host)
    count = {"one of each": 1, "twenty": 10}.get(how, 2)
    diffusion, steps = how != "direct", 2 if how == "twenty" else 4
    graph = host.graph()
    made = graph.add(
        "DiptychTextToImage",
        model=loaded(host, graph),
        prompts=f"\n  {PROMPTS[0]}\n\n{PROMPTS[1]}  \n",
        count=count,
        steps=steps,
        cfg=1.5,
        seed=2**64 - 7,
        diffusion=diffusion,
    )
    kept = host.run(graph.keep(images=made[0], report=made[1])).kept
    expected = model.generate_from_text(PROMPTS, count, diffusion, steps, 2**64 - 7, cfg=1.5)
    same(host, kept["images"], expected)
    first, second = kept["report"].splitlines()
    numbers = {1: ("image 1", "image 2"), 2: ("image 1-2", "image 3-4"), 10: ("image 1-10", "image 11-20")}
    assert (first, second) == tuple(f"{n}: {p}" for n, p in zip(numbers[count], PROMPTS, strict=True))


@case(each=lambda: ["greedy", "drawn", "transparent"])
def the_captions_are_those_of_the_same_call_outside(host, how):
    model, seen = make_model(host), images(channels=4 if how == "transparent" else 3)
    drawn = {"temperature": 1.2, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.1}
    graph = host.graph()
    read = graph.add(
        "DiptychImageToText",
        model=loaded(host, graph),
        images=graph.given(seen),
        greedy=how != "drawn",
        count=2 if how == "drawn" else 1,
        seed=11,
        **drawn,
    )
    texts = host.run(graph.keep(text=read[1])).kept["text"]
    if how == "drawn":
        rows = model.generate_from_image(seen, 2, seed=11, **drawn)
        expected = [caption for row in rows for caption in row]
    else:
        expected = model.generate_text_from_image(model.encode_image(seen))
    assert texts.split("\n") == expected and len(set(expected)) > 1


@case
def what_follows_runs_once_for_each_caption_or_once_for_all(host):
    make_model(host)
    graph = host.graph()
    model = loaded(host, graph)
    read = graph.add(
        "DiptychImageToText", model=model, images=graph.given(images(2)), greedy=False, count=2, seed=1
    )
    each, joined = (graph.add("DiptychTextToImage", model=model, prompts=read[n], steps=1)[0] for n in (0, 1))
    batches = []
    host.nodes["TestTake"] = taker(batches)
    graph.add("TestTake", image=each)
    graph.add("TestTake", image=joined)
    host.run(graph)
    assert sorted(map(len, batches)) == [1, 1, 1, 1, 4]


def taker(batches: list):
    class Take:
        """Test-only output node: appends each image batch that arrives."""

        INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",)}})
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

        def take(self, image):
            batches.append(image)
            return {}

    return Take


@case
def the_similarities_are_those_of_the_same_call_outside(host):
    model, seen = make_model(host), images(5)
    graph = host.graph()
    score = graph.add(
        "DiptychMultimodalScore",
        model=loaded(host, graph),
        texts="\n".join(PROMPTS),
        images=graph.given(seen),
    )
    numbers = []
    host.nodes["TestNumbers"] = number_taker(numbers)
    graph.add("TestNumbers", index=score[1], cosine=score[2])
    kept = host.run(graph.keep(best=score[0], report=score[3], sheet=score[4])).kept
    cosines, best = model.similarity(seen, PROMPTS).max(dim=0)
    assert numbers == list(zip(best.tolist(), cosines.tolist(), strict=True))
    assert torch.equal(kept["best"], seen[best])
    assert f"{cosines[1]:+.3f}  image {int(best[1]) + 1}" in kept["report"]
    assert kept["sheet"].ndim == 4


def number_taker(numbers: list):
    class Numbers:
        """Test-only output node: appends each pair that arrives."""

        INPUT_TYPES = classmethod(lambda cls: {"required": {"index": ("INT",), "cosine": ("FLOAT",)}})
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

        def take(self, index, cosine):
            numbers.append((index, cosine))
            return {}

    return Numbers


@case
def as_a_reward_it_judges_elsewhere_and_needs_no_image_here(host):
    model, seen = make_model(host), images(4)
    graph = host.graph()
    score = graph.add("DiptychMultimodalScore", model=loaded(host, graph), texts="")
    ranked = graph.add("DiptychRewardScore", images=graph.given(seen), reward=score[5], prompt=PROMPTS[0])
    behind = graph.add("TestKeepValue", value=score[0], name="behind")
    run = host.run(graph.keep(best=ranked[0], sorted=ranked[2]))
    cosines = model.similarity(seen, PROMPTS[:1])[:, 0]
    assert abs(run.kept["best"] - float(cosines.max())) < 1e-6
    assert torch.equal(run.kept["sorted"], seen[cosines.argsort(descending=True)])
    assert "behind" not in run.kept and not run.error, behind


@case
def reward_training_learns_from_it(host):
    graph = host.graph()
    bundled = graph.add("DiptychMultimodalLoader", model="tiny (bundled)")
    score = graph.add("DiptychMultimodalScore", model=bundled[0], texts="")
    demo = graph.add("DiptychDemoImage", example=3)
    small = {"updates": 1, "group_size": 2, "groups": 1, "rank": 2, "preview_every": 0, "preset": "nft"}
    trained = graph.add(
        "DiptychTrainGRPO",
        reward=score[5],
        images=demo[0],
        instructions=demo[1],
        base_model="tiny kontext (bundled)",
        output_name="by_likeness",
        **small,
    )
    kept = host.run(graph.keep(report=trained[3])).kept
    assert "1 of 1 updates" in kept["report"] and "multimodal" in kept["report"]


@case
def each_step_moves_the_bar_and_the_stop_button_ends_it(host):
    import comfy.model_management as memory
    import comfy.utils

    make_model(host)
    node, told = host.nodes["DiptychTextToImage"](), []

    def hook(value, total, preview, **_):
        told.append((value, total, preview))
        if len(told) == 5:
            memory.interrupt_current_processing()

    with torch.inference_mode():
        (model,) = host.nodes["DiptychMultimodalLoader"]().load("mine")
        comfy.utils.set_progress_bar_global_hook(hook)
        try:
            node.draw(model, PROMPTS[0], count=1, steps=8)
        except memory.InterruptProcessingException:
            pass
        else:
            raise AssertionError("it was not stopped")
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
            memory.interrupt_current_processing(False)
    assert [value for value, *_ in told] == [1, 2, 3, 4, 5] and {total for _, total, _ in told} == {8}
    kind, image, _ = told[-1][2]
    assert kind == "JPEG" and image.size == (56, 56)


@case
def comfyui_holds_the_model_and_takes_it_off_the_device(host):
    import comfy.model_management as memory

    make_model(host)
    with torch.inference_mode():
        (model,) = host.nodes["DiptychMultimodalLoader"]().load("mine")
        host.nodes["DiptychTextToImage"]().draw(model, PROMPTS[0], steps=1)
        assert any(entry.model is model.patcher for entry in memory.current_loaded_models)
        assert model.model.device.type == memory.get_torch_device().type
        memory.unload_all_models()
        assert model.model.device == torch.device(model.patcher.offload_device)
        assert not any(entry.model is model.patcher for entry in memory.current_loaded_models)
        assert not any(parameter.is_inference() for parameter in model.model.parameters())


@case
def a_menu_of_folders_and_no_free_path(host):
    import folder_paths

    make_model(host)
    menu = host.nodes["DiptychMultimodalLoader"].INPUT_TYPES()["required"]["model"][0]
    assert menu[0] == "tiny (bundled)" and "mine" in menu
    assert str(host.base / "models" / FOLDER) in folder_paths.get_folder_paths(FOLDER)
    other = host.base.parent / "elsewhere"
    folder_paths.add_model_folder_path(FOLDER, str(other))  # as extra_model_paths.yaml does
    (other / "yours").mkdir(parents=True, exist_ok=True)
    (other / "yours" / "model.safetensors").touch()
    assert "yours" in host.nodes["DiptychMultimodalLoader"].INPUT_TYPES()["required"]["model"][0]
    for name in ("../mine", str(host.base / "models" / FOLDER / "mine"), "gone"):
        refused(lambda name=name: host.nodes["DiptychMultimodalLoader"]().load(name), "not known")
    refused(
        lambda: host.nodes["DiptychMultimodalLoader"]().load("yours"), "cannot be read as a file of tensors"
    )


def refused(call, words: str) -> None:
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was refused: {words}")


@case
def what_cannot_be_read_is_refused_in_a_sentence(host):
    make_model(host)
    with torch.inference_mode():
        (model,) = host.nodes["DiptychMultimodalLoader"]().load("mine")
        draw, read, score = (
            getattr(host.nodes[name](), host.nodes[name].FUNCTION)
            for name in ("DiptychTextToImage", "DiptychImageToText", "DiptychMultimodalScore")
        )
        refused(lambda: draw(model, " \n "), "prompts is empty")
        refused(lambda: draw(model, "a red circle\nSonnenuntergang"), "'Sonnenuntergang' has no word that")
        refused(lambda: draw(model, "\n".join(["red"] * 20), count=64), "20 prompts and count 64 are 1280")
        refused(lambda: draw(model, "red", steps=0), "steps is 0")
        refused(lambda: read(model, images(1), count=2), "count is 2, but greedy")
        refused(lambda: score(model, "", images(1)), "texts is empty")
        made, report = draw(model, "a red sunset", steps=1)["result"]
        assert "not known sunset; read a red" in report and len(made) == 1


@case
def the_bundled_model_draws_what_its_captions_say_and_reads_it_back(host):
    bundled(host)
    shapes = host.pack("training.tiny.shapes")
    scenes = shapes.single_scenes(0, "train")[:12]
    captions = [scene.caption for scene in scenes]
    graph = host.graph()
    model = loaded(host, graph, "tiny (bundled)")
    made = graph.add("DiptychTextToImage", model=model, prompts="\n".join(captions), steps=10, seed=1)
    read = graph.add("DiptychImageToText", model=model, images=graph.given(shapes.render_many(scenes, 64)))
    kept = host.run(graph.keep(images=made[0], text=read[1])).kept
    assert float(shapes.read(kept["images"]).matches(scenes).float().mean()) >= 0.75
    assert sum(a == b for a, b in zip(kept["text"].split("\n"), captions, strict=True)) >= 11
