"""The frozen models of a run: text to context, pictures to latents and features."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoints.format import EncoderSizes
from ..errors import CorruptFileError, InvalidInputError, quoted, reason
from ..images.encoder import TransformersImageEncoder, vision_config
from ..model_folders import check_configs, hold_in_memory, load_pipeline, open_single_file, read_table
from ..models import BASE_MODELS, layout_of, listed
from ..models.sites import Training
from ..models.unet import CHECKPOINT_PREFIX, FIRST_KEY, unet_of_width
from ..quiet import quietly
from .objectives import Scheduler

if TYPE_CHECKING:

    class Denoiser(nn.Module):
        """What is asked of diffusers' denoisers."""

        config: Any
        dtype: torch.dtype
        device: torch.device

        def set_attn_processor(self, processor: object) -> None: ...
        def enable_gradient_checkpointing(self) -> None: ...

    class Autoencoder(nn.Module):
        """What is asked of diffusers' autoencoders."""

        config: Any

        def encode(self, pixels: Tensor) -> Any: ...


@dataclass(slots=True)
class FrozenBase:
    """A diffusers pipeline's parts. ``vae`` is None once everything is cached."""

    unet: Denoiser
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Scheduler
    vae: Autoencoder | None
    folder: str
    """Where they came from: a diffusers folder or a single file."""
    config: str = ""
    """Of a single file: the folder of its configs."""
    _training: Training | None = None

    @property
    def training(self) -> Training:
        """What the trainer must know of the family. Raises InvalidInputError where nothing can be trained on it."""
        if self._training is None:
            model = layout_of(self.unet).model
            if model.training is None:
                known = [base for base in BASE_MODELS if base.training]
                raise InvalidInputError(
                    f"nothing can be trained on {model.name} yet; choose a model of {listed(known, 'or')}"
                )
            self._training = model.training
        return self._training

    @property
    def home(self) -> str:
        """The folder of the model's configs and tokenizers, which may also hold an image encoder."""
        return self.config or self.folder

    def pipeline(self, **parts: Any) -> Any:
        """diffusers' pipeline of these files around parts that are in memory; the rest comes from disk."""
        if self.config:
            return open_single_file(Path(self.folder), Path(self.config), **parts)
        from diffusers import DiffusionPipeline

        with quietly("diffusers", "transformers"):
            return DiffusionPipeline.from_pretrained(self.folder, local_files_only=True, **parts)

    @property
    def reads_sizes(self) -> bool:
        """Whether the UNet wants a pooled text embedding and time ids."""
        return self.training.condition == "text and sizes"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, on a side."""
        return latent_factor(self._vae().config)

    def tokenize(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Token ids ``b l``, one tensor per text encoder."""
        return tuple(
            tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        )

    def encode_text(self, ids: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Context ``b l d`` and SDXL's pooled embedding, as diffusers' pipelines make them.

        Frozen encoders keep nothing for a gradient; a LoRA beside their layers makes them do.
        """
        if not self.reads_sizes:
            return self.text_encoders[0](ids[0])[0], None
        outputs = [
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip(self.text_encoders, ids, strict=True)
        ]  # fmt: skip
        # SDXL reads the last layer but one of both encoders; the pooled embedding is the second's.
        return torch.cat([out.hidden_states[-2] for out in outputs], -1), outputs[-1][0]

    def added(self, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        """What SDXL wants besides text: the pooled embedding and ``sizes`` ``b 6`` (original, crop, target; y before x)."""
        return {} if pooled is None else {"text_embeds": pooled, "time_ids": sizes.to(pooled)}

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels ``b 3 y x`` in -1..1 to mean and standard deviation of the scaled latents, ``b c y x``."""
        vae = self._vae()
        weight = next(vae.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        encoded = vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # AutoencoderTiny has no distribution
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (mean - shift) * vae.config.scaling_factor, std * vae.config.scaling_factor

    def _vae(self) -> Autoencoder:
        assert self.vae is not None, "everything is cached, and the autoencoder gone"
        return self.vae

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """UNet and text encoders to the compute device and dtype; the VAE keeps its dtype (SDXL's overflows in fp16)."""
        for module in (self.unet, *self.text_encoders):
            onto(module, device, dtype)
        if self.vae is not None:
            onto(self.vae, device)


def onto(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move a model; one that stays on the CPU gets memory of its own, apart from its files."""
    with quietly("diffusers"):  # it warns of any other dtype than a model was loaded in
        module.to(device, dtype)
    if device.type == "cpu":
        hold_in_memory(module)


def model_home(base: str, config: str) -> str:
    """The folder with a model's configs and tokenizers: ``base`` itself, or for a single file ``config`` or its neighbour.

    Raises InvalidInputError saying what the file holds and which folder would do.
    """
    path = Path(base)
    if not path.is_file():
        return base
    if path.suffix != ".safetensors":
        raise InvalidInputError(
            f"{path} is a {path.suffix or 'nameless'} file; single-file models are read as .safetensors, which run no code"
        )
    home = Path(config) if config else path.with_suffix("")
    width, text = _single_file_widths(path)
    known = unet_of_width(text)
    published = None if known is None else known.published
    kind = (
        f"unknown model with text tokens {text} wide"
        if known is None or published is None
        else f"{known.name} model (text tokens {text} wide)"
    )
    if not (home / "model_index.json").is_file():
        where = f"model.config {home}" if config else f"{home} (beside it, of its name)"
        raise InvalidInputError(
            f"{path.name} holds an {kind}, without configs and tokenizers, and {where} is no diffusers folder that has them; "
            f"set model.config to one of its architecture, of which only the .json and .txt files are needed"
            + (
                f": hf download {published.repository} --include '*.json' '*.txt' --local-dir {home}"
                if published is not None
                else ""
            )
        )
    check_configs(home)
    try:
        unet = read_table(home / "unet" / "config.json")
        told = (unet["block_out_channels"][0], unet["cross_attention_dim"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidInputError(f"{home} has no readable unet/config.json ({reason(error)})") from error
    if told != (width, text):
        raise InvalidInputError(
            f"{path.name} holds an {kind} whose UNet begins with {width} channels, but model.config {home} describes "
            f"{told[0]} channels and text tokens {told[1]} wide; give a folder of the same architecture"
        )
    return str(home)


def _single_file_widths(path: Path) -> tuple[int, int]:
    """Channels of a checkpoint's first layer and width of its text tokens, from the file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            text = next(
                (key for key in keys if key.startswith(CHECKPOINT_PREFIX) and key.endswith("attn2.to_k.weight")), ""
            )
            if text and FIRST_KEY in keys:
                return file.get_slice(FIRST_KEY).get_shape()[0], file.get_slice(text).get_shape()[1]
    except Exception as error:  # safetensors raises its own kind without a public name
        raise CorruptFileError(f"{path} is not a readable safetensors file ({reason(error)})") from error
    raise InvalidInputError(
        f"{path} is no whole SD1.5, SD2 or SDXL checkpoint: it lacks {FIRST_KEY.partition('.0.')[0]}… with cross-attention (it has "
        f"{', '.join(sorted({key.split('.')[0] for key in keys})[:6])})"
    )


def latent_factor(vae_config: Any) -> int:
    widths = getattr(vae_config, "block_out_channels", None) or vae_config.encoder_block_out_channels
    # AutoencoderTiny halves between its blocks too, and its demo twin has three such steps minus one
    return 2 ** (len(widths) - 1)


def freeze(module: nn.Module) -> None:
    """No gradients, no dropout, no running statistics."""
    module.requires_grad_(False).eval()


def load_base(folder: str, config: str = "") -> FrozenBase:
    """The models in a diffusers folder or a single file, on the CPU in float32, frozen.

    ``config`` as in ModelConfig. Raises InvalidInputError or CorruptFileError.
    """
    if not folder:
        raise InvalidInputError("model.base is empty; give the diffusers folder of an SD1.5, SD2 or SDXL model")
    home = model_home(folder, config)
    single = home if home != folder else ""
    pipeline = open_single_file(Path(folder), Path(home)) if single else load_pipeline(folder)
    pairs = [
        (getattr(pipeline, encoder, None), getattr(pipeline, tokenizer, None))
        for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    ]
    pairs = [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None and tokenizer is not None]
    base = FrozenBase(
        unet=pipeline.unet,
        text_encoders=tuple(encoder for encoder, _ in pairs),
        tokenizers=tuple(tokenizer for _, tokenizer in pairs),
        scheduler=pipeline.scheduler,
        vae=pipeline.vae,
        folder=folder,
        config=single,
    )
    for module in (pipeline.unet, pipeline.vae, *base.text_encoders):
        freeze(module)
    return base


def load_encoder(base: str, folder: str) -> TransformersImageEncoder:
    """The image encoder in ``folder``, or the one inside the model folder."""
    if folder:
        return TransformersImageEncoder.from_pretrained(folder)
    if not (Path(base) / "image_encoder" / "config.json").is_file():
        raise InvalidInputError(
            f"{base} has no image_encoder folder; set model.image_encoder to one, e.g. models/image_encoder of h94/IP-Adapter"
        )
    return TransformersImageEncoder.from_pretrained(base, subfolder="image_encoder")


def encoder_sizes(base: str, folder: str) -> EncoderSizes:
    """Sizes of the image encoder, from its config.json: the weights may not be needed at all."""
    vision = _vision_config(base, folder)
    side = vision["image_size"] // vision["patch_size"]
    return EncoderSizes(vision["projection_dim"], vision["hidden_size"], side * side + 1, vision["image_size"])


def _vision_config(base: str, folder: str) -> dict[str, int]:
    path = Path(folder) if folder else Path(base) / "image_encoder"
    if path.is_file():
        return vision_config(path)
    try:
        values = read_table(path / "config.json")
        vision: dict[str, Any] = {**values, **(values.get("vision_config") or {})}
        sizes: dict[str, int] = {
            key: vision[key] for key in ("image_size", "patch_size", "projection_dim", "hidden_size")
        }
        strange = [
            f"{key} is {quoted(size)}" for key, size in sizes.items() if type(size) is not int or not 0 < size < 2**16
        ]
        if strange:
            raise CorruptFileError(strange[0])
        return sizes
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} holds no readable config.json of a CLIP image encoder ({reason(error)}); set model.image_encoder to one, "
            "e.g. models/image_encoder of h94/IP-Adapter"
        ) from error


def files_stamp(folder: str, *parts: str) -> str:
    """A digest of a model's weight files below ``parts``, the same after copying them elsewhere.

    Sizes and the first and last mebibyte stand for a file: reading gigabytes at every start would be felt.
    """
    digest = hashlib.sha256()
    for part in parts:
        whole = Path(folder)
        for path in [whole] if whole.is_file() else sorted((whole / part).glob("*")):
            if path.suffix not in (".safetensors", ".bin", ".json") or not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{part}/{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()


def checkpoint_blocks(unet: Denoiser) -> None:
    """Let a UNet's blocks be computed again for the gradient instead of being kept."""
    unet.enable_gradient_checkpointing()
    for block in unet.modules():
        if getattr(block, "gradient_checkpointing", False):
            # diffusers before 0.32 asks for this, and frozen blocks are not in training; dropout layers stay as they are
            block.training = True
