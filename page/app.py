"""The page itself: its tabs, and the server on the loopback address. Imports Gradio."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser

from ..commands.stopping import Stop
from .backend import Backend

HOST = "127.0.0.1"
PORT, PORTS = 7860, 100  # the first that is tried, and how many
WAITING = 32  # jobs in the queue at most
UPLOAD = "64mb"  # of one file
PATIENCE = 2  # seconds for open connections at the end
INTRO = """# Diptych
Edit images by instruction, fill what is drawn over, make them larger, without ComfyUI. The *tiny* models know
images of coloured shapes alone and answer in seconds; `diptych web --model FOLDER` offers others."""


def build(backend: Backend):
    """The page as a `gradio.Blocks`, its files in the backend's folder."""
    # Before Gradio is imported: it reads both then.
    os.environ["GRADIO_TEMP_DIR"] = str(backend.folder / "files")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from . import handlers, tabs
    from .canvas_tab import canvas_tab

    with gr.Blocks(title="Diptych", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Tab("Edit"):
            tabs.edit_tab(backend)
        with gr.Tab("Fill and outpaint"):
            with gr.Tab("Fill"):
                tabs.fill_tab(backend)
            with gr.Tab("Outpaint"):
                tabs.outpaint_tab(backend)
            with gr.Tab("Canvas"):
                canvas_tab(backend)
        with gr.Tab("Generate and caption"):
            tabs.words_tab(backend)
        page.unload(handlers.gone(backend))
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def application(backend: Backend):
    """The page as an ASGI application that answers to the loopback address alone."""
    page = build(backend)
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A name that somebody else's page has pointed at this machine is refused.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    # The system's fonts: the default theme fetches its own from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        allowed_paths=[],
        max_file_size=UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme,
    )


def listen(port: int | None) -> socket.socket:
    """A listening socket at a port of the loopback address; without one, the first free from 7860.

    Raises ValueError if it is taken.
    """
    for number in [port] if port else range(PORT, PORT + PORTS):
        found = socket.socket()
        if os.name != "nt":  # there it would share a port that is in use
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, number))
            found.listen()
        except OSError:
            found.close()
        else:
            return found
    tried = f"--port is {port}, which is" if port else f"ports {PORT} to {PORT + PORTS - 1} are"
    raise ValueError(f"{tried} in use here: give another --port")


def serve(backend: Backend, port: int | None, browser: bool) -> None:
    """Serve until Ctrl-C; then everything that was uploaded and made is deleted."""
    import uvicorn

    try:
        with Stop("the page is closed; what was uploaded and made is deleted"), listen(port) as place:
            config = uvicorn.Config(
                application(backend), log_level="warning", timeout_graceful_shutdown=PATIENCE
            )
            address = f"http://{HOST}:{place.getsockname()[1]}"
            sys.stdout.write(f"the page is at {address}  (Ctrl-C ends it)\n")
            sys.stdout.flush()
            if browser:
                webbrowser.open(address)
            uvicorn.Server(config).run(sockets=[place])
    finally:
        backend.close()
