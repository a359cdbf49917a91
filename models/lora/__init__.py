"""LoRA files of every format: read, apply to diffusers or ComfyUI, save."""
