"""How a button's work becomes a Gradio event: queue, progress, stop, errors in one sentence.

All jobs share one queue, for they share the model. Imports Gradio: for `app.py` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .backend import Backend
from .jobs import Job, Stopped

QUEUE = "model"  # of every event that runs one


def visitor(request: gr.Request | None) -> str:
    """Who sent an event."""
    return str(getattr(request, "session_hash", None) or "")


def job(backend: Backend, work: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A handler that runs work(job, visitor, *inputs) with a bar of steps; stopped, it changes nothing."""

    def handler(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> Any:  # noqa: B008
        def tell(done: int, total: int) -> None:
            progress((done, total), desc=what, unit="steps")

        who = visitor(request)
        progress(0, desc=f"{what}: waiting for the model")
        return told(backend, lambda: backend.jobs.run(who, lambda job: work(job, who, *values), tell, what))

    return handler


def quick(backend: Backend, work: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that runs work(visitor, *inputs), which needs no model."""

    def handler(request: gr.Request, *values: Any) -> Any:
        return told(backend, lambda: work(visitor(request), *values))

    return handler


def gone(backend: Backend) -> Callable[[gr.Request], None]:
    """A handler for the end of a visit."""

    def handler(request: gr.Request) -> None:
        backend.forget(visitor(request))

    return handler


def told(backend: Backend, work: Callable[[], Any]) -> Any:
    """What `work` returns; an error as one sentence in the page, a stop as a note."""
    try:
        return work()
    except Stopped as stopped:
        raise gr.Error(str(stopped), title="Stopped", duration=5, print_exception=False) from None
    except Exception as error:
        raise gr.Error(backend.sentence(error), print_exception=False) from error


def on_run(
    backend: Backend,
    triggers: Sequence[Callable[..., Any]],
    stop: gr.Button,
    work: Callable[[Job, str], Any],
    what: str,
    inputs: Sequence[Any],
    outputs: Any,
) -> None:
    """Run `work` at each trigger, in the queue of the model; the Stop button ends it or takes it out."""
    handler = job(backend, work, what)
    events = [
        trigger(handler, inputs, outputs, concurrency_id=QUEUE, concurrency_limit=1, api_visibility="private")
        for trigger in triggers
    ]

    def end(request: gr.Request) -> None:
        for job in backend.jobs.stop(visitor(request), what):
            gr.Info(f"stopping at the next step, {job.done} of {job.total} were done: nothing will change")

    # The page forgets a job that is cancelled, and its error with it. Only what is queued can say something.
    stop.click(end, None, None, cancels=events, concurrency_limit=None, api_visibility="private")
