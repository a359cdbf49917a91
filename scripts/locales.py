"""The nodes' texts in the languages of ComfyUI's page: writes `locales/en`, finds what a language lacks.

    .venv/bin/python scripts/locales.py            # writes locales/en anew, from the node classes
    .venv/bin/python scripts/locales.py --check    # names what is missing or stale in any language; exit 1

`locales/en` is never edited by hand. The page shows the classes' own texts where a language has no key, so
it changes nothing in English, and other languages do not fall back to it; it is the list of keys that a
translation starts from and is checked with. An `options` table is read by `web/js/options.js`, the notes and
titles of templates (`web/notes`, by their English text) by `web/js/notes.js`: ComfyUI's page translates
everything else by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from comfyui_diptych import NODE_CLASS_MAPPINGS
from comfyui_diptych.nodes.menus import BUNDLED_PREFIX

ROOT = Path(__file__).resolve().parents[1]
LOCALES, NOTES = ROOT / "locales", ROOT / "web" / "notes"
# Parts of our categories that ComfyUI's page translates itself, for every pack.
TRANSLATED_BY_COMFYUI = {"sampling", "training"}


def node_defs() -> dict[str, dict]:
    """What `nodeDefs.json` holds: {node: {display_name, description, inputs, outputs}}."""
    newest = SimpleNamespace(NODE_CLASS_MAPPINGS={"ImageCompare": object})
    with patch.dict(sys.modules, nodes=newest):  # with the inputs that only a newer ComfyUI has
        return {node: _node(cls) for node, cls in NODE_CLASS_MAPPINGS.items()}


def main_texts() -> dict[str, dict]:
    """What `main.json` holds: the parts of the nodes' categories."""
    parts = {part for cls in NODE_CLASS_MAPPINGS.values() for part in cls.CATEGORY.split("/")}
    return {"nodeCategories": {part: part for part in sorted(parts - TRANSLATED_BY_COMFYUI)}}


def template_texts() -> dict[str, dict]:
    """{notes, titles} of the templates and blueprints; slots' names and hints of apps are titles too."""
    files = [*ROOT.glob("example_workflows/*.json"), *ROOT.glob("subgraphs/*.json")]
    flows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(files)]
    subgraphs = [graph for flow in flows for graph in flow.get("definitions", {}).get("subgraphs", [])]
    nodes = [node for graph in (*flows, *subgraphs) for node in graph["nodes"]]
    groups = [group for graph in (*flows, *subgraphs) for group in graph.get("groups", [])]
    slots = [slot for graph in subgraphs for slot in (*graph["inputs"], *graph["outputs"])]
    apps = [flow.get("extra", {}).get("linearData", {}) for flow in flows]
    notes = [node["widgets_values"][0] for node in nodes if node["type"] in ("Note", "MarkdownNote")]
    titles = {titled["title"] for titled in (*nodes, *groups) if titled.get("title")}
    titles |= {slot.get("label") or slot["name"] for slot in slots}
    told = [more for app in apps for entry in app.get("inputs", []) for more in entry[2:]]
    titles |= {more["description"] for more in told if more.get("description")}
    return {"notes": {text: text for text in notes}, "titles": {text: text for text in sorted(titles)}}


def read(language: str) -> dict[str, dict]:
    """{file name: its content} of one language; `notes.json` for that of `web/notes`."""
    files = {path.name: path for path in sorted((LOCALES / language).glob("*.json"))}
    if (NOTES / f"{language}.json").is_file():
        files["notes.json"] = NOTES / f"{language}.json"
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


def english() -> dict[str, dict]:
    """{file name: its content} as `locales/en` has to be."""
    return {"main.json": main_texts(), "nodeDefs.json": node_defs()}


def keys(texts: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text) of every text in nested tables."""
    if isinstance(texts, dict):
        for key, value in texts.items():
            yield from keys(value, (*path, key))
    else:
        yield path, texts


def faults(language: str) -> list[str]:
    """What a language's files lack, and what they still say of things that are gone, a line each."""
    texts = english() if language == "en" else {**english(), "notes.json": template_texts()}
    wanted, found = dict(keys(texts)), dict(keys(read(language)))
    lines = [f"missing in {language}: {' > '.join(path)}" for path in wanted if not found.get(path)]
    return lines + [f"stale in {language}: {' > '.join(path)}" for path in found if path not in wanted]


def _node(cls: type) -> dict:
    schema = cls.INPUT_TYPES()
    specs = {**schema.get("required", {}), **schema.get("optional", {})}
    names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
    outputs = zip(names, cls.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": cls.DISPLAY_NAME,
        "description": cls.DESCRIPTION,
        "inputs": {name: _input(name, *spec) for name, spec in specs.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def _input(name: str, kind: object, extra: dict) -> dict:
    """A menu's files keep their names; its words are the options that there are without ComfyUI's folders."""
    entry = {"name": extra.get("display_name", name), "tooltip": extra["tooltip"]}
    words = [o for o in kind if not o.startswith(BUNDLED_PREFIX)] if isinstance(kind, list) else []
    return {**entry, "options": {word: word for word in words}} if words else entry


def _write() -> None:
    for name, texts in english().items():
        path = LOCALES / "en" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(words: list[str]) -> int:
    if words != ["--check"]:
        _write()
    lines = [line for folder in sorted(LOCALES.iterdir()) if folder.is_dir() for line in faults(folder.name)]
    if read("en") != english():
        lines.append("stale: locales/en is not what the node classes say; run scripts/locales.py")
    print("\n".join(lines) or "every text is there, in every language")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
