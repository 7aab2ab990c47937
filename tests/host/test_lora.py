"""LoRAs in a real ComfyUI: against its own loader, live against merged, regions, schedules, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from host.comfy_server import ComfyServer, ExecutionFailed, Graph, GraphRejected, Link, Node
from host.servers import newest
from host.shrunk import WIDTH
from host.shrunk_transformers import POOLED, TEXT, build_transformer, build_transformer_loras
from host.steering import Steering
from host.tiny_lora_files import build_lora, lora_tensors
from ipadapter_core.training import parse_config
from ipadapter_core.training.config import LoRAConfig
from ipadapter_core.training.lora_adapter import fresh_lora

CLOSE = 2e-3
"""Latents of size 5 after two steps; merging rounds where the side path does not, and sampling multiplies that."""
EFFECT = 0.02
STACK = {
    f"{name}_{i}": value for i in range(1, 6) for name, value in (("on", True), ("file", "none"), ("strength", 1.0))
}


class Scene(Steering):
    """A graph with LoRA files at hand."""

    def file(self, *, seed: int = 0, unet: str | None = None) -> str:
        return self.server.add_model("loras", build_lora(unet or self.unet, self.folder, seed=seed))

    def lora_inputs(self) -> dict[str, Any]:
        return {
            "model": self.model, "strength": 1.0, "text_strength": 1.0, "selector": "", "mode": "live", "start": 0.0,
            "end": 1.0,
        }  # fmt: skip

    def lora(self, model: Node | Link | None = None, *, seed: int = 0, **settings: Any) -> Node:
        inputs = self.lora_inputs() | {"model": model or self.model, "file": self.file(seed=seed)}
        return self.graph.add("ImagePromptLoRAStrength", **(inputs | settings))

    def host_lora(self, model: Node | Link | None = None, *, strength: float = 1.0, seed: int = 0) -> Node:
        file = self.file(seed=seed)
        return self.graph.add("LoraLoaderModelOnly", model=model or self.model, lora_name=file, strength_model=strength)

    def compare(self, **nodes: Node) -> dict[str, np.ndarray]:
        result = self.run()
        return {name: result.tensor(node) for name, node in nodes.items()}


@pytest.fixture
def scene(server: ComfyServer, sd15_small: str, adapters: Path) -> Callable[..., Scene]:
    return lambda **settings: Scene(server, sd15_small, adapters, **settings)


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def test_live_merged_and_the_hosts_own_loader_agree(scene: Callable[..., Scene]) -> None:
    """On the same file, at two strengths; and the plain model after them is the plain model, bit for bit."""
    s = scene()
    runs = {"plain": s.sample(s.model)}
    for strength in (1.0, -0.5):
        runs[f"live {strength}"] = s.sample(s.lora(strength=strength))
        runs[f"merged {strength}"] = s.sample(s.lora(strength=strength, mode="merged"))
        runs[f"host {strength}"] = s.sample(s.host_lora(strength=strength))
    runs["zero live"] = s.sample(s.lora(strength=0.0))
    runs["zero merged"] = s.sample(s.lora(strength=0.0, mode="merged"))
    out = s.compare(**runs)
    for strength in (1.0, -0.5):
        same(out[f"live {strength}"], out[f"host {strength}"])
        same(out[f"merged {strength}"], out[f"host {strength}"])
        assert apart(out[f"live {strength}"], out["plain"]) > EFFECT
    assert np.array_equal(out["zero live"], out["plain"])
    assert np.array_equal(out["zero merged"], out["plain"])
    again = scene()
    assert np.array_equal(again.compare(plain=again.sample(again.model, seed=5))["plain"], out["plain"])


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "dora"])
def test_comfyui_reads_what_the_trainer_writes(
    server: ComfyServer, sd15: str, adapters: Path, tmp_path: Path, algorithm: Any
) -> None:
    """By its own table of names; DoRA by columns, as its own loader mistakes rows (PR 15458).

    PEFT's key format its table has for convolutions, not for the attentions of UNets: half of the file is lost on it.
    """
    s = Scene(server, sd15, adapters, unet="sd15", steps=1)
    runs = {"plain": s.sample(s.model)}
    for key_format, path in trained_files(tmp_path, algorithm).items():
        file = server.add_model("loras", path)
        ours = s.graph.add("ImagePromptLoRAStrength", **(s.lora_inputs() | {"file": file, "mode": "merged"}))
        host = s.graph.add("LoraLoaderModelOnly", model=s.model, lora_name=file, strength_model=1.0)
        runs |= {f"ours {key_format}": s.sample(ours), f"host {key_format}": s.sample(host)}
    out = s.compare(**runs)
    first = out["ours kohya"]
    assert apart(first, out["plain"]) > EFFECT
    differing = {name: apart(found, first) for name, found in out.items() if name != "plain"}
    assert differing.pop("host diffusers", 1.0) > EFFECT
    assert max(differing.values()) < CLOSE, differing


def trained_files(folder: Path, algorithm: Any) -> dict[str, Path]:
    """A LoRA as the trainer saves it, random instead of learned, for the shrunk SD1.5."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=(WIDTH,) * 4)
    if algorithm == "dora":  # its magnitudes start as the weights' norms
        unet = unet.to_empty(device="cpu")
        with torch.no_grad():
            for p in unet.parameters():
                p.fill_(0.02)
    config = LoRAConfig(rank=4, alpha=2.0, algorithm=algorithm, dora_axis="in")
    lora = fresh_lora({"denoiser": unet}, config)
    size = 1.0 if algorithm == "loha" else 0.3
    with torch.no_grad():
        for i, (name, p) in enumerate(lora.named_parameters()):
            if not name.endswith("magnitude"):
                generator = torch.Generator().manual_seed(i)
                p.copy_(torch.randn(p.shape, generator=generator) * (size / p[0].numel() ** 0.5))
    files: dict[str, Path] = {}
    for key_format in ("kohya", "generic", "diffusers") if algorithm == "locon" else ("kohya", "generic"):
        out = parse_config({"output": {"key_format": key_format, "dtype": "float32"}}, "here").output
        path = folder / f"{algorithm}_{key_format}.safetensors"
        files[key_format] = lora.save(path, lora.state_dict(), {}, out)
    return files


def test_text_encoders_are_merged_as_the_hosts_loader_does(
    server: ComfyServer, sd15_small: str, adapters: Path, model_cache: Path, tmp_path: Path
) -> None:
    """CLIP-L of the real size; what the trainer writes for it, at a strength of its own."""
    clip_file = server.add_model("text_encoders", clip_l(model_cache))
    s = Scene(server, sd15_small, adapters, steps=1)
    clip = s.graph.add("CLIPLoader", clip_name=clip_file, type="stable_diffusion")
    encoder: Any = nn.Module()
    encoder.text_model = nn.Module()
    encoder.text_model.encoder = nn.Module()
    layer: Any = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    for name in "qkv":
        layer.self_attn.add_module(f"{name}_proj", nn.Linear(768, 768))
    layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2 = (
        nn.Linear(768, 768),
        nn.Linear(768, 3072),
        nn.Linear(3072, 768),
    )
    encoder.text_model.encoder.layers = nn.ModuleList([layer])
    lora = fresh_lora({"te1": encoder}, LoRAConfig(rank=4, targets="te: 1", text_encoders=True))
    with torch.no_grad():
        for i, p in enumerate(lora.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / p[0].numel() ** 0.5)
    out = parse_config({"output": {"dtype": "float32"}}, "here").output
    file = server.add_model("loras", lora.save(tmp_path / "text.safetensors", lora.state_dict(), {}, out))
    settings = s.lora_inputs() | {"file": file, "clip": clip, "text_strength": 0.7}
    ours = s.graph.add("ImagePromptLoRAStrength", **settings)
    host = s.graph.add("LoraLoader", model=s.model, clip=clip, lora_name=file, strength_model=1.0, strength_clip=0.7)

    def encoded(source: Node | Link) -> Node:
        return s.save(s.graph.add("CLIPTextEncode", clip=source, text="an owl on a red background"))

    found = s.compare(plain=encoded(clip), ours=encoded(ours[1]), host=encoded(host[1]))
    same(found["ours"], found["host"])
    assert apart(found["ours"], found["plain"]) > 5 * CLOSE


def clip_l(folder: Path) -> Path:
    """A CLIP-L text encoder of random weights, fp16, 246 MB."""
    path = folder / "random_clip_l_v1.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768),
        }  # fmt: skip
        for i in range(12):
            stem = f"encoder.layers.{i}"
            shapes |= {f"{stem}.self_attn.{n}_proj.weight": (768, 768) for n in ("q", "k", "v", "out")}
            shapes |= {f"{stem}.mlp.fc1.weight": (3072, 768), f"{stem}.mlp.fc2.weight": (768, 3072)}
        state = {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}
        state |= {
            key.removesuffix("weight") + "bias": torch.zeros(value.shape[0])
            for key, value in state.items()
            if ".layers." in key
        }
        norms = [f"encoder.layers.{i}.layer_norm{n}" for i in range(12) for n in (1, 2)] + ["final_layer_norm"]
        state |= {f"{norm}.weight": torch.ones(768) for norm in norms} | {
            f"{norm}.bias": torch.zeros(768) for norm in norms
        }
        unfinished = path.with_suffix(".part")
        save_file({f"text_model.{key}": value.half() for key, value in state.items()}, unfinished)
        unfinished.replace(path)
    return path


def test_chains_stacks_and_others_loras(scene: Callable[..., Scene]) -> None:
    s = scene()
    chained = s.lora(s.lora(seed=1, strength=0.5), seed=2)
    rows = STACK | {
        "file_1": s.file(seed=2),
        "file_3": s.file(seed=1),
        "strength_3": 0.5,
        "file_4": s.file(seed=2),
        "on_4": False,
    }
    stacked = s.graph.add("ImagePromptLoRAStack", model=s.model, mode="merged", **rows)
    mixed = s.lora(s.host_lora(seed=1, strength=0.5), seed=2)
    host = s.host_lora(s.host_lora(seed=1, strength=0.5), seed=2)
    out = s.compare(chained=s.sample(chained), stacked=s.sample(stacked), mixed=s.sample(mixed), host=s.sample(host))
    for name in ("chained", "stacked", "mixed"):
        same(out[name], out["host"])


def test_rows_are_a_chain_and_a_stack_for_other_packs(scene: Callable[..., Scene]) -> None:
    """Rows by name, by whole path and with the other slashes; as a LORA_STACK out of one node and into the next."""
    s = scene()
    first, second = s.file(seed=1), s.file(seed=2)
    beside = s.server.add_model("loras", s.server.models("loras") / second, f"below/{second}")
    rows = [
        {"file": str(s.server.models("loras") / first), "strength": 0.5, "text_strength": 0.25},
        {"file": beside.replace("/", "\\"), "selector": "attn2: 0"},
        {"file": "gone.safetensors", "on": False},
        {"file": second, "strength": 0, "text_strength": 0},
    ]
    inputs = {"mode": "merged", "rows": json.dumps(rows)}
    whole = s.graph.add("ImagePromptLoRARows", model=s.model, **inputs)
    stacker = s.graph.add("ImagePromptLoRARows", **(inputs | {"rows": json.dumps(rows[:1])}))
    chained = s.graph.add(
        "ImagePromptLoRARows", model=s.model, lora_stack=stacker[2], mode="merged", rows=json.dumps(rows[1:])
    )
    nothing = s.graph.add("ImagePromptLoRARows", model=s.model, mode="auto", rows="")
    stack = s.graph.add("PreviewAny", source=whole[2])
    report = s.graph.add("PreviewAny", source=stacker[4])
    by_hand = s.lora(s.lora(seed=1, strength=0.5), seed=2, selector="attn2: 0", mode="merged")
    samples = {"whole": whole, "chained": chained, "by_hand": by_hand, "nothing": nothing, "plain": s.model}
    nodes = {name: s.sample(model) for name, model in samples.items()}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    assert np.array_equal(out["nothing"], out["plain"])
    assert np.array_equal(out["whole"], out["chained"])
    same(out["whole"], out["by_hand"])
    assert apart(out["whole"], out["plain"]) > EFFECT
    assert json.loads(
        result.text(stack)[0].replace("(", "[").replace(")", "]").replace("'", '"').replace("\\\\", "/")
    ) == [
        [str(s.server.models("loras") / first), 0.5, 0.25],
        [beside, 1.0, 1.0],
    ]
    assert result.text(report) == ["nothing to apply them to is connected"]


def test_rows_say_their_trigger_words_and_what_is_wrong_with_them(server: ComfyServer) -> None:
    for name, words in (("a.safetensors", "ink, sks"), ("b.safetensors", "sks, paper")):
        save_file(
            lora_tensors("sd15_small"), server.models("loras") / name, metadata={"modelspec.trigger_phrase": words}
        )
    graph = Graph()
    rows = graph.add("ImagePromptLoRARows", mode="auto", rows='[{"file": "a.safetensors"}, {"file": "b.safetensors"}]')
    words = graph.add("PreviewAny", source=rows[3])
    assert server.run(graph).text(words) == ["ink, sks, paper"]
    graph[rows.id]["inputs"]["rows"] = '[{"file": "a.safetensors", "strength": "much"}]'
    with pytest.raises(GraphRejected, match=r"row 1 has strength: 'much'; a number in -20\.\.20 was expected"):
        server.run(graph)
    graph[rows.id]["inputs"]["rows"] = '[{"file": "../secret.safetensors"}]'
    with pytest.raises(ExecutionFailed, match="none of the files in models/loras"):
        server.run(graph)


def test_schedules_and_selectors(scene: Callable[..., Scene]) -> None:
    s = scene(steps=3)
    out = s.compare(
        plain=s.sample(s.model),
        whole=s.sample(s.lora()),
        never=s.sample(s.lora(start=0.999, end=0.9995)),
        late=s.sample(s.lora(start=0.4)),
        attention=s.sample(s.lora(selector="all: 0, attn2: 1")),
        none=s.sample(s.lora(selector="all: 0")),
    )
    assert np.array_equal(out["never"], out["plain"])
    assert np.array_equal(out["none"], out["plain"])
    assert min(apart(out["late"], out["plain"]), apart(out["late"], out["whole"])) > EFFECT / 4
    assert apart(out["attention"], out["plain"]) < apart(out["whole"], out["plain"])


def test_regions_and_an_image_prompt(scene: Callable[..., Scene]) -> None:
    """Masks of one and of zero are no mask and no LoRA; beside an image prompt in either order."""
    s = scene()
    ones = s.graph.add("SolidMask", value=1.0, width=64, height=64)
    zeros = s.graph.add("SolidMask", value=0.0, width=64, height=64)
    left = s.mask(1.0, 0.0)
    adapter = s.adapter()
    prompt = s.encode(adapter, s.photo())
    out = s.compare(
        plain=s.sample(s.model),
        whole=s.sample(s.lora()),
        ones=s.sample(s.lora(mask=ones)),
        zeros=s.sample(s.lora(mask=zeros)),
        left=s.sample(s.lora(mask=left)),
        both=s.sample(s.apply(s.lora(mask=left), adapter, prompt)),
        swapped=s.sample(s.lora(s.apply(s.model, adapter, prompt), mask=left)),
        image=s.sample(s.apply(s.model, adapter, prompt)),
    )
    same(out["ones"], out["whole"])
    same(out["zeros"], out["plain"])
    same(out["both"], out["swapped"])
    for other in ("plain", "whole"):
        assert apart(out["left"], out[other]) > EFFECT / 4
    assert apart(out["both"], out["image"]) > EFFECT / 4


def test_with_little_memory_and_one_by_one(scene: Callable[..., Scene]) -> None:
    """However the conditionings are batched, the same."""
    s = scene()
    left = s.mask(1.0, 0.0)
    nodes = {"batched": s.sample(s.lora(mask=left, negative_strength=0.3))}
    for how in ("little memory", "one by one", "negative first"):
        model = s.graph.add("TestCondBatch", model=s.lora(mask=left, negative_strength=0.3), how=how)
        nodes[how] = s.sample(model)
    out = s.compare(**nodes)
    for how in ("little memory", "one by one", "negative first"):
        same(out[how], out["batched"])


def test_with_the_weights_outside_of_the_device(scene: Callable[..., Scene]) -> None:
    """The host patches weights only as they pass by; live LoRAs need none, and neither leaves a trace."""
    s = scene()
    loras = {
        "live": s.lora(strength=0.8),
        "merged": s.lora(strength=0.8, mode="merged"),
        "host": s.host_lora(strength=0.8),
        "plain": s.model,
    }
    outside = {f"{name} outside": s.graph.add("TestPartlyLoaded", model=model) for name, model in loras.items()}
    out = s.compare(**{name: s.sample(model) for name, model in (loras | outside).items()})
    for name in ("live", "merged", "host", "plain"):
        same(out[f"{name} outside"], out[name])
    same(out["merged"], out["host"])
    assert apart(out["live outside"], out["plain"]) > EFFECT
    again = scene()
    assert np.array_equal(again.compare(plain=again.sample(again.model))["plain"], out["plain"])


def test_on_weights_of_eight_bits(scene: Callable[..., Scene]) -> None:
    """``auto`` leaves eight-bit weights alone; a merge rounds to eight bits at random, in the host's loader as in ours."""
    s = scene()
    file = s.server.add_model("diffusion_models", s.server.models("checkpoints") / s.checkpoint)
    model = s.graph.add("UNETLoader", unet_name=file, weight_dtype="fp8_e4m3fn")
    lora = s.lora(model, mode="auto", strength=0.5)
    shown = s.graph.add("PreviewAny", source=lora[2])
    nodes = {
        "plain": s.sample(model),
        "auto": s.sample(lora),
        "live": s.sample(s.lora(model, strength=0.5)),
        "merged": s.sample(s.lora(model, strength=0.5, mode="merged")),
        "host": s.sample(s.host_lora(model, strength=0.5)),
        "zero": s.sample(s.lora(model, strength=0.0)),
    }
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    assert "runs live: the base weights are quantised" in result.text(shown)[0]
    assert np.array_equal(out["zero"], out["plain"])
    assert np.array_equal(out["auto"], out["live"])
    effect, rounding = apart(out["live"], out["plain"]), apart(out["merged"], out["host"])
    assert effect > EFFECT
    assert max(apart(out["live"], out[name]) for name in ("merged", "host")) < effect / 2
    assert rounding < effect / 2


def test_the_memory_manager_counts_live_loras_and_frees_them(scene: Callable[..., Scene]) -> None:
    s = scene()
    lora = s.lora()
    report = s.graph.add("TestMemory", model=lora, after=s.sampled(lora))
    found = json.loads(s.run().text(report)[0])
    assert found["held"] > 1e5
    assert found["after"] == 0
    assert found["counted"] == pytest.approx(found["held"], rel=0.05)


class Transformer:
    """A graph around a shrunk SD3 or Flux."""

    def __init__(self, server: ComfyServer, kind: str, folder: Path) -> None:
        self.server, self.kind, self.folder, self.graph = server, kind, folder, Graph()
        self.text = [self.graph.add("TestConditioning", seed=i, width=TEXT, tokens=8, pooled=POOLED) for i in (1, 2)]
        self.latent = self.graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)

    def model(self, *, scaled: bool = False) -> Node:
        file = self.server.add_model("diffusion_models", build_transformer(self.kind, self.folder, scaled=scaled))
        return self.graph.add("UNETLoader", unet_name=file, weight_dtype="default")

    def lora(self, model: Node, file: str, mode: str) -> Node:
        settings = {"strength": 0.8, "text_strength": 1.0, "selector": "", "start": 0.0, "end": 1.0}
        return self.graph.add("ImagePromptLoRAStrength", model=model, file=file, mode=mode, **settings)

    def host_lora(self, model: Node, file: str) -> Node:
        return self.graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=0.8)

    def files(self) -> dict[str, str]:
        files = build_transformer_loras(self.kind, self.folder)
        return {key_format: self.server.add_model("loras", path) for key_format, path in files.items()}

    def sample(self, model: Node) -> Node:
        sampled = self.graph.add(
            "KSampler", model=model, positive=self.text[0], negative=self.text[1], latent_image=self.latent, seed=5, steps=2,
            cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        return self.graph.add("TestSaveTensor", value=sampled)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_with_fused_layers(server: ComfyServer, tmp_path: Path, kind: str) -> None:
    """SD3 and Flux: live, merged and the host's loader agree, in kohya's key format (q, k, v in one) and diffusers' (apart)."""
    if kind == "flux" and server.host.version.startswith("0.3."):
        pytest.skip("this ComfyUI takes every Flux to be 3072 wide")
    t = Transformer(server, kind, tmp_path)
    model = t.model()
    nodes = {"plain": t.sample(model)}
    files = t.files()
    for key_format in ("kohya", "diffusers"):
        for mode in ("live", "merged"):
            nodes[f"{mode} {key_format}"] = t.sample(t.lora(model, files[key_format], mode))
        nodes[f"host {key_format}"] = t.sample(t.host_lora(model, files[key_format]))
    result = server.run(t.graph)
    out = {name: result.tensor(node) for name, node in nodes.items()}
    first = out.pop("live kohya")
    assert apart(first, out.pop("plain")) > EFFECT
    for found in out.values():
        same(found, first)


def test_matrices_of_eight_bits_with_a_scale(server: ComfyServer, tmp_path: Path) -> None:
    """As most Flux files are: ``auto`` leaves them alone, and DoRA reads what they stand for."""
    if server.host.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no such tensors")
    t = Transformer(server, "flux", tmp_path)
    model, exact, files = t.model(scaled=True), t.model(), t.files()
    auto = t.lora(model, files["kohya"], "auto")
    shown = t.graph.add("PreviewAny", source=auto[2])
    nodes = {
        "auto": t.sample(auto), "live": t.sample(t.lora(model, files["kohya"], "live")),
        "merged": t.sample(t.lora(model, files["kohya"], "merged")), "host": t.sample(t.host_lora(model, files["kohya"])),
        "dora": t.sample(t.lora(model, files["dora"], "live")), "exact": t.sample(t.lora(exact, files["kohya"], "live")),
        "exact dora": t.sample(t.lora(exact, files["dora"], "live")), "plain": t.sample(model),
    }  # fmt: skip
    result = server.run(t.graph)
    out = {name: result.tensor(node) for name, node in nodes.items()}
    assert "runs live: the base weights are quantised" in result.text(shown)[0]
    assert np.array_equal(out["auto"], out["live"])
    same(out["merged"], out["host"])
    for name in ("live", "dora"):
        effect = apart(out[name], out["plain"])
        assert effect > EFFECT
        assert apart(out[name], out[f"exact{' dora' * (name == 'dora')}"]) < effect / 4, "eight bits are not sixteen"


def test_inspect_save_and_load_what_was_saved(scene: Callable[..., Scene], server: ComfyServer) -> None:
    s = scene()
    shown = s.graph.add("ImagePromptLoRAInspect", file=s.file())
    saved = s.graph.add(
        "ImagePromptLoRASave", file=s.file(), filename_prefix="small", spelling="generic", dtype="float16", rank=2
    )
    result = s.run()
    (text,) = result.text(shown)
    assert "LoRA × " in text
    assert result.images(shown)[0].shape[2] == 3
    (message,) = result.text(saved)
    path = Path(message.rpartition(" in ")[2])
    with safe_open(str(path), "pt") as file:
        keys = list(file.keys())
    assert all(key.startswith("diffusion_model.") for key in keys)
    t = scene()
    lora = t.graph.add("LoraLoaderModelOnly", model=t.model, lora_name=path.name, strength_model=1.0)
    out = t.compare(plain=t.sample(t.model), small=t.sample(lora))
    assert apart(out["plain"], out["small"]) > EFFECT / 4


def test_mistakes_get_one_sentence(scene: Callable[..., Scene]) -> None:
    s = scene()
    wrong = s.server.add_model("loras", build_lora("sdxl_small", s.folder))
    for settings, expected in (
        ({"file": wrong}, "this is a LoRA for SDXL, the model is SD1.5"),
        ({"mode": "merged", "end": 0.5}, "'merged' is not possible: its strength changes over the steps"),
    ):
        bad = scene()
        bad.sample(bad.lora(**settings))
        with pytest.raises(ExecutionFailed) as failure:
            bad.run()
        assert expected in failure.value.message
        assert failure.value.exception_type.rsplit(".", 1)[-1] in ("IncompatibleAdapterError", "InvalidInputError")
    typo = scene()
    typo.sample(typo.lora(selector="attn7: 1"))
    with pytest.raises(GraphRejected, match="unknown word 'attn7'"):
        typo.run()


@newest
def test_live_loras_on_a_compiled_model(scene: Callable[..., Scene]) -> None:
    """Plain, two LoRAs, a window over the steps: each as without torch.compile."""
    s = scene()
    models = {
        "plain": s.model,
        "one": s.lora(),
        "other": s.lora(seed=1, strength=0.5),
        "late": s.lora(start=0.4),
        "both": s.lora(s.lora(), seed=1),
        "again": s.model,
    }
    runs = {name: s.sample(model) for name, model in models.items()}
    runs |= {
        f"compiled_{name}": s.sample(s.graph.add("TestCompile", model=model, backend="eager"))
        for name, model in models.items()
    }
    found = s.compare(**runs)
    for name in models:
        same(found[f"compiled_{name}"], found[name])
    assert min(apart(found["plain"], found[name]) for name in ("one", "other", "late", "both")) > 1e-3
