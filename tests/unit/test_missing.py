"""Without a library of the pack, nodes and the command line say which command installs it."""

from __future__ import annotations

import sys

import pytest
from comfyui_diptych import missing
from comfyui_diptych.nodes.guard import guard


def test_the_command_is_for_the_python_that_runs_and_the_packs_own_list():
    said = missing.sentence(ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"))
    assert said.startswith(f'peft is not installed: run "{sys.executable}" -m pip install -r "')
    assert said.endswith('requirements.txt"')


@pytest.mark.parametrize(("name", "package"), [("datasets", "datasets"), ("open_clip", "open_clip_torch")])
def test_what_only_some_need_is_installed_alone(name, package):
    said = missing.sentence(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert said.endswith(f"-m pip install {package}")


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
