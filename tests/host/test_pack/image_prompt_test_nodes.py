"""Test-only ComfyUI nodes; the server copies this file into custom_nodes. V1 style, which every version loads."""

from __future__ import annotations

import collections
import gc
import hashlib
import json
import os
import tempfile
import threading
import types

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import folder_paths
import numpy as np
import torch
from comfy.comfy_types import IO
from comfy.ldm.modules.attention import optimized_attention
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_torch_compile
from server import PromptServer

# Of an error the host keeps every input as text, and a picture's numbers take longer to write than most nodes to run.
torch.set_printoptions(edgeitems=1, threshold=8)


async def freeze(app):
    """Collections look at what was made since the server is up, not at all of the host's modules each time."""
    gc.freeze()


PromptServer.instance.app.on_startup.append(freeze)

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "projection_dim": 24,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
}
SEED = ("INT", {"default": 0, "min": 0, "max": 2**31})


class TestConditioning:
    """Random text conditioning: what a CLIPTextEncode would give, without a text encoder."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": SEED,
                "width": ("INT", {"default": 768, "min": 1, "max": 8192}),
            },
            "optional": {
                "tokens": ("INT", {"default": 77, "min": 1, "max": 1024}),
                "pooled": ("INT", {"default": 1280, "min": 1, "max": 8192}),
            },
        }

    def make(self, seed, width, tokens=77, pooled=1280):
        generator = torch.Generator().manual_seed(seed)
        cond = torch.randn(1, tokens, width, generator=generator)
        return ([[cond, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


class TestClipVision:
    """A real ClipVisionModel of 17 tokens x 32, projection 24, with seeded weights."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        width = ("INT", {"default": VISION["hidden_size"], "min": 8, "max": 512, "step": 8})
        return {"required": {"seed": SEED}, "optional": {"hidden_size": width}}

    def make(self, seed, hidden_size=VISION["hidden_size"]):
        descriptor, path = tempfile.mkstemp(suffix=".json")  # 0.3.64 takes a file only
        with os.fdopen(descriptor, "w") as file:
            json.dump(VISION | {"hidden_size": hidden_size, "projection_dim": hidden_size * 3 // 4}, file)
        try:
            vision = comfy.clip_vision.ClipVisionModel(path)
        finally:
            os.unlink(path)
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for key, value in sorted(vision.get_sd().items()):
            if not value.is_floating_point():
                continue
            if value.ndim == 1 and key.endswith("weight"):
                random = torch.ones(value.shape)
            elif value.ndim == 1 and key.endswith("bias"):
                random = torch.zeros(value.shape)
            else:
                random = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
            state[key] = random.to(value.dtype)
        vision.load_sd(state)
        return (vision,)


_load_clip_vision = comfy.clip_vision.load


def load_clip_vision(path, *args):
    """ComfyUI's loader, which builds published sizes alone; files of this name stand for TestClipVision."""
    if os.path.basename(path).startswith("test_clip_vision"):
        return TestClipVision().make(0)[0]
    return _load_clip_vision(path, *args)


comfy.clip_vision.load = load_clip_vision


class FixedVAE:
    """Latents of 16 channels to pictures eight times as large, by fixed random matrices: no VAE's weights are needed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.out = torch.randn(16, 192, generator=generator) / 4
        self.into = torch.linalg.pinv(self.out)

    def decode(self, latents, **_):
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
        pixels = torch.einsum("bcyx,cp->bpyx", latents.float().cpu(), self.out)
        return torch.nn.functional.pixel_shuffle(pixels, 8).sigmoid().movedim(1, -1)

    def encode(self, images, **_):
        pixels = torch.logit(images[..., :3].float().clamp(0.01, 0.99)).movedim(-1, 1)
        return torch.einsum("bpyx,pc->bcyx", torch.nn.functional.pixel_unshuffle(pixels, 8), self.into)


class TestVAE:
    """Stands in for the VAEs of transformers."""

    CATEGORY = "tests"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (FixedVAE(),)


class TestSigmas:
    """Sigmas by their numbers."""

    CATEGORY = "tests"
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"numbers": ("STRING", {})}}

    def make(self, numbers):
        return (torch.tensor(json.loads(numbers)),)


class TestAnima:
    """An Anima of three narrow blocks; ComfyUI reads Anima's sizes off no file."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.ldm.anima.model
        import comfy.supported_models

        whole = comfy.ldm.anima.model.LLMAdapter
        comfy.ldm.anima.model.LLMAdapter = lambda **_: torch.nn.Identity()  # of one size, half a gigabyte
        try:
            described = comfy.supported_models.Anima({
                "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
                "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64,
                "concat_padding_mask": True, "crossattn_emb_channels": 32, "pos_emb_cls": "rope3d",
                "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
                "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 3, "num_heads": 2,
                "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
                "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
            })  # fmt: skip
            described.set_inference_dtype(torch.float32, None)
            model = described.get_model({}, "", device=torch.device("cpu"))
        finally:
            comfy.ldm.anima.model.LLMAdapter = whole
        generator = torch.Generator().manual_seed(3)
        for parameter in model.diffusion_model.parameters():
            size, base = (0.8 / parameter.shape[-1] ** 0.5, 0.0) if parameter.ndim > 1 else (0.3, 1.0)
            parameter.data = base + size * torch.randn(parameter.shape, generator=generator)
        model.diffusion_model.eval().requires_grad_(False)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu")),)


class TestFlux:
    """A FLUX.1 of any width from a file of the original layout; ComfyUI before 0.13 reads no width off one."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": (folder_paths.get_filename_list("diffusion_models"),)}}

    def load(self, file):
        import comfy.ldm.flux.model
        import comfy.supported_models
        import comfy.utils

        state = comfy.utils.load_torch_file(folder_paths.get_full_path("diffusion_models", file))
        width, text = state["txt_in.weight"].shape
        depths = [len({key.split(".")[1] for key in state if key.startswith(name)}) for name in ("double_", "single_")]
        config = {
            "image_model": "flux", "patch_size": 2, "in_channels": 16, "out_channels": 16, "context_in_dim": text,
            "vec_in_dim": state["vector_in.in_layer.weight"].shape[1], "hidden_size": width, "mlp_ratio": 4.0,
            "num_heads": width // 128, "depth": depths[0], "depth_single_blocks": depths[1], "axes_dim": [16, 56, 56],
            "theta": 10000, "qkv_bias": True, "guidance_embed": True,
        }  # fmt: skip
        if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
            config["txt_ids_dims"] = []
        described = comfy.supported_models.Flux(config)
        described.set_inference_dtype(torch.float32, None)
        model = described.get_model({}, "", device=torch.device("cpu"))
        own = model.diffusion_model.state_dict()
        model.diffusion_model.load_state_dict(
            {
                key if key in own else key.replace("norm.scale", "norm.weight"): value.float()
                for key, value in state.items()
            }
        )
        model.diffusion_model.eval().requires_grad_(False)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu")),)


class ThreeFaces:
    """A face model that finds three faces in every picture, the second one the largest; who they are depends on the picture."""

    name = "three faces"

    def find(self, picture, size):
        height, width = picture.shape[:2]
        seed = int(picture.double().sum() * 1000) % 2**31
        faces = []
        for i, (left, side) in enumerate(((0.05, 0.2), (0.25, 0.4), (0.75, 0.2))):
            corner = torch.tensor([left * width, 0.3 * height])
            points = torch.tensor([[0.34, 0.46], [0.66, 0.46], [0.5, 0.64], [0.37, 0.82], [0.63, 0.82]])
            faces.append(
                types.SimpleNamespace(
                    box=torch.cat([corner, corner + side * width]),
                    points=corner + points * side * width,
                    score=0.9 - i / 10,
                    area=(side * width) ** 2,
                    embedding=torch.randn(512, generator=torch.Generator().manual_seed(seed + i)) * 20,
                )
            )
        return faces


class TestFaceModel:
    """Stands in for Load Face Model and the old pack's loaders, without a face model's files."""

    CATEGORY = "tests"
    RETURN_TYPES = ("IMAGE_PROMPT_FACE_MODEL", "INSIGHTFACE")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return ThreeFaces(), ThreeFaces()


class TestUnifiedLoader:
    """What a unified loader of the old pack hands on, from parts that a test chooses."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL", "IPADAPTER")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "adapter": ("IPADAPTER",), "clip_vision": ("CLIP_VISION",)},
            "optional": {"insightface": ("INSIGHTFACE",)},
        }

    def make(self, model, adapter, clip_vision, insightface=None):
        pipeline = {
            "clipvision": {"file": None, "model": clip_vision},
            "ipadapter": {"file": None, "model": adapter},
            "insightface": {"provider": "CPU", "model": insightface},
        }
        return model, pipeline


class TestKolors:
    """An SDXL model that carries Kolors' projection of its text, as Kolors loaders leave it on the UNet."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def make(self, model):
        unet = model.get_model_object("diffusion_model")
        if not hasattr(unet, "encoder_hid_proj"):
            with torch.inference_mode(False), torch.random.fork_rng():
                torch.manual_seed(0)
                unet.encoder_hid_proj = torch.nn.Linear(4096, 2048)
        return (model,)


class TestSaveTensor:
    """Write a LATENT, IMAGE, MASK or CONDITIONING as .npy (float32) and report shape, dtype and hash."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (IO.ANY, {})}}

    def save(self, value):
        if isinstance(value, dict):
            value = value["samples"]
        elif isinstance(value, list):
            value = value[0][0]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"TestSaveTensor takes a LATENT, IMAGE, MASK or CONDITIONING, got {type(value).__name__}")
        array = np.ascontiguousarray(value.detach().float().cpu().numpy())
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        name = f"{digest[:32]}.npy"
        folder = os.path.join(folder_paths.get_output_directory(), "tensors")
        os.makedirs(folder, exist_ok=True)
        np.save(os.path.join(folder, name), array)
        entry = {"filename": name, "subfolder": "tensors", "type": "output"}
        entry |= {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": digest}
        return {"ui": {"tensor": [entry]}}


class TestImage:
    """Images that no loader gives: not a number, no pixels, no images, values far out of range."""

    CATEGORY = "tests"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["nan", "no pixels", "no images", "0..255", "latent"],)}}

    def make(self, kind):
        image = torch.full((1, 16, 16, 3), 0.5)
        if kind == "nan":
            image[0, 3, 4, 1] = float("nan")
        made = {"nan": image, "no pixels": image[:, :0], "no images": image[:0], "0..255": image * 255}
        return (made[kind] if kind in made else image.movedim(-1, 1),)


class TestMaskBatch:
    """Masks of one batch, ``values`` long, each filled with its value."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        size = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"values": ("STRING", {"default": "1, 0"}), "width": size, "height": size}}

    def make(self, values, width, height):
        return (torch.stack([torch.full((height, width), float(v)) for v in values.split(",")]),)


class TestHook:
    """Another pack in the attn2 replace slot of every block: its own text attention times ``factor``.

    ``chain`` calls what is in the slot already, as polite packs do; else it is thrown out, as most do.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "factor": ("FLOAT", {"default": 1.0, "min": -8.0, "max": 8.0}),
                "chain": ("BOOLEAN", {"default": False}),
                "key_parts": ("INT", {"default": 2, "min": 2, "max": 3}),
            }
        }

    def patch(self, model, factor, chain, key_parts):
        model = model.clone()
        slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        blocks = [("middle", 0)] + [(name, i) for name in ("input", "output") for i in range(12)]
        keys = [(*block, depth) for block in blocks for depth in range(10)] if key_parts == 3 else blocks
        for key in keys:
            previous = slots.get(key, slots.get(key[:2])) if chain else None

            def hook(q, k, v, extra_options, previous=previous):
                if previous is not None:
                    return previous(q, k, v, extra_options) * factor
                precision = extra_options["attn_precision"]
                return optimized_attention(q, k, v, extra_options["n_heads"], attn_precision=precision) * factor

            model.set_model_attn2_replace(hook, *key)
        return (model,)


class TestCondBatch:
    """How the conditionings reach the model: one call each (as with little memory), or in another order."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "how": (["little memory", "one by one", "negative first"],)}}

    def patch(self, model, how):
        model = model.clone()
        if how == "little memory":
            original = model.model.memory_required

            def memory_required(input_shape, cond_shapes=None, **more):
                needed = original(input_shape, cond_shapes=cond_shapes or {}, **more)
                # The sampler asks for the batches it would like with cond_shapes; batches of one always go through.
                return 1e18 if cond_shapes is not None and input_shape[0] > 1 else needed

            model.add_object_patch("memory_required", memory_required)
            return (model,)

        def calc(args):
            conds, rest = args["conds"], (args["input"], args["sigma"], args["model"], args["model_options"])
            x, sigma, inner, options = rest
            if how == "negative first":
                order = list(reversed(range(len(conds))))
                out = comfy.samplers.calc_cond_batch(inner, [conds[i] for i in order], x, sigma, options)
                return [out[order.index(i)] for i in range(len(conds))]
            alone = lambda i: [c if j == i else None for j, c in enumerate(conds)]  # noqa: E731
            return [comfy.samplers.calc_cond_batch(inner, alone(i), x, sigma, options)[i] for i in range(len(conds))]

        model.set_model_sampler_calc_cond_batch_function(calc)
        return (model,)


class TestPartlyLoaded:
    """A model of which the host keeps all that it can outside of the device, as it does when memory is short.

    On a CPU it would never: there is nothing to move. Put it last, the switch does not survive a clone.
    """

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        model = model.clone()
        load = model.load

        def load_little(device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
            load(device_to, 1, force_patch_weights, False)
            outside = [m for m in model.model.modules() if getattr(m, "comfy_cast_weights", False)]
            assert model.model.model_lowvram, "the host did not load partly"
            assert len(outside) > 10, "nothing was left outside"

        model.load = load_little
        return (model,)


class TestMemory:
    """What the memory manager counts for live LoRAs, and what they hold before and after it unloads everything."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "after": ("LATENT",)}}

    def report(self, model, after):
        (managed,) = model.get_additional_models_with_key("image_prompt_lora")
        patchers = [m.model for m in comfy.model_management.current_loaded_models]  # None where one is gone already
        loaded = [p.model_size() for p in patchers if p is not None and p.is_clone(managed)]
        stack = managed.model.stack
        numbers = {"counted": sum(loaded), "held": stack.held_bytes}
        comfy.model_management.unload_all_models()
        return {"ui": {"text": [json.dumps(numbers | {"after": stack.held_bytes})]}}


class TestPromptMemory:
    """What the memory manager counts for image prompts, for each of them."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "after": ("LATENT",)}}

    def report(self, model, after):
        managed = model.get_additional_models_with_key("image_prompt")
        patchers = [m.model for m in comfy.model_management.current_loaded_models]  # None where one is gone already
        counted = [sum(p.model_size() for p in patchers if p is not None and p.is_clone(one)) for one in managed]
        held = [  # keys and values, or an adapter's weights where these are used while sampling
            one.model.bytes if hasattr(one.model, "bytes") else comfy.model_management.module_size(one.model)
            for one in managed
        ]
        return {"ui": {"text": [json.dumps({"counted": counted, "held": held})]}}


class TestCensus:
    """What is alive in the server's process: memory, tensors, patchers, and every Python object by its class."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"run": SEED}}

    def count(self, run):
        gc.collect()
        alive = gc.get_objects()
        kinds = collections.Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in alive)
        with open("/proc/self/status") as status:
            rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        numbers = {
            "rss_kb": rss,
            "objects": len(alive),
            "tensors": sum(issubclass(type(one), torch.Tensor) for one in alive),
            "patchers": sum(issubclass(type(one), comfy.model_patcher.ModelPatcher) for one in alive),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "kinds": dict(kinds.most_common(400)),
        }
        return {"ui": {"text": [json.dumps(numbers)]}}


class TestCompile:
    """TorchCompileModel with a backend that runs the traced graph as it is: all of the tracing, none of the compiling."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "backend": (["eager", "aot_eager", "inductor"],)}}

    def patch(self, model, backend):
        model = model.clone()
        skip = getattr(nodes_torch_compile, "skip_torch_compile_dict", None)  # newer hosts drop guards
        options = {"guard_filter_fn": skip} if skip else None
        set_torch_compile_wrapper(model=model, backend=backend, options=options)
        return (model,)


class TestSameObject:
    """Remembers an object under a tag; later says whether it got the same one."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "compare"
    OUTPUT_NODE = True
    KEPT: dict = {}  # noqa: RUF012

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (IO.ANY, {}), "tag": ("STRING", {}), "run": SEED}}

    def compare(self, value, tag, run):
        known = self.KEPT.setdefault(tag, value)
        return {"ui": {"text": ["same" if known is value and run else "first" if not run else "another"]}}


class TestFloats:
    """A list of numbers in one FLOAT, as nodes that draw splines give it."""

    CATEGORY = "tests"
    RETURN_TYPES = ("FLOAT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"numbers": ("STRING", {})}}

    def make(self, numbers):
        return (json.loads(numbers),)


NODES = (
    TestConditioning,
    TestClipVision,
    TestVAE,
    TestAnima,
    TestSigmas,
    TestFlux,
    TestFaceModel,
    TestUnifiedLoader,
    TestKolors,
    TestSaveTensor,
    TestImage,
    TestMaskBatch,
    TestHook,
    TestCondBatch,
    TestPartlyLoaded,
    TestMemory,
    TestPromptMemory,
    TestCensus,
    TestCompile,
    TestSameObject,
    TestFloats,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
