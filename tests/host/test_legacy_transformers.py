"""Class types of packs for FLUX.1 and SD3.5 that run on no current ComfyUI: their graphs run, with what our nodes give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, ExecutionFailed, Graph, Node
from host.shrunk_transformers import (
    POOLED,
    TEXT,
    build_siglip,
    build_transformer,
    build_transformer_adapter,
    build_transformer_loras,
)
from host.test_legacy_nodes import widget_names
from ipadapter_core.legacy.flux_schedule import flux_sigmas

# class type: widgets in the order in which saved graphs store their values
WIDGETS = {
    "LoadFluxIPAdapter": ["ipadatper", "clip_vision", "provider"],
    "ApplyFluxIPAdapter": ["ip_scale"],
    "ApplyAdvancedFluxIPAdapter": ["begin_strength", "end_strength", "smothing_type"],
    "FluxLoraLoader": ["lora_name", "strength_model"],
    "XlabsSampler": [
        "noise_seed",
        None,
        "steps",
        "timestep_to_start_cfg",
        "true_gs",
        "image_to_image_strength",
        "denoise_strength",
    ],
    "IPAdapterFluxLoader": ["ipadapter", "clip_vision", "provider"],
    "ApplyIPAdapterFlux": ["weight", "start_percent", "end_percent"],
    "IPAdapterFluxLoaderAdvanced": ["ipadapter", "clip_vision", "provider"],
    "ApplyIPAdapterFluxAdvanced": ["weight_start", "weight_end", "steps", "start_percent", "end_percent"],
    "IPAdapterSD3Loader": ["ipadapter", "provider"],
    "ApplyIPAdapterSD3": ["weight", "start_percent", "end_percent"],
}


def test_every_class_type_has_its_widgets_in_order(server: ComfyServer) -> None:
    found = server.object_info()
    for name, widgets in WIDGETS.items():
        assert list(widget_names(found[name])) == widgets, name
        assert found[name]["deprecated"] is True
        assert "ComfyUI_IPAdapter_plus" not in found[name]["description"]


class Scene:
    """A graph around one shrunk transformer, and what came of its nodes."""

    def __init__(self, server: ComfyServer, kind: str, folder: Path) -> None:
        if kind == "flux" and server.host.version.startswith("0.3."):
            pytest.skip("this ComfyUI takes every Flux to be 3072 wide")
        self.server, self.folder, self.graph = server, folder, Graph()
        file = server.add_model("diffusion_models", build_transformer(kind, folder))
        self.model = self.graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        self.images = [self.graph.add("EmptyImage", width=64, height=64, batch_size=1, color=c) for c in (90000, 70)]
        self.siglip = server.add_model("clip_vision", build_siglip(folder), "siglip_tiny.safetensors")
        self.text = [self.graph.add("TestConditioning", seed=i, width=TEXT, pooled=POOLED) for i in (1, 2)]
        self.latent = self.graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)

    def adapter(self, family: str) -> str:
        return self.server.add_model(
            "ipadapter", build_transformer_adapter(family, self.folder), f"{family}.safetensors"
        )

    def sampled(self, model: Node) -> str:
        out = self.graph.add(
            "KSampler", model=model, positive=self.text[0], negative=self.text[1], latent_image=self.latent, seed=5,
            steps=2, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        return self.graph.add("TestSaveTensor", value=out).id

    def ours(self, file: str, vision: Node, image: Node, *, combine: str = "concat", curve: str = "", sites: str = "", **apply: Any) -> Node:  # fmt: skip
        """The same by our nodes."""
        adapter = self.graph.add("ImagePromptLoadAdapter", file=file)
        prompt = self.graph.add(
            "ImagePromptEncode", adapter=adapter, clip_vision=vision, image=image, crop="auto", combine=combine,
            strengths="", unconditional="auto", per_latent=False,
        )  # fmt: skip
        settings = {"strength": 1.0, "preset": "linear", "scaling": "V only", "start": 0.0, "end": 1.0, **apply}
        if curve or sites:
            settings["schedule"] = self.graph.add(
                "ImagePromptSchedule", curve=curve, sites=sites, separate_composition=False, composition_strength=1.0,
                boost=1.0,
            )  # fmt: skip
        return self.graph.add("ImagePromptApply", model=self.model, adapter=adapter, image_prompt=prompt, **settings)

    def same(self, theirs: Node, ours: Node, within: float = 0.0) -> None:
        saved = {name: self.sampled(node) for name, node in (("theirs", theirs), ("ours", ours), ("plain", self.model))}
        result = self.server.run(self.graph)
        out = {name: result.tensor(node) for name, node in saved.items()}
        assert np.abs(out["theirs"] - out["ours"]).max() <= within
        assert np.abs(out["ours"] - out["plain"]).max() > 0.02


def test_x_flux(server: ComfyServer, tmp_path: Path) -> None:
    scene = Scene(server, "flux", tmp_path)
    file = scene.adapter("xlabs")
    clip = clip_vision(server, tmp_path)
    loaded = scene.graph.add("LoadFluxIPAdapter", ipadatper=file, clip_vision=clip, provider="CPU")
    theirs = scene.graph.add(
        "ApplyFluxIPAdapter", model=scene.model, ip_adapter_flux=loaded, image=scene.images[0], ip_scale=0.8
    )
    vision = scene.graph.add("CLIPVisionLoader", clip_name=clip)
    scene.same(theirs, scene.ours(file, vision, scene.images[0], strength=0.8))


def test_x_flux_advanced(server: ComfyServer, tmp_path: Path) -> None:
    """Strengths by block, of which the shrunk model has the first two of nineteen; several pictures are averaged."""
    scene = Scene(server, "flux", tmp_path)
    file = scene.adapter("xlabs")
    clip = clip_vision(server, tmp_path)
    loaded = scene.graph.add("LoadFluxIPAdapter", ipadatper=file, clip_vision=clip, provider="GPU")
    both = scene.graph.add("ImageBatch", image1=scene.images[0], image2=scene.images[1])
    theirs = scene.graph.add(
        "ApplyAdvancedFluxIPAdapter", model=scene.model, ip_adapter_flux=loaded, image=both, begin_strength=0.9,
        end_strength=0.0, smothing_type="Linear",
    )  # fmt: skip
    vision = scene.graph.add("CLIPVisionLoader", clip_name=clip)
    sites = f"double 0: 0.9, double 1: {0.9 * 17 / 18}"
    scene.same(theirs, scene.ours(file, vision, both, combine="average", sites=sites))


def test_xlabs_sampler_and_loras(server: ComfyServer, tmp_path: Path) -> None:
    """Its schedule by ComfyUI's own Euler: with guidance from the first step on, never, and from the second; a LoRA before it."""
    scene = Scene(server, "flux", tmp_path)
    graph = scene.graph
    lora = server.add_model("loras", build_transformer_loras("flux", tmp_path)["kohya"])
    model = graph.add("FluxLoraLoader", model=scene.model, lora_name=lora, strength_model=0.8)
    empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    guided = [graph.add("FluxGuidance", conditioning=text, guidance=4.0) for text in scene.text]

    def theirs(first: int) -> str:
        out = graph.add(
            "XlabsSampler", model=model, conditioning=guided[0], neg_conditioning=scene.text[1], noise_seed=3, steps=3,
            timestep_to_start_cfg=first, true_gs=2.5, image_to_image_strength=0.0, denoise_strength=1.0, latent_image=empty,
        )  # fmt: skip
        return graph.add("TestSaveTensor", value=out).id

    same_lora = graph.add("LoraLoaderModelOnly", model=scene.model, lora_name=lora, strength_model=0.8)
    sigmas = graph.add("TestSigmas", numbers=json.dumps(flux_sigmas(3, 16)))

    def hosts(cfg: float) -> str:
        out = graph.add(
            "SamplerCustom", model=same_lora, add_noise=True, noise_seed=3, cfg=cfg, positive=guided[0], negative=guided[1],
            sampler=graph.add("KSamplerSelect", sampler_name="euler"), sigmas=sigmas, latent_image=empty,
        )  # fmt: skip
        return graph.add("TestSaveTensor", value=out).id

    nodes = {
        "always": theirs(0),
        "never": theirs(3),
        "later": theirs(1),
        "host always": hosts(2.5),
        "host never": hosts(1.0),
    }
    result = server.run(graph)
    out = {name: result.tensor(node) for name, node in nodes.items()}
    for name in ("always", "never"):
        assert np.abs(out[name] - out[f"host {name}"]).max() < 2e-3  # a merged LoRA rounds where a live one does not
    assert min(np.abs(out["later"] - out[name]).max() for name in ("always", "never")) > 0.02


def test_shakkers(server: ComfyServer, tmp_path: Path) -> None:
    """Values are normed too, as there; an advanced one has a curve."""
    scene = Scene(server, "flux", tmp_path)
    file = scene.adapter("instantx")
    loaders = {"ipadapter": file, "clip_vision": "google/siglip-so400m-patch14-384", "provider": "cpu"}
    vision = scene.graph.add("ImagePromptLoadEncoder", file=scene.siglip)
    loaded = scene.graph.add("IPAdapterFluxLoader", **loaders)
    theirs = scene.graph.add(
        "ApplyIPAdapterFlux", model=scene.model, ipadapter_flux=loaded, image=scene.images[0], weight=0.8,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    ours = scene.ours(file, vision, scene.images[0], strength=0.8, compatibility="IPAdapter-Flux")
    advanced = scene.graph.add(
        "ApplyIPAdapterFluxAdvanced", model=scene.model,
        ipadapter_flux=scene.graph.add("IPAdapterFluxLoaderAdvanced", **loaders), image=scene.images[0],
        weight_start=0.2, weight_end=0.9, steps=10, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    curved = scene.ours(file, vision, scene.images[0], curve="0: 0.2, 1: 0.9", compatibility="IPAdapter-Flux")
    official = scene.sampled(scene.ours(file, vision, scene.images[0], strength=0.8))
    saved = [scene.sampled(node) for node in (theirs, ours, advanced, curved)]
    result = server.run(scene.graph)
    hashes = [result.sha256(node) for node in saved]
    assert hashes[0] == hashes[1] != result.sha256(official)
    assert hashes[2] == hashes[3] != hashes[0]


def test_slickytails(server: ComfyServer, tmp_path: Path) -> None:
    """Features come from the host's CLIP Vision Encode; no image is hidden states of zero."""
    scene = Scene(server, "sd3", tmp_path)
    file = scene.adapter("sd3.5")
    vision = scene.graph.add("ImagePromptLoadEncoder", file=scene.siglip)
    seen = scene.graph.add("CLIPVisionEncode", clip_vision=vision, image=scene.images[0], crop="none")
    loaded = scene.graph.add("IPAdapterSD3Loader", ipadapter=file, provider="cpu")
    theirs = scene.graph.add(
        "ApplyIPAdapterSD3", model=scene.model, ipadapter=loaded, image_embed=seen, weight=0.7, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip
    # ComfyUI's node rounds pixels where ours resizes as the encoder's own processor does
    scene.same(theirs, scene.ours(file, vision, scene.images[0], strength=0.7), within=2e-3)


def test_what_no_loader_gives_is_named(server: ComfyServer, tmp_path: Path) -> None:
    scene = Scene(server, "sd3", tmp_path)
    seen = scene.graph.add("TestAnything", text="3")
    applied = scene.graph.add(
        "ApplyIPAdapterSD3", model=scene.model, ipadapter=seen, image_embed=seen, weight=0.7, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip
    scene.sampled(applied)
    with pytest.raises(ExecutionFailed, match="IP_ADAPTER_SD3_INSTANTX was expected: connect a node that makes it"):
        server.run(scene.graph)


def clip_vision(server: ComfyServer, folder: Path) -> str:
    """A file in models/clip_vision that loads as TestClipVision."""
    save_file({"nothing": torch.zeros(1)}, folder / "test_clip_vision.safetensors")
    return server.add_model("clip_vision", folder / "test_clip_vision.safetensors")
