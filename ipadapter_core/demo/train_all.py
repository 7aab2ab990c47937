"""Make the whole demo world by one command, on a CPU or one GPU:
``python -m ipadapter_core.demo.train_world all --pictures node_modules --device auto --seconds 420``.

Pictures, scenes, pairs and captions are drawn on the device (``easel``), every stage gets a share of the time (``STAGES``), and its step
is recorded where that pays (``learner``). Results lie below ``--work`` in ``parts``, in files of at most 16 MB, and states of what is not
finished in ``state``: started again with the same ``--work``, it goes on. ``join`` makes the model folder of the parts, which needs no GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..checkpoints import load_adapter, save_adapter
from ..checkpoints.format import EncoderSizes
from ..models import layout_of
from ..training.adapter import fresh_adapter
from ..training.config import AdapterConfig
from ..training.processors import IPAttnProcessor
from . import train_parts
from .build_world import build
from .easel import Easel
from .learner import Learner, load_parts, save_parts
from .pictures import SIZE, Pictures, recolour
from .train_adapters import MatmulIPAttention, listen, start_on_grid
from .train_parts import (
    EMBED_DIM,
    LATENT_SCALE,
    THUMBNAIL,
    VISION_DIM,
    VISION_PATCH,
    EncoderTraining,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    draw_timesteps,
    encode,
    normalise,
    patch_pca,
    save_image_encoder,
    world_tokenizer,
)
from .train_together import NUM_TOKENS, ONE_ROLE, SITE_DROPOUT, TEXT_ONLY

FEW = 2000
"""Scenes from which statistics are taken."""
ENCODER = EncoderSizes(EMBED_DIM, VISION_DIM, (SIZE // VISION_PATCH) ** 2 + 1, SIZE)


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how much at once; ``most``: steps of each stage at most, ``record``: see Learner."""

    seconds: float
    batch: int
    most: int | None = None
    record: bool | None = None


class Workshop:
    """What the stages share: the device, what is drawn there, and the finished parts, each on disk before the next begins."""

    def __init__(self, pictures: Pictures, work: Path, device: torch.device, settings: Settings) -> None:
        self.work, self.device, self.settings, self.batch = work, device, settings, settings.batch
        folder = work / "tokenizer"
        known = (folder / "tokenizer.json").is_file()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder) if known else world_tokenizer(pictures, folder)
        self.easel = Easel(pictures, self.tokenizer, train_parts.TEXT_LENGTH, device)
        alphas: Tensor = build_scheduler().alphas_cumprod
        self.alphas = alphas.to(device, torch.float32)

    def bfloat16(self) -> torch.autocast:
        # casts that are kept would be outside of what a graph records
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def done(self, part: str) -> dict[str, Tensor] | None:
        """The tensors of a finished part, on the device; None if it is not finished."""
        found = load_parts(self.work / "parts" / part)
        return None if found is None else {key: value.to(self.device).float() for key, value in found[0].items()}

    def finish(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Keep a part, in half precision."""
        save_parts(self.work / "parts" / part, {key: value.half() for key, value in tensors.items()})

    def learn(self, stage: str, modules: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> None:
        """Minimise ``loss`` for the stage's share of the time."""
        learner = Learner(modules, loss, self.device, record=self.settings.record, **settings)
        state = self.work / "state" / stage
        learner.run(self.settings.seconds * SHARES[stage], state, most=self.settings.most)
        print(f"{stage}: {learner.steps} steps in {learner.used:.0f} s, loss {learner.last_loss():.4f}", flush=True)
        shutil.rmtree(state, ignore_errors=True)

    def velocity_loss(self, unet: nn.Module, latents: Tensor, context: Tensor) -> Tensor:
        """Mean squared error of the predicted velocity."""
        noise = torch.randn(latents.shape, generator=self.easel.generator, device=self.device)
        with self.device:
            t = draw_timesteps(len(latents), self.easel.generator)
        alpha = self.alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with self.bfloat16():
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, context).sample
        return F.mse_loss(predicted.float(), target)


# --- stages: each makes its part, or reads it -----------------------------------------------------------------------------


def thumbnails(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, SIZE // THUMBNAIL)


def image_encoder(shop: Workshop) -> nn.Module:
    """The image encoder: aligned with names, able to redraw what it sees."""
    torch.manual_seed(3)
    easel, kept = shop.easel, shop.done("image_encoder")
    with shop.device:
        model = EncoderTraining(len(easel.vocabulary), thumbnails(easel.scenes(easel.choose(FEW), 0.3).images))
    if kept is not None:
        model.encoder.load_state_dict(kept)
        return model.encoder.eval().requires_grad_(False)

    def loss() -> Tensor:
        index = easel.choose(2 * shop.batch)
        scenes = easel.scenes(index, 0.3)
        with shop.device, shop.bfloat16():
            embeds, tokens = model.features(scenes.images)
            coefficients, large = model.thumbnail(embeds), model.redraw_tokens(tokens)
            matched = model.match_text(embeds, easel.names[index], scenes.background)
        wanted = (thumbnails(scenes.images).flatten(1) - model.centre) @ model.components.T
        layout = F.mse_loss(coefficients.float(), wanted) / wanted.square().mean()
        return layout + 4 * (large.float() - scenes.images).abs().mean() + 0.05 * matched

    shop.learn("image_encoder", model, loss, lr=1e-3)
    shop.finish("image_encoder", model.encoder.state_dict())
    return model.encoder


def autoencoder(shop: Workshop) -> nn.Module:
    """The autoencoder: the encoder is an exact PCA of the scenes' patches, the decoder is learned."""
    torch.manual_seed(1)
    easel, kept = shop.easel, shop.done("vae")
    with shop.device:
        model = build_autoencoder(*patch_pca(easel.scenes(easel.choose(FEW), 0.25).images))
    if kept is not None:
        model.load_state_dict(kept)
        return model.eval().requires_grad_(False)
    model.encoder.requires_grad_(False)
    decoder = model.decoder.to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        images = easel.scenes(easel.choose(max(shop.batch // 2, 1)), 0.25).images
        latents = encode(model, images)
        latents = latents + 0.05 * torch.randn(latents.shape, generator=easel.generator, device=shop.device)
        with shop.bfloat16():
            out = decoder((latents / LATENT_SCALE).contiguous(memory_format=torch.channels_last))
        out = out.float() / 2 + 0.5
        edges = sum((out.diff(dim=side) - images.diff(dim=side)).abs().mean() for side in (-1, -2))
        return (out - images).abs().mean() + edges

    shop.learn("vae", decoder, loss, lr=1e-3)
    shop.finish("vae", model.state_dict())
    return model


class Pictured:
    """The UNet with an adapter of its own at every cross-attention, and the image features that it reads."""

    def __init__(self, shop: Workshop, unet: Any, encoder: Any, config: AdapterConfig) -> None:
        self.shop, self.unet, self.encoder, self.plus = shop, unet, encoder, config.family == "plus"
        with shop.device:
            self.adapter = fresh_adapter(unet, ENCODER, config)
        layers = dict(zip(self.adapter.names, self.adapter.ip_adapter, strict=True))
        self.sites = {
            name.removesuffix(".processor"): MatmulIPAttention(layer)
            for name, layer in layers.items()
            if isinstance(layer, IPAttnProcessor)
        }
        processors = {name: self.sites.get(name.removesuffix(".processor"), AttnProcessor()) for name in layers}
        unet.set_attn_processor(processors)
        roles = layout_of(unet).model.roles
        self.styling = {site.path for site in layout_of(unet).sites if site.order in roles.style}

    def features(self, references: Tensor, dropped: Tensor) -> Tensor:
        """What the adapter reads of references; of dropped ones what stands for none: zero pixels, or zero embeds."""
        shop = self.shop
        with torch.no_grad(), shop.device, shop.bfloat16():
            pixels = normalise(references)
            if self.plus:
                pixels = pixels * ~dropped[:, None, None, None]
            seen = self.encoder(pixels, output_hidden_states=True)
        if self.plus:
            return seen.hidden_states[-2].float()
        return seen.image_embeds.float() * ~dropped[:, None]

    def state(self) -> dict[str, Tensor]:
        """The adapter as files have it."""
        state = {f"image_proj.{key}": value for key, value in self.adapter.image_proj.state_dict().items()}
        for number, name in enumerate(self.adapter.names):
            site = self.sites.get(name.removesuffix(".processor"))
            if site is not None:
                state |= {f"ip_adapter.{number}.{key}": value for key, value in site.inner.state_dict().items()}
        return state


def together(shop: Workshop, encoder: nn.Module, vae: nn.Module) -> tuple[nn.Module, nn.Module]:
    """UNet and text encoder, from nothing, with a plus adapter that hands them pictures in three quarters of the samples."""
    torch.manual_seed(7)
    easel, count = shop.easel, shop.batch
    with shop.device:
        unet: Any = train_parts.build_unet().to(memory_format=torch.channels_last)
        text: Any = build_text_encoder(shop.tokenizer)
    kept = shop.done("unet"), shop.done("text_encoder"), shop.done("plus")
    if kept[0] is not None and kept[1] is not None and kept[2] is not None:
        unet.load_state_dict(kept[0])
        text.load_state_dict(kept[1])
        return unet.eval().requires_grad_(False), text.eval().requires_grad_(False)
    pictured = Pictured(shop, unet, encoder, AdapterConfig("plus", num_tokens=NUM_TOKENS, depth=2))
    projector = pictured.adapter.image_proj
    listen(pictured.adapter)
    with shop.device:
        first = easel.scenes(easel.choose(128), 0.0).images
        start_on_grid(projector, pictured.features(first, torch.zeros(len(first), dtype=torch.bool)))
    seen = round(count * (1 - TEXT_ONLY))

    def loss() -> Tensor:
        index = easel.choose(count)
        pairs, scenes = easel.pairs(index[:seen]), easel.scenes(index[seen:], 0.1)
        kind = torch.rand(seen, generator=easel.generator, device=shop.device)
        partly = kind < SITE_DROPOUT
        composition = (kind >= SITE_DROPOUT) & (kind < SITE_DROPOUT + ONE_ROLE)
        style = (kind >= SITE_DROPOUT + ONE_ROLE) & (kind < SITE_DROPOUT + 2 * ONE_ROLE)
        opaque = torch.cat([pairs.references, torch.ones_like(pairs.references[:, :1])], 1)
        references = recolour(opaque, easel.hue(composition))[:, :3]
        turns = torch.randint(1, 4, (seen,), generator=easel.generator, device=shop.device)
        for turn in (1, 2, 3):
            turned = (style & (turns == turn))[:, None, None, None]
            references = torch.where(turned, references.rot90(turn, (-2, -1)), references)
        off = torch.zeros(count - seen, dtype=torch.bool, device=shop.device)
        for path, site in pictured.sites.items():
            on = (~partly | easel.chance(seen, 0.5)) & ~(composition if path in pictured.styling else style)
            site.gate = torch.cat([on, off]).float()[:, None, None]
        features = pictured.features(references, pairs.dropped)
        with shop.bfloat16():
            states = text(torch.cat([pairs.captions, scenes.captions])).last_hidden_state
            tokens = projector(features)
        tokens = torch.cat([tokens, tokens.new_zeros(count - seen, *tokens.shape[1:])])
        latents = encode(vae, torch.cat([pairs.targets, scenes.images]))
        return shop.velocity_loss(unet, latents, torch.cat([states.float(), tokens.float()], 1))

    models = nn.ModuleDict({"unet": unet, "text": text, "projector": projector})
    shop.learn("unet", models, loss, lr=1.5e-3, average=0.9995)
    shop.finish("plus", pictured.state())
    unet.set_attn_processor(AttnProcessor())
    shop.finish("text_encoder", text.state_dict())
    shop.finish("unet", unet.state_dict())
    return unet, text


def base(shop: Workshop, encoder: nn.Module, vae: nn.Module, unet: nn.Module, text: Any) -> None:
    """The base adapter on the frozen models, from values of zero."""
    if shop.done("base") is not None:
        return
    torch.manual_seed(5)
    pictured = Pictured(shop, unet, encoder, AdapterConfig("base", init="zero_v"))
    easel, projector = shop.easel, pictured.adapter.image_proj
    learned = pictured.adapter.requires_grad_(True)

    def loss() -> Tensor:
        pairs = easel.pairs(easel.choose(shop.batch))
        features = pictured.features(pairs.references, pairs.dropped)
        with torch.no_grad(), shop.bfloat16():
            states = text(pairs.captions).last_hidden_state
        tokens = projector(features)
        return shop.velocity_loss(unet, encode(vae, pairs.targets), torch.cat([states.float(), tokens], 1))

    shop.learn("base", learned, loss, lr=1e-3)
    shop.finish("base", pictured.state())


SHARES = {"image_encoder": 0.10, "vae": 0.05, "unet": 0.72, "base": 0.13}
"""What of the time each stage gets."""


def train_all(pictures: Pictures, work: Path, device: torch.device, settings: Settings) -> None:
    """Every stage in turn; those whose parts lie in ``work`` are read."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    shop = Workshop(pictures, work, device, settings)
    encoder, vae = image_encoder(shop), autoencoder(shop)
    base(shop, encoder, vae, *together(shop, encoder, vae))


def join(work: Path, folder: Path) -> None:
    """The model folder of finished parts, with both adapters. Raises FileNotFoundError for a part that is missing."""

    def part(name: str) -> dict[str, Tensor]:
        found = load_parts(work / "parts" / name)
        if found is None:
            raise FileNotFoundError(f"{work / 'parts' / name} is missing; run `all` with the same --work to its end")
        return found[0]

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = build_autoencoder(torch.zeros(48), torch.zeros(16, 48))
    made: dict[str, Any] = {"vae": vae, "unet": train_parts.build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    for name, model in made.items():
        model.load_state_dict(part(name))
        model.half().save_pretrained(work / name)
    encoder = train_parts.build_image_encoder()
    encoder.load_state_dict(part("image_encoder"))
    save_image_encoder(encoder, work / "image_encoder")
    build(work, folder)
    for family in ("plus", "base"):
        file = folder / "adapters" / f"ip-adapter-{family}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        adapter = load_adapter(part(family), name=file.stem, dtype=torch.float16)
        save_adapter(adapter, file, metadata={"trained_by": "ipadapter_core.demo.train_world"})
