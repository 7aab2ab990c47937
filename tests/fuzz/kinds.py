"""Kinds of input: how one is made and damaged, and what is done with it once it loads.

``make(rng, keep)`` gives a Case; ``keep`` chooses which of its changes are made (all of them by default), so that a failure can be
told with fewer. ``use(folder, main)`` opens and uses it; whatever it raises is judged by the harness. Errors of this package are what
damaged input should give.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import tiny_loras
import tiny_towers
from fuzz import mutators as m
from ipadapter_core import WeightSchedule, bake, load_adapter, load_prompt
from ipadapter_core.attention.presets import parse_layers, parse_site_factors
from ipadapter_core.attention.schedule import parse_curve, parse_numbers
from ipadapter_core.backends.diffusers import lora as diffusers_lora
from ipadapter_core.checkpoints import describe_adapter, save_adapter, trainable_families
from ipadapter_core.commands.cli import build_parser
from ipadapter_core.errors import AdapterError
from ipadapter_core.features import pack_face
from ipadapter_core.generate import read_image, read_mask
from ipadapter_core.images.encoder import load_image_encoder
from ipadapter_core.images.files import decode_picture
from ipadapter_core.lora import (  # fmt: skip
    LoRAPatch,
    block_vector,
    describe_lora,
    load_lora,
    match_lora,
    parse_selector,
    parse_where,
    save_lora,
    targets_of,
)
from ipadapter_core.lora.convert import KEY_FORMATS
from ipadapter_core.lora.factors import Smaller, combine, resize
from ipadapter_core.lora.inspection import describe_facts, draw_heat_map, heat_map, lora_facts, verify
from ipadapter_core.models import layout_of
from ipadapter_core.prompt.combine import combine_prompts
from ipadapter_core.prompt.encode import prompt_from_features
from ipadapter_core.report import describe_spec, spec_facts
from ipadapter_core.training.collection import collect, hold_out, look
from ipadapter_core.training.config import DataConfig, OutputConfig, load_config, parse_overrides, write_config
from ipadapter_core.training.pictures import cut_target
from ipadapter_core.training.sources import open_source
from ipadapter_core.training.state import TRAINING, RunFolder
from tiny import TRANSFORMERS
from tiny_models import FEATURE_DIM, adapter_state, call_unet, noise, tiny_unet

ROOT = Path(__file__).resolve().parents[2]
MARKER = "FUZZ_MARKER"
"""Environment variable with the file that pickles with code try to write."""


@dataclass
class Case:
    """Files to write, which of them to open, whether it must be refused, how many changes were made, what it is."""

    files: dict[str, bytes]
    main: str
    refused: bool = False
    changes: int = 0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


Keep = Collection[int] | None
Make = Callable[[Random, Keep], Case]
Use = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Kind:
    name: str
    make: Make
    use: Use
    share: int = 1
    """How often this kind is drawn, beside others."""


def changed(
    rng: Random, keep: Keep, value: Any, ways: Sequence[Callable[[Random, Any], Any]], most: int = 3
) -> tuple[Any, int]:
    """A value after one to ``most`` changes, each with a random source of its own."""
    count = rng.choice((1, 1, 1, 2, most))
    for number in range(count):
        own = Random(rng.getrandbits(64))
        way = own.choice(ways)
        if keep is None or number in keep:
            value = way(own, value)
    return value, count


def damaged(rng: Random, keep: Keep, raw: bytes, *ways: Callable[[Random, bytes], bytes]) -> tuple[bytes, int]:
    """A file after changes of its bytes, or of the structure that ``ways`` know."""
    return changed(rng, keep, raw, (*m.BYTES, *ways * (1 + len(m.BYTES) // max(1, len(ways)))) if ways else m.BYTES)


# --- files of tensors --------------------------------------------------------------------------------------------

CONTAINERS = ("safetensors", "zip", "legacy")
STRUCTURE = {"safetensors": m.edit_header, "zip": m.edit_zip, "legacy": m.edit_pickle}


def contain(state: Any, container: str, metadata: dict[str, str] | None = None) -> bytes:
    if container == "safetensors":
        return m.safetensors_bytes(state, metadata)
    return m.pickle_bytes(state, zipped=container == "zip")


def of_tensors(
    rng: Random,
    keep: Keep,
    state: m.State,
    name: str,
    nest: Callable[[m.State], Any],
    texts: dict[str, str],
    containers: Sequence[str] = CONTAINERS,
) -> Case:
    """A table of tensors damaged as a table, or as the file that holds it."""
    container = rng.choice(containers)

    def contained(state: m.State) -> bytes:
        return contain(state if container == "safetensors" else nest(state), container, texts)

    note = f"{name} {container}"
    way = rng.random()
    if way < 0.08:
        return Case({"a.bin": contained(m.with_nan(rng, state))}, "a.bin", True, 1, f"{note}, one number is none")
    if way < 0.14:
        raw = contained(state)
        return Case({"a.bin": raw[: rng.randrange(len(raw))]}, "a.bin", True, 1, f"{note}, truncated")
    if way < 0.55:
        state, count = changed(rng, keep, state, m.STATES)
        return Case({"a.bin": contained(state)}, "a.bin", changes=count, note=f"{note}, tensors")
    raw, count = damaged(rng, keep, contained(state), STRUCTURE[container])
    suffix = rng.choice(("safetensors", "bin", "pt", "ckpt"))
    return Case({f"a.{suffix}": raw}, f"a.{suffix}", changes=count, note=f"{note}, bytes")


def nested(state: m.State) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for key, t in state.items():
        group, _, rest = key.partition(".")
        groups.setdefault(group, {})[rest] = t
    return groups


@cache
def unet() -> Any:
    return tiny_unet("small")


@cache
def layout() -> Any:
    return layout_of(unet())


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in trainable_families()},
    **{family: (family, {"depth": 1, "num_tokens": 3, "inner_dim": 16, "hidden_dim": 16}) for family in TRANSFORMERS},
    "anima-character": ("anima-character", {"lora_rank": 2}),
    "plus": ("plus", {"depth": 1, "num_tokens": 4, "inner_dim": 64, "hidden_dim": 16}),
    "faceid": ("faceid", {}),
    "faceid with LoRA": ("faceid", {"lora_rank": 2}),
    "faceid-plus": ("faceid-plus", {"depth": 1, "face_dim": 12}),
    "faceid-plusv2 with LoRA": ("faceid-plus", {"depth": 1, "face_dim": 12, "lora_rank": 2}),
}


@cache
def adapter_seed(family: str) -> m.State:
    kind, sizes = FAMILIES[family]
    return adapter_state(kind, layout(), **sizes)


def make_adapter(rng: Random, keep: Keep) -> Case:
    family = rng.choice(sorted(FAMILIES))
    return of_tensors(rng, keep, adapter_seed(family), family, nested, {"encoder": "tiny", "faceid_version": "2"})


def features_for(adapter: Any) -> Tensor:
    spec = adapter.spec
    features = noise(*((2, spec.feature_dim) if spec.format.feature.rank == 2 else (2, 8, spec.feature_dim)))
    return pack_face(noise(2, spec.options["face_dim"]), features) if "face_dim" in spec.options else features


@torch.no_grad()
def use_adapter(folder: Path, main: Path) -> None:
    spec = describe_adapter(main)
    adapter = load_adapter(main, dtype=torch.float32)
    assert adapter.spec == spec, "the header tells another adapter than the file"
    assert describe_spec(spec, adapter.name).isprintable() or True
    spec_facts(spec)
    for tensor in adapter.module.state_dict().values():
        assert bool(torch.isfinite(tensor).all()), "a number of a loaded adapter is none"
    for tensor in adapter.lora.values():
        assert bool(torch.isfinite(tensor.float()).all()), "a number of a loaded LoRA is none"
    if not spec.projected_by_model:
        features = features_for(adapter)
        prompt = prompt_from_features(adapter, features, torch.zeros_like(features))
        reach, tokens, timestep = spec.format.reach, prompt.cond, 500.0 if spec.format.reach.timed else None
        if timestep is not None:
            tokens = adapter.tokens_at(tokens, timestep)
        for index in range(len(spec.layer_channels)):
            adapter.key_value(index, tokens[:, :1], timestep)
            gate = adapter.gate(index) if reach.gated else None
            if gate is not None:
                gate(noise(1, 1, spec.options["embedding_dim"]))
        with suppress(AdapterError):
            bake(adapter, prompt, layout(), WeightSchedule())
    save_adapter(adapter, folder / "again.safetensors")
    assert load_adapter(folder / "again.safetensors").spec.family == spec.family
    if adapter.lora:
        with suppress(AdapterError):
            load_lora(adapter.loadable_lora())


# --- LoRA --------------------------------------------------------------------------------------------------------


@cache
def lora_targets() -> list[Any]:
    found = [
        t
        for t in targets_of(unet()).targets.values()
        if len(t.shape) > 1 and t.shape[0] % 4 == 0 and t.shape[1] % 2 == 0
    ]
    convolutions = [t for t in found if len(t.shape) == 4]
    return [t for t in found if "attn2.to_q" in t.path or "ff.net.2" in t.path][:2] + convolutions[:1]


def _glora(shape: tuple[int, ...], rank: int, seed: int) -> m.State:
    out, rows = shape[0], shape[1]
    sizes = {"a1": (rows, rank), "a2": (rank, rows), "b1": (out, rank), "b2": (rank, rows)}
    return {f"{name}.weight": noise(*size, seed=seed) / 9 for name, size in sizes.items()}


def _boft(shape: tuple[int, ...], rank: int, seed: int) -> m.State:
    return {"oft_blocks": noise(2, shape[0] // 4, 4, 4, seed=seed) / 9, "alpha": torch.tensor(0.01)}


def _locon(shape: tuple[int, ...], rank: int, seed: int) -> m.State:
    made = tiny_loras.low_rank((*shape[:2], *shape[2:]), rank, seed)
    if len(shape) == 4:
        made["lora_mid.weight"] = noise(rank, rank, *shape[2:], seed=seed)
        made["lora_down.weight"] = made["lora_down.weight"][:, :, :1, :1].clone()
    return made


MORE_MAKERS = {**tiny_loras.MAKERS, "GLoRA": _glora, "BOFT": _boft, "LoCon": _locon}
LORA_PREFIXES = (
    "lora_unet_",
    "lycoris_",
    "lora_transformer_",
    "unet.",
    "base_model.model.",
    "diffusion_model.",
    "",
    "transformer.",
)
PEFT_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@cache
def lora_seed(algorithm: str, prefix: str) -> m.State:
    state: m.State = {}
    for number, target in enumerate(lora_targets()):
        dotted = prefix.endswith(".") or not prefix
        if algorithm == "GLoRA" and len(target.shape) != 2:
            continue
        for key, t in MORE_MAKERS[algorithm](target.shape, 2, 7 * number).items():
            key = PEFT_NAMES.get(key, key) if prefix in ("unet.", "base_model.model.") else key
            state[f"{prefix}{target.path if dotted else target.path.replace('.', '_')}.{key}"] = t.contiguous()
    return state


TEXTS_OF_LORA = {
    "ss_network_dim": "2",
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": '{"a": {"cat": 3}}',
    "modelspec.title": "x",
}


def make_lora(rng: Random, keep: Keep) -> Case:
    algorithm, prefix = rng.choice(sorted(MORE_MAKERS)), rng.choice(LORA_PREFIXES)
    texts = dict(TEXTS_OF_LORA)
    if rng.random() < 0.2:
        texts[rng.choice(sorted(texts))] = rng.choice(m.TEXTS)
    return of_tensors(rng, keep, lora_seed(algorithm, prefix), f"{algorithm} {prefix}", dict, texts)


def use_lora(folder: Path, main: Path) -> None:
    with suppress(AdapterError):
        verify(main).text()
    with suppress(AdapterError):
        describe_facts(lora_facts(main))
    describe_lora(main)
    weights = load_lora(main)
    with suppress(AdapterError):
        draw_heat_map(heat_map(weights), main.name)
    with suppress(AdapterError):
        resize(weights, Smaller(1))
    with suppress(AdapterError):
        combine([weights, weights], [1.0, 0.5])
    for key_format in KEY_FORMATS:
        with suppress(AdapterError):
            save_lora(weights, folder / f"{key_format}.safetensors", key_format=key_format)
            load_lora(folder / f"{key_format}.safetensors")
    model = unet()
    placed = match_lora(weights, {"denoiser": targets_of(model)})
    placed.summary()
    patch = LoRAPatch(placed, 0.7)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    try:
        with suppress(AdapterError):
            diffusers_lora.merge(model, patch).remove()
        for key, t in model.state_dict().items():
            assert torch.equal(t, before[key]), f"{key} is another after merging and taking out"
        with suppress(AdapterError):
            applied = diffusers_lora.apply(model, patch)
            try:
                call_unet(model, noise(1, 4, 8, 8), noise(1, 4, 32))
            finally:
                applied.remove()
    finally:
        model.load_state_dict(before)


def make_peft(rng: Random, keep: Keep) -> Case:
    config = {
        "peft_type": rng.choice(("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")), "r": 2, "lora_alpha": 4, "alpha": 4, "use_rslora": False,
        "use_dora": False, "target_modules": ["to_q", "to_k"], "rank_pattern": {}, "alpha_pattern": {"attn2.to_q": 3}, "bias": "none",
        "modules_to_save": None, "fan_in_fan_out": False, "lora_bias": False,
    }  # fmt: skip
    tree, count = changed(rng, keep, config, (m.edit_tree,))
    raw = m.json_bytes(rng, tree)
    if rng.random() < 0.2:
        raw, more = damaged(rng, keep, raw)
        count += more
    algorithm = rng.choice(("LoRA", "LoHa", "LoKr", "DoRA out"))
    files = {
        "adapter_model.safetensors": m.safetensors_bytes(lora_seed(algorithm, "base_model.model.")),
        "adapter_config.json": raw,
    }
    return Case(files, "adapter_model.safetensors", changes=count, note=f"PEFT {algorithm}")


# --- prompts -----------------------------------------------------------------------------------------------------


@cache
def adapters_for_prompts() -> list[Any]:
    return [load_adapter(adapter_seed(family), dtype=torch.float32, name=family) for family in ("base", "plus")]


def make_prompt(rng: Random, keep: Keep) -> Case:
    wide = rng.random() < 0.5
    embeds = noise(2, 5, FEATURE_DIM) if wide else noise(2, FEATURE_DIM)
    shape = rng.choice(("own", "own", "tensor", "pair", "list"))
    if shape == "own":
        state = {"embeds": embeds, "negative": torch.zeros_like(embeds[:1]), "neutral": torch.zeros_like(embeds[:1])}
        texts = {
            "feature": "penultimate" if wide else "image_embeds",
            "latents": "2",
            "encoder": "tiny",
            "face_scale": "1.0",
        }
        if rng.random() < 0.3:
            texts[rng.choice(sorted(texts))] = rng.choice([t for t in m.TEXTS if t.isprintable()])
        return of_tensors(rng, keep, state, "prompt", dict, texts, ("safetensors",))
    content: Any = {"tensor": embeds, "pair": torch.stack([embeds, embeds]), "list": [torch.cat([embeds, embeds])]}[
        shape
    ]
    container = rng.choice(("zip", "legacy"))
    if rng.random() < 0.3:
        part = content[0] if isinstance(content, list) else content
        own = Random(rng.getrandbits(64))
        part = own.choice((m.reshape_tensor, m.cast_tensor, m.with_nan, m.scale_tensor))(own, {"t": part})["t"]
        odd: Any = rng.choice(
            (
                part,
                [part],
                [part, part],
                (part,),
                {"a": part},
                part[:1].expand(10**6, *part.shape[1:]) if part.ndim and len(part) else part,
            )
        )
        return Case(
            {"a.ipadpt": m.pickle_bytes(odd, zipped=container == "zip")},
            "a.ipadpt",
            changes=1,
            note=f"{shape} {container}, tensors",
        )
    raw, count = damaged(rng, keep, m.pickle_bytes(content, zipped=container == "zip"), STRUCTURE[container])
    return Case({"a.ipadpt": raw}, "a.ipadpt", changes=count, note=f"{shape} {container}, bytes")


def use_prompt(folder: Path, main: Path) -> None:
    problems: list[Exception] = []
    for adapter in adapters_for_prompts():
        try:
            prompt = load_prompt(main, adapter)
        except AdapterError as error:
            problems.append(error)
            continue
        assert bool(torch.isfinite(prompt.cond).all() and torch.isfinite(prompt.uncond).all()), "a token is no number"
        combine_prompts(adapter, [prompt, prompt], combine="concat")
        bake(adapter, prompt, layout(), WeightSchedule())
    if len(problems) == len(adapters_for_prompts()):
        raise problems[0]


# --- pickles with code -------------------------------------------------------------------------------------------

CODE = f"import os; open(os.environ.get({MARKER!r}) or os.devnull, 'w').close()"


class Runs:
    """Calls something when it is unpickled."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.called, self.arguments


def gadgets() -> dict[str, Any]:
    return {
        "system": Runs(os.system, f'touch "${MARKER}"'),
        "exec": Runs(exec, CODE),
        "eval": Runs(eval, f"exec({CODE!r})"),
        "numpy": np.array([Runs(exec, CODE)], dtype=object),
        "torch.load": Runs(torch.load, io.BytesIO(pickle.dumps(Runs(exec, CODE)))),
        "loads": Runs(pickle.loads, pickle.dumps(Runs(exec, CODE))),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "module": torch.nn.Flatten(),
    }


def make_code(rng: Random, keep: Keep) -> Case:
    kind = rng.choice(sorted(gadgets()))
    gadget = gadgets()[kind]
    content = rng.choice(
        (gadget, {"image_proj": {"x": gadget}}, {"a": torch.ones(2), "b": gadget}, [gadget], {"a": [{"b": gadget}]})
    )
    way = rng.choice(("bare", "zip", "zip", "legacy", "legacy", "tar", "inst"))
    protocol = rng.choice((2, 2, 3, 4, 5)) if way != "bare" or kind == "torch.load" else rng.randrange(6)
    if way == "bare":
        raw = pickle.dumps(content, protocol)
    elif way == "tar":
        raw = m.tar_of({"pickle": pickle.dumps(content, 2), "storages": b"", "tensors": b""})
    elif way == "inst":
        raw = b"\x80\x02(S'" + f'touch "${MARKER}"'.encode() + b"'\nios\nsystem\n."
    else:
        raw = m.pickle_bytes(content, zipped=way == "zip", protocol=protocol)
    suffix = rng.choice(("bin", "ipadpt", "safetensors", "pt"))
    count = 0
    if rng.random() < 0.5:
        raw, count = damaged(rng, keep, raw, *([STRUCTURE[way]] if way in STRUCTURE else [m.edit_pickle]))
    return Case({f"a.{suffix}": raw}, f"a.{suffix}", count == 0, count, f"{kind} {way} protocol {protocol}")


def use_any_weights(folder: Path, main: Path) -> None:
    """By every reader; it must be refused by all."""
    refused: list[Exception] = []
    readers: tuple[Callable[[], object], ...] = (
        lambda: describe_adapter(main), lambda: load_adapter(main), lambda: load_lora(main),
        lambda: load_prompt(main, adapters_for_prompts()[0]),
    )  # fmt: skip
    for read in readers:
        try:
            read()
        except AdapterError as error:
            refused.append(error)
    if len(refused) == len(readers):
        raise refused[0]


# --- workflows ---------------------------------------------------------------------------------------------------

OLD_TYPES = (
    "IPAdapterAdvanced", "IPAdapter", "IPAdapterFaceID", "IPAdapterTiled", "IPAdapterBatch", "IPAdapterStyleComposition", "IPAdapterEmbeds",
    "IPAdapterPreciseStyleTransfer", "IPAdapterUnifiedLoader", "IPAdapterModelLoader", "IPAdapterInsightFaceLoader", "IPAdapterNoise",
    "IPAdapterEncoder", "IPAdapterCombineEmbeds", "PrepImageForClipVision", "IPAdapterWeights", "Reroute", "IPAdapterMS", "ClipVisionLoader",
    "Power Lora Loader (rgthree)",
)  # fmt: skip


def old_workflow(rng: Random) -> Any:
    def node(
        number: int, kind: str, inputs: dict[str, tuple[str, int | None]], outputs: list[str], widgets: list[Any]
    ) -> Any:
        return {
            "id": number, "type": kind, "pos": [100 * number, 50], "widgets_values": widgets,
            "inputs": [{"name": name, "type": t, "link": link} for name, (t, link) in inputs.items()],
            "outputs": [{"name": t, "type": t, "links": []} for t in outputs],
        }  # fmt: skip

    sockets = {"model": ("MODEL", 2), "ipadapter": ("IPADAPTER", 3), "image": ("IMAGE", 4), "attn_mask": ("MASK", 5)}
    checkpoint = rng.choice(("sd15.safetensors", "sdxl.safetensors", "ponyRealism.safetensors", "a b.ckpt"))
    nodes = [
        node(1, "CheckpointLoaderSimple", {}, ["MODEL", "CLIP", "VAE"], [checkpoint]),
        node(2, rng.choice(("IPAdapterUnifiedLoader", "IPAdapterUnifiedLoaderFaceID", "IPAdapterModelLoader")), {"model": ("MODEL", 1)},
             ["MODEL", "IPADAPTER"], [rng.choice(("PLUS (high strength)", "FULL FACE - SD1.5 only", "FACEID PLUS V2"))]),
        node(3, "LoadImage", {}, ["IMAGE", "MASK"], ["a.png"]),
        node(4, rng.choice(OLD_TYPES), sockets, ["MODEL"], [0.8, rng.choice(("ease in", "style transfer (SDXL)")), "average", 0.1, 0.9, "K+V"]),
        node(5, "KSampler", {"model": ("MODEL", 6)}, ["LATENT"], [1]),
        node(6, rng.choice(OLD_TYPES), {"image": ("IMAGE", None)}, ["IMAGE"], []),
    ]  # fmt: skip
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 4, 0, "MODEL"], [3, 2, 1, 4, 1, "IPADAPTER"]]
    links += [[4, 3, 0, 4, 2, "IMAGE"], [5, 3, 1, 4, 3, "MASK"], [6, 4, 0, 5, 0, "MODEL"]]
    tree: Any = {
        "nodes": nodes,
        "links": links,
        "version": 0.4,
        "groups": [],
        "extra": {"reroutes": [{"id": 1, "linkIds": [2, 3]}]},
    }
    if rng.random() < 0.3:
        inner = {"id": "b5e0", "name": "sub", "nodes": nodes, "links": links, "inputs": [], "outputs": []}
        outer = [{"id": 9, "type": "b5e0", "inputs": [], "outputs": [], "widgets_values": []}]
        tree = {"nodes": outer, "links": [], "version": 0.4, "definitions": {"subgraphs": [inner]}}
    elif rng.random() < 0.2:
        tree["extra"] = {"groupNodes": {"g": {"nodes": nodes, "links": links}}}
    return tree


@cache
def shipped_workflows() -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "workflows").glob("*.json"))]


def make_workflow(rng: Random, keep: Keep) -> Case:
    tree = rng.choice(shipped_workflows()) if rng.random() < 0.1 else old_workflow(rng)
    tree, count = changed(rng, keep, tree, (m.edit_tree,), most=4)
    raw = m.json_bytes(rng, tree)
    if rng.random() < 0.15:
        raw, more = damaged(rng, keep, raw)
        return Case({"a.json": raw}, "a.json", changes=max(count, more), note="workflow, bytes")
    if rng.random() < 0.1:
        info = PngImagePlugin.PngInfo()
        info.add_text("workflow", raw.decode("utf-8", "replace"))
        made = io.BytesIO()
        Image.new("RGB", (4, 4)).save(made, "PNG", pnginfo=info)
        return Case({"a.png": made.getvalue()}, "a.png", changes=count, note="workflow in a PNG")
    return Case({"a.json": raw}, "a.json", changes=count, note="workflow, tree")


def use_workflow(folder: Path, main: Path) -> None:
    run(["migrate", str(main), "--out", str(folder / "new.json")])
    json.loads((folder / "new.json").read_text(encoding="utf-8"))


def run(words: list[str]) -> None:
    """A command, without main()'s way of showing errors."""
    args = build_parser().parse_args(words)
    args.run(args)


# --- configs -----------------------------------------------------------------------------------------------------


@cache
def examples() -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "ipadapter_core/training/examples").glob("*.toml"))
    ]


def edit_toml(rng: Random, text: str) -> str:
    """A value, a key or a line."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    key, equals, value = lines[at].partition("=")
    odd = rng.choice((
        *map(str, m.NUMBERS), *map(str, m.FLOATS), json.dumps(rng.choice(m.TEXTS)), "[]", "{}", "[1, 2]", '"C:\\Users\\x"', "true", "1979-05-27", '""',
        "[" * 3000, "'''", "{a = " * 500, "0x7fffffffffffffffff", "'a\tb'", '"\\ud83d\\ude00"', "[[]]",
    ))  # fmt: skip
    match rng.randrange(5):
        case 0 | 1:
            lines[at] = f"{key}= {odd}" if equals else lines[at]
        case 2:
            lines[at] = f"{rng.choice(m.NAMES)} = {value}"
        case 3:
            lines.insert(at, rng.choice(lines))
        case _:
            return m.edit_text(rng, text)
    return "\n".join(lines)


def make_config(rng: Random, keep: Keep) -> Case:
    text, count = changed(rng, keep, rng.choice(examples()), (edit_toml,))
    raw = m.write_text(rng, text)
    if rng.random() < 0.1:
        raw, count = damaged(rng, keep, raw)
    override = rng.choice(("train.lr", "output.name", "data.path", "x", "loss.snr_gamma")) + "=" + rng.choice(m.TEXTS)
    return Case({"a.toml": raw}, "a.toml", changes=count, note="config", extra={"override": override})


def use_config(folder: Path, main: Path) -> None:
    config = load_config(main)
    write_config(config, folder / "again.toml")
    assert load_config(folder / "again.toml") == config, "a config is another after writing and reading"


def make_override(rng: Random, keep: Keep) -> Case:
    words = rng.choice(
        (
            "train.lr=1",
            "output.name=x",
            "data.caption_key=text",
            "train.steps=5",
            "watch.timesteps=[1,2]",
            "loss.snr_gamma=5.0",
        )
    )
    text, count = changed(rng, keep, words, (m.edit_text,))
    return Case({"a.txt": text.encode("utf-8", "surrogatepass")}, "a.txt", changes=count, note="override")


@cache
def plain_config() -> Any:
    from ipadapter_core.training.config import parse_config

    return parse_config({"model": {"base": "x"}, "data": {"path": "y"}, "output": {"folder": "z"}}, "the fuzzer")


def use_override(folder: Path, main: Path) -> None:
    text = main.read_bytes().decode("utf-8", "surrogatepass")
    write_config(parse_overrides([text], plain_config()), folder / "a.toml")
    load_config(folder / "a.toml")


# --- pictures, lists, captions, shards ---------------------------------------------------------------------------


@cache
def picture(number: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
    image: Any = Image.fromarray(pixels)
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(
            {
                "I;16": grey.astype(np.uint16) * 257,
                "I": grey.astype(np.int32) * 257,
                "F": grey.astype(np.float32) / 255,
            }[mode]
        )
    else:
        image = image.convert(mode)
    made = io.BytesIO()
    image.save(made, kind)
    return made.getvalue()


PICTURES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "TIFF": ("RGB", "RGBA", "L", "I;16", "I", "F", "CMYK"),
    "WEBP": ("RGB", "RGBA"), "GIF": ("P", "L"), "BMP": ("RGB", "L", "P"), "PPM": ("RGB", "L", "I;16"),
}  # fmt: skip


def make_picture(rng: Random, keep: Keep) -> Case:
    kind = rng.choice(sorted(PICTURES))
    mode = rng.choice(PICTURES[kind])
    raw, count = damaged(rng, keep, picture(rng.randrange(4), kind, mode), m.picture_edit)
    name = f"a.{rng.choice((kind.lower(), 'png', 'jpg', 'jfif'))}"
    return Case({name: raw}, name, changes=count, note=f"{kind} {mode}")


def use_picture(folder: Path, main: Path) -> None:
    problems: list[Exception] = []
    readers: tuple[Callable[[], object], ...] = (
        lambda: cut_target(decode_picture(main.read_bytes(), main.name), (32, 32)), lambda: read_image(main), lambda: read_mask(main),
    )  # fmt: skip
    for read in readers:
        try:
            found = read()
            assert not isinstance(found, Tensor) or bool(torch.isfinite(found).all()), "a pixel is no number"
        except AdapterError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def folder_of_pictures(captions: bool = True) -> dict[str, bytes]:
    files = {f"data/{number}.png": picture(number) for number in range(3)}
    return {**files, **({f"data/{number}.txt": b"a cat, on red" for number in range(3)} if captions else {})}


def make_list(rng: Random, keep: Keep) -> Case:
    entries = [{"image_file": f"{number}.png", "text": "a cat", "subject": "x"} for number in range(3)]
    if rng.random() < 0.65:
        tree, count = changed(rng, keep, entries, (m.edit_tree,))
        raw = m.json_bytes(rng, tree)
        if rng.random() < 0.2:
            raw, count = damaged(rng, keep, raw)
        return Case(
            {**folder_of_pictures(False), "data/list.json": raw}, "data/list.json", changes=count, note="JSON list"
        )
    lines = [{"file_name": f"{number}.png", "text": "a cat"} for number in range(3)]
    if rng.random() < 0.5:
        lines, count = changed(rng, keep, lines, (m.edit_tree,))
        text = "\n".join(json.dumps(line) for line in (lines if isinstance(lines, list) else [lines]))
        name = "metadata.jsonl"
    else:
        text, name = "file_name,text\n" + "".join(f'{line["file_name"]},"a cat"\n' for line in lines), "metadata.csv"
        text, count = changed(rng, keep, text, (m.edit_text,))
    return Case(
        {**folder_of_pictures(False), f"data/{name}": m.write_text(rng, text)}, "data", changes=count, note=name
    )


def make_captions(rng: Random, keep: Keep) -> Case:
    files = folder_of_pictures()
    text, count = changed(rng, keep, "a cat on a red background, café", (m.edit_text,))
    name = rng.choice(("data/0.txt", "data/0.caption", "data/1.TXT", "data/sub/2.txt", "data/.txt", "data/0.txt.txt"))
    files[name] = m.write_text(rng, text)
    if rng.random() < 0.3:
        files[name], count = damaged(rng, keep, files[name])
    if rng.random() < 0.3:
        files["data/1.png"], _ = damaged(Random(rng.getrandbits(64)), None, files["data/1.png"], m.picture_edit)
    return Case(files, "data", changes=count, note="captions")


def make_shard(rng: Random, keep: Keep) -> Case:
    members = {}
    for number in range(3):
        members[f"{number:04}.png"] = picture(number)
        members[f"{number:04}.{rng.choice(('txt', 'json'))}"] = rng.choice(
            (b"a cat", b'{"text": "a cat", "subject": 3}', b"\xff\xfea\0", b"[" * 3000)
        )
    raw, count = damaged(rng, keep, m.tar_of(members), m.edit_tar)
    return Case({"a.tar": raw}, "a.tar", changes=count, note="shard")


def use_data(folder: Path, main: Path) -> None:
    config = DataConfig(path=str(main), min_side=16)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "hf")
    source = open_source(config)
    found = collect(look(source, config), config, "the fuzzer")
    found.findings.describe()
    hold_out(found, 1, config)


# --- texts of nodes ----------------------------------------------------------------------------------------------

TEXT_READERS: dict[str, tuple[tuple[str, ...], Callable[[str], Any]]] = {
    "selector": (
        ("all: 0.5, attn2: 1", "to_q|to_k: 0", "unet.down: 0, !mid: 2", "attn: 1", "blocks: 1, *.to_out*: 0.3"),
        lambda text: parse_selector(text).chosen(targets_of(unet()).targets.values()),
    ),
    "where": (
        ("1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1,1", "sd-outall", "XL-OUTALL", "NAME:1,0,1", "all: 1"),
        lambda text: parse_where(text, "SD1.5").factors(targets_of(unet()).targets.values()),
    ),
    "block vector": (("1," * 16 + "1", "sd-outall", "SD-INALL"), lambda text: block_vector(text)),
    "sites": (
        ("all: 1, down: 0.5", "up.1: 0, mid: 2", "style: 1; composition: 0"),
        lambda text: WeightSchedule(site_factors=parse_site_factors(text)).site_weights(layout()),
    ),
    "curve": (
        ("0:1, 0.5:0.2, 1:0", "0: 0\n1: 1", "0.1:1"),
        lambda text: [WeightSchedule(curve=parse_curve(text)).site_weights(layout())],
    ),
    "layers": (("0:1, 3:0.5", "1:0"), parse_layers),
    "numbers": (("1,0.5, 2", "1 2 3", "1e-3"), parse_numbers),
}  # fmt: skip


def make_text(rng: Random, keep: Keep) -> Case:
    name = rng.choice(sorted(TEXT_READERS))
    text, count = changed(rng, keep, rng.choice(TEXT_READERS[name][0]), (m.edit_text,))
    return Case({f"{name}.txt": text.encode("utf-8", "surrogatepass")}, f"{name}.txt", changes=count, note=name)


def use_text(folder: Path, main: Path) -> None:
    TEXT_READERS[main.stem][1](main.read_bytes().decode("utf-8", "surrogatepass"))


# --- folders -----------------------------------------------------------------------------------------------------


def save_clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


ENCODERS: dict[str, Callable[[Path], object]] = {
    "clip": save_clip,
    "siglip": lambda folder: tiny_towers.siglip(folder, width=16, side=28, layers=2),
    "dinov2": lambda folder: tiny_towers.dinov2(folder, side=28, layers=1),
    "pe": lambda folder: tiny_towers.pe_core(folder / "pe.safetensors", side=2, layers=1),
}


@cache
def encoder_files(kind: str) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ENCODERS[kind](Path(folder))
        files = {f"enc/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    if kind == "pe":  # one file, as it is published
        return files
    return {**files, "enc/preprocessor_config.json": b'{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'}


def make_encoder(rng: Random, keep: Keep) -> Case:
    kind = rng.choice(sorted(ENCODERS))
    files = dict(encoder_files(kind))
    name = rng.choice(sorted(files))
    if name.endswith(".json") and rng.random() < 0.8:
        tree, count = changed(rng, keep, json.loads(files[name]), (m.edit_tree,))
        files[name] = m.json_bytes(rng, tree)
    else:
        files[name], count = damaged(rng, keep, files[name], *([] if name.endswith(".json") else [m.edit_header]))
    return Case(files, name if kind == "pe" else "enc", changes=count, note=f"encoder, {kind}, {name}")


def use_encoder(folder: Path, main: Path) -> None:
    encoder = load_image_encoder(main)
    encoder.encode(torch.zeros(1, 3, encoder.image_size, encoder.image_size))


@cache
def state_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kept = RunFolder(OutputConfig(folder=folder, keep_states=2))
        kept.prepare()
        for step in (2, 4):
            place = kept.unfinished(step)
            place.mkdir()
            (place / "tensors.safetensors").write_bytes(m.safetensors_bytes({"w": torch.full((8,), float(step))}))
            (place / TRAINING).write_text(json.dumps({"step": step, "list": [1, 2, 3]}))
            kept.finish(step, {"step": step, "processes": 1, "config": {"train": {"lr": 1.0}}})
        return {f"run/{p.relative_to(folder)}": p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def make_state(rng: Random, keep: Keep) -> Case:
    files = dict(state_files())
    name = rng.choice(sorted(n for n in files if "state-00000004" in n))
    before = files[name]
    if name.endswith(".json") and rng.random() < 0.5:
        tree, count = changed(rng, keep, json.loads(before), (m.edit_tree,))
        files[name] = m.json_bytes(rng, tree)
    else:
        files[name], count = damaged(rng, keep, before)
    return Case(files, "run", changes=count, note=f"state, {Path(name).name}", extra={"same": files[name] == before})


def use_state(folder: Path, main: Path) -> None:
    kept = RunFolder(OutputConfig(folder=str(main)))
    kept.prepare()
    found, problems = kept.newest()
    assert found is not None, "no state is left, and nothing said so"
    if found.step == 4:
        pristine = {name: raw for name, raw in state_files().items() if "state-00000004" in name}
        same = all(
            (folder / name).read_bytes() == raw for name, raw in pristine.items() if not name.endswith("run.json")
        )
        assert same, "a damaged state counts as whole"
    else:
        assert problems, "the state before is taken, and nothing said so"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("adapters", make_adapter, use_adapter, 5),
        Kind("loras", make_lora, use_lora, 5),
        Kind("peft", make_peft, use_lora, 2),
        Kind("prompts", make_prompt, use_prompt, 4),
        Kind("code", make_code, use_any_weights, 3),
        Kind("workflows", make_workflow, use_workflow, 5),
        Kind("configs", make_config, use_config, 3),
        Kind("overrides", make_override, use_override, 1),
        Kind("lists", make_list, use_data, 2),
        Kind("captions", make_captions, use_data, 2),
        Kind("shards", make_shard, use_data, 2),
        Kind("pictures", make_picture, use_picture, 5),
        Kind("texts", make_text, use_text, 5),
        Kind("encoders", make_encoder, use_encoder, 2),
        Kind("states", make_state, use_state, 2),
    )
}


def stored(case: Case) -> dict[str, str]:
    return {name: base64.b64encode(raw).decode() for name, raw in case.files.items()}
