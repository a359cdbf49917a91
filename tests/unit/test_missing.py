"""Without a library of the pack, nodes and the command line say which command installs it."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
from comfyui_diptych import NODE_CLASS_MAPPINGS, missing
from comfyui_diptych.models.lora import LoraError
from comfyui_diptych.nodes.guard import guard


def test_the_command_is_for_the_python_that_runs_and_the_packs_own_list():
    said = missing.sentence(ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"))
    assert said.startswith(f'peft is not installed: run "{sys.executable}" -m pip install -r "')
    assert said.endswith('requirements.txt"')


@pytest.mark.parametrize(("name", "package"), [("datasets", "datasets"), ("open_clip", "open_clip_torch")])
def test_what_only_some_need_is_installed_alone(name, package):
    said = missing.sentence(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert said.endswith(f"-m pip install {package}")


def test_what_only_comfyui_brings_is_not_to_be_installed():
    said = missing.sentence(ModuleNotFoundError("No module named 'comfy'", name="comfy.sd"))
    assert said == "this needs ComfyUI: run it as a node there"


def test_a_node_says_so_too():
    class Needy:
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self):
            import no_such_library  # noqa: F401

    with pytest.raises(ImportError, match="no_such_library is not installed: run .* -m pip install"):
        guard(Needy)().run()


def test_a_page_is_found_in_the_tree_and_on_the_web():
    assert missing.page("grpo.md").endswith("docs/grpo.md") and not missing.page("grpo.md").startswith("http")
    assert missing.page("none.md").startswith("https://")


@pytest.fixture
def without(monkeypatch):
    """without(name, ...): as if these modules were not installed."""

    def hide(*names: str) -> None:
        real = missing.importlib.util.find_spec
        fake = SimpleNamespace(util=SimpleNamespace(find_spec=lambda n: None if n in names else real(n)))
        monkeypatch.setattr(missing, "importlib", fake)

    return hide


@pytest.mark.parametrize("node", ["DiptychTinyModelLoader", "DiptychTrainLora", "DiptychTrainGRPO"])
def test_a_node_says_at_queue_time_what_is_not_installed(without, node):
    """`VALIDATE_INPUTS` is what ComfyUI asks as a prompt is queued; the same sentence ends a run."""
    cls = NODE_CLASS_MAPPINGS[node]
    assert cls.VALIDATE_INPUTS() is True
    without("diffusers")
    said = cls.VALIDATE_INPUTS()
    assert said.startswith("diffusers is not installed: run ") and said == missing.lacking(*cls.NEEDS)
    name = next(iter(inspect.signature(cls.VALIDATE_INPUTS).parameters))
    default = cls.INPUT_TYPES()["required"][name][0][0]
    required = {row: "" for row in cls.INPUT_TYPES()["required"]}
    with pytest.raises(ValueError, match="diffusers is not installed"):
        getattr(cls(), cls.FUNCTION)(**{**required, name: default})


def test_a_value_that_such_a_node_checks_itself_is_held_to_its_menu():
    said = NODE_CLASS_MAPPINGS["DiptychTinyModelLoader"].VALIDATE_INPUTS(which="../../etc")
    assert said.startswith("which is '../../etc', which is not known: choose one of fill")


def test_a_judge_says_at_queue_time_what_it_lacks(without):
    ask = NODE_CLASS_MAPPINGS["DiptychReward"].VALIDATE_INPUTS
    assert ask(name="keep_l1", weights_file="published") is True
    said = ask(name="hpsv2", weights_file="published")
    assert "put HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2 into" in said
    without("lpips")
    assert ask(name="keep_lpips") == f"reward keep_lpips cannot judge: {missing.lacking('lpips')}"


def test_several_are_named_at_once_as_the_pack_is_loaded(without):
    without("diffusers", "peft")
    assert missing.lacking().startswith("diffusers, peft are not installed: run ")
    without("torch")
    assert missing.lacking("torch") == missing.TORCH


class Ours(RuntimeError):
    """An error of a module of the pack."""


Ours.__module__ = "comfyui_diptych.training.somewhere"


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (LoraError("no LoRA"), ValueError("no LoRA")),
        (Ours("odd"), RuntimeError("odd")),
        (
            AssertionError("Torch not compiled with CUDA enabled"),
            RuntimeError("this torch is built without CUDA: install"),
        ),
        (FileNotFoundError(2, "No such file", "/nowhere"), RuntimeError("/nowhere does not exist")),
    ],
)
def test_errors_reach_comfyui_as_a_sentence_of_a_plain_type(raised, shown):
    """ComfyUI shows the module of an error's class before its name: in a pack a path."""
    with pytest.raises(type(shown), match=str(shown)) as caught:
        guard(failing(raised))().run()
    assert type(caught.value) is type(shown)


def test_what_comfyui_handles_itself_passes_as_it_is():
    """An interrupt, and memory that ran out, which makes it unload models."""

    class Interrupt(Exception):
        pass

    for raised in (Interrupt(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), KeyError("x")):
        with pytest.raises(type(raised)) as caught:
            guard(failing(raised))().run()
        assert caught.value is raised


def failing(error: Exception) -> type:
    class Failing:
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def run(self):
            raise error

    return Failing
