"""What only graphs of ComfyUI_IPAdapter_plus need: its settings, its file names, its graphs rewritten."""
