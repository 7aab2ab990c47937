"""The configs that diffusers wants beside a checkpoint in one file: those of the published architectures, told by its shapes.

ComfyUI keeps SD1.5 and SDXL models as one file each, without configs and tokenizers. Sizes: the model_index folders of
stable-diffusion-v1-5/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from ..files.state_dict import describe_state_dict
from ..models.unet import FIRST_KEY, SD15, SDXL, SIZES_KEY, TEXT_KEY, UNet

Config = dict[str, Any]

_CLIP_L: Config = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768,
    "max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_CLIP_G: Config = {
    **_CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
_VAE: Config = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4, "in_channels": 3,
    "out_channels": 3, "norm_num_groups": 32, "act_fn": "silu",
}  # fmt: skip
_SCHEDULER: Config = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
_VAES: dict[str, Config] = {
    SD15.name: {"scaling_factor": 0.18215},
    SDXL.name: {"scaling_factor": 0.13025, "force_upcast": True},
}


def _unet(model: UNet) -> Config:
    config: Config = {
        "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "act_fn": "silu",
        "norm_num_groups": 32, "flip_sin_to_cos": True, "freq_shift": 0, "sample_size": model.resolution // 8,
        "block_out_channels": [*model.channels], "cross_attention_dim": model.text_width,
        "attention_head_dim": model.heads or [channels // 64 for channels in model.channels],
    }  # fmt: skip
    if model.pooled:
        config |= {
            "transformer_layers_per_block": [max(depth, 1) for depth in model.depths], "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": model.size_embedding,
        }  # fmt: skip
    cross = ["CrossAttn" if depth else "" for depth in model.depths]
    down, up = [f"{kind}DownBlock2D" for kind in cross], [f"{kind}UpBlock2D" for kind in reversed(cross)]
    return config | {"down_block_types": down, "up_block_types": up}


def _parts(model: UNet) -> dict[str, Config]:
    parts = {
        "unet": _unet(model),
        "vae": {**_VAE, "sample_size": model.resolution, **_VAES[model.name]},
        "text_encoder": _CLIP_L,
    }
    return parts | {"text_encoder_2": _CLIP_G} if model.pooled else parts


ARCHITECTURES: dict[str, dict[str, Config]] = {model.name: _parts(model) for model in (SD15, SDXL)}


def architecture_of(checkpoint: Path) -> str:
    """Which of ARCHITECTURES a checkpoint in the original layout is, from its shapes alone.

    Raises InvalidInputError for any other model.
    """
    tensors = describe_state_dict(checkpoint).tensors
    shape = {key: tuple(tensors[key].shape) for key in (FIRST_KEY, TEXT_KEY, SIZES_KEY) if key in tensors}
    found = (shape.get(FIRST_KEY), shape.get(TEXT_KEY, (0, 0))[1], shape.get(SIZES_KEY, (0, 0))[1])
    for model in (SD15, SDXL):
        if found == ((model.channels[0], 4, 3, 3), model.text_width, model.size_embedding):
            return model.name
    if found[0] is not None and found[0][1] == 9:
        raise InvalidInputError(
            f"{checkpoint.name} is an inpainting model (9 input channels); train on its ordinary relative"
        )
    raise InvalidInputError(
        f"{checkpoint.name} is no whole SD1.5 or SDXL checkpoint (first layer {found[0]}, text tokens {found[1]} wide); choose one "
        "of these, or for another model (SD2) a diffusers folder"
    )


def write_model_configs(checkpoint: Path, tokenizer: Path, folder: Path) -> Path:
    """Make ``folder`` the ``model.config`` of an SD1.5 or SDXL checkpoint; returns it.

    ``tokenizer`` is a folder with CLIP's ``vocab.json`` and ``merges.txt``. SDXL models trained for v-prediction are told
    by the empty tensors ``v_pred`` and ``ztsnr`` that their makers put into the file (NoobAI).
    Raises InvalidInputError for another model, before anything is written.
    """
    name = architecture_of(checkpoint)
    marks = describe_state_dict(checkpoint).tensors.keys()
    parts = dict(ARCHITECTURES[name])
    parts["scheduler"] = _SCHEDULER | {
        "prediction_type": "v_prediction" if "v_pred" in marks else "epsilon", "rescale_betas_zero_snr": "ztsnr" in marks,
    }  # fmt: skip
    index: Config = {"_class_name": "StableDiffusionPipeline" if name == SD15.name else "StableDiffusionXLPipeline"}
    files = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}
    for part, config in parts.items():
        library = "transformers" if part.startswith("text") else "diffusers"
        index[part] = [library, config["architectures"][0] if library == "transformers" else config["_class_name"]]
        _write(folder / part / files.get(part, "config.json"), config)
    # the second encoder's tokenizer pads with "!", the token number 0
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))[: 1 if name == SD15.name else 2]:
        index[part] = ["transformers", "CLIPTokenizer"]
        _write(folder / part / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
        })  # fmt: skip
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizer / file, folder / part / file)
    if name == SD15.name:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write(folder / "model_index.json", index)
    return folder


def _write(file: Path, values: Config) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
