"""The main job in a real ComfyUI: reference pictures go in, pictures that visibly follow them come out, without a download.

The node Demo World gives the shipped models to ComfyUI's own nodes (Empty Latent Image, CLIP Text Encode, KSampler, VAE Decode)
and to ours; the independent judge of the demo compares the results with the references, none of which any training saw.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from host.comfy_server import ComfyServer, Graph, Link, Node
from ipadapter_core.demo.judge import background_names, similarity
from ipadapter_core.demo.poster import off_the_inks
from ipadapter_core.demo.world import World, load_world

COUNT = 8
TEXT = "fox face on red background"
STYLE = "demo-world-style.safetensors"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with torch.no_grad():
        yield load_world()


def add_world(graph: Graph, family: str = "plus", reference: str = "all of them") -> Node:
    return graph.add("ImagePromptDemoWorld", reference=reference, adapter=family)


def first_references(graph: Graph, demo: Node) -> Node:
    return graph.add("ImageFromBatch", image=demo[5], batch_index=0, length=COUNT)


def sample(graph: Graph, demo: Node, model: Node | Link, text: str, batch: int = COUNT) -> Node:
    """Pictures by ComfyUI's own nodes."""
    latents = graph.add(
        "KSampler", model=model, positive=graph.add("CLIPTextEncode", clip=demo[1], text=text),
        negative=graph.add("CLIPTextEncode", clip=demo[1], text=""),
        latent_image=graph.add("EmptyLatentImage", width=128, height=128, batch_size=batch),
        seed=1, steps=12, cfg=2.0, sampler_name="euler_ancestral", scheduler="sgm_uniform", denoise=1.0,
    )  # fmt: skip
    return graph.add("VAEDecode", samples=latents, vae=demo[2])


def steered(graph: Graph, demo: Node, strength: float, preset: str = "linear", model: Node | None = None) -> Node:
    """The world's model, led by a reference for each of the latents."""
    image_prompt = graph.add(
        "ImagePromptEncode", adapter=demo[4], clip_vision=demo[3], image=first_references(graph, demo), crop="center",
        combine="concat", strengths="", unconditional="auto", per_latent=True,
    )  # fmt: skip
    return graph.add(
        "ImagePromptApply", model=model or demo[0], adapter=demo[4], image_prompt=image_prompt, strength=strength,
        preset=preset, scaling="V only", start=0.0, end=1.0,
    )  # fmt: skip


def pictures(server: ComfyServer, graph: Graph, *nodes: Node) -> list[torch.Tensor]:
    """Pictures of the IMAGEs of these nodes, ``b 3 y x``."""
    saved = [graph.add("TestSaveTensor", value=node) for node in nodes]
    result = server.run(graph)
    return [torch.as_tensor(result.tensor(node)).movedim(-1, 1) for node in saved]


@pytest.mark.parametrize("family", ["plus", "base"])
def test_pictures_follow_their_references(server: ComfyServer, world: World, family: str) -> None:
    graph = Graph()
    demo = add_world(graph, family)
    drawn = [sample(graph, demo, steered(graph, demo, strength), TEXT) for strength in (0.0, 1.0)]
    plain = sample(graph, demo, demo[0], TEXT)
    without, with_image, untouched = pictures(server, graph, *drawn, plain)
    assert without.shape == (COUNT, 3, 64, 64)
    assert torch.equal(without, untouched)
    references = world.references.images[:COUNT]
    table, none = similarity(with_image, references), similarity(without, references)
    assert table.diag().mean() > none.diag().mean() + 0.2
    assert (table.argmax(1) == torch.arange(COUNT)).sum() >= 6, "of 8 references, while the text names another subject"
    assert background_names(with_image).count("red") >= 6, "the text decides the background"


def test_its_parts_are_those_that_diffusers_loads(server: ComfyServer, world: World) -> None:
    graph = Graph()
    demo = add_world(graph)
    picture = first_references(graph, demo)
    latents = graph.add("VAEEncode", pixels=picture, vae=demo[2])
    saved = graph.add("TestSaveTensor", value=latents)
    tiled = graph.add(
        "VAEDecodeTiled", samples=latents, vae=demo[2], tile_size=64, overlap=0, temporal_size=64, temporal_overlap=8
    )
    text = graph.add(
        "TestSaveTensor", value=graph.add("CLIPTextEncode", clip=demo[1], text="fluent (panda face) on sky background")
    )
    shown = [
        graph.add("TestSaveTensor", value=node)
        for node in (graph.add("VAEDecode", samples=latents, vae=demo[2]), tiled)
    ]
    result = server.run(graph)
    images, vae = world.references.images[:COUNT], world.pipeline.vae
    expected = vae.encode(images * 2 - 1).latents
    assert torch.allclose(torch.as_tensor(result.tensor(saved)), expected, atol=1e-4)
    decoded = (vae.decode(expected).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    whole, in_tiles = (torch.as_tensor(result.tensor(node)) for node in shown)
    assert torch.allclose(whole, decoded, atol=1e-3)
    assert (in_tiles - decoded).abs().mean() < 0.02, "tiles end in zeros, not in what lies beside them"
    ids = world.pipeline.tokenizer(
        "fluent panda face on sky background", padding="max_length", return_tensors="pt"
    ).input_ids
    states = torch.as_tensor(result.tensor(text))
    assert states.shape == (1, 16, 192)
    assert not torch.allclose(states, world.pipeline.text_encoder(ids).last_hidden_state, atol=1e-2), (
        "brackets emphasise"
    )


def test_text_is_encoded_as_diffusers_does(server: ComfyServer, world: World) -> None:
    texts = ["", TEXT, "fluent tropical fish"]
    graph = Graph()
    demo = add_world(graph)
    saved = [graph.add("TestSaveTensor", value=graph.add("CLIPTextEncode", clip=demo[1], text=text)) for text in texts]
    result = server.run(graph)
    for text, node in zip(texts, saved, strict=True):
        ids = world.pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        expected = world.pipeline.text_encoder(ids).last_hidden_state
        assert torch.allclose(torch.as_tensor(result.tensor(node)), expected, atol=1e-4), text


@pytest.mark.parametrize("mode", ["live", "merged"])
def test_a_style_lora_and_an_image_act_together(server: ComfyServer, world: World, mode: str) -> None:
    graph = Graph()
    demo = add_world(graph)
    styled = graph.add(
        "ImagePromptLoRAStrength", model=demo[0], file=STYLE, strength=1.25, text_strength=1.0, selector="", mode=mode,
        start=0.0, end=1.0,
    )  # fmt: skip
    plain, both = pictures(
        server,
        graph,
        *(sample(graph, demo, steered(graph, demo, 1.0, "composition", m), "emoji") for m in (demo[0], styled)),
    )
    assert off_the_inks(both).mean() < off_the_inks(plain).mean() / 3
    assert similarity(both, plain).diag().mean() > 0.5, "of the same layout"


def test_one_copy_is_shared_and_survives_unloading(server: ComfyServer) -> None:
    def run(number: int, reference: str, family: str) -> tuple[np.ndarray, list[str]]:
        graph = Graph()
        demo = add_world(graph, family, reference)
        told = [graph.add("TestSameObject", value=demo[i], tag=f"demo {i}", run=number) for i in range(5)]
        saved = graph.add("TestSaveTensor", value=sample(graph, demo, demo[0], TEXT, 1))
        result = server.run(graph)
        return result.tensor(saved), [result.text(node)[0] for node in told]

    before, _ = run(0, "owl", "plus")
    server.free()
    after, told = run(1, "snail", "base")
    assert told == ["same"] * 4 + ["another"], "MODEL, CLIP, VAE and CLIP_VISION are shared; each adapter is its own"
    assert np.array_equal(before, after)
