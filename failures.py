"""One sentence for whatever ended a command or a node: what failed, on what, and what to do about it.

Errors of our own (ValueError and its kinds) already are such sentences. Those of the system, the network, the
device and the libraries are translated here, known by their names so that no library is imported for it.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from . import missing

LONGEST = 700  # letters; libraries append whole pages
NETWORK = ("requests", "httpx", "httpx2", "httpcore", "urllib3", "aiohttp", "socket", "ssl")
UNREACHABLE = (
    "We couldn't connect to",
    "Cannot find an appropriate cached snapshot",
    "Max retries exceeded",
    "outgoing traffic has been disabled",
)
DEVICE = (
    "Torch not compiled with",
    "Found no NVIDIA driver",
    "No CUDA GPUs are available",
    "device type at start of device string",
    "Attempting to deserialize object on",
    "Cannot access accelerator device",
    "PyTorch is not linked with support for",
    "invalid device ordinal",
    "Invalid device string",
)


class Failure(NamedTuple):
    """sentence: for the user. ours: whether it is a fault of this program, not of what it was given."""

    sentence: str
    ours: bool = False


def explain(error: BaseException) -> Failure:
    """What to say of an error that reached the top of the command line."""
    for translate in (_missing, _memory, _device, _hub, _network, _system, _data):
        sentence = translate(error)
        if sentence:
            return Failure(_short(sentence))
    if isinstance(error, ValueError) and str(error).strip():
        return Failure(_short(str(error)))
    where = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(where[-1].filename)}:{where[-1].lineno}" if where else ""
    return Failure(
        f"unexpected {type(error).__name__}{place}: {_short(str(error)) or 'no message'} (add --debug for "
        "the traceback, and please report it: this should have been one clear sentence)",
        ours=True,
    )


def translated(error: BaseException) -> str:
    """What a node says of an error of the device, the network, the hub or the disk; "" for any other.

    Memory that ran out is not among them: ComfyUI knows what to do about it by the error's type.
    """
    if _memory(error):
        return ""
    sentences = (translate(error) for translate in (_missing, _device, _hub, _network, _system))
    return _short(next(filter(None, sentences), ""))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _missing(error: BaseException) -> str:
    return missing.sentence(error) if isinstance(error, ImportError) else ""


def _memory(error: BaseException) -> str:
    text = str(error)
    if "OutOfMemoryError" in _names(error) or "out of memory" in text.lower():
        return (
            f"the device's memory is full ({text.split('. ')[0]}): for an edit add --offload, or a smaller "
            "--panel-width; for training set a smaller resolution, batch_size or micro_batch, or "
            "gradient_checkpointing: true"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "cannot allocate memory" in text:
        return f"main memory is full ({text or 'MemoryError'}): use smaller images or batches"
    return ""


def _device(error: BaseException) -> str:
    if "not compiled with CUDA" in str(error):
        return f"{missing.CUDA}, or use cpu"
    if any(words in str(error) for words in DEVICE):
        return f"the device cannot be used ({str(error).split('. ')[0]}): use cpu, or see diptych doctor"
    return ""


def _hub(error: BaseException) -> str:
    names, text = _names(error), _short(str(error)).split(". ")[0][:300]
    if "GatedRepoError" in names or "gated repo" in str(error):
        return f"this model asks for its licence to be accepted on its page, then `hf auth login` ({text})"
    if "RepositoryNotFoundError" in names or "is not a valid model identifier" in str(error):
        return (
            f"{text}: there is no such folder here and no such public repository on the Hugging Face hub; "
            "check the name"
        )
    if "DatasetNotFoundError" in names:
        return f"{text}: there is no such data set; check the name and the network"
    if "HFValidationError" in names:
        return f"{text}: it is neither a folder here nor a name on the Hugging Face hub"
    return ""


def _network(error: BaseException) -> str:
    for each in _chain(error):
        names = _names(each)
        known = names & {
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
            "ConnectionError",
            "HfHubHTTPError",
        }
        known |= names & {"gaierror", "SSLError", "URLError"}
        library = type(each).__module__.split(".")[0] in NETWORK
        if known or library or any(words in str(each) for words in UNREACHABLE):
            if "HF_HUB_OFFLINE" in os.environ:
                remedy = "unset HF_HUB_OFFLINE, or give a folder on this machine"
            else:
                remedy = "check the network, or give a folder on this machine"
            return f"the network was needed and not reached ({_short(str(error))[:300]}): {remedy}"
    return ""


def _system(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return ""
    if error.errno is None:
        return _short(str(error)) or type(error).__name__
    name = error.filename if error.filename is not None else ""
    where = f" {os.fsdecode(name) if isinstance(name, (bytes, str)) else name}" if name != "" else ""
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    remedies = {
        errno.ENOENT: "does not exist: check the path",
        errno.EACCES: "may not be used by this user: change its permissions, or choose another place",
        errno.EPERM: "may not be used by this user: change its permissions, or choose another place",
        errno.EROFS: "is on a read-only disk: choose another place",
        errno.ENOTDIR: "goes through a file as if it were a folder: choose another place",
        errno.EISDIR: "is a folder where a file is needed: name a file",
        errno.EEXIST: "is a file where a folder is needed: choose another place",
        errno.ENAMETOOLONG: "is too long a name: use a shorter one",
        errno.EMFILE: "cannot be opened, too many files are: raise `ulimit -n`",
    }
    if error.errno in full:
        return (
            f"the disk is full{': writing' + where if where else ''}; free some space or choose another disk"
        )
    if where and error.errno in remedies:
        return f"{where.strip()} {remedies[error.errno]}"
    return f"the system refused{where}: {error.strerror or error}"


def _data(error: BaseException) -> str:
    names = _names(error)
    if isinstance(error, UnicodeError):
        return f"text is not UTF-8 ({error}): save the file, or type the words, as UTF-8"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply: use a flatter file"
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}): use a smaller one"
    if "SafetensorError" in names or "UnpicklingError" in names or "BadZipFile" in names:
        return (
            f"a weights file is damaged or of another kind ({_short(str(error))}): download or copy it again"
        )
    if "DecompressionBombError" in names or "UnidentifiedImageError" in names:
        return f"an image cannot be read ({error})"
    if type(error).__module__.split(".")[0] == "re" or "PatternError" in names:
        return f"a pattern is no regular expression ({error})"
    return ""
