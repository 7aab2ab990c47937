"""Checkpoints as ComfyUI keeps them, one file without configs: which model it is, and the configs that diffusers wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ipadapter_core import TransformersImageEncoder
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.images.encoder import vision_config
from ipadapter_core.training.frozen import encoder_sizes, load_encoder, model_home
from ipadapter_core.training.model_configs import ARCHITECTURES, architecture_of, write_model_configs

PARAMETERS = {
    "SD1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "SDXL": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
"""Of the published models (parameters; position ids are not)."""


def checkpoint(path: Path, text: int = 768, channels: int = 4, marks: tuple[str, ...] = ()) -> Path:
    """What tells an architecture, and nothing else."""
    prefix = "model.diffusion_model."
    shapes: dict[str, tuple[int, ...]] = {
        "input_blocks.0.0.weight": (320, channels, 3, 3), "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, text),
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, text),
    }  # fmt: skip
    if text == 2048:
        shapes["label_emb.0.0.weight"] = (1280, 2816)
    state = {prefix + key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    save_file(state | {mark: torch.zeros(0) for mark in marks}, path)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "!", "c", "a", "t</w>", "ca", "cat</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_models_made_from_the_configs_are_the_published_ones(name: str, tokenizer: Path, tmp_path: Path) -> None:
    import diffusers
    import transformers

    file = checkpoint(tmp_path / "model.safetensors", 768 if name == "SD1.5" else 2048)
    folder = write_model_configs(file, tokenizer, tmp_path / "configs")
    assert model_home(str(file), str(folder)) == str(folder)  # accepted as this file's
    index = json.loads((folder / "model_index.json").read_text())
    counts: dict[str, int] = {}
    for part in PARAMETERS[name]:
        library, kind = index[part]
        config = json.loads((folder / part / "config.json").read_text())
        made: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        with torch.device("meta"):
            model = made.from_config(config) if library == "diffusers" else made(made.config_class(**config))
        counts[part] = sum(p.numel() for p in model.parameters())
    assert counts == PARAMETERS[name]
    words = [
        transformers.CLIPTokenizer.from_pretrained(folder / part) for part in index if part.startswith("tokenizer")
    ]
    assert [w(["cat"], padding="max_length", max_length=5).input_ids[0] for w in words] == [
        [0, 7, 1, pad, pad] for pad in (1, 2)[: len(words)]
    ]
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, rel=1e-2)


def test_what_the_model_predicts_is_read_from_its_marks(tokenizer: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "v.safetensors", 2048, marks=("v_pred", "ztsnr"))
    folder = write_model_configs(file, tokenizer, tmp_path / "v")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_other_models_are_refused_before_anything_is_written(tokenizer: Path, tmp_path: Path) -> None:
    for text, channels, words in ((1024, 4, "1024 wide"), (768, 9, "inpainting model")):
        file = checkpoint(tmp_path / f"{text}.safetensors", text, channels)
        with pytest.raises(InvalidInputError, match=words):
            write_model_configs(file, tokenizer, tmp_path / "no")
    save_file({"lora": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(InvalidInputError, match=r"no whole SD1\.5 or SDXL checkpoint"):
        architecture_of(tmp_path / "lora.safetensors")
    assert not (tmp_path / "no").exists()


# --- image encoders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vision tower as a folder: of a published width, which says its number of heads, and else small."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, projection_dim=24, image_size=28,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tower")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_a_file_alone_is_the_folder(tower: Path) -> None:
    file = tower / "model.safetensors"
    alone, folder = TransformersImageEncoder.from_pretrained(file), TransformersImageEncoder.from_pretrained(tower)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    a, b = alone.encode(pixels), folder.encode(pixels)
    assert torch.equal(a.image_embeds, b.image_embeds)
    assert torch.equal(a.penultimate, b.penultimate)
    assert encoder_sizes("", str(file)) == encoder_sizes("", str(tower))
    assert load_encoder("", str(file)).image_size == 28
    assert vision_config(file)["hidden_act"] == "gelu"


def test_files_that_are_no_tower(tower: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "open_clip.safetensors")
    with pytest.raises(InvalidInputError, match=r"not one of CLIP's vision towers.*it has visual"):
        TransformersImageEncoder.from_pretrained(tmp_path / "open_clip.safetensors")
    state = load_file(tower / "model.safetensors")
    state.pop("vision_model.encoder.layers.1.mlp.fc2.bias")
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(CorruptFileError, match="lacks 1 of its weights"):
        TransformersImageEncoder.from_pretrained(tmp_path / "cut.safetensors")
