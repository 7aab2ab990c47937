"""The main job in a real ComfyUI: reference pictures go in, pictures that visibly follow them come out.

The demo world's trained models run inside ComfyUI (its own UNet class, sampler and CLIP vision) with our nodes; the
independent judge of the demo compares the results with the references, none of which any training saw.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from host.comfy_server import ComfyServer, Graph, Node
from ipadapter_core.demo.judge import background_names, similarity
from ipadapter_core.demo.world import FOLDER, World, load_world

COUNT = 8


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def texts(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of text states by prompt."""
    folder = tmp_path_factory.mktemp("texts")
    paths: dict[str, str] = {}
    with torch.no_grad():
        for prompt in ("", "emoji", "emoji on green background"):
            ids = world.pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
            states = world.pipeline.text_encoder(ids).last_hidden_state
            path = folder / f"{len(paths)}.npy"
            np.save(path, states.numpy())
            paths[prompt] = str(path)
    return paths


def draw(
    server: ComfyServer, world: World, texts: dict[str, str], family: str, strength: float, prompt: str = "emoji"
) -> torch.Tensor:
    """One picture per reference, ``b 3 64 64``, through KSampler."""
    graph = Graph()
    folder = str(FOLDER)
    model = graph.add("DemoWorldModel", folder=folder)
    vision = graph.add("DemoWorldVision", folder=folder)
    name = server.add_model("ipadapter", FOLDER / "adapters" / f"ip-adapter-{family}.safetensors")
    adapter = graph.add("ImagePromptLoadAdapter", file=name)
    batch: Node | None = None
    for i, image in enumerate(world.references.images[:COUNT]):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        loaded = graph.add("LoadImage", image=server.upload_image(pixels, f"reference_{i}.png"))
        batch = loaded if batch is None else graph.add("ImageBatch", image1=batch, image2=loaded)
    image_prompt = graph.add(
        "ImagePromptEncode", adapter=adapter, clip_vision=vision, image=batch, crop="center", combine="concat",
        strengths="", unconditional="auto", per_latent=True,
    )  # fmt: skip
    patched = graph.add(
        "ImagePromptApply", model=model, adapter=adapter, image_prompt=image_prompt, strength=strength, preset="linear",
        scaling="V only", start=0.0, end=1.0,
    )  # fmt: skip
    latents = graph.add(
        "KSampler", model=patched, positive=graph.add("DemoWorldConditioning", path=texts[prompt]),
        negative=graph.add("DemoWorldConditioning", path=texts[""]), latent_image=graph.add("DemoWorldLatent", batch=COUNT),
        seed=1, steps=12, cfg=2.0, sampler_name="euler_ancestral", scheduler="sgm_uniform", denoise=1.0,
    )  # fmt: skip
    saved = graph.add("TestSaveTensor", value=latents)
    found = torch.as_tensor(server.run(graph).tensor(saved))
    vae = world.pipeline.vae
    with torch.no_grad():
        return (vae.decode(found / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("family", ["plus", "base"])
def test_pictures_follow_their_references(
    server: ComfyServer, world: World, texts: dict[str, str], family: str, tmp_path: Path
) -> None:
    references = world.references.images[:COUNT]
    right = torch.arange(COUNT)
    without, with_image = (similarity(draw(server, world, texts, family, s), references) for s in (0.0, 1.0))
    assert with_image.diag().mean() > without.diag().mean() + 0.2
    assert (with_image.argmax(1) == right).sum() >= 6, "of 8 references"
    assert (without.argmax(1) == right).sum() <= 4


def test_text_decides_the_background_while_the_image_decides_the_subject(
    server: ComfyServer, world: World, texts: dict[str, str]
) -> None:
    pictures = draw(server, world, texts, "plus", 0.6, "emoji on green background")
    assert background_names(pictures).count("green") >= 6
