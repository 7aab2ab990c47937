"""The nodes in a running ComfyUI: what users see of them, strength, caching, clones, files and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import websocket
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, ExecutionFailed, Graph, GraphRejected, Node
from host.steering import APPLY, Steering
from host.tiny_adapters import VISION_HIDDEN, VISION_TOKENS, adapter_tensors, build_adapter, build_prompt
from ipadapter_core.attention.presets import PRESETS
from tiny_towers import pe_core

SOCKETS = {
    "IMAGE_PROMPT_ADAPTER",
    "IMAGE_PROMPT",
    "LORA_STACK",
    "FLOAT,CURVE",
    "IMAGE_PROMPT_SCHEDULE",
    "IMAGE_PROMPT_FACE_MODEL",
    "IMAGE_PROMPT_RECORDING",
}
HOST_TYPES = {
    "MODEL",
    "CLIP",
    "VAE",
    "CLIP_VISION",
    "LATENT",
    "IMAGE",
    "MASK",
    "STRING",
    "INT",
    "FLOAT",
    "BOOLEAN",
    "COMBO",
}
OUTPUTS = {
    "ImagePromptLoadAdapter": (["IMAGE_PROMPT_ADAPTER"], ["adapter"]),
    "ImagePromptEncode": (["IMAGE_PROMPT"], ["image_prompt"]),
    "ImagePromptCombine": (["IMAGE_PROMPT"], ["image_prompt"]),
    "ImagePromptSave": (["STRING"], ["path"]),
    "ImagePromptLoad": (["IMAGE_PROMPT"], ["image_prompt"]),
    "ImagePromptNoise": (["IMAGE"], ["image"]),
    "ImagePromptApply": (["MODEL"], ["model"]),
    "ImagePromptApplyImage": (["MODEL"], ["model"]),
    "ImagePromptApplyTiled": (["MODEL", "IMAGE", "MASK"], ["model", "tiles", "masks"]),
    "ImagePromptSchedule": (["IMAGE_PROMPT_SCHEDULE"], ["schedule"]),
    "ImagePromptInspect": (["STRING"], ["text"]),
    "ImagePromptRecord": (["MODEL", "IMAGE_PROMPT_RECORDING"], ["model", "recording"]),
    "ImagePromptAttentionMaps": (["IMAGE", "IMAGE", "MASK", "STRING"], ["heat_maps", "layers", "maps", "text"]),
    "ImagePromptLoadFaceModel": (["IMAGE_PROMPT_FACE_MODEL"], ["face_model"]),
    "ImagePromptEncodeFace": (["IMAGE_PROMPT", "IMAGE"], ["image_prompt", "faces"]),
    "ImagePromptApplyFaceLoRA": (["MODEL"], ["model"]),
    "ImagePromptLoRAStrength": (["MODEL", "CLIP", "STRING"], ["model", "clip", "report"]),
    "ImagePromptLoRAStack": (["MODEL", "CLIP", "STRING"], ["model", "clip", "report"]),
    "ImagePromptPreviewRegion": (["IMAGE"], ["preview"]),
    "ImagePromptLoRARows": (
        ["MODEL", "CLIP", "LORA_STACK", "STRING", "STRING"],
        ["model", "clip", "lora_stack", "trigger_words", "report"],
    ),
    "ImagePromptLoRAInspect": (["STRING", "IMAGE"], ["text", "heat_map"]),
    "ImagePromptLoRASave": (["STRING"], ["path"]),
    "ImagePromptLoRAExtract": (["STRING"], ["path"]),
    "ImagePromptTrain": (["IMAGE_PROMPT_ADAPTER", "IMAGE", "IMAGE"], ["adapter", "loss_plot", "samples"]),
    "ImagePromptTrainLoRA": (["STRING", "IMAGE", "IMAGE"], ["path", "loss_plot", "samples"]),
    "ImagePromptLoadEncoder": (["CLIP_VISION"], ["clip_vision"]),
    "ImagePromptLoadModels": (
        ["MODEL", "IMAGE_PROMPT_ADAPTER", "CLIP_VISION", "CLIP_VISION", "IMAGE_PROMPT_FACE_MODEL", "STRING"],
        ["model", "adapter", "clip_vision", "clip_vision_2", "face_model", "report"],
    ),
    "ImagePromptDemoWorld": (
        ["MODEL", "CLIP", "VAE", "CLIP_VISION", "IMAGE_PROMPT_ADAPTER", "IMAGE"],
        ["model", "clip", "vae", "clip_vision", "adapter", "image"],
    ),
}
OUTPUT_NODES = {
    "ImagePromptAttentionMaps",
    "ImagePromptPreviewRegion",
    "ImagePromptInspect",
    "ImagePromptSave",
    "ImagePromptLoRAInspect",
    "ImagePromptLoRASave",
    "ImagePromptLoRAExtract",
    "ImagePromptTrain",
    "ImagePromptTrainLoRA",
}


@pytest.fixture
def make(server: ComfyServer, sd15_small: str, adapters: Path) -> Callable[..., Steering]:
    """Starts a graph on the small SD1.5 model."""
    return lambda **settings: Steering(server, sd15_small, adapters, **settings)


# --- what the frontend is told ----------------------------------------------------------------------------------------


def test_every_node_is_there(server: ComfyServer) -> None:
    nodes = server.pack_nodes()
    assert set(nodes) == set(OUTPUTS)
    for name, info in nodes.items():
        types, names = OUTPUTS[name]
        assert list(info["output"]) == types
        assert list(info["output_name"]) == names
        assert info["category"] == ("image prompt/lora" if "LoRA" in name else "image prompt")
        assert info["description"]
        assert info["output_node"] == (name in OUTPUT_NODES)


def test_load_image_encoder_reads_what_comfyui_cannot(
    make: Callable[..., Steering], tmp_path: Path, server: ComfyServer
) -> None:
    """A PE-Core, which then is the wrong encoder for a plus adapter, also beside the right one's place; and no encoder at all."""
    pe_core(tmp_path / "pe.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    s = make()
    names = {
        name: server.add_model("clip_vision", tmp_path / f"{name}.safetensors", f"{name}_{tmp_path.name}.safetensors")
        for name in ("pe", "none")
    }
    loaded = s.graph.add("ImagePromptLoadEncoder", file=names["pe"])
    s.sample(s.apply(s.model, s.adapter(), s.encode(s.adapter(), s.photo(), clip_vision_2=loaded)))
    server.run(s.graph)
    wrong = make()
    loaded = wrong.graph.add("ImagePromptLoadEncoder", file=names["pe"])
    wrong.sample(
        wrong.apply(wrong.model, wrong.adapter(), wrong.encode(wrong.adapter(), wrong.photo(), clip_vision=loaded))
    )
    with pytest.raises(ExecutionFailed, match=r"hidden states of width 32.*PE-Core"):
        server.run(wrong.graph)
    none = make()
    loaded = none.graph.add("ImagePromptLoadEncoder", file=names["none"])
    none.sample(none.apply(none.model, none.adapter(), none.encode(none.adapter(), none.photo(), clip_vision=loaded)))
    with pytest.raises(ExecutionFailed, match="is no image encoder"):
        server.run(none.graph)


def test_every_input_explains_itself(server: ComfyServer) -> None:
    seen = 0
    for name, info in server.pack_nodes().items():
        for section in ("required", "optional"):
            for key, (kind, *rest) in info["input"].get(section, {}).items():
                assert kind in SOCKETS | HOST_TYPES, f"{name}.{key} has the type {kind}"
                assert len(rest[0]["tooltip"]) > 15, f"{name}.{key} has no tooltip worth reading"
                if kind == "FLOAT":
                    assert rest[0]["min"] <= rest[0]["default"] <= rest[0]["max"], f"{name}.{key}"
                seen += 1
    assert seen > 30


def test_combos_offer_what_the_core_has(server: ComfyServer) -> None:
    nodes = server.pack_nodes()

    def options(node: str, key: str) -> list[str]:
        return nodes[node]["input"]["required"][key][1]["options"]

    presets = options("ImagePromptApply", "preset")
    assert presets == list(PRESETS)
    assert options("ImagePromptApply", "scaling")[0] == "V only"
    assert len(options("ImagePromptApply", "scaling")) == 4
    for node in ("ImagePromptEncode", "ImagePromptCombine"):
        assert options(node, "combine")[0] == "concat"
        assert len(options(node, "combine")) == 7
    assert options("ImagePromptEncode", "unconditional")[0] == "auto"
    assert options("ImagePromptEncode", "crop")[0] == "center"


# --- strength, caching, clones ----------------------------------------------------------------------------------------


def test_strength_zero_is_the_plain_model_and_one_is_not(make: Callable[..., Steering]) -> None:
    s = make()
    adapter = s.adapter()
    prompt = s.encode(adapter, s.photo())
    plain = s.sample(s.model)
    zero, one, away = (s.sample(s.apply(s.model, adapter, prompt, strength=value)) for value in (0.0, 1.0, -0.5))
    result = s.run()
    assert result.sha256(zero) == result.sha256(plain)
    for node in (one, away):
        assert np.isfinite(result.tensor(node)).all()
        assert np.abs(result.tensor(node) - result.tensor(plain)).mean() > 0.01
    assert result.sha256(one) != result.sha256(away)


def test_one_node_does_what_two_do(make: Callable[..., Steering]) -> None:
    s = make()
    adapter, photo, mask = s.adapter(), s.photo(), s.mask(0.2, 1.0)
    settings = {"strength": 0.7, "preset": "ease in", "scaling": "K+V", "start": 0.0, "end": 0.9}
    two = s.apply(s.model, adapter, s.encode(adapter, photo, combine="average"), mask=mask, **settings)
    one = s.graph.add(
        "ImagePromptApplyImage", model=s.model, adapter=adapter, clip_vision=s.vision, image=photo, mask=mask,
        combine="average", per_latent=False, **settings,
    )  # fmt: skip
    saved = [s.sample(model) for model in (two, one)]
    result = s.run()
    assert result.sha256(saved[0]) == result.sha256(saved[1])


def test_another_strength_encodes_nothing_again_and_going_back_gives_the_same_bits(
    server: ComfyServer, make: Callable[..., Steering]
) -> None:
    def graph(strength: float) -> tuple[Steering, Node, Node, Node]:
        s = make()
        adapter = s.adapter()
        prompt = s.encode(adapter, s.photo())
        applied = s.apply(s.model, adapter, prompt, strength=strength)
        return s, prompt, applied, s.sample(applied)

    s, _, _, saved = graph(0.9)
    first = s.run().sha256(saved)
    s, prompt, applied, saved = graph(0.6)
    changed = s.run()
    assert prompt.id in changed.cached
    assert applied.id not in changed.cached
    assert changed.sha256(saved) != first
    server.free()
    s, prompt, _, saved = graph(0.9)
    again = s.run()
    assert prompt.id not in again.cached, "answered from the cache: equal bits would prove nothing"
    assert again.sha256(saved) == first


def test_branches_of_one_model_do_not_see_each_other(server: ComfyServer, make: Callable[..., Steering]) -> None:
    def run(strength_b: float) -> dict[str, tuple[str, np.ndarray]]:
        s = make()
        a, b = s.adapter("plus"), s.adapter("base", seed=1)
        prompt_a, prompt_b = s.encode(a, s.photo(0)), s.encode(b, s.photo(3))
        with_a = s.apply(s.model, a, prompt_a, strength=0.8)
        with_b = s.apply(s.model, b, prompt_b, strength=strength_b)
        models = {
            "A+B": s.apply(with_a, b, prompt_b, strength=strength_b),
            "B+A": s.apply(with_b, a, prompt_a, strength=0.8),
            "A": with_a,
            "plain": s.model,
        }
        saved = {name: s.sample(model) for name, model in models.items()}
        result = s.run()
        return {name: (result.sha256(node), result.tensor(node)) for name, node in saved.items()}

    alone = make()
    saved = alone.sample(alone.model)
    plain = alone.run().sha256(saved)
    server.free()
    first = run(0.7)
    assert first["plain"][0] == plain
    assert len({digest for digest, _ in first.values()} | {first["A+B"][0]}) >= 3
    # Two additions in another order: only rounding may differ.
    np.testing.assert_allclose(first["A+B"][1], first["B+A"][1], rtol=0, atol=1e-3)
    assert np.abs(first["A+B"][1] - first["A"][1]).mean() > 0.01

    server.free()
    second = run(-0.4)
    assert (second["A"][0], second["plain"][0]) == (first["A"][0], plain)
    assert np.abs(second["A+B"][1] - first["A+B"][1]).mean() > 0.01


def test_combining_prompts_equals_encoding_them_together(make: Callable[..., Steering]) -> None:
    s = make()
    adapter = s.adapter()
    photos = [s.photo(0), s.photo(1)]
    both = s.graph.add("ImageBatch", image1=photos[0], image2=photos[1])
    together = s.encode(adapter, both, strengths="1, 0.5")
    strengths = {f"strength_{i}": value for i, value in enumerate((1.0, 0.5, 1.0, 1.0, 1.0), 1)}
    combined = s.graph.add(
        "ImagePromptCombine",
        adapter=adapter,
        combine="concat",
        prompt_1=s.encode(adapter, photos[0]),
        prompt_3=s.encode(adapter, photos[1]),
        **(strengths | {"strength_2": 3.0, "strength_3": 0.5}),
    )
    saved = [s.sample(s.apply(s.model, adapter, prompt)) for prompt in (together, combined)]
    result = s.run()
    np.testing.assert_allclose(*(result.tensor(node) for node in saved), rtol=0, atol=1e-3)


def test_one_strength_is_that_of_every_reference(make: Callable[..., Steering]) -> None:
    s = make()
    adapter = s.adapter()
    both = s.graph.add("ImageBatch", image1=s.photo(0), image2=s.photo(1))
    prompts = [s.encode(adapter, both, strengths=text) for text in ("0.5", "0.5, 0.5", "")]
    saved = [s.sample(s.apply(s.model, adapter, prompt)) for prompt in prompts]
    result = s.run()
    one, two, whole = (result.sha256(node) for node in saved)
    assert one == two != whole


# --- faces ------------------------------------------------------------------------------------------------------------


def encode_faces(s: Steering, adapter: Node, **settings: Any) -> Node:
    inputs = {"face": "largest", "number": 1, "combine": "concat", "picture_strength": 1.0, "per_latent": False}
    inputs |= {"adapter": adapter, "face_model": s.graph.add("TestFaceModel"), "image": s.photo(2)} | settings
    return s.graph.add("ImagePromptEncodeFace", **inputs)


def test_which_face_is_chosen(make: Callable[..., Steering]) -> None:
    """Of three faces: the second is the largest, the first the best detection, the third lies in the mask."""
    s = make()
    adapter = s.adapter("faceid")
    right = s.mask(0.0, 1.0)
    choices = {
        "largest": {},
        "best": {"face": "best"},
        "all": {"face": "all"},
        "second largest": {"face": "nth largest", "number": 2},
        "second from left": {"face": "nth from left", "number": 2},
        "third from left": {"face": "nth from left", "number": 3},
        "in the mask": {"mask": right},
        "a picture without transparency": {"mask": s.photo(2)[1]},
    }
    saved = {name: s.save(encode_faces(s, adapter, **settings)[1]) for name, settings in choices.items()}
    result = s.run()
    crops = {name: result.tensor(node) for name, node in saved.items()}
    assert [len(crop) for crop in crops.values()] == [1, 1, 3, 1, 1, 1, 1, 1]
    assert crops["largest"].shape == (1, 224, 224, 3)
    for same, other in (
        ("largest", "second from left"), ("best", "second largest"), ("in the mask", "third from left"),
        ("largest", "a picture without transparency"),
    ):  # fmt: skip
        assert np.array_equal(crops[same], crops[other]), (same, other)
    assert np.array_equal(crops["all"][:1], crops["largest"])
    assert not np.array_equal(crops["largest"], crops["best"])


def test_faces_steer(make: Callable[..., Steering]) -> None:
    s = make()
    face = s.adapter("faceid")
    plain = s.sample(s.model)
    steered = s.sample(s.apply(s.model, face, encode_faces(s, face)[0]))
    result = s.run()
    assert result.sha256(steered) != result.sha256(plain)


def test_faces_steer_away_from_a_negative_picture(make: Callable[..., Steering]) -> None:
    s = make()
    face = s.adapter("faceid")
    prompts = [encode_faces(s, face), encode_faces(s, face, negative=s.photo(1))]
    saved = [s.sample(s.apply(s.model, face, prompt[0])) for prompt in prompts]
    result = s.run()
    assert result.sha256(saved[0]) != result.sha256(saved[1])


def test_a_wide_reference_is_seen_as_tiles(server: ComfyServer, make: Callable[..., Steering]) -> None:
    """A picture of two squares as tiles is the two squares as references of their own."""
    s = make()
    adapter = s.adapter()
    squares = np.random.default_rng(1).integers(0, 255, (2, 32, 32, 3), np.uint8).repeat(2, 1).repeat(2, 2)
    left, right = (s.graph.add("LoadImage", image=server.upload_image(x, f"{i}.png")) for i, x in enumerate(squares))
    wide = s.graph.add("LoadImage", image=server.upload_image(np.concatenate([*squares], 1), "wide.png"))
    both = s.graph.add("ImageBatch", image1=left, image2=right)
    prompts = [s.encode(adapter, wide, crop="tiles"), s.encode(adapter, both), s.encode(adapter, wide)]
    saved = [s.sample(s.apply(s.model, adapter, prompt)) for prompt in prompts]
    result = s.run()
    tiled, together, middle = (result.tensor(node) for node in saved)
    np.testing.assert_allclose(tiled, together, rtol=0, atol=1e-3)
    assert np.abs(tiled - middle).max() > 1e-2


def test_tiles_steer_their_own_places(make: Callable[..., Steering]) -> None:
    """Of two squares side by side: the same as each applied to its half; strength 0 is the plain model."""
    s = make(width=128)
    adapter = s.adapter()
    left, right = s.photo(0), s.photo(1)
    wide = s.graph.add("ImageStitch", image1=left, image2=right, direction="right", match_image_size=True,
                       spacing_width=0, spacing_color="white")  # fmt: skip
    inputs = {"adapter": adapter, "clip_vision": s.vision, "image": wide, "combine": "concat", "per_latent": False}
    tiled, off = (
        s.graph.add("ImagePromptApplyTiled", model=s.model, **inputs, **(APPLY | {"strength": n}), sharpening=0.0)
        for n in (0.8, 0.0)
    )
    halves = s.apply(s.model, adapter, s.encode(adapter, left), strength=0.8, mask=s.mask(1.0, 0.0))
    halves = s.apply(halves, adapter, s.encode(adapter, right), strength=0.8, mask=s.mask(0.0, 1.0))
    saved = [s.sample(model) for model in (tiled[0], halves, off[0], s.model)]
    shown = [s.save(tiled[i]) for i in (1, 2)]
    result = s.run()
    np.testing.assert_allclose(result.tensor(saved[0]), result.tensor(saved[1]), rtol=0, atol=1e-3)
    assert result.sha256(saved[2]) == result.sha256(saved[3]) != result.sha256(saved[0])
    assert [result.tensor(node).shape for node in shown] == [(2, 64, 64, 3), (2, 64, 128)]


def test_a_drawn_curve_is_sampled_as_the_same_curve_in_words(
    server: ComfyServer, make: Callable[..., Steering]
) -> None:
    """Numbers of another node, above 1 too, and the curve of the host's own editor, where it has one."""
    s = make(steps=6)
    adapter = s.adapter("base")
    prompt = s.encode(adapter, s.photo())

    def sampled(**settings: Any) -> Any:
        return s.sample(s.apply(s.model, adapter, prompt, schedule=s.schedule(**settings)))

    def floats(*numbers: float) -> Any:
        return s.graph.add("TestFloats", numbers=json.dumps(numbers))

    words, constant = sampled(curve="0: 1.5, 0.5: 0.75, 1: 0"), sampled(curve="0: 1.5, 1: 1.5")
    listed, halved = sampled(drawn=floats(1.5, 0.75, 0)), sampled(drawn=floats(0.75, 0.375, 0), top=2.0)
    one = sampled(drawn=floats(1.5))
    edited: list[Any] = []
    if "CurveEditor" in server.object_info():
        line = {"points": [[0, 1], [1, 0]], "interpolation": "linear"}
        edited.append(sampled(drawn=s.graph.add("CurveEditor", curve=line), top=1.5))
    else:
        assert server.host.version == "0.3.64", "newer hosts draw curves"
    result = s.run()
    assert result.sha256(listed) == result.sha256(halved) == result.sha256(words)
    assert result.sha256(one) == result.sha256(constant) != result.sha256(words)
    for node in edited:
        np.testing.assert_allclose(result.tensor(node), result.tensor(words), rtol=0, atol=1e-3)
        assert np.abs(result.tensor(node) - result.tensor(constant)).max() > 1e-2


def test_noise_is_made_of_the_image(make: Callable[..., Steering]) -> None:
    s = make()
    inputs = {"strength": 1.0, "blur": 0}
    made = [s.graph.add("ImagePromptNoise", kind="dissolve", **inputs, **more) for more in ({}, {"image": s.photo()})]
    kinds = [
        s.graph.add("ImagePromptNoise", kind=k, **inputs, image=s.photo()) for k in ("fade", "gaussian", "shuffle")
    ]
    saved = [s.save(node) for node in (*made, *kinds)]
    adapter = s.adapter()
    away = s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo(), negative=made[1])))
    plain = s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))
    result = s.run()
    assert {result.tensor(node).shape for node in saved} == {(1, 224, 224, 3)}
    assert len({result.sha256(node) for node in saved}) == 5
    assert result.sha256(away) != result.sha256(plain)


def test_inspect_lists_every_site_with_its_weight(server: ComfyServer, sd15: str, adapters: Path) -> None:
    s = Steering(server, sd15, adapters, unet="sd15")
    adapter = s.adapter()
    model = s.apply(s.model, adapter, s.encode(adapter, s.photo()), strength=0.7)
    alone = s.graph.add("ImagePromptInspect", adapter=adapter)
    fitted = s.graph.add("ImagePromptInspect", adapter=adapter, model=model)
    result = s.run()
    (about,), (text,) = result.text(alone), result.text(fitted)
    assert "plus" in about
    assert "SD1.5" in about
    assert text.startswith(about)
    rows = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in ("input", "middle", "output")]
    assert len(rows) == 16
    assert all(row.endswith("0.7") for row in rows), "every site, the middle block included, has the strength"
    assert sum("middle" in row for row in rows) == 1


def test_inspect_writes_its_text_into_the_node(make: Callable[..., Steering]) -> None:
    """The frontend shows binary messages of type 3 (length of the node's id, id, text) inside the node that runs."""
    s = make()
    node = s.graph.add("ImagePromptInspect", adapter=s.adapter())
    socket = websocket.create_connection(s.server.url.replace("http", "ws") + "/ws", timeout=60)
    try:
        (text,) = s.run().text(node)
        while True:
            message = socket.recv()
            if isinstance(message, bytes) and int.from_bytes(message[:4], "big") == 3:
                break
    finally:
        socket.close()
    shown = message[8:].decode().removeprefix(node.id)
    assert shown == text


# --- files ------------------------------------------------------------------------------------------------------------


def test_one_copy_per_file_whoever_loads_it(server: ComfyServer, make: Callable[..., Steering]) -> None:
    def load(seed: int, run: int) -> str:
        s = make()
        node = s.graph.add("TestSameObject", value=s.adapter("base", seed=seed), tag="copies", run=run)
        return s.run().text(node)[0]

    assert load(3, 0) == "first"
    server.free()  # the Load node runs again, while the first copy is still in use elsewhere
    assert load(3, 1) == "same"
    assert load(4, 2) == "another"


def test_a_changed_file_is_read_again(server: ComfyServer, make: Callable[..., Steering], adapters: Path) -> None:
    file = server.models("ipadapter") / "changing.safetensors"

    def run(seed: int) -> str:
        shutil.copy(build_adapter("base", "sd15_small", adapters, seed=seed), file)
        s = make()
        adapter = s.graph.add("ImagePromptLoadAdapter", file=file.name)
        saved = s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))
        return s.run().sha256(saved)

    assert run(5) != run(6)


def test_trained_output_is_found(server: ComfyServer, make: Callable[..., Steering], adapters: Path) -> None:
    trained = server.base / "output" / "ipadapter" / "my run" / "step_100.safetensors"
    trained.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(build_adapter("base", "sd15_small", adapters), trained)
    options = server.object_info("ImagePromptLoadAdapter")["input"]["required"]["file"][1]["options"]
    name = str(Path("my run") / "step_100.safetensors")
    assert name in options
    s = make()
    node = s.graph.add("ImagePromptInspect", adapter=s.graph.add("ImagePromptLoadAdapter", file=name))
    assert "step_100.safetensors" in s.run().text(node)[0]


def test_a_saved_prompt_is_listed_at_once_and_gives_the_same_picture(
    server: ComfyServer, make: Callable[..., Steering]
) -> None:
    def files() -> list[str]:
        return server.object_info("ImagePromptLoad")["input"]["required"]["file"][1]["options"]

    before = files()
    s = make()
    adapter = s.adapter()
    prompt = s.encode(adapter, s.photo(), negative=s.photo(2))
    save = s.graph.add("ImagePromptSave", image_prompt=prompt, filename_prefix="looks/mine")
    fresh = s.sample(s.apply(s.model, adapter, prompt))
    result = s.run()
    name = str(Path("looks") / "mine_00001.ipadpt.safetensors")
    assert set(files()) - set(before) == {name}
    assert str(server.base / "output" / "image_prompts" / name) in result.text(save)[0]

    s = make()
    adapter = s.adapter()
    loaded = s.graph.add("ImagePromptLoad", adapter=adapter, file=name, per_latent=False)
    again = s.sample(s.apply(s.model, adapter, loaded))
    both = s.encode(adapter, s.photo(1))
    strengths = {f"strength_{i}": 1.0 for i in range(1, 6)}
    inputs = {"adapter": adapter, "combine": "average", "prompt_1": loaded, "prompt_2": both}
    s.sample(s.apply(s.model, adapter, s.graph.add("ImagePromptCombine", **inputs, **strengths)))
    assert s.run().sha256(again) == result.sha256(fresh)


def test_embeds_of_the_old_pack_load_from_the_input_folder(server: ComfyServer, make: Callable[..., Steering]) -> None:
    folder = server.base / "input" / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.rand(2, VISION_TOKENS, VISION_HIDDEN), folder / "old.ipadpt")
    s = make(batch=2)
    adapter = s.adapter()
    file = {"adapter": adapter, "file": str(Path("shared") / "old.ipadpt") + " [input]"}
    saved = [
        s.sample(
            s.apply(s.model, adapter, s.graph.add("ImagePromptLoad", **file, per_latent=each, clip_vision=s.vision))
        )
        for each in (False, True)
    ]
    result = s.run()
    assert result.sha256(saved[0]) != result.sha256(saved[1])


# --- what goes wrong --------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def write_lora(path: Path) -> None:
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(4, 2)}, path)


def write_truncated(path: Path) -> None:
    save_file(adapter_tensors("base", "sd15_small"), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_nan(path: Path) -> None:
    state = adapter_tensors("base", "sd15_small")
    state["ip_adapter.3.to_k_ip.weight"][1, 2] = float("nan")
    save_file(state, path)


def write_code(path: Path) -> None:
    torch.save({"image_proj": {"proj.weight": RunsCode()}}, path)


BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "lora.safetensors": (write_lora, "LoRA"),
    "truncated.safetensors": (write_truncated, "truncated"),
    "nan.safetensors": (write_nan, "NaN"),
    "code.bin": (write_code, "carries code"),
    "empty.safetensors": (lambda path: path.write_bytes(b"") and None, "empty"),
}


def check_message(failure: pytest.ExceptionInfo[ExecutionFailed], expected: str) -> None:
    """One of ours: a type of this pack, the expected words, and no more than a short paragraph."""
    error = failure.value
    assert error.exception_type.split(".")[-1] in {
        "UnknownFormatError", "UnsafeFileError", "CorruptFileError", "IncompatibleAdapterError",
        "IncompatibleEncoderError", "InvalidInputError",
    }, f"{error.exception_type}: {error.message}\n{error.traceback}"  # fmt: skip
    assert expected.lower() in error.message.lower()
    assert len(error.message) < 600
    assert "\n" not in error.message


def check_still_works(make: Callable[..., Steering]) -> None:
    s = make(steps=1)
    adapter = s.adapter("base")
    saved = s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))
    assert np.isfinite(s.run().tensor(saved)).all()


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(server: ComfyServer, make: Callable[..., Steering], name: str) -> None:
    write, expected = BAD_FILES[name]
    path = server.models("ipadapter") / name
    write(path)
    before = path.read_bytes()
    s = make()
    s.graph.add("ImagePromptInspect", adapter=s.graph.add("ImagePromptLoadAdapter", file=name))
    with pytest.raises(ExecutionFailed) as failure:
        s.run()
    check_message(failure, expected)
    assert name in failure.value.message
    assert path.read_bytes() == before
    assert "this must never be printed" not in server.log
    check_still_works(make)


def wrong_model(s: Steering) -> None:
    sdxl_file = build_adapter("base", "sdxl_small", s.folder)
    adapter = s.graph.add("ImagePromptLoadAdapter", file=s.server.add_model("ipadapter", sdxl_file))
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))


def wrong_vision(s: Steering) -> None:
    s.vision = s.graph.add("TestClipVision", seed=0, hidden_size=64)
    adapter = s.adapter()
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))


def other_adapters_prompt(s: Steering) -> None:
    sdxl_file = build_adapter("base", "sdxl_small", s.folder)
    other = s.graph.add("ImagePromptLoadAdapter", file=s.server.add_model("ipadapter", sdxl_file))
    s.sample(s.apply(s.model, s.adapter(), s.encode(other, s.photo())))


def bad_image(kind: str) -> Callable[[Steering], None]:
    def build(s: Steering) -> None:
        adapter = s.adapter()
        s.sample(s.apply(s.model, adapter, s.encode(adapter, s.graph.add("TestImage", kind=kind))))

    return build


def reference_mask_of_another_size(s: Steering) -> None:
    adapter = s.adapter()
    mask = s.graph.add("SolidMask", value=1.0, width=32, height=64)
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo(), mask=mask)))


def unreadable(**settings: Any) -> Callable[[Steering], None]:
    def build(s: Steering) -> None:
        adapter = s.adapter()
        prompt = s.encode(adapter, s.photo())
        s.sample(s.apply(s.model, adapter, prompt, schedule=s.schedule(**settings)))

    return build


def two_strengths_for_one_image(s: Steering) -> None:
    adapter = s.adapter()
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo(), strengths="1, 2")))


def face_adapter_on_pictures(s: Steering) -> None:
    adapter = s.adapter("faceid")
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo())))


def picture_adapter_on_faces(s: Steering) -> None:
    adapter = s.adapter("base")
    s.sample(s.apply(s.model, adapter, encode_faces(s, adapter)[0]))


def no_lora_inside(s: Steering) -> None:
    s.sample(s.graph.add("ImagePromptApplyFaceLoRA", model=s.model, adapter=s.adapter("base"), strength=1.0))


def fourth_of_three_faces(s: Steering) -> None:
    adapter = s.adapter("faceid")
    s.sample(s.apply(s.model, adapter, encode_faces(s, adapter, face="nth largest", number=4)[0]))


def two_encoders(s: Steering) -> None:
    adapter = s.adapter("base")
    first = s.encode(adapter, s.photo())
    s.vision = s.graph.add("TestClipVision", seed=0, hidden_size=64)
    strengths = {f"strength_{i}": 1.0 for i in range(1, 6)}
    inputs = {"combine": "average", "prompt_1": first, "prompt_2": s.encode(adapter, s.photo(1))}
    s.sample(s.apply(s.model, adapter, s.graph.add("ImagePromptCombine", adapter=adapter, **inputs, **strengths)))


def test_the_mask_of_a_picture_without_transparency_is_no_mask(
    server: ComfyServer, make: Callable[..., Steering]
) -> None:
    """Load Image gives 64 x 64 zeros for it, whatever the picture's size."""
    s = make()
    adapter = s.adapter()
    picture = np.random.default_rng(3).integers(0, 255, (80, 96, 3), np.uint8)
    loaded = s.graph.add("LoadImage", image=server.upload_image(picture, "no_transparency.png"))
    plain, masked = (
        s.sample(s.apply(s.model, adapter, s.encode(adapter, loaded, **more))) for more in ({}, {"mask": loaded[1]})
    )
    result = s.run()
    assert result.sha256(plain) == result.sha256(masked)


def saved_for_another_family(s: Steering) -> None:
    file = s.server.add_model("image_prompts", build_prompt(s.folder))
    adapter = s.adapter("base")
    s.sample(s.apply(s.model, adapter, s.graph.add("ImagePromptLoad", adapter=adapter, file=file, per_latent=False)))


def saved_without_what_no_image_is(s: Steering) -> None:
    file = s.server.models("image_prompts") / "bare.ipadpt"
    torch.save(torch.rand(1, VISION_TOKENS, VISION_HIDDEN), file)
    adapter = s.adapter()
    prompt = s.graph.add("ImagePromptLoad", adapter=adapter, file=file.name, per_latent=False)
    s.sample(s.apply(s.model, adapter, prompt))


MISTAKES: dict[str, tuple[Callable[[Steering], None], str]] = {
    "adapter for another model": (wrong_model, "adapter for"),
    "wrong image encoder": (wrong_vision, "hidden states of width 32"),
    "prompt of another adapter": (other_adapters_prompt, "encode the image with the adapter that you apply"),
    "NaN image": (bad_image("nan"), "NaN"),
    "image without pixels": (bad_image("no pixels"), "no pixels"),
    "no images": (bad_image("no images"), "empty"),
    "image in 0..255": (bad_image("0..255"), "0..1"),
    "channels first": (bad_image("latent"), "channels"),
    "reference mask of another size": (reference_mask_of_another_size, "32x64"),
    "site that is not there": (unreadable(sites="input 99: 1"), "matches no site"),
    "strength for no image": (two_strengths_for_one_image, "strengths"),
    "face adapter on whole pictures": (face_adapter_on_pictures, "reads faces and not whole pictures"),
    "adapter for pictures on faces": (picture_adapter_on_faces, "reads whole pictures and not faces"),
    "no LoRA inside": (no_lora_inside, "carries no LoRA"),
    "face that is not there": (fourth_of_three_faces, "face number 4"),
    "prompts of two encoders": (two_encoders, "encoder"),
    "prompt saved for another family": (saved_for_another_family, "which reads the image embeds"),
    "saved without what no image is": (saved_without_what_no_image_is, "connect the image encoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence_and_the_next_graph_runs(make: Callable[..., Steering], mistake: str) -> None:
    build, expected = MISTAKES[mistake]
    s = make()
    build(s)
    with pytest.raises(ExecutionFailed) as failure:
        s.run()
    check_message(failure, expected)
    check_still_works(make)


@pytest.mark.parametrize("typo", [{"curve": "up, then down"}, {"sites": "somewhere"}], ids=["curve", "sites"])
def test_typos_are_rejected_before_anything_runs(make: Callable[..., Steering], typo: dict[str, str]) -> None:
    s = make()
    unreadable(**typo)(s)
    with pytest.raises(GraphRejected, match="cannot read"):
        s.run()


def test_values_out_of_range_are_rejected_before_anything_runs(make: Callable[..., Steering]) -> None:
    s = make()
    adapter = s.adapter()
    s.sample(s.apply(s.model, adapter, s.encode(adapter, s.photo()), start=1.5))
    with pytest.raises(GraphRejected, match="value_bigger_than_max"):
        s.run()


def test_a_region_is_shown_in_the_models_grids(server: ComfyServer, sd15_small: str) -> None:
    """One panel for each resolution of a UNet, one for each of the masks."""
    graph = Graph()
    whole, nothing = (graph.add("SolidMask", value=value, width=64, height=64) for value in (1.0, 0.0))
    node = graph.add(
        "ImagePromptPreviewRegion",
        model=graph.add("CheckpointLoaderSimple", ckpt_name=sd15_small),
        mask=graph.add("MaskComposite", destination=nothing, source=whole, x=32, y=0, operation="add"),
        latent=graph.add("EmptyLatentImage", width=128, height=128, batch_size=1),
    )
    (picture,) = server.run(graph).images(node)
    assert picture.shape[1] > 4 * 288
    left, right = picture[100, 20].astype(int), picture[100, 290].astype(int)
    assert right[2] - right[0] > 40
    assert left[2] == left[0]
