"""Single cases of LoRAs in a host's Python, for lora_on_models.py: whole models side by side with merges, and special files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.clip_model
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import torch
from host_loras import (
    CPU,
    LoRAPatch,
    Weights,
    Window,
    beside,
    by_host,
    host_lora,
    largest,
    load_lora,
    lora_for,
    merged,
    patcher_of,
    spellings,
    weights_of,
)  # fmt: skip
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Case = dict[str, Any]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT = noise(1, 7, 40, seed=1)
POOLED = noise(1, 24, seed=2)
INPUTS: dict[str, dict[str, Any]] = {
    "SDXL": {"x": (1, 4, 16, 16), "c_crossattn": noise(1, 7, 48), "y": noise(1, 96)},
    "SVD_img2vid": {
        "x": (2, 4, 8, 8), "c_concat": noise(2, 4, 8, 8), "c_crossattn": noise(2, 7, 48), "y": noise(2, 96), "num_video_frames": 2,
        "image_only_indicator": torch.zeros(1, 2), "time_context": noise(1, 7, 48),
    },
    "SD3": {"x": (1, 4, 8, 8), "y": POOLED},
    "Flux": {"x": (1, 4, 8, 8), "y": POOLED, "guidance": torch.tensor([3.5])},
    "Chroma": {"x": (1, 4, 8, 8), "guidance": torch.tensor([0.0])},
    "Flux2": {"x": (1, 8, 4, 4), "guidance": torch.tensor([3.5])},
    "ZImage": {"x": (1, 4, 8, 8), "num_tokens": 7},
    "Lumina2": {"x": (1, 4, 8, 8), "num_tokens": 7},
    "QwenImage": {"x": (1, 4, 1, 8, 8)},
    "WAN21_T2V": {"x": (1, 4, 2, 8, 8), "c_crossattn": noise(1, 8, 40)},
    "HunyuanVideo": {"x": (1, 4, 2, 8, 8), "y": POOLED, "guidance": torch.tensor([3.5])},
    "LTXV": {"x": (1, 8, 2, 4, 4), "attention_mask": None, "frame_rate": 25},
    "CosmosT2IPredict2": {"x": (1, 4, 1, 8, 8)},
    "CosmosT2V": {"x": (1, 4, 2, 8, 8), "fps": torch.tensor([24.0]), "image_size": None},
    "GenmoMochi": {"x": (1, 4, 2, 8, 8), "c_crossattn": noise(1, 8, 40), "attention_mask": torch.ones(1, 8), "num_tokens": 8},
    "AuraFlow": {"x": (1, 4, 8, 8)},
    "PixArtSigma": {"x": (1, 4, 64, 64)},
    "Omnigen2": {"x": (1, 4, 8, 8), "num_tokens": 7, "attention_mask": torch.ones(1, 7)},
    "HiDream": {"x": (1, 4, 8, 8), "y": POOLED, "c_crossattn": noise(1, 7, 40), "encoder_hidden_states_llama3": noise(1, 2, 7, 48), "image_cond": None},
    "CogVideoX_T2V": {"x": (1, 4, 2, 8, 8)},
    "ErnieImage": {"x": (1, 8, 4, 4)},
    "Krea2": {"x": (1, 4, 8, 8), "c_crossattn": noise(1, 7, 80)},
    "Kandinsky5": {"x": (1, 4, 2, 8, 8), "y": POOLED},
    "JoyImage": {"x": (1, 4, 1, 8, 8)},
    "Lens": {"x": (1, 16, 4, 4), "c_crossattn": noise(1, 7, 80)},
    "StableAudio": {"x": (1, 8, 16), "global_embed": noise(1, 24)},
    "Hunyuan3Dv2": {"x": (1, 8, 16)},
}  # fmt: skip
"""One call of a model: the latent's shape, and what else its conditioning brings."""


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a MODEL predicts in one call, patches and wrappers of its own included."""
    call = {"c_crossattn": TEXT, **inputs}
    x = noise(*call.pop("x"), seed=5)
    model.patch_model()
    try:
        options = {
            **model.model_options["transformer_options"],
            "wrappers": model.wrappers,
        }  # as the host's sampler puts them
        return model.model.apply_model(x, torch.full((x.shape[0],), 0.7), transformer_options=options, **call)
    finally:
        model.unpatch_model()


def on_whole_models(chosen: list[str]) -> Iterator[Case]:
    """Every layer of a model beside itself and merged, in one call of the model; strength 0 changes no bit."""
    known = {kind.__name__ for kind in comfy.supported_models.models}
    for name, inputs in INPUTS.items():
        if name not in known or (chosen and name not in chosen):
            continue
        patcher = patcher_of(name)
        names = host_lora.names(patcher)
        plain, inside = (
            weights_of(patcher),
            {to: n for n, to in names.items() if n.startswith("diffusion_model.") and isinstance(to, str)},
        )
        lora = lora_for({n: to for to, n in inside.items() if to in plain}, plain)
        matched = host_lora.backend.place(load_lora(lora, name=name), patcher, names=names)
        alone = {f"diffusion_model.{m.key}" for m in matched.matches if m.needs_merged}
        lora = lora_for({n: to for to, n in inside.items() if to in plain and to not in alone}, plain)
        loaded = host_lora.LoadedLoRA(load_lora(lora, name=name))
        base = predict(patcher, inputs)

        merged, live, off = (
            predict(host_lora.apply(patcher, None, loaded, mode, strength=strength)[0], inputs)
            for mode, strength in (("merged", 0.3), ("live", 0.3), ("live", 0.0))
        )
        yield {
            "case": f"whole {name}", "difference": float((live - merged).abs().max() / merged.abs().max()),
            "change": float((merged - base).abs().max() / base.abs().max()),
            "zero": bool(torch.equal(off, base)) and bool(torch.equal(predict(patcher, inputs), base)),
            "merge alone": len(alone),
        }  # fmt: skip


def control_file(plain: Weights, widened: str = "img_in") -> Weights:
    """A control LoRA of FLUX.1 as its authors write it: products and biases of every layer, the norms whole, twice the inputs."""
    generator, found = torch.Generator().manual_seed(3), Weights()
    for key, weight in plain.items():
        path, _, last = key.removeprefix("diffusion_model.").rpartition(".")
        if weight.ndim == 1 and "_norm." in key:
            found[f"{path}.scale"] = torch.rand(weight.shape, generator=generator) + 0.5
        elif weight.ndim == 2 and last == "weight":
            columns = weight.shape[1] * (2 if path == widened else 1)
            found[f"{path}.lora_A.weight"] = torch.randn(2, columns, generator=generator) / columns**0.5
            found[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator) / 2
            if f"diffusion_model.{path}.bias" in plain:
                found[f"{path}.lora_B.bias"] = torch.randn(weight.shape[0], generator=generator) / 4
    return found


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def read(lora: Weights, folder: Path) -> Any:
    file = folder / "lora.safetensors"
    save_file(lora, file)
    return host_lora.LoadedLoRA(host_lora.read(str(file), "lora.safetensors"))


def apply_file(patcher: Any, lora: Weights, folder: Path) -> object:
    return host_lora.apply(patcher, None, read(lora, folder), "merged", strength=1.0)


def room(model: Any, plain: Weights, key: str) -> list[int] | None:
    """The shape for which newer hosts make room before they patch a weight; None for others."""
    asked = getattr(comfy.lora, "calculate_shape", None)
    return None if asked is None else list(asked(model.patches[key], plain[key], key))


def control(folder: Path) -> Iterator[Case]:
    """Layers with more inputs: as the host's loader makes them, merged alone, and gone with the patch."""
    patcher = patcher_of("Flux")
    plain = weights_of(patcher)
    lora = control_file(plain)
    loaded = read(lora, folder)
    inputs = INPUTS["Flux"] | {"c_concat": noise(1, 4, 8, 8, seed=7)}
    model, _, text, shown = host_lora.apply(patcher, None, loaded, "auto", strength=1.0)
    ours, theirs = merged(model, plain), merged(by_host(patcher, lora, 1.0), plain)
    half = {
        k: t
        for k, t in merged(host_lora.apply(patcher, None, loaded, "merged", strength=0.5)[0], plain).items()
        if "norm" not in k
    }
    half_theirs = merged(by_host(patcher, lora, 0.5), plain)
    before = predict(patcher, INPUTS["Flux"])
    predicted = predict(model, inputs)
    window = Window(0.0, 0.5)
    yield {
        "case": "control", "keys": len(ours), "same keys": set(ours) == set(theirs), "difference": max(largest(ours, theirs), largest(half, half_theirs)),
        "shape": list(ours["diffusion_model.img_in.weight"].shape), "room": room(model, plain, "diffusion_model.img_in.weight"), "text": text, "shown": shown,
        "predicted": float((predicted - predict(by_host(patcher, lora, 1.0), inputs)).abs().max() / predicted.abs().max()),
        "zero": not host_lora.apply(patcher, None, loaded, "auto", strength=0.0)[0].patches,
        "gone": bool(torch.equal(before, predict(patcher, INPUTS["Flux"]))),
        "live": said(lambda: host_lora.apply(patcher, None, loaded, "live", strength=1.0)),
        "steps": said(lambda: host_lora.apply(patcher, None, loaded, "auto", strength=1.0, window=window)),
        "allowed": host_lora.apply(patcher, None, loaded, "live", "allow", strength=1.0)[3],
    }  # fmt: skip
    plain_names = {
        f"diffusion_model.{key}": t for key, t in lora.items() if "_norm" not in key and not key.endswith("bias")
    }
    unnamed = host_lora.apply(
        patcher, None, host_lora.LoadedLoRA(load_lora(plain_names, name="x")), "merged", strength=1.0
    )[0]
    key = "diffusion_model.img_in.weight"
    yield {"case": "control without a shape", "difference": largest({key: merged(unnamed, plain)[key]}, theirs)}
    second = host_lora.apply(
        model,
        None,
        host_lora.LoadedLoRA(load_lora(lora_for({"diffusion_model.img_in": key}, plain), name="y")),
        "merged",
        strength=1.0,
    )[0]
    narrow = merged(
        host_lora.apply(
            patcher,
            None,
            host_lora.LoadedLoRA(load_lora(lora_for({"diffusion_model.img_in": key}, plain), name="y")),
            "merged",
            strength=1.0,
        )[0],
        plain,
    )[key]
    expected = theirs[key].clone()
    expected[:, : narrow.shape[1]] += narrow - plain[key]
    yield {
        "case": "control and another on the same layer",
        "difference": largest({key: merged(second, plain)[key]}, {key: expected}),
    }


def converted(folder: Path) -> Iterator[Case]:
    """Files that the host's loader renames first."""
    wan = patcher_of("WAN21_T2V")
    plain = weights_of(wan)
    names = {n: to for n, to in host_lora.names(wan).items() if n.startswith("lora_unet_blocks") and "norm" not in n}
    lora = {k.replace("lora_unet_", "lora_unet__", 1): t for k, t in lora_for(names, plain).items()}
    ours = merged(host_lora.apply(wan, None, read(lora, folder), "merged", strength=0.7)[0], plain)
    theirs = merged(by_host(wan, lora, 0.7), plain)
    headless = merged(
        host_lora.apply(wan, None, host_lora.LoadedLoRA(load_lora(lora, name="wan")), "merged", strength=0.7)[0], plain
    )
    same = set(ours) == set(theirs) == set(headless)
    yield {
        "case": "Wan-Fun",
        "keys": len(ours),
        "same keys": same,
        "difference": max(largest(ours, theirs), largest(headless, theirs)),
    }
    flux = patcher_of("Flux", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 16, "num_heads": 2})
    plain = weights_of(flux)
    generator, uso = torch.Generator().manual_seed(4), Weights()
    for key, weight in plain.items():
        block = re.fullmatch(
            r"diffusion_model\.((double|single)_blocks\.\d+)\.(img_attn\.qkv|img_attn\.proj|txt_attn\.qkv|txt_attn\.proj|linear1|linear2)\.weight",
            key,
        )
        if block is None:
            continue
        word = {
            "img_attn.qkv": "qkv_lora1",
            "img_attn.proj": "proj_lora1",
            "txt_attn.qkv": "qkv_lora2",
            "txt_attn.proj": "proj_lora2",
            "linear1": "qkv_lora",
            "linear2": "proj_lora",
        }[block[3]]
        rows = 48 if block[3] == "linear1" else weight.shape[0]
        uso[f"{block[1]}.processor.{word}.down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        uso[f"{block[1]}.processor.{word}.up.weight"] = torch.randn(rows, 2, generator=generator) / 8
    ours = merged(host_lora.apply(flux, None, read(uso, folder), "merged", strength=0.7)[0], plain)
    theirs = merged(by_host(flux, uso, 0.7), plain)
    yield {"case": "USO", "keys": len(ours), "same keys": set(ours) == set(theirs), "difference": largest(ours, theirs)}
    hostile: dict[str, Weights] = {
        "half a control": {"img_in.lora_A.weight": noise(2, 4), "single_blocks.0.norm.key_norm.scale": noise(4)},
        "no matrices": {"img_in.lora_A.weight": noise(2), "img_in.lora_B.weight": noise(2), "single_blocks.0.norm.key_norm.scale": noise(4)},
        "a shape of gigabytes": {
            "diffusion_model.img_in.lora_A.weight": noise(2, 16), "diffusion_model.img_in.lora_B.weight": noise(32, 2),
            "diffusion_model.img_in.reshape_weight": torch.tensor([32, 2**40]),
        },
        "too wide": {"diffusion_model.img_in.lora_A.weight": noise(1, 16 * 17), "diffusion_model.img_in.lora_B.weight": noise(32, 1), "diffusion_model.img_in.reshape_weight": torch.tensor([32, 16 * 17])},
        "no shape": {"diffusion_model.img_in.lora_A.weight": noise(2, 16), "diffusion_model.img_in.lora_B.weight": noise(32, 2), "diffusion_model.img_in.reshape_weight": torch.tensor([[32, 16]])},
        "a narrower shape": {"diffusion_model.img_in.lora_A.weight": noise(2, 8), "diffusion_model.img_in.lora_B.weight": noise(32, 2), "diffusion_model.img_in.reshape_weight": torch.tensor([32, 8])},
    }  # fmt: skip
    small = patcher_of("Flux")
    for name, lora in hostile.items():
        yield {
            "case": f"hostile: {name}",
            "said": said(partial(apply_file, small, lora, folder)),
        }


FAMILIES = (
    "SDXL",
    "SD3",
    "Flux",
    "Flux2",
    "ZImage",
    "QwenImage",
    "WAN21_T2V",
    "Anima",
    "HunyuanVideo",
    "LTXV",
    "Lumina2",
)


def of_other_families(folder: Path) -> Iterator[Case]:
    """Every family's LoRA on every other family: refused in one sentence."""
    known = {kind.__name__ for kind in comfy.supported_models.models}
    patchers = {name: patcher_of(name) for name in FAMILIES if name in known}
    for name, patcher in patchers.items():
        plain = weights_of(patcher)
        names = {
            n: to
            for n, to in host_lora.names(patcher).items()
            if n.startswith("lora_unet_") and isinstance(to, str) and to in plain and plain[to].ndim > 1
        }
        loaded = host_lora.LoadedLoRA(load_lora(lora_for(dict(list(names.items())[:60]), plain), name=f"a {name} LoRA"))
        for other, model in patchers.items():
            if other != name:
                yield {
                    "case": f"{name} on {other}",
                    "said": said(partial(host_lora.apply, model, None, loaded, "auto", strength=1.0)),
                }


def full(rows: int, columns: int, algorithm: str) -> tuple[Weights, Callable[[Tensor], Tensor]]:
    """Tensors of an algorithm for a matrix, and its formula in float64."""
    if algorithm.startswith("DoRA"):
        down, up = noise(2, columns, seed=1) / 4, noise(rows, 2, seed=2) / 2
        axis = 1 if algorithm.endswith("out") else 0
        scale = noise(*((rows, 1) if axis else (1, columns)), seed=3).abs() + 0.5

        def dora(weight: Tensor) -> Tensor:
            changed = weight + (up.double() @ down.double()) * 0.5
            return scale.double() * changed / torch.linalg.vector_norm(changed, dim=axis, keepdim=True) - weight

        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0), "dora_scale": scale}, dora
    if algorithm == "LoHa":
        parts = {
            f"hada_w{n}_{side}": noise(*size, seed=n * 3 + i) / 2
            for n in (1, 2)
            for i, (side, size) in enumerate((("a", (rows, 2)), ("b", (2, columns))))
        }
        first, second = (parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2))
        return parts | {"alpha": torch.tensor(1.0)}, lambda weight: first * second * 0.5
    second, first = noise(rows // 2, columns // 4, seed=5) / 4, noise(2, 4, seed=6) / 2
    if algorithm == "LoKr full":
        return {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(1.0)}, lambda weight: torch.kron(
            first.double(), second.double()
        )
    a, b = noise(rows // 2, 2, seed=7) / 2, noise(2, columns // 4, seed=8) / 2
    return {
        "lokr_w1": first,
        "lokr_w2_a": a,
        "lokr_w2_b": b,
        "alpha": torch.tensor(1.0),
    }, lambda weight: torch.kron(first.double(), a.double() @ b.double()) * 0.5


FUSED = {
    "Flux": ("transformer.transformer_blocks.1.attn.to_k", "transformer.transformer_blocks.0.attn.add_v_proj", "transformer.single_transformer_blocks.1.proj_mlp", "transformer.single_transformer_blocks.0.attn.to_q"),
    "ZImage": ("diffusion_model.layers.0.attention.to_v", "lycoris_noise_refiner_0_attention_to_k"),
    "Flux2": ("lycoris_transformer_blocks_0_attn_to_v",),
}  # fmt: skip


def on_fused_rows(folder: Path) -> Iterator[Case]:
    """Algorithms on some rows of a layer: the formula in float64 on these rows alone, merged and beside; LoKr and LoHa as the host's."""
    known = {kind.__name__ for kind in comfy.supported_models.models}
    for kind, names in FUSED.items():
        if kind not in known:
            continue
        patcher = patcher_of(kind)
        plain, places = weights_of(patcher), host_lora.names(patcher)
        for name in (n for n in names if n in places):
            key, (_, start, length) = places[name][:2]
            for algorithm in ("DoRA out", "DoRA in", "LoHa", "LoKr full", "LoKr"):
                tensors, formula = full(length, plain[key].shape[1], algorithm)
                lora = {f"{name}.{part}": t for part, t in tensors.items()}
                loaded = host_lora.LoadedLoRA(load_lora(lora, name=algorithm))
                ours = merged(host_lora.apply(patcher, None, loaded, "merged", strength=0.7)[0], plain)
                expected = plain[key].double().clone()
                rows = expected[start : start + length]
                rows += 0.7 * formula(rows.clone())
                matched = host_lora.backend.place(loaded.weights, patcher, names=places)
                _, live, _ = beside(patcher.model.diffusion_model, LoRAPatch(matched, strength=0.7), ours)
                case = {
                    "case": f"{algorithm} on {name}",
                    "difference": largest({key: ours[key].double()}, {key: expected}),
                    "live": live,
                }
                if algorithm[:2] == "Lo":
                    case["host"] = largest(ours, merged(by_host(patcher, lora, 0.7), plain))
                yield case


class Products(TorchDispatchMode):
    """Counts matrix products, and what is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket.__name__ in {"linear", "mm", "addmm", "bmm", "baddbmm"}
        return func(*args, **(kwargs or {}))


def counted(folder: Path) -> Iterator[Case]:
    """No weight is written when a live strength changes; two products a layer, however many LoRAs."""
    known = {kind.__name__ for kind in comfy.supported_models.models}
    for kind in (k for k in ("Flux", "ZImage") if k in known):
        patcher = patcher_of(kind)
        plain = weights_of(patcher)
        names = {
            n: to
            for n, to in host_lora.names(patcher).items()
            if n.startswith("lora_unet_") and isinstance(to, str) and to in plain and plain[to].ndim == 2
        }
        loaded = host_lora.LoadedLoRA(load_lora(lora_for(names, plain), name=kind))
        one = host_lora.apply(patcher, None, loaded, "live", strength=0.5)[0]
        other = host_lora.apply(patcher, None, loaded, "live", strength=-0.25)[0]
        three = host_lora.apply(
            host_lora.apply(one, None, loaded, "live", strength=0.1)[0], None, loaded, "live", strength=0.2
        )[0]
        before = {k: (t.data_ptr(), t.clone()) for k, t in plain.items()}
        counts: dict[str, int] = {}
        for name, model in (("plain", patcher), ("one", one), ("other", other), ("three", three)):
            predict(model, INPUTS[kind])
            with Products() as seen:
                predict(model, INPUTS[kind])
            counts[name] = seen.products
        same = all(plain[k].data_ptr() == at and torch.equal(plain[k], t) for k, (at, t) in before.items())
        layers = len(host_lora.backend.unfused_stack(one).layers)
        yield {
            "case": f"counted {kind}",
            "layers": layers,
            "patches": len(one.patches) + len(other.patches),
            "same": same,
            **counts,
        }


class Encoder(nn.Module):
    """One text encoder as the host's CLIPs hold it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        ops = comfy.ops.disable_weight_init
        if kind == "clip":
            config: dict[str, Any] = {
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "hidden_act": "quick_gelu",
                "max_position_embeddings": 77,
                "eos_token_id": 49407,
            }
            self.transformer = comfy.clip_model.CLIPTextModel(config, torch.float32, CPU, ops)
        elif kind == "t5":
            config = {
                "num_layers": 2,
                "d_model": 32,
                "d_kv": 8,
                "num_heads": 4,
                "d_ff": 48,
                "dense_act_fn": "gelu_pytorch_tanh",
                "is_gated_act": True,
                "model_type": "t5",
                "vocab_size": 64,
            }
            self.transformer = comfy.text_encoders.t5.T5(config, torch.float32, CPU, ops)
        else:
            config = {
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            }
            self.transformer = comfy.text_encoders.llama.Llama2(config, torch.float32, CPU, ops)


CLIPS: dict[str, dict[str, str]] = {
    "SD1.5": {"clip_l": "clip"}, "SD2": {"clip_h": "clip"}, "SDXL": {"clip_l": "clip", "clip_g": "clip"}, "refiner": {"clip_g": "clip"},
    "SD3": {"clip_l": "clip", "clip_g": "clip", "t5xxl": "t5"}, "Flux": {"clip_l": "clip", "t5xxl": "t5"}, "T5": {"t5xxl": "t5"},
    "Wan": {"umt5xxl": "t5"}, "Qwen-Image": {"qwen25_7b": "llama"}, "Z-Image": {"qwen3_4b": "llama"}, "Anima": {"qwen3_06b": "llama"}, "Lumina 2": {"gemma2_2b": "llama"},
    "HunyuanVideo": {"clip_l": "clip", "llama": "llama"}, "HiDream": {"clip_l": "clip", "clip_g": "clip", "t5xxl": "t5", "llama": "llama"},
}  # fmt: skip


def clip_of(encoders: dict[str, str]) -> Any:
    model = nn.Module()
    for name, kind in encoders.items():
        model.add_module(name, Encoder(kind))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    model.eval().requires_grad_(False)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer, clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds = (
        model,
        None,
        None,
        False,
        None,
    )
    clip.tokenizer_options = {}
    clip.patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    return clip


def text_encoders(folder: Path) -> Iterator[Case]:
    """Every spelling of every text encoder, as the host's loader applies them."""
    for kind, encoders in CLIPS.items():
        clip = clip_of(encoders)
        plain = dict(clip.cond_stage_model.state_dict())
        names = host_lora.names(None, clip)
        worst, lost, counts = 0.0, list[str](), dict[str, int]()
        for spelling, rounds in spellings(names).items():
            for entries in rounds:
                lora = lora_for(entries, plain)
                theirs = comfy.sd.load_lora_for_models(None, clip, dict(lora), 0, 0.7)[1].patcher
                loaded = host_lora.LoadedLoRA(load_lora(lora, name=f"{kind} {spelling}"))
                ours = host_lora.apply(None, clip, loaded, "auto", strength=0.0, text_strength=0.7)[1].patcher
                mine, his = merged(ours, plain), merged(theirs, plain)
                lost += sorted(set(mine) ^ set(his))
                worst = max(worst, largest({k: t for k, t in mine.items() if k in his}, his))
                counts[spelling] = counts.get(spelling, 0) + len(entries)
        yield {
            "case": f"text encoders of {kind}",
            "difference": worst,
            "lost": lost,
            "spellings": counts,
            "names": len(names),
        }


def cases(chosen: list[str]) -> Iterator[Case]:
    yield from on_whole_models(chosen)
    if chosen and "cases" not in chosen:
        return
    with TemporaryDirectory() as folder:
        for group in (control, converted, of_other_families, on_fused_rows, counted, text_encoders):
            yield from group(Path(folder))
