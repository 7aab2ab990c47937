"""Graphs with an adapter in them, in few words: `Steering(server, checkpoint, folder)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from host.comfy_server import ComfyServer, Graph, Link, Node, Result
from host.shrunk import UNETS
from host.tiny_adapters import build_adapter

PHOTO = Path(__file__).parent / "photo.jpg"
APPLY = {"strength": 1.0, "preset": "linear", "scaling": "V only", "start": 0.0, "end": 1.0}
ENCODE = {"crop": "center", "combine": "concat", "strengths": "", "unconditional": "auto", "per_latent": False}
Input = Node | Link


@dataclass
class Steering:
    """One graph under construction for a UNet of host.shrunk; width and height are the picture's."""

    server: ComfyServer
    checkpoint: str
    folder: Path
    unet: str = "sd15_small"
    width: int = 64
    height: int = 64
    batch: int = 1
    steps: int = 2
    graph: Graph = field(default_factory=Graph)

    def __post_init__(self) -> None:
        self.model = self.graph.add("CheckpointLoaderSimple", ckpt_name=self.checkpoint)
        self.vision = self.graph.add("TestClipVision", seed=0)
        self.positive, self.negative, self.other_text = (self.text(seed) for seed in (1, 2, 3))
        self.latent = self.graph.add("EmptyLatentImage", width=self.width, height=self.height, batch_size=self.batch)

    def text(self, seed: int) -> Node:
        """Conditioning, a different one for every seed."""
        return self.graph.add("TestConditioning", seed=seed, width=UNETS[self.unet].text_width)

    def photo(self, part: int = 0) -> Node:
        """A 64 px square of the photograph, another one for every part 0..3."""
        photo = Image.open(PHOTO).convert("RGB")
        side = min(photo.size) // 2
        left, top = (photo.width - side) * (part % 2), (photo.height - side) * (part // 2)
        square = photo.crop((left, top, left + side, top + side)).resize((64, 64))
        return self.graph.add("LoadImage", image=self.server.upload_image(np.asarray(square), f"photo_{part}.png"))

    def adapter(self, family: str = "plus", seed: int = 0) -> Node:
        """Load IP-Adapter on a tiny file for this UNet."""
        file = build_adapter(family, self.unet, self.folder, seed=seed)
        return self.graph.add("ImagePromptLoadAdapter", file=self.server.add_model("ipadapter", file))

    def encode(self, adapter: Input, image: Input, **settings: Any) -> Node:
        inputs = {"adapter": adapter, "clip_vision": self.vision, "image": image} | ENCODE | settings
        return self.graph.add("ImagePromptEncode", **inputs)

    def apply(self, model: Input, adapter: Input, prompt: Input, **settings: Any) -> Node:
        return self.graph.add(
            "ImagePromptApply", model=model, adapter=adapter, image_prompt=prompt, **(APPLY | settings)
        )

    def schedule(self, curve: str = "", sites: str = "", **drawn: Any) -> Node:
        settings = {"separate_composition": False, "composition_strength": 1.0, "boost": 1.0}
        return self.graph.add("ImagePromptSchedule", curve=curve, sites=sites, **settings, **drawn)

    def mask(self, left: float, right: float, width: int | None = None, height: int | None = None) -> Node:
        """A mask of two halves, at the picture's size or another."""
        width, height = width or self.width, height or self.height
        whole = self.graph.add("SolidMask", value=right, width=width, height=height)
        half = self.graph.add("SolidMask", value=0.0, width=width // 2, height=height)
        hole = self.graph.add("MaskComposite", destination=whole, source=half, x=0, y=0, operation="multiply")
        fill = self.graph.add("SolidMask", value=left, width=width // 2, height=height)
        return self.graph.add("MaskComposite", destination=hole, source=fill, x=0, y=0, operation="add")

    def sample(self, model: Input, **settings: Any) -> Node:
        """KSampler and a TestSaveTensor on its latent; returns the latter."""
        return self.save(self.sampled(model, **settings))

    def sampled(self, model: Input, **settings: Any) -> Node:
        inputs = {
            "model": model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "seed": 5,
            "steps": self.steps,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        }
        return self.graph.add("KSampler", **(inputs | settings))

    def guide(self, guider: Input) -> Node:
        """SamplerCustomAdvanced with a guider, with the noise and steps of sample()."""
        sampler = self.graph.add(
            "SamplerCustomAdvanced",
            noise=self.graph.add("RandomNoise", noise_seed=5),
            guider=guider,
            sampler=self.graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=self.graph.add(
                "BasicScheduler", model=self.model, scheduler="normal", steps=self.steps, denoise=1.0
            ),
            latent_image=self.latent,
        )
        return self.save(sampler)

    def save(self, value: Input) -> Node:
        return self.graph.add("TestSaveTensor", value=value)

    def run(self) -> Result:
        return self.server.run(self.graph)
