"""Base models as one file in the original layout: the same training as from their diffusers folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipadapter_core import load_adapter
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.training import train
from ipadapter_core.training.frozen import load_base
from tiny_ldm import save_single_file
from tiny_training import fingerprint, save_model, save_pictures, tiny_config

KINDS = ("sd15", "sd2", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per kind a diffusers folder, the same models as one file, and a folder of configs without weights."""
    root = tmp_path_factory.mktemp("single")
    for kind in KINDS:
        folder = save_model(root / f"{kind}-folder", "sdxl" if kind == "sdxl" else "sd15", kl=True)
        save_single_file(folder, root / f"{kind}.safetensors", kind)
        shutil.copytree(folder, root / kind, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copytree(folder / "image_encoder", root / kind / "image_encoder", dirs_exist_ok=True)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_folder(folders: Path, kind: str) -> None:
    whole, single = load_base(str(folders / f"{kind}-folder")), load_base(str(folders / f"{kind}.safetensors"))
    for name in ("unet", "vae"):
        assert fingerprint(getattr(single, name)) == fingerprint(getattr(whole, name)), name
    assert single.reads_sizes == (kind == "sdxl")
    text = ["cat on red background"]
    for a, b in zip(single.encode_text(single.tokenize(text)), whole.encode_text(whole.tokenize(text)), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_training_from_a_single_file(folders: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures")
    more: dict[str, Any] = {"train__steps": 3, "watch__sample_every": 3, "watch__sample_steps": 1, "data__workers": 0}
    for name, base in (("folder", "sd15-folder"), ("file", "sd15.safetensors")):
        cache = str(tmp_path / f"cache {name}")
        train(tiny_config(folders / base, pictures, tmp_path / name, data__cache=cache, **more))
    whole, single = (load_adapter(tmp_path / name / "ip-adapter.safetensors") for name in ("folder", "file"))
    for key, value in whole.module.checkpoint_state().items():
        assert torch.equal(single.module.checkpoint_state()[key], value), key
    assert (tmp_path / "file/sheet.png").read_bytes() == (tmp_path / "folder/sheet.png").read_bytes()


def test_what_cannot_be_told_is_asked_for(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    shutil.copy(folders / "sd15.safetensors", file)
    with pytest.raises(InvalidInputError, match=r"text tokens 16 wide, without configs .* set model\.config"):
        load_base(str(file))
    assert load_base(str(file), str(folders / "sd15")).config == str(folders / "sd15")
    with pytest.raises(InvalidInputError, match=r"describes 8 channels and text tokens 48 wide"):
        load_base(str(file), str(folders / "sdxl"))
    for width, kind, example in ((768, "SD1.5", "stable-diffusion-v1-5"), (2048, "SDXL", "xl-base")):
        prefix = "model.diffusion_model."
        tensors = {"input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3), "a.attn2.to_k.weight": torch.zeros(320, width)}
        save_file({prefix + key: value for key, value in tensors.items()}, file)
        with pytest.raises(InvalidInputError, match=rf"holds an {kind} model.*{example}"):
            load_base(str(file))


def test_files_that_are_no_base_model(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"lora.down": torch.zeros(1)}, file)
    with pytest.raises(InvalidInputError, match=r"no whole SD1\.5, SD2 or SDXL checkpoint.*it has lora"):
        load_base(str(file))
    file.write_bytes(b"nonsense")
    with pytest.raises(CorruptFileError, match="not a readable safetensors"):
        load_base(str(file))
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"is a \.ckpt file; single-file models are read as \.safetensors"):
        load_base(str(tmp_path / "x.ckpt"))
    state = load_file(folders / "sd15.safetensors")
    save_file({key: value for key, value in state.items() if not key.startswith("cond_stage")}, file)
    with pytest.raises(InvalidInputError, match=r"text encoder, autoencoder and UNet must all be in the file"):
        load_base(str(file), str(folders / "sd15"))
