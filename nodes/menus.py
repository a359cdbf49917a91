"""What ComfyUI's folders offer to the menus of nodes, and where a chosen entry lies on disk.

Menus list names only, so a shared workflow cannot name a path of its choosing. Outside ComfyUI every list
holds just what the pack brings itself.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..models import tiny

# models.lora is imported where it is used: it is a third of what importing the pack would cost.

NONE = "none"
NO_FILE = "None"  # as ICEdit-official's DiptychCreate has it, whose saved workflows open here
DEMO = "shapes demo (512 pairs)"
DEMO_SPEC = "shapes:512?split=train&seed=0&size=64&task={task}"
TINY = {
    "tiny fill (bundled)": "fill",
    "tiny kontext (bundled)": "kontext",
    "tiny sd_inpaint (bundled)": "sd_inpaint",
}
BUNDLED_PREFIX = "diptych tiny demo/"
REWARDS = "diptych_rewards"
MULTIMODAL = "diptych_multimodal"
BUNDLED_MULTIMODAL = "tiny (bundled)"
LAMA_FOLDERS = ("inpaint", "upscale_models")
LAMA_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


def comfy_folders() -> ModuleType | None:
    """ComfyUI's module `folder_paths`, or None outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return None
    return folder_paths


# images of the input folder


def input_images() -> list[str]:
    """Image files of ComfyUI's input folder, as Load Image lists them."""
    folders = comfy_folders()
    top = Path(folders.get_input_directory()) if folders else None
    if top is None or not top.is_dir():
        return []
    files = [entry.name for entry in top.iterdir() if entry.is_file()]
    return sorted(folders.filter_files_content_types(files, ["image"]))


def input_image_exists(name: object) -> bool:
    """Whether a name of that list, or one with a folder that an upload gave, is there."""
    folders = comfy_folders()
    return isinstance(name, str) and folders is not None and folders.exists_annotated_filepath(name)


def input_image_fingerprint(name: object) -> str:
    """Another text once the file of that name changes; "" without one."""
    if not input_image_exists(name):
        return ""
    stat = Path(comfy_folders().get_annotated_filepath(name)).stat()
    return f"{stat.st_mtime_ns} {stat.st_size}"


# datasets and base models of the training nodes


def datasets() -> dict[str, Path]:
    """Subfolders of ComfyUI's input folder, by name."""
    folders = comfy_folders()
    top = Path(folders.get_input_directory()) if folders else None
    if top is None or not top.is_dir():
        return {}
    return {p.name: p for p in sorted(top.iterdir()) if p.is_dir() and not p.name.startswith(".")}


def data_spec(dataset: str, task: str) -> str:
    """The data source of an entry of the dataset menu. Raises ValueError when it is not there any more."""
    from ..training.data.specs import spec_of

    if dataset == DEMO:
        return DEMO_SPEC.format(task="inpaint" if task == "sd_inpaint" else "edit")
    folder = datasets().get(dataset)
    if folder is None:
        raise ValueError(
            f"dataset is {dataset!r}, which is not in ComfyUI's input folder: put a folder of pairs there"
        )
    return spec_of(folder, inside=True)


def base_models() -> dict[str, Path]:
    """Complete diffusers folders under ComfyUI's models/diffusers, by name."""
    folders = comfy_folders()
    found: dict[str, Path] = {}
    for parent in folders.get_folder_paths("diffusers") if folders else []:
        for index in sorted(Path(parent).glob("*/model_index.json")):
            found.setdefault(index.parent.name, index.parent)
    return found


def model_folder(base_model: str) -> Path:
    """The diffusers folder of an entry of the model menu. Raises ValueError when it is not there any more."""
    folder = tiny.folder() / TINY[base_model] if base_model in TINY else base_models().get(base_model)
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"base_model is {base_model!r}, which is not there: put a diffusers folder into ComfyUI's "
            f"models/diffusers"
        )
    return folder


# LoRAs


def lora_names() -> list[str]:
    """Files of the loras folder, folders among them that are one LoRA (with a final /), bundled ones.

    Costs what ComfyUI's own cached list costs: folders are found by the names of the files in it.
    """
    files = _lora_files()
    return files + sorted(_lora_folders(files)) + [f"{BUNDLED_PREFIX}{p.name}" for p in _bundled()]


def lora_path(name: object) -> Path | None:
    """Where a name of the list is on disk; None if it is not there any more, or no name at all."""
    if not isinstance(name, str):
        return None
    if name.startswith(BUNDLED_PREFIX):
        return next((p for p in _bundled() if p.name == name.removeprefix(BUNDLED_PREFIX)), None)
    folders = comfy_folders()
    if folders is None:
        return None
    listed = _lora_files()
    marker = _lora_folders(listed).get(name)
    if marker is None and name not in listed:
        return None
    found = folders.get_full_path("loras", name if marker is None else marker)
    if found is None:
        return None
    return Path(found) if marker is None else Path(found).parent


def lora_fingerprint(path: Path) -> str:
    """Name, time and size of the files of a LoRA: another text once one of them changes."""
    from ..models.lora.files import WEIGHT_FILES, sidecar_files

    weights = [p for p in path.iterdir() if p.name in WEIGHT_FILES] if path.is_dir() else [path]
    files = [*weights, *(sidecar for file in weights for sidecar in sidecar_files(file))]
    stats = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(files) if p.is_file()]
    return repr(stats)


def _lora_files() -> list[str]:
    folders = comfy_folders()
    return list(folders.get_filename_list("loras")) if folders else []


def _lora_folders(files: list[str]) -> dict[str, str]:
    """`folder/` -> the weights file in it that gave it away."""
    from ..models.lora.files import WEIGHT_FILES

    found = {}
    for file in files:
        folder, _, name = file.replace("\\", "/").rpartition("/")
        if folder and name in WEIGHT_FILES:
            found[f"{folder}/"] = file
    return found


def _bundled() -> list[Path]:
    return sorted((tiny.folder() / "loras").glob("*.safetensors"))


# weights of rewards and of LaMa


def reward_files() -> dict[str, Path]:
    """What lies in ComfyUI's models/diptych_rewards, by name: folders and single weight files."""
    folders = comfy_folders()
    top = Path(folders.models_dir) / REWARDS if folders else None
    if top is None or not top.is_dir():
        return {}
    kinds = (".pt", ".pth", ".safetensors")
    return {p.name: p for p in sorted(top.iterdir()) if p.is_dir() or p.suffix.lower() in kinds}


def reward_path(name: str) -> Path:
    """The file or folder of that name. Raises ValueError when it is not there any more."""
    path = reward_files().get(name)
    if path is None:
        raise ValueError(f"weights_file is {name!r}, which is not in models/{REWARDS}: put it there.")
    return path


def lama_files() -> list[str]:
    """What `lama_file` offers; "none" first, so that the node is valid without a file."""
    return [NONE, *_lama_choices()]


def lama_path(name: str) -> Path | None:
    """The file of that name; None for "none". Raises ValueError for a name that is not in the list."""
    if name == NONE:
        return None
    choices = _lama_choices()
    if name not in choices:
        raise ValueError(f"lama_file is {name!r}: it is not in {' or '.join(LAMA_FOLDERS)}, choose again.")
    return choices[name]


def _lama_choices() -> dict[str, Path]:
    """{name: file} over ComfyUI's folders; models/inpaint is looked through even if no pack registered it."""
    folders = comfy_folders()
    found: dict[str, Path] = {}
    for folder in LAMA_FOLDERS if folders else ():
        known = folder in folders.folder_names_and_paths
        places = folders.get_folder_paths(folder) if known else [Path(folders.models_dir) / folder]
        for place in map(Path, places):
            for file in sorted(place.rglob("*")) if place.is_dir() else ():
                if file.suffix.lower() in LAMA_SUFFIXES and file.is_file():
                    found.setdefault(f"{folder}/{file.relative_to(place).as_posix()}", file)
    return found


# multimodal models


def multimodal_models() -> dict[str, Path]:
    """Folders of multimodal models under ComfyUI's models/diptych_multimodal, by name.

    The folder is one of ComfyUI's own list, so extra_model_paths.yaml may name more.
    """
    folders = comfy_folders()
    if folders is None:
        return {}
    folders.add_model_folder_path(MULTIMODAL, str(Path(folders.models_dir) / MULTIMODAL))
    found: dict[str, Path] = {}
    for parent in folders.get_folder_paths(MULTIMODAL):
        for weights in sorted(Path(parent).glob("*/model.safetensors")):
            found.setdefault(weights.parent.name, weights.parent)
    return found


def multimodal_folder(name: str) -> Path:
    """The folder of an entry of the model menu. Raises ValueError when it is not there any more."""
    if name == BUNDLED_MULTIMODAL:
        from ..models.multimodal.storage import bundled

        return bundled()
    folder = multimodal_models().get(name)
    if folder is None:
        raise ValueError(
            f"model is {name!r}, which is not in models/{MULTIMODAL}: put the folder that "
            "`diptych train multimodal` wrote there"
        )
    return folder


# textual inversions


def check_embedding(name: str) -> None:
    """Raise ValueError unless ComfyUI's models/embeddings holds one of that name, in any of its folders.

    ComfyUI itself leaves out an embedding that is not there, with a line in the console.
    """
    folders = comfy_folders()
    files = folders.get_filename_list("embeddings") if folders else []
    if name not in {Path(file.replace("\\", "/")).stem for file in files}:
        raise ValueError(
            f"embedding {name} is not in models/embeddings: cut it out of PowerPaint's text encoder with "
            "`diptych powerpaint split`, and refresh."
        )
