"""The page of `diptych web`: editing, filling, outpainting, generating and captioning in a browser.

`app.py`, `tabs.py` and `canvas_tab.py` are the Gradio page and all that knows of Gradio; the other files do
the work and can be called without it. Not for ComfyUI's page, which is `web/`.
"""
