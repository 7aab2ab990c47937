"""Make the whole demo world by one command, on a CPU or one GPU:
``python -m ipadapter_core.demo.train_world all --pictures node_modules --device auto --seconds 420``.

Pictures, scenes, pairs and captions are drawn on the device (``easel``), every stage gets a share of the time (``shares``), and its step
is recorded where that pays (``learner``). Results lie below ``--work`` in ``parts``, in files of at most 16 MB, and states of what is not
finished in ``state``: started again with the same ``--work``, it goes on. Base models share what is not theirs: after a UNet's world,
a transformer's takes its image encoder, autoencoder and text encoder. ``build_world`` makes the model folder of the parts, which needs no GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..checkpoints.projectors import Resampler
from .easel import Easel
from .learner import Learner, load_parts, save_parts
from .pictures import SIZE, Pictures, recolour
from .train_adapters import SPEAKING, LearningAdapter, start_on_grid
from .train_base import Base
from .train_flux import Flux
from .train_parts import (
    LATENT_SCALE,
    TEXT_LENGTH,
    THUMBNAIL,
    EncoderTraining,
    build_autoencoder,
    build_text_encoder,
    encode,
    patch_pca,
    world_tokenizer,
)
from .train_unet import UNet

BASES: dict[str, type[Base]] = {base.name: base for base in (UNet, Flux)}
"""The base models that a world can have."""
FEW = 2000
"""Scenes from which statistics are taken."""
TEXT_ONLY = 1 / 4
"""Share of a batch that sees no adapter at all: strength 0 must stay a good text-to-image model."""
SITE_DROPOUT = 0.15
"""Share of the pictured samples whose tokens reach each site with probability one half only."""
ONE_ROLE = 0.15
"""Share of the pictured samples whose tokens reach the sites of composition only, and as large a share for style. Released
models divide these tasks by themselves; here, composition sees the reference in wrong colours and style sees it turned by a
quarter or half, so that each learns to hand over just what its name says. Nothing of it where a model's roles are not known."""

Part = dict[str, Tensor]
"""The weights of one model, by their names in it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how much at once; ``most``: steps of each stage at most, ``record``: see Learner."""

    seconds: float
    batch: int
    most: int | None = None
    record: bool | None = None


def shares(base: type[Base]) -> dict[str, float]:
    """What of the time each stage gets."""
    _, *others = base.adapters
    alone = dict.fromkeys(others, 0.13 / max(len(others), 1))
    return {"image_encoder": 0.10, "vae": 0.05, base.part: 0.85 - sum(alone.values())} | alone


class Workshop:
    """What the stages share: the device, what is drawn there, and the finished parts, each on disk before the next begins."""

    def __init__(
        self, pictures: Pictures, work: Path, device: torch.device, settings: Settings, base: type[Base] = UNet
    ) -> None:
        self.work, self.device, self.settings, self.batch = work, device, settings, settings.batch
        folder = work / "tokenizer"
        known = (folder / "tokenizer.json").is_file()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder) if known else world_tokenizer(pictures, folder)
        self.easel = Easel(pictures, self.tokenizer, TEXT_LENGTH, device)
        self.base, self.shares = base(device), shares(base)

    def bfloat16(self) -> torch.autocast:
        # casts that are kept would be outside of what a graph records
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def done(self, part: str) -> Part | None:
        """The tensors of a finished part, on the device; None if it is not finished."""
        found = load_parts(self.work / "parts" / part)
        return None if found is None else {key: value.to(self.device).float() for key, value in found[0].items()}

    def learn(
        self,
        stage: str,
        modules: nn.Module,
        loss: Callable[[], Tensor],
        parts: Callable[[], Mapping[str, Part]],
        **settings: Any,
    ) -> None:
        """Minimise ``loss`` for the stage's share of the time and keep the parts that it makes, in half precision."""
        learner = Learner(modules, loss, self.device, record=self.settings.record, **settings)
        state = self.work / "state" / stage
        learner.run(self.settings.seconds * self.shares[stage], state, most=self.settings.most)
        print(f"{stage}: {learner.steps} steps in {learner.used:.0f} s, loss {learner.last_loss():.4f}", flush=True)
        for part, tensors in parts().items():
            save_parts(self.work / "parts" / part, {key: value.half() for key, value in tensors.items()})
        shutil.rmtree(state, ignore_errors=True)

    def denoising_loss(self, model: nn.Module, latents: Tensor, text: Any) -> Tensor:
        """Mean squared error of what the base model predicts."""
        with self.device:
            noisy, time, target = self.base.noised(latents, self.easel.generator)
            with self.bfloat16():
                predicted = self.base.predicted(model, noisy, time, text)
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
            coefficients, large = model.thumbnail(embeds), model.redraw(tokens)
            matched = model.match_text(embeds, easel.names[index], scenes.background)
        wanted = (thumbnails(scenes.images).flatten(1) - model.centre) @ model.components.T
        layout = F.mse_loss(coefficients.float(), wanted) / wanted.square().mean()
        return layout + 4 * (large.float() - scenes.images).abs().mean() + 0.05 * matched

    shop.learn("image_encoder", model, loss, lambda: {"image_encoder": model.encoder.state_dict()}, lr=1e-3)
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

    shop.learn("vae", decoder, loss, lambda: {"vae": model.state_dict()}, lr=1e-3)
    return model


def together(shop: Workshop, encoder: nn.Module, vae: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Base model and text encoder, with an adapter that hands them pictures in three quarters of the samples.

    A released model has drawn billions of pictures before an adapter meets it. One of 17 million parameters that has drawn a
    million paints what a word means on average, and an adapter on it, frozen, hands over colours but hardly shapes. A text encoder
    that is there already, another base model's, stays as it is.
    """
    torch.manual_seed(7)
    easel, base, count = shop.easel, shop.base, shop.batch
    name, adapter = next(iter(base.adapters.items()))
    with shop.device:
        model, text = base.build(), build_text_encoder(shop.tokenizer)
    kept, words = shop.done(base.part), shop.done("text_encoder")
    if words is not None:
        text.load_state_dict(words)
        text.eval().requires_grad_(False)
    if kept is not None and words is not None and shop.done(name) is not None:
        model.load_state_dict(kept)
        return model.eval().requires_grad_(False), text
    learning = LearningAdapter(model, encoder, adapter, shop.device)
    learning.start(SPEAKING)
    projector, roles = learning.module.projector, learning.roles
    if isinstance(projector, Resampler):
        with shop.device, shop.bfloat16():
            first = easel.scenes(easel.choose(128), 0.0).images
            features = learning.features(first, torch.zeros(len(first), dtype=torch.bool))
        with shop.device:
            start_on_grid(projector, features)
    seen = round(count * (1 - TEXT_ONLY))
    one_role = 0.0 if roles is None else ONE_ROLE

    def loss() -> Tensor:
        index = easel.choose(count)
        pairs, scenes = easel.pairs(index[:seen]), easel.scenes(index[seen:], 0.1)
        kind = torch.rand(seen, generator=easel.generator, device=shop.device)
        partly = kind < SITE_DROPOUT
        composition = (kind >= SITE_DROPOUT) & (kind < SITE_DROPOUT + one_role)
        style = (kind >= SITE_DROPOUT + one_role) & (kind < SITE_DROPOUT + 2 * one_role)
        opaque = torch.cat([pairs.references, torch.ones_like(pairs.references[:, :1])], 1)
        references = recolour(opaque, easel.hue(composition))[:, :3]
        turns = torch.randint(1, 4, (seen,), generator=easel.generator, device=shop.device)
        for turn in (1, 2, 3):
            turned = (style & (turns == turn))[:, None, None, None]
            references = torch.where(turned, references.rot90(turn, (-2, -1)), references)
        off = torch.zeros(count - seen, dtype=torch.bool, device=shop.device)
        gates: dict[int, Tensor] = {}
        for i in learning.reached:
            styling = roles is not None and roles.of(learning.sites[i]) == "style"
            on = (~partly | easel.chance(seen, 0.5)) & ~(composition if styling else style)
            gates[i] = torch.cat([on, off]).float()
        with shop.bfloat16():
            features = learning.features(references, pairs.dropped)
            states = text(torch.cat([pairs.captions, scenes.captions]))
            tokens = projector(features).float()
        learning.see(torch.cat([tokens, tokens.new_zeros(count - seen, *tokens.shape[1:])]), gates)
        return shop.denoising_loss(model, encode(vae, torch.cat([pairs.targets, scenes.images])), states)

    def parts() -> dict[str, Part]:
        # the text encoder last: a base model that is not finished would take it for another's
        return {name: learning.state(), base.part: model.state_dict(), "text_encoder": text.state_dict()}

    modules = nn.ModuleDict({"model": model, "text": text, "adapter": learning.module})
    shop.learn(base.part, modules, loss, parts, lr=1.5e-3, average=0.9995)
    learning.remove()
    return model, text


def alone(shop: Workshop, name: str, encoder: nn.Module, vae: nn.Module, model: nn.Module, text: nn.Module) -> None:
    """An adapter on the frozen models, from values of zero."""
    if shop.done(name) is not None:
        return
    torch.manual_seed(5)
    learning, easel = LearningAdapter(model, encoder, shop.base.adapters[name], shop.device), shop.easel
    learning.start(0.0)

    def loss() -> Tensor:
        pairs = easel.pairs(easel.choose(shop.batch))
        with shop.bfloat16():
            features = learning.features(pairs.references, pairs.dropped)
            with torch.no_grad():
                states = text(pairs.captions)
        learning.see(learning.module.projector(features))
        return shop.denoising_loss(model, encode(vae, pairs.targets), states)

    shop.learn(name, learning.module, loss, lambda: {name: learning.state()}, lr=1e-3)
    learning.remove()


def stages(shop: Workshop) -> None:
    """Every stage in turn; those whose parts are there are read."""
    encoder, vae = image_encoder(shop), autoencoder(shop)
    model, text = together(shop, encoder, vae)
    for name in tuple(shop.base.adapters)[1:]:
        alone(shop, name, encoder, vae, model, text)


def train_all(pictures: Pictures, work: Path, device: torch.device, settings: Settings, base: type[Base]) -> None:
    """Make all parts of a world of this base model, as fast as the device can."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    stages(Workshop(pictures, work, device, settings, base))
