"""What the trainer writes gives the same image tokens here, in diffusers and in ComfyUI_IPAdapter_plus."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from host.comfy_server import find_hosts
from ipadapter_core import load_adapter
from ipadapter_core.commands.cli import main
from ipadapter_core.training import train
from ipadapter_core.training.frozen import load_encoder
from tiny_training import save_model, save_pictures, tiny_config

OLD = os.environ.get("IPADAPTER_PLUS_PATH")
FAMILIES: dict[str, dict[str, Any]] = {"base": {}, "plus": {"adapter__depth": 4}, "full-face": {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and a flat and a nested file of every family, trained for two steps and exported."""
    root = tmp_path_factory.mktemp("trained")
    # 768 as in SD1.5: the other two fix a resampler's heads at 12 of 64
    model, pictures = save_model(root / "model", text_width=768), save_pictures(root / "pictures")
    for family, more in FAMILIES.items():
        values = {"adapter__family": family, "train__steps": 2, "train__optimizer": "muon", "output__state_every": 0}
        outcome = train(tiny_config(model, pictures, root / family, **values, **more))
        outcome.file.rename(root / f"{family}.safetensors")
        assert main(["export", str(root / f"{family}.safetensors"), str(root / f"{family}.bin")]) == 0
    return root


def features(root: Path, family: str) -> tuple[Tensor, Tensor]:
    """Features of two pictures of noise, and what stands for no image: `2 …`."""
    encoder, spec = load_encoder(str(root / "model"), ""), load_adapter(root / f"{family}.safetensors").spec
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    cond = encoder.encode(pixels).get(spec.feature)
    uncond = encoder.encode(torch.zeros_like(pixels)).get(spec.feature)
    return cond, torch.zeros_like(cond) if spec.unconditional == "zero_embeds" else uncond


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_and_nested_files_give_diffusers_tokens(trained: Path, family: str) -> None:
    from diffusers import StableDiffusionPipeline

    cond, _ = features(trained, family)
    for name in (f"{family}.safetensors", f"{family}.bin"):
        pipeline = StableDiffusionPipeline.from_pretrained(trained / "model", safety_checker=None)
        pipeline.load_ip_adapter(str(trained), subfolder="", weight_name=name)
        theirs = pipeline.unet.encoder_hid_proj.image_projection_layers[0](cond)
        ours = load_adapter(trained / name).tokens(cond)
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)


def test_flat_and_nested_files_give_the_old_packs_tokens(trained: Path, tmp_path: Path) -> None:
    hosts = find_hosts()
    if not OLD or not hosts:
        pytest.skip("no ComfyUI, or no ComfyUI_IPAdapter_plus at $IPADAPTER_PLUS_PATH")
    files = [trained / f"{family}{suffix}" for family in FAMILIES for suffix in (".safetensors", ".bin")]
    seen: dict[str, Tensor] = {}
    for file in files:
        cond, uncond = features(trained, file.stem)
        seen |= {f"{file.name}.cond": cond.contiguous(), f"{file.name}.uncond": uncond.contiguous()}
    save_file(seen, tmp_path / "features.safetensors")
    script, out = Path(__file__).with_name("old_tokens.py"), tmp_path / "tokens.safetensors"
    command = [
        str(hosts[0].python),
        str(script),
        OLD,
        str(hosts[0].path),
        str(tmp_path / "features.safetensors"),
        str(out),
    ]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(out)
    assert len(theirs) == 2 * len(files)
    for key, value in theirs.items():
        ours = load_adapter(trained / key.rpartition(".")[0]).tokens(seen[key])
        torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
