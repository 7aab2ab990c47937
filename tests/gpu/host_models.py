"""Models, adapters and LoRAs of random weights inside ComfyUI, made by its own loaders: at the real sizes, and shrunk ones of the
same topology. Every weight is a number that fp8 has, so that a model holds the same weights in every dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor

from tiny import nested, tiny_state

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Kind:
    """A base model: what the host's class is built of, and the widths of what it is called with."""

    name: str
    family: str
    """Of the adapter."""
    text: int
    pooled: int
    latent: tuple[int, int]
    """Channels and side."""
    settings: dict[str, Any]
    pixels: str = ""
    transformer: bool = False
    published: bool = False
    """Whether the attentions are those of a published model, by whose numbers the old pack knows them."""


def unet(levels: tuple[int, ...], depths: tuple[int, ...], middle: int, blocks: int, xl: bool) -> dict[str, Any]:
    """What the host's UNet is built of; ``depths``: transformer blocks after each residual block of a level."""
    down = [depth for depth in depths for _ in range(blocks)]
    up = [depth for depth in depths for _ in range(blocks + 1)]
    heads = {"num_head_channels": 64} if xl else {"num_heads": 8}
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [blocks] * len(levels),
        "channel_mult": list(levels), "use_spatial_transformer": True, "legacy": False, "transformer_depth": down,
        "transformer_depth_output": up, "transformer_depth_middle": middle, "use_linear_in_transformer": xl,
        "context_dim": 2048 if xl else 768, **({"num_classes": "sequential", "adm_in_channels": 2816} if xl else {}), **heads,
    }  # fmt: skip


def flux(width: int, text: int, pooled: int, double: int, single: int) -> dict[str, Any]:
    return {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": pooled, "context_in_dim": text, "hidden_size": width, "mlp_ratio": 4.0,
        "num_heads": width // 128, "depth": double, "depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip


SHRUNK = (
    Kind("SD1.5", "base", 768, 1280, (4, 16), unet((1, 1, 1, 1), (1, 1, 1, 0), 1, 2, False), published=True),
    Kind("SDXL", "plus", 2048, 1280, (4, 16), unet((1, 1, 1), (0, 1, 2), 1, 2, True)),
    Kind("FLUX", "xlabs", 64, 32, (16, 16), flux(128, 64, 32, 2, 2), transformer=True),
)
"""Of the real topology, narrow or with fewer blocks: what a CPU computes in a second."""
REAL = (
    Kind("SD1.5", "plus", 768, 1280, (4, 64), unet((1, 2, 4, 4), (1, 1, 1, 0), 1, 2, False), "512 px", published=True),
    Kind("SDXL", "plus", 2048, 1280, (4, 128), unet((1, 2, 4), (0, 2, 10), 10, 2, True), "1024 px", published=True),
    Kind(
        "FLUX",
        "xlabs",
        4096,
        768,
        (16, 128),
        flux(3072, 4096, 768, 5, 10),
        "1024 px, 5 + 10 of 19 + 38 blocks",
        transformer=True,
    ),
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(kind: Kind) -> dict[str, Tensor]:
    """A file's tensors: norms and scales one, biases zero, matrices that keep the variance, those that end a branch halved."""
    with torch.device("meta"):
        if kind.transformer:
            newer = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
            extra = {"txt_ids_dims": []} if "txt_ids_dims" in newer else {}
            given = {**kind.settings, **extra}
            model: Any = comfy.ldm.flux.model.Flux(
                dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init, **given
            )
        else:
            model = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
                dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init, **kind.settings
            )
    device = torch.device("cuda" if torch.cuda.is_available() and kind in REAL else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        shape = tuple(value.shape)
        if len(shape) < 2:
            made[key] = torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
        else:
            ends = key.endswith(("out_layers.3.weight", "ff.net.2.weight", "attn1.to_out.0.weight"))
            size = (0.5 if ends else 1.0) / value[0].numel() ** 0.5
            made[key] = torch.randn(shape, generator=generator, device=device).mul_(size)
        made[key] = made[key].to(FP8).half().cpu()
    return made


def load(state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A MODEL by the host's loader. Its tensors are given a copy each, since a loader may take them."""
    model: Any = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": dtype})
    assert model is not None, "the host does not know this model"
    return model


class Bench:
    """A kind of model with an adapter, an image prompt and a LoRA for it, in our pack."""

    def __init__(self, pack: Any, kind: Kind, state: dict[str, Tensor]) -> None:
        self.pack, self.kind, self.state = pack, kind, state
        self.core, self.host = pack.ipadapter_core, pack.nodes.host
        self.feature = {"base": (1024,), "plus": (257, 1280), "xlabs": (768,)}[kind.family]
        self.managed: Any = None
        self.adapter_state: dict[str, Tensor] = {}

    def model(self, dtype: torch.dtype) -> Any:
        model = load(self.state, dtype)
        if not self.adapter_state:
            layout = self.host.adapters.layout(model)
            form = next(f for f in self.core.checkpoints.FORMATS if f.name == self.kind.family)
            channels = tuple(layout.sites[i].channels for i in form.reach.sites(layout))
            sizes: dict[str, Any] = {"token_dim": layout.token_dim, "feature_dim": self.feature[-1], "num_tokens": 4}
            if self.kind.family == "plus":
                inner = 1280 if self.kind.name == "SDXL" else 768
                sizes |= {"num_tokens": 16, "hidden_dim": inner, "inner_dim": inner, "depth": 4}
            self.adapter_state = tiny_state(self.kind.family, channels=channels, **sizes)
            self.sites = len(channels)
            self.managed = self.host.adapters.manage(dict(self.adapter_state), f"random {self.kind.family}")
        return model

    def features(self, seed: int = 3) -> Tensor:
        return random(1, *self.feature, seed=seed)

    def prompt(self, seed: int = 3) -> Any:
        """An image prompt of random features; never the same object, so nothing of it is baked yet."""
        adapter = self.managed.to_device()
        features = self.features(seed).to(adapter.device, adapter.dtype)
        with torch.no_grad():
            cond, uncond = adapter.tokens(features), adapter.tokens(torch.zeros_like(features))
        return self.core.ImagePrompt(
            cond, uncond, features[:, None], torch.zeros_like(features)[:, None], adapter.name, "none", adapter.spec.token_dim
        )  # fmt: skip

    def prompted(self, model: Any, prompt: Any = None, strength: float = 1.0) -> Any:
        schedule = self.core.WeightSchedule(strength)
        return self.host.adapters.apply(model, self.managed, prompt or self.prompt(), schedule, None)[0]

    def lora(self, model: Any, mode: str, strength: float = 0.7) -> Any:
        """A LoRA of rank 16 on all matrices of the attentions, live or merged."""
        tensors: dict[str, Tensor] = {}
        for i, (key, value) in enumerate(sorted(self.state.items())):
            if "attn" in key and key.endswith(".weight") and value.ndim == 2:
                stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
                rows, columns = value.shape
                tensors[f"{stem}.lora_down.weight"] = random(16, columns, seed=i) / columns**0.5
                tensors[f"{stem}.lora_up.weight"] = random(rows, 16, seed=i + 1) / 8
                tensors[f"{stem}.alpha"] = torch.tensor(16.0)
        loaded = self.host.lora.LoadedLoRA(self.core.lora.load_lora(tensors, name="random"))
        return self.host.lora.apply(model, None, loaded, mode, strength=strength)[0]

    def sample(self, model: Any, steps: int = 1) -> Tensor:
        """What both branches predict in the last of some steps of the host's own sampler, from the middle of the way."""
        model, seen = model.clone(), list[Tensor]()
        channels, side = self.kind.latent

        def look(args: Any) -> Any:
            if len(seen) == steps - 1 or steps == 1:
                sigma = args["sigma"].view(-1, 1, 1, 1)
                seen.append(torch.cat([(args["input"] - out) / sigma for out in args["conds_out"]]))
            else:
                seen.append(args["input"])
            return args["conds_out"]

        model.set_model_sampler_pre_cfg_function(look)
        conds: list[Any] = []
        for i in range(2):
            more: dict[str, Any] = {"pooled_output": random(1, self.kind.pooled, seed=60 + i)}
            if self.kind.transformer:
                more["guidance"] = 3.5
            conds.append([[random(1, 77, self.kind.text, seed=50 + i), more]])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*conds)
        guider.set_cfg(3.0)
        start = float(model.get_model_object("model_sampling").percent_to_sigma(0.4))
        noise = random(1, channels, side, side, seed=7)
        sigmas = torch.linspace(start, start / 2, steps + 1)
        sampler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)
        return seen[-1]

    def old(self, nodes: Any, model: Any) -> Any:
        """The same adapter and features by ComfyUI_IPAdapter_plus."""
        features = self.features()
        return nodes["IPAdapterEmbeds"]().apply_ipadapter(
            model, nested(self.adapter_state), features, 1.0, "linear", 0.0, 1.0, neg_embed=torch.zeros_like(features)
        )[0]
