"""The shipped demo world as ComfyUI's own MODEL, CLIP, VAE and CLIP_VISION: small trained models, without a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar
from weakref import WeakValueDictionary

import comfy.clip_vision
import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor, nn

from ...ipadapter_core.demo.world import FOLDER, References, load_references
from ...ipadapter_core.models import layout_of
from ...ipadapter_core.models.sites import ModelLayout
from .adapters import ManagedAdapter, manage

ADAPTERS = ("plus", "base")
ALL = "all of them"
Part = TypeVar("Part")

_LOADED: WeakValueDictionary[str, Any] = WeakValueDictionary()


def _shared(name: str, load: Callable[[], Part]) -> Part:
    """One copy of each part, for as long as a graph holds it; the memory manager moves and unloads it as any other model."""
    part = _LOADED.get(name)
    if part is None:
        part = _LOADED[name] = load()
    return part


def _config(part: str) -> dict[str, Any]:
    return json.loads((FOLDER / part / "config.json").read_text(encoding="utf-8"))


def _weights(part: str) -> dict[str, Tensor]:
    files = sorted((FOLDER / part).glob("*.safetensors"))  # several where one would be too large
    return {key: value.float() for file in files for key, value in comfy.utils.load_torch_file(str(file)).items()}


def _patcher(model: nn.Module, device: torch.device, offload: torch.device) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload)


# --- MODEL ----------------------------------------------------------------------------------------------------------------


class DemoLatents(comfy.latent_formats.LatentFormat):
    """16 channels, four pixels a latent."""

    def __init__(self) -> None:
        vae = _config("vae")
        self.latent_channels, self.scale_factor = vae["latent_channels"], vae["scaling_factor"]


def _described(unet: dict[str, Any]) -> comfy.supported_models.SD15:
    """ComfyUI's description of a diffusers UNet whose first level has no attention."""
    widths, layers = unet["block_out_channels"], unet["layers_per_block"]
    depths = [int(name.startswith("CrossAttn")) for name in unet["down_block_types"]]
    described = comfy.supported_models.SD15(
        {
            "image_size": unet["sample_size"],
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": [layers] * len(widths),
            "transformer_depth": depths,
            "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
            "transformer_depth_middle": 1,
            "context_dim": unet["cross_attention_dim"],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "adm_in_channels": None,
            "legacy": False,
        }
    )
    described.unet_config |= {"num_heads": unet["attention_head_dim"], "num_head_channels": -1}
    described.latent_format = DemoLatents()
    described.sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "zsnr": True}
    described.set_inference_dtype(torch.float32, None)
    return described


def _model(described: comfy.supported_models.SD15, device: torch.device | None = None) -> comfy.model_base.BaseModel:
    return comfy.model_base.BaseModel(described, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device)


@cache
def layout() -> ModelLayout:
    """Where image prompts act in the world's model; nothing is loaded."""
    return layout_of(_model(_described(_config("unet")), torch.device("meta")).diffusion_model)


def _load_model() -> comfy.model_patcher.ModelPatcher:
    described = _described(_config("unet"))
    model = _model(described)
    names = comfy.utils.unet_to_diffusers(described.unet_config)
    weights = _weights("unet")
    model.diffusion_model.load_state_dict({names[key]: value for key, value in weights.items() if key in names})
    device = comfy.model_management.get_torch_device()
    return _patcher(model, device, comfy.model_management.unet_offload_device())


# --- CLIP -----------------------------------------------------------------------------------------------------------------


class DemoText(comfy.sd1_clip.SDClipModel):
    """The text encoder; where it says 77 and 49407, ComfyUI's own is told the world's numbers."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        config = _config("text_encoder")
        ends = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            special_tokens=ends,
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        embeddings = self.transformer.text_model.embeddings
        size = (config["vocab_size"], config["hidden_size"])
        embeddings.token_embedding = self.operations.Embedding(*size, dtype=dtype, device=device)


class DemoWords(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        config = _config("text_encoder")
        super().__init__(
            tokenizer_path=str(FOLDER / "tokenizer"),
            max_length=config["max_position_embeddings"],
            embedding_directory=embedding_directory,
            embedding_size=config["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=DemoWords)


class DemoCLIP(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoText)


class _Target:
    """What ComfyUI makes a CLIP of."""

    params: ClassVar[dict[str, Any]] = {}
    clip, tokenizer = DemoCLIP, DemoTokenizer


def _load_clip() -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(_Target, model_options={"dtype": torch.float32})
    clip.load_sd(_weights("text_encoder"))
    return clip


# --- VAE ------------------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """Three convolutions beside the identity, as in diffusers' AutoencoderTiny."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [_conv(channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)]
        self.conv, self.fuse = nn.Sequential(*layers), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


def _conv(into: int, out: int, **settings: Any) -> nn.Module:
    return comfy.ops.disable_weight_init.Conv2d(into, out, 3, padding=1, **settings)


class _Layers(nn.Module):
    """One half of an AutoencoderTiny, under its names."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """diffusers' AutoencoderTiny of the world, without diffusers: pixels ``b 3 y x`` in -1..1."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        latents, colours = config["latent_channels"], 3
        into: list[nn.Module] = []
        for i, (width, blocks) in enumerate(
            zip(config["encoder_block_out_channels"], config["num_encoder_blocks"], strict=True)
        ):
            into.append(_conv(width, width, stride=2, bias=False) if i else _conv(colours, width))
            into += [_Residual(width) for _ in range(blocks)]
        self.encoder = _Layers([*into, _conv(config["encoder_block_out_channels"][-1], latents)])
        widths = config["decoder_block_out_channels"]
        out: list[nn.Module] = [_conv(latents, widths[0]), nn.ReLU()]
        for i, (width, blocks) in enumerate(zip(widths, config["num_decoder_blocks"], strict=True)):
            last = i == len(widths) - 1
            out += [_Residual(width) for _ in range(blocks)]
            out += [] if last else [nn.Upsample(scale_factor=2)]
            out.append(_conv(width, colours if last else width, bias=last))
        self.decoder = _Layers(out)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder((pixels + 1) / 2)

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        return self.decoder(torch.tanh(latents / 3) * 3) * 2 - 1


class DemoVAE(comfy.sd.VAE):
    """ComfyUI's VAE around the world's autoencoder; its constructor knows published kinds only, and makes a small one of these."""

    def __init__(self, network: TinyAutoencoder, ratio: int, channels: int) -> None:
        sizes = {
            "double_z": True,
            "z_channels": 4,
            "resolution": 8,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1],
        }
        params: dict[str, Any] = {
            "embed_dim": 4,
            "ddconfig": {**sizes, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
        }
        stand_in = comfy.ldm.models.autoencoder.AutoencoderKL(**params)
        super().__init__(sd=stand_in.state_dict(), config={"params": params}, dtype=torch.float32)
        self.first_stage_model = network.eval()
        self.patcher = _patcher(network, self.device, comfy.model_management.vae_offload_device())
        self.latent_channels, self.downscale_ratio, self.upscale_ratio = channels, ratio, ratio
        self.size = None

        def memory(pixels: int) -> int:
            return 48 * 4 * 4 * pixels  # of the widest layer a few copies

        def encoding(shape: tuple[int, ...], dtype: torch.dtype) -> int:
            return memory(shape[2] * shape[3])

        def decoding(shape: tuple[int, ...], dtype: torch.dtype) -> int:
            return memory(shape[2] * shape[3] * ratio**2)

        self.memory_used_encode, self.memory_used_decode = encoding, decoding


def _load_vae() -> DemoVAE:
    config = _config("vae")
    network = TinyAutoencoder(config)
    network.load_state_dict(_weights("vae"))
    return DemoVAE(
        network.requires_grad_(False), 2 ** (len(config["decoder_block_out_channels"]) - 1), config["latent_channels"]
    )


# --- CLIP_VISION and the rest ---------------------------------------------------------------------------------------------


def _load_vision() -> comfy.clip_vision.ClipVisionModel:
    vision = comfy.clip_vision.ClipVisionModel(str(FOLDER / "image_encoder" / "config.json"))
    vision.load_sd(_weights("image_encoder"))
    return vision


@dataclass(frozen=True)
class DemoWorld:
    """The world's parts, as the sockets of their names carry them."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    vision: comfy.clip_vision.ClipVisionModel
    adapter: ManagedAdapter


def load(adapter: str) -> DemoWorld:
    """The world with one of its ADAPTERS."""
    file = FOLDER / "adapters" / f"ip-adapter-{adapter}.safetensors"
    return DemoWorld(
        _shared("model", _load_model),
        _shared("clip", _load_clip),
        _shared("vae", _load_vae),
        _shared("vision", _load_vision),
        _shared(adapter, lambda: manage(str(file), file.stem)),
    )


@cache
def _references() -> References:
    return load_references()


def reference_names() -> list[str]:
    """The shipped reference pictures, and behind them ALL of them at once."""
    return [*(name.rsplit(".", 1)[0].replace("-", " ") for name in _references().names), ALL]


def reference(name: str) -> Tensor:
    """One reference ``1 y x 3`` by a name of ``reference_names``, or all of them as a batch."""
    images = _references().images.movedim(1, -1)
    return images if name == ALL else images[reference_names().index(name)][None]
