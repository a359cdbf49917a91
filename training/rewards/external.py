"""Rewards that a recipe file may name but no node may: a Python callable, or an HTTP endpoint.

A shared workflow must never be able to import code or open a connection of its choosing, so these are not in
the registry; a `Spec` that is not `external` never names one.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import logging
import queue
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...models.image_files import to_pil
from .base import Context, Reward

logger = logging.getLogger(__name__)

LARGEST_REPLY = 1 << 20  # bytes: a batch's scores are some hundreds


class CallableReward(Reward):
    """A function (images, prompts, sources, masks) -> N numbers, `module:function`.

    The arguments are the images and the parts of the `Context` of those names, None where not known. An
    exception in the function makes that batch NaN and is logged.
    """

    def __init__(self, function: Callable[..., Sequence[float] | Tensor], name: str):
        self.function, self.name = function, name

    @classmethod
    def load(cls, target: str) -> CallableReward:
        """Import `module:function`. Raises ValueError if there is no such callable."""
        module, _, attribute = target.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # whatever a module of the user's may raise when it is imported
            raise ValueError(
                f"reward {target!r} cannot be imported ({error}): write module:function."
            ) from error
        return cls(function, target)

    def _score(self, images: Tensor, context: Context) -> Tensor:
        try:
            scores = self.function(images, context.prompts, context.sources, context.masks)
            scores = torch.as_tensor(scores, dtype=torch.float32)
        except Exception as error:  # user code: one failing batch must not end a run of hours
            logger.warning("reward %s failed: %s", self.name, error)
            return torch.full((len(images),), torch.nan)
        if scores.shape != (len(images),):
            raise ValueError(
                f"reward {self.name} returned shape {tuple(scores.shape)} for {len(images)} images."
            )
        return scores


def _pngs(images: Tensor | None) -> list[str] | None:
    """Images [N,H,W,C] or masks [N,H,W] in 0..1 -> base64 PNGs."""
    if images is None:
        return None
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        to_pil(image).save(file, "PNG")
    return [base64.b64encode(file.getvalue()).decode("ascii") for file in files]


class HttpReward(Reward):
    """POSTs JSON {"images": [base64 PNG], "prompts", "sources", "masks"}, reads {"scores": [number or null]}.

    timeout: seconds for one try, from the connection to the last byte. null, and a batch that still fails
    after the retries, become NaN. Nothing is ever unpickled.
    """

    def __init__(
        self, url: str, timeout: float = 30.0, retries: int = 3, batch_size: int = 16, wait: float = 1.0
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"reward endpoint {url!r} is not an http(s) address.")
        self.url, self.timeout, self.retries, self.wait = url, timeout, retries, wait
        self.name, self.batch_size = url, batch_size

    def _score(self, images: Tensor, context: Context) -> Tensor:
        payload = {
            "images": _pngs(images),
            "prompts": None if context.prompts is None else list(context.prompts),
            "sources": _pngs(context.sources),
            "masks": _pngs(context.masks),
        }
        body = json.dumps(payload).encode()
        for attempt in range(self.retries + 1):
            try:
                return _scores(_within(self.timeout, lambda: self._post(body)), len(images))
            except Exception as error:  # whatever a server does must not end a run of hours
                reason = f"{type(error).__name__}: {error}"
                logger.warning("reward endpoint %s failed (try %d): %s", self.url, attempt + 1, reason)
                if attempt < self.retries:
                    time.sleep(self.wait * 2**attempt)
        return torch.full((len(images),), torch.nan)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = response.read(LARGEST_REPLY + 1)
            missing = response.length or 0  # of the announced length; `read(n)` does not mind
        if len(reply) > LARGEST_REPLY:
            raise ValueError(f"the reply is longer than {LARGEST_REPLY} bytes")
        if missing:
            raise ValueError(f"the reply breaks off {missing} bytes before its end")
        return reply


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What `work` returns. Raises what it raises, or TimeoutError where it takes longer.

    A socket's own time-out begins anew with every byte; a thread can be left behind.
    """
    made: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            made.put(work())
        except BaseException as error:  # passed on
            made.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = made.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole reply within {seconds:g} seconds") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _scores(reply: bytes, count: int) -> Tensor:
    """The scores [count] of a reply. Raises ValueError if it is not {"scores": [number or null, ...]}."""
    content = json.loads(reply)
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f'the reply is not {{"scores": [...]}} with {count} numbers: {reply[:80]!r}')
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"the score {str(score)[:40]!r} is no number")
    return torch.tensor([torch.nan if score is None else float(score) for score in scores])
