"""Values that no widget would give the nodes: linked ones of any kind, None, and numbers out of range."""

from __future__ import annotations

import inspect
import math

import pytest
from comfyui_diptych import NODE_CLASS_MAPPINGS as NODES
from comfyui_diptych.models.lora.weights import LoraError
from comfyui_diptych.nodes.guard import checked, guard

STRANGE = (None, 5, 2.5, math.nan, True, "no such entry", "", b"x", ["a"], {"a": 1}, ("a",), object())


def inputs(node: str) -> dict[str, tuple]:
    schema = NODES[node].INPUT_TYPES()
    return {**schema["required"], **schema.get("optional", {})}


def ask(node: str, what: str, values: dict):
    """ComfyUI's question: VALIDATE_INPUTS gets what it names, IS_CHANGED all inputs."""
    question = getattr(NODES[node], what, None)
    if question is None:
        return True
    if what == "VALIDATE_INPUTS":
        names = question.__func__.__code__.co_varnames[1 : question.__func__.__code__.co_argcount]
        values = {name: value for name, value in values.items() if name in names}
    return question(**values)


def widgets(kinds: tuple[str, ...] | None) -> list[tuple[str, str]]:
    """(node, input) of every menu (None), or of every widget of these kinds."""
    found = [(node, name, spec[0]) for node in NODES for name, spec in inputs(node).items()]
    return [(n, i) for n, i, kind in found if (isinstance(kind, list) if kinds is None else kind in kinds)]


def call(node: str, **values):
    """The node's function with its defaults, None at its sockets, and these values."""
    kinds = inputs(node).items()
    given = {name: spec[1].get("default") if len(spec) > 1 else None for name, spec in kinds}
    for name, spec in kinds:
        if given[name] is None and isinstance(spec[0], list) and spec[0]:
            given[name] = spec[0][0]
    cls = NODES[node]
    return getattr(cls(), cls.FUNCTION)(**{**given, **values})


@pytest.mark.parametrize("what", ["VALIDATE_INPUTS", "IS_CHANGED"])
@pytest.mark.parametrize("node", NODES)
def test_questions_about_linked_inputs_are_answered(node, what):
    linked = dict.fromkeys(inputs(node))
    answer = ask(node, what, linked)
    assert what == "IS_CHANGED" or answer is True
    for value in STRANGE:
        answers = [ask(node, what, {**linked, name: value}) for name in linked]
        assert what == "IS_CHANGED" or all(answer is True or isinstance(answer, str) for answer in answers)


@pytest.mark.parametrize("node, name", widgets(None))
def test_a_linked_value_is_held_to_the_menu(node, name):
    for value in ("../../no such entry", 5, ["a"], None):
        with pytest.raises(ValueError, match=f"^{name} is ") as caught:
            call(node, **{name: value})
        assert type(caught.value) is ValueError


@pytest.mark.parametrize("node, name", widgets(("INT", "FLOAT")))
def test_a_linked_number_is_held_to_its_range(node, name):
    options = inputs(node)[name][1]
    for value in (options["min"] - 1, options["max"] + 1, math.nan, math.inf, "3", None, [1]):
        with pytest.raises(ValueError, match=rf"^{name} is .*from .* to "):
            call(node, **{name: value})


@pytest.mark.parametrize("node, name", widgets(("STRING",)))
def test_a_linked_text_is_a_text(node, name):
    for value in (5, b"x", ["a"], "x" * 200):
        if isinstance(value, str):
            assert checked(NODES[node].INPUT_TYPES(), {name: value}) == {name: value}
            continue
        with pytest.raises(ValueError, match=f"^{name} is .*give it a text"):
            call(node, **{name: value})


def test_numbers_come_as_the_type_of_their_widget():
    schema = {"required": {"n": ("INT", {"min": 0, "max": 9}), "x": ("FLOAT", {"min": 0.0, "max": 9.0})}}
    seen = checked(schema, {"n": 3.0, "x": 2})
    assert seen == {"n": 3, "x": 2.0} and [type(v) for v in seen.values()] == [int, float]
    with pytest.raises(ValueError, match="n is 3.5: give a whole number from 0 to 9"):
        checked(schema, {"n": 3.5})


def test_a_value_is_not_repeated_whole_in_its_error():
    with pytest.raises(ValueError) as caught:
        call("DiptychBuilder", side="x" * 20000)
    assert len(str(caught.value)) < 300


def test_errors_reach_the_page_as_plain_value_errors():
    """ComfyUI shows the class of an error with its module, which in a custom node is a path."""

    class Fails:
        FUNCTION = "run"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self):
            raise LoraError("lora is broken: choose another")

    with pytest.raises(ValueError, match="^lora is broken: choose another$") as caught:
        guard(Fails)().run()
    assert type(caught.value) is ValueError and isinstance(caught.value.__cause__, LoraError)


def test_what_a_node_validates_itself_is_asked_again_when_it_runs():
    with pytest.raises(
        ValueError, match="lora is 'gone.safetensors', which is not in ComfyUI's loras folder"
    ):
        call("DiptychGRPOLoraLoader", lora="gone.safetensors")


def test_a_question_for_a_reward_that_asks_none_is_refused():
    with pytest.raises(ValueError, match="question is for vlm_yes, but the reward is shapes"):
        call("DiptychReward", name="shapes", question="is it {prompt}?")


AUTOMATIC = [
    (node, name)
    for node in NODES
    for name, spec in inputs(node).items()
    if len(spec) > 1 and "automatic" in spec[1]
]


@pytest.mark.parametrize("node, name", AUTOMATIC)
def test_auto_is_the_number_that_stood_for_it_when_the_widget_was_a_number(node, name):
    """So workflows saved then still open, and mean the same: the function's own default."""
    schema, spec = NODES[node].INPUT_TYPES(), inputs(node)[name]
    meant = spec[1]["automatic"]
    function = inspect.signature(getattr(NODES[node], NODES[node].FUNCTION))
    assert spec[1]["default"] == "auto" and function.parameters[name].default == meant["unset"]
    for value in ("auto", " Auto ", "", meant["unset"], str(meant["unset"])):
        assert checked(schema, {name: value}) == {name: meant["unset"]}
    top = checked(schema, {name: f"{meant['max']}"})[name]
    assert top == meant["max"] and type(top) is (int if meant["kind"] == "INT" else float)
    for value in ("fast", meant["max"] + 1, "1e999", None, [1], "nan"):
        with pytest.raises(ValueError, match=rf"^{name} is .*number from .* to .*, or auto\.$"):
            call(node, **{name: value})


def test_a_learning_rate_is_read_as_it_is_written():
    schema = NODES["DiptychTrainGRPO"].INPUT_TYPES()
    assert checked(schema, {"learning_rate": "1e-4"}) == {"learning_rate": 1e-4}


def test_every_sampler_and_trainer_says_auto_where_a_number_would_mean_something_else():
    """No widget of a released node stands at first on a number that means another one."""
    assert {name for _, name in AUTOMATIC} == {
        "batch_size", "eta", "group_size", "groups", "learning_rate", "mask_blur", "rank", "resolution",
        "scale", "top_k",
    }  # fmt: skip
