"""The harness itself: servers start, shrunk checkpoints sample, errors surface. Workflow tests build on this."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from host.comfy_server import ComfyServer, ExecutionFailed, ExecutionInterrupted, Graph, GraphRejected, Node, Result
from host.shrunk import UNETS, build_checkpoint, cross_attention_widths, unet_shapes
from host.tiny_adapters import adapter_tensors, build_adapter

PHOTO = Path(__file__).parent / "photo.jpg"


def sampling_graph(checkpoint: str, text_width: int, *, steps: int = 2, seed: int = 1) -> tuple[Graph, Node]:
    """Loader, random prompts, KSampler at 64 px; returns the graph and the sampler node."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    sampler = graph.add(
        "KSampler",
        model=loader,
        positive=graph.add("TestConditioning", seed=1, width=text_width),
        negative=graph.add("TestConditioning", seed=2, width=text_width),
        latent_image=graph.add("EmptyLatentImage", width=64, height=64, batch_size=1),
        seed=seed,
        steps=steps,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return graph, sampler


@pytest.mark.parametrize(("name", "layers"), [("sd15", 16), ("sd15_small", 7), ("sdxl", 70), ("sdxl_small", 16)])
def test_topology_has_the_layers_it_claims(name: str, layers: int) -> None:
    keys = [key for key, _ in unet_shapes(UNETS[name])]
    assert len(keys) == len(set(keys))
    assert sum(key.endswith("attn2.to_k.weight") for key in keys) == layers == len(cross_attention_widths(UNETS[name]))


def test_real_topologies_put_attention_where_the_real_models_do() -> None:
    def blocks(name: str) -> set[str]:
        keys = [key for key, _ in unet_shapes(UNETS[name]) if "attn2.to_q" in key]
        return {".".join(key.split(".")[:2]) for key in keys}

    sd15 = {*(f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)), *(f"output_blocks.{i}" for i in range(3, 12))}
    sdxl = {*(f"input_blocks.{i}" for i in (4, 5, 7, 8)), *(f"output_blocks.{i}" for i in range(6))}
    assert blocks("sd15") == sd15 | {"middle_block.1"}
    assert blocks("sdxl") == sdxl | {"middle_block.1"}


def test_tiny_adapters_have_the_keys_of_real_files(tmp_path: Path) -> None:
    base, plus = adapter_tensors("base", "sd15"), adapter_tensors("plus", "sdxl")
    assert base["image_proj.proj.weight"].shape == (4 * 768, 24)
    assert {k for k in base if k.endswith("to_k_ip.weight")} == {
        f"ip_adapter.{n}.to_k_ip.weight" for n in range(1, 32, 2)
    }
    assert plus["ip_adapter.139.to_v_ip.weight"].shape == (320, 2048)
    nested = torch.load(build_adapter("plus", "sd15", tmp_path, suffix=".bin"), weights_only=True)
    assert nested["image_proj"]["latents"].shape == (1, 16, 64)
    assert "31.to_v_ip.weight" in nested["ip_adapter"]


def test_packs_load(server: ComfyServer) -> None:
    assert server.import_problems() == []
    assert "TestSaveTensor" in server.object_info()
    if server.has_pack:
        assert server.pack_nodes(), "the pack was imported but registered no node"


@pytest.mark.parametrize("name", ["sd15", "sdxl_small"])
def test_checkpoint_samples_and_decodes(server: ComfyServer, model_cache: Path, name: str) -> None:
    checkpoint = server.add_model("checkpoints", build_checkpoint(name, model_cache))
    graph, sampler = sampling_graph(checkpoint, UNETS[name].text_width)
    latent = graph.add("TestSaveTensor", value=sampler)
    pixels = graph.add("VAEDecode", samples=sampler, vae=["1", 2])
    image = graph.add("SaveImage", images=pixels, filename_prefix=name)
    result = server.run(graph)

    sampled = result.tensor(latent)
    assert sampled.shape == (1, 4, 8, 8)
    assert np.isfinite(sampled).all()
    assert 1 < sampled.std() < 20  # about 5 for a trained model: ComfyUI divides by 0.18 (SDXL 0.13)
    (picture,) = result.images(image)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5, "the decoded image is flat"
    assert (picture == 0).mean() + (picture == 255).mean() < 0.2, "the decoded image is saturated"


def test_same_inputs_give_the_same_bits_and_another_prompt_does_not(server: ComfyServer, sd15: str) -> None:
    def sample(prompt_seed: int) -> Result:
        graph, sampler = sampling_graph(sd15, 768)
        graph["2"]["inputs"]["seed"] = prompt_seed
        graph.add("TestSaveTensor", value=sampler)
        return server.run(graph)

    first, other = sample(1), sample(100)
    server.free()  # without it ComfyUI answers the third prompt out of its cache, and equal bits prove nothing
    again = sample(1)
    assert "3" not in again.cached
    assert first.sha256("6") == again.sha256("6")
    assert first.sha256("6") != other.sha256("6")


def test_photo_goes_through_upload_vae_and_vision(server: ComfyServer, sd15: str) -> None:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    photo = graph.add("LoadImage", image=server.upload_image(PHOTO))
    small = graph.add("ImageScale", image=photo, upscale_method="area", width=96, height=64, crop="disabled")
    latent = graph.add("TestSaveTensor", value=graph.add("VAEEncode", pixels=small, vae=loader[2]))
    pixels = graph.add("TestSaveTensor", value=small)
    vision = graph.add("TestClipVision", seed=0)
    encoded = graph.add("CLIPVisionEncode", clip_vision=vision, image=photo, crop="center")
    text = graph.add("TestConditioning", seed=0, width=768)
    unclip = {"conditioning": text, "clip_vision_output": encoded, "strength": 1.0, "noise_augmentation": 0.0}
    condition = graph.add("TestSaveTensor", value=graph.add("unCLIPConditioning", **unclip))
    result = server.run(graph)
    assert result.tensor(latent).shape == (1, 4, 8, 12)
    assert 0.05 < result.tensor(latent).std() < 10
    assert result.tensor(pixels).std() > 0.05, "the photo has no contrast"
    assert result.tensor(condition).shape == (1, 77, 768)


def test_node_errors_reach_the_test_with_their_message(server: ComfyServer) -> None:
    graph = Graph()
    graph.add("TestSaveTensor", value=graph.add("TestClipVision", seed=0))
    with pytest.raises(ExecutionFailed, match="TestSaveTensor takes a LATENT") as failure:
        server.run(graph)
    assert failure.value.node_type == "TestSaveTensor"
    assert failure.value.exception_type.endswith("TypeError")


def test_invalid_graphs_are_rejected_with_the_reason(server: ComfyServer) -> None:
    graph = Graph()
    vision = graph.add("TestClipVision", seed=0)
    image = graph.add("EmptyImage", width=8, height=8, batch_size=1, color=0)
    graph.add("SaveImage", images=vision, filename_prefix="x")
    graph.add("PreviewImage", images=image)
    with pytest.raises(GraphRejected, match="return_type_mismatch"):
        server.run(graph)


def test_a_run_can_be_interrupted_and_the_server_lives_on(server: ComfyServer, sd15: str) -> None:
    graph, sampler = sampling_graph(sd15, 768, steps=500, seed=7)
    graph.add("TestSaveTensor", value=sampler)
    prompt_id = server.submit(graph)
    deadline = time.monotonic() + 60
    while not server.queue()["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    server.interrupt()
    with pytest.raises(ExecutionInterrupted):
        server.wait(prompt_id, timeout=60)
    graph = Graph()
    conditioning = graph.add("TestSaveTensor", value=graph.add("TestConditioning", seed=3, width=4))
    assert server.run(graph).tensor(conditioning).shape == (1, 77, 4)
