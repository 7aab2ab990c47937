"""The image tokens that ComfyUI_IPAdapter_plus makes of adapter files, inside the host's own python.

    ~/comfy/ComfyUI/.venv/bin/python old_tokens.py PACK HOST FEATURES OUT FILE…

FEATURES is a safetensors file with `cond` and `uncond` per file name; OUT gets the tokens under the same names. The pack
loads each file, chooses sizes and builds its projector itself; it is stopped where it would go on to patch a model.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

pack, host, features, out, *files = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host)


class Built(Exception):
    """Carries the projector out of the pack's long function."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter


def main() -> None:
    import comfy.options

    comfy.options.enable_args_parsing()
    from safetensors.torch import load_file, save_file

    spec = importlib.util.spec_from_file_location(
        "old_pack", Path(pack) / "__init__.py", submodule_search_locations=[pack]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_pack"] = module
    spec.loader.exec_module(module)
    inner, utils = sys.modules["old_pack.IPAdapterPlus"], sys.modules["old_pack.utils"]
    original: Any = inner.IPAdapter

    def build(*args: Any, **kwargs: Any) -> None:
        raise Built(original(*args, **kwargs))

    inner.IPAdapter = build
    seen, tokens = load_file(features), {}
    for file in files:
        name = Path(file).name
        cond, uncond = seen[f"{name}.cond"], seen[f"{name}.uncond"]
        try:
            inner.ipadapter_execute(
                SimpleNamespace(model=None), utils.ipadapter_model_loader(file), None, pos_embed=cond, neg_embed=uncond
            )
        except Built as built:
            made = built.adapter.get_image_embeds(cond, uncond, 0)
            tokens[f"{name}.cond"], tokens[f"{name}.uncond"] = (one.contiguous().float() for one in made)
    save_file(tokens, out)


main()
