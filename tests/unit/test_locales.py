"""Every text of a node is there in every language, none of what is gone, and Chinese texts are Chinese."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from comfyui_diptych import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[2]
HOW = "run scripts/locales.py, then add to locales/zh what `scripts/locales.py --check` names"
# Options that are names in every language: samplers, schedulers, rewards, recipes, models, number formats.
NAMES = set(
    "aesthetic beta bfloat16 clip_h clip_i clip_l cpu cps dance ddim ddim_uniform dino eps exponential fast "
    "fill float32 float8_e4m3fn flow flow-grpo fp8_e4m3fn fp8_e4m3fn_fast fp8_e5m2 "
    "glid gpu hpsv2 icedit icedit_moe jpeg_size karras keep_l1 multimodal "
    "keep_lpips keep_ssim kontext lama mixgrpo nft normal ode pickscore plms rf_ancestral sd_inpaint "
    "sd_inpaint_dreambooth sgm_uniform shapes simple uxo vlm_yes winner".split()
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")
ENGLISH_SENTENCE = re.compile(r"(?:\b[A-Za-z']+[ ,]+){6,}")
# Core's nodes that our texts name, as ComfyUI's page calls them in Chinese.
CORE = set(
    "Flux引导 自定义采样器（高级） 自定义采样器 合成图像（遮罩） 模型相减 模型相加 UNet加载器 加载VAE "
    "加载ControlNet模型 CFG引导器 随机噪波 VAE解码".split()
)
every_node = pytest.mark.parametrize("node", sorted(NODE_CLASS_MAPPINGS))


@pytest.fixture(scope="module")
def locales():
    spec = importlib.util.spec_from_file_location("locales_script", ROOT / "scripts" / "locales.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_english_is_what_the_node_classes_say(locales):
    assert locales.read("en") == locales.english(), HOW


def test_no_language_lacks_a_text_or_keeps_a_stale_one(locales):
    languages = [folder.name for folder in locales.LOCALES.iterdir() if folder.is_dir()]
    assert {"en", "zh"} <= set(languages)
    assert [fault for language in languages for fault in locales.faults(language)] == [], HOW


def prose(text: str) -> str:
    """Without code, addresses and what is set apart as a name or an example."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|\*+[^*\n]+\*+", "·", text, flags=re.S)


def test_chinese_texts_are_chinese(locales):
    """Names may be those of the field (VAE, CLIP, Latent); what stays in small letters was left over."""
    left = {}
    for path, text in locales.keys(locales.read("zh")):
        if path[-2] == "options":
            good = CHINESE.search(text) or path[-1] in NAMES
        elif path[-2] == "titles":
            good = CHINESE.search(text) or re.fullmatch(r"(?:[A-Z][\w.-]* ?)+|glid|inpaint - base", text)
        elif path[-1] == "name":
            good = CHINESE.search(text) or text[0].isupper()
        else:
            good = CHINESE.search(text) and not ENGLISH_SENTENCE.search(prose(text))
        if not good:
            left[" > ".join(path)] = text
    assert not left


def test_no_text_holds_what_the_page_reads_as_code(locales):
    """The page's messages take {name}, @:key and a | b apart; notes are no messages."""
    texts = [(path, text) for language in ("en", "zh") for path, text in locales.keys(locales.read(language))]
    texts = [(path, text) for path, text in texts if path[0] != "notes.json"]
    assert [(path, text) for path, text in texts if re.search(r"[{}|@]", text)] == []


def short(entry: dict) -> str:
    return entry["display_name"].partition("（")[0]


def test_what_a_text_names_in_chinese_is_called_so(locales):
    """A node named in quotation marks in a description or tooltip is one of ours, an input, or core's."""
    defs = locales.read("zh")["nodeDefs.json"]
    own = {title for entry in defs.values() for title in (entry["display_name"], short(entry))}
    own |= {text for path, text in locales.keys(defs) if path[-1] == "name" or path[-2] == "options"}
    named = {
        name
        for path, text in locales.keys(defs)
        if path[-1] in ("description", "tooltip")
        for name in re.findall("“([^”]+)”", text)
    }
    assert named - own <= CORE


def outline(page: Path) -> tuple[list[str], list[int], int]:
    """What two pages of one node share: marks of headings, rows of each table, points of lists."""
    text = page.read_text(encoding="utf-8") + "\n"
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return (
        re.findall(r"^(#+) ", text, re.M),
        [table.count("\n") for table in tables],
        len(re.findall(r"^- ", text, re.M)),
    )


@every_node
def test_the_chinese_help_page_has_the_parts_of_the_english_one(node):
    english, chinese = ROOT / "web/docs" / f"{node}.md", ROOT / "web/docs" / node / "zh.md"
    assert chinese.is_file(), "write it: the page shows it to whoever uses ComfyUI in Chinese"
    assert outline(chinese) == outline(english)


@every_node
def test_the_chinese_help_page_calls_things_what_the_node_shows(node, locales):
    text = (ROOT / "web/docs" / node / "zh.md").read_text(encoding="utf-8")
    english, entry = (locales.read(language)["nodeDefs.json"][node] for language in ("en", "zh"))
    assert text.startswith(f"# {entry['display_name']}\n")
    rows = {name: given["name"] for name, given in entry["inputs"].items()}
    outputs = [(english["outputs"][slot]["name"], given["name"]) for slot, given in entry["outputs"].items()]
    wanted = [f"**{shown}**（`{name}`" for name, shown in [*rows.items(), *outputs]]
    assert [row for row in wanted if row not in text] == []
    assert ENGLISH_SENTENCE.findall(prose(text)) == []


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]


def test_the_chinese_readme_has_all_of_the_english_one(locales):
    """The same parts, commands, files and figures; every node, by its Chinese name."""
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    assert outline(chinese) == outline(english) and commands(chinese) == commands(english)
    for kind in (r"`[^`\n]+`", r"https://[^)\s]+(?<!README\.md)(?<!README\.zh\.md)(?=\))", r"\d+\.\d+"):
        assert sorted(re.findall(kind, texts[1])) == sorted(re.findall(kind, texts[0])), kind
    names = [short(entry) for entry in locales.read("zh")["nodeDefs.json"].values()]
    assert [name for name in names if name not in texts[1]] == []
    assert "README.zh.md" in texts[0] and "README.md" in texts[1]
