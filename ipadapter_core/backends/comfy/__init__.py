"""ComfyUI: image prompts and LoRAs on its MODEL and CLIP."""
