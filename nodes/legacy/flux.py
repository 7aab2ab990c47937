"""The class types of x-flux-comfyui (XLabs) and of ComfyUI-IPAdapter-Flux (Shakker): image prompts in FLUX.1.

Both packs replace parts of the model and run on no current ComfyUI. Here their graphs act through hooks, with any sampler.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ...ipadapter_core import EncodeOptions, InvalidInputError, WeightSchedule, rules_for
from ...ipadapter_core.legacy.block_strengths import SMOOTHINGS, Smoothing, strengths_of_blocks
from ...ipadapter_core.legacy.flux_schedule import sampled_sigmas
from ...ipadapter_core.narrowing import is_row, is_table
from .. import host
from .loaders import find_encoder
from .pipeline import Pipeline
from .sockets import CONDITIONING, IMAGE, MODEL, Inputs, LegacyNode, choice, integer, number


def carried(value: Any, loader: str) -> Pipeline:
    """What a loader here gave. Raises InvalidInputError for what another pack's loader did."""
    if not isinstance(value, Pipeline):
        raise InvalidInputError(
            f"the adapter input carries a {type(value).__name__} of another pack; connect {loader} of this pack"
        )
    return value


def apply_picture(
    model: Any,
    pipeline: Pipeline,
    image: Tensor,
    schedule: WeightSchedule,
    *,
    average: bool = False,
    rules: str = "correct",
) -> tuple[Any, ...]:
    """The MODEL with an image prompt: several pictures as their ``average``, or one for each latent."""
    options = EncodeOptions(combine="average" if average else "concat", per_latent=not average and len(image) > 1)
    prompt = host.adapters.encode(pipeline.adapter, pipeline.clip_vision, image, options)
    patched, _ = host.adapters.apply(model, pipeline.adapter, prompt, schedule, None, rules_for(rules))
    return (patched,)


# --- x-flux-comfyui --------------------------------------------------------------------------------------------------


class XLabsNode(LegacyNode):
    PACK = "x-flux-comfyui"


class XLabsModelNode(XLabsNode):
    """One that gives the model with something applied."""

    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("MODEL",)
    SOURCE: ClassVar[Inputs] = {"model": MODEL, "ip_adapter_flux": ("IP_ADAPTER_FLUX",), "image": IMAGE}


class LoadFluxIPAdapter(XLabsNode):
    REPLACEMENT = "Load IP-Adapter, and Load CLIP Vision"
    RETURN_TYPES = ("IP_ADAPTER_FLUX",)
    RETURN_NAMES = ("ipadapterFlux",)
    FUNCTION = "loadmodel"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "ipadatper": (host.files.names("ipadapter"),),  # so it is spelled in saved graphs
                "clip_vision": (host.files.names("clip_vision"),),
                "provider": choice(["CPU", "GPU"]),
            }
        }

    def loadmodel(self, ipadatper: str, clip_vision: str, provider: str) -> tuple[Any, ...]:
        return (Pipeline(host.adapters.load(ipadatper), host.clip_vision.load(clip_vision)),)


class ApplyFluxIPAdapter(XLabsModelNode):
    FUNCTION = "applymodel"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": cls.SOURCE | {"ip_scale": number(0.93, 0.0, 1.0, 0.001)}}

    def applymodel(self, model: Any, ip_adapter_flux: Any, image: Tensor, ip_scale: float) -> tuple[Any, ...]:
        pipeline = carried(ip_adapter_flux, "Load Flux IPAdapter")
        return apply_picture(model, pipeline, image, WeightSchedule(strength=ip_scale))


class ApplyAdvancedFluxIPAdapter(XLabsModelNode):
    REPLACEMENT = "Encode Image Prompt, Adapter Schedule (sites) and Apply Adapter to Model"
    FUNCTION = "applymodel"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                **cls.SOURCE,
                "begin_strength": number(0.0, -100.0, 100.0, 0.01),
                "end_strength": number(1.0, -100.0, 100.0, 0.01),
                "smothing_type": choice(SMOOTHINGS),
            }
        }

    def applymodel(
        self, model: Any, ip_adapter_flux: Any, image: Tensor, begin_strength: float, end_strength: float,
        smothing_type: Smoothing,
    ) -> tuple[Any, ...]:  # fmt: skip
        pipeline = carried(ip_adapter_flux, "Load Flux IPAdapter")
        layers = tuple(enumerate(strengths_of_blocks(smothing_type, begin_strength, end_strength)))
        return apply_picture(model, pipeline, image, WeightSchedule(layers=layers), average=True)


class FluxLoraLoader(XLabsModelNode):
    REPLACEMENT = "LoRA Strength"
    FUNCTION = "loadmodel"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        files = (host.files.names("loras"),)
        return {"required": {"model": MODEL, "lora_name": files, "strength_model": number(1.0, -100.0, 100.0, 0.01)}}

    def loadmodel(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any, ...]:
        return (host.lora.apply(model, None, host.lora.load(lora_name), "auto", strength=strength_model)[0],)


def latent_of(value: object) -> Tensor:
    """The latents ``b c h w`` on a LATENT input. Raises InvalidInputError where there are none."""
    found = value.get("samples") if is_table(value) else None
    if not isinstance(found, Tensor) or found.ndim != 4 or found.numel() == 0:
        raise InvalidInputError("latent_image holds no latents b c h w; connect Empty Latent Image or VAE Encode")
    return found


def conditioning_of(value: object) -> list[tuple[Tensor, dict[str, object]]]:
    """The entries of a CONDITIONING input. Raises InvalidInputError for what is none."""
    found: list[tuple[Tensor, dict[str, object]]] = []
    for entry in value if is_row(value) else ():
        text, more = entry if is_row(entry) and len(entry) == 2 else (None, None)
        if not isinstance(text, Tensor) or not is_table(more):
            raise InvalidInputError("the conditioning holds no encoded text; connect CLIP Text Encode")
        found.append((text, more))
    if not found:
        raise InvalidInputError("the conditioning is empty; connect CLIP Text Encode")
    return found


class XlabsSampler(XLabsNode):
    """Euler over that pack's own schedule, with guidance by the negative prompt from a step on."""

    REPLACEMENT = "KSampler, with cfg 1"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    FUNCTION = "sampling"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": MODEL,
                "conditioning": CONDITIONING,
                "neg_conditioning": CONDITIONING,
                "noise_seed": integer(0, 0, 2**64 - 1),
                "steps": integer(20, 1, 100),
                "timestep_to_start_cfg": integer(20, 0, 100),
                "true_gs": number(3.0, 0.0, 100.0),
                "image_to_image_strength": number(0.0, 0.0, 1.0, 0.01),
                "denoise_strength": number(1.0, 0.0, 1.0, 0.01),
            },
            "optional": {"latent_image": ("LATENT",), "controlnet_condition": ("ControlNetCondition",)},
        }

    def sampling(
        self, model: Any, conditioning: Any, neg_conditioning: Any, noise_seed: int, steps: int, timestep_to_start_cfg: int,
        true_gs: float, image_to_image_strength: float, denoise_strength: float, latent_image: Any = None,
        controlnet_condition: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        if latent_image is None:
            raise InvalidInputError("latent_image is not connected; connect Empty Latent Image")
        if controlnet_condition is not None:
            raise InvalidInputError(
                "controlnet_condition is of x-flux-comfyui's own ControlNets, which this pack has not; use Apply ControlNet on the "
                "conditioning and KSampler"
            )
        latent = latent_of(latent_image)
        conditioning, neg_conditioning = (conditioning_of(given) for given in (conditioning, neg_conditioning))
        # an empty latent of sixteen channels has no picture to start from
        start = image_to_image_strength if latent.shape[1] == 16 and bool(latent.any()) else None
        tokens = (latent.shape[-2] // 2) * (latent.shape[-1] // 2)
        sigmas = sampled_sigmas(steps, tokens, denoise_strength, start)
        # that sampler's guidance is 1 where the conditioning says none
        told = [[text, {"guidance": 1.0, **more}] for text, more in conditioning]
        guidance = told[0][1]["guidance"]
        negative = [[text, {**more, "guidance": guidance}] for text, more in neg_conditioning]
        sampled = host.sampling.sample_guided_from(
            model, told, negative, latent, noise_seed, sigmas, timestep_to_start_cfg, true_gs
        )
        return ({**latent_image, "samples": sampled},)


# --- ComfyUI-IPAdapter-Flux ------------------------------------------------------------------------------------------


class ShakkerNode(LegacyNode):
    PACK = "ComfyUI-IPAdapter-Flux"
    SOURCE: ClassVar[Inputs] = {"model": MODEL, "ipadapter_flux": ("IP_ADAPTER_FLUX_INSTANTX",), "image": IMAGE}
    WINDOW: ClassVar[Inputs] = {
        "start_percent": number(0.0, 0.0, 1.0, 0.001),
        "end_percent": number(1.0, 0.0, 1.0, 0.001),
    }


class IPAdapterFluxLoader(ShakkerNode):
    REPLACEMENT = "Load IP-Adapter, and Load CLIP Vision"
    RETURN_TYPES = ("IP_ADAPTER_FLUX_INSTANTX",)
    RETURN_NAMES = ("ipadapterFlux",)
    FUNCTION = "load_model"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "ipadapter": (host.files.names("ipadapter"),),
                "clip_vision": choice(["google/siglip-so400m-patch14-384"]),
                "provider": choice(["cuda", "cpu", "mps"]),
            }
        }

    def load_model(self, ipadapter: str, clip_vision: str, provider: str) -> tuple[Any, ...]:
        adapter = host.adapters.load(ipadapter)
        return (Pipeline(adapter, host.clip_vision.load(find_encoder(adapter.weights.spec, ipadapter))),)


class ApplyIPAdapterFlux(ShakkerNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter_flux"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {**cls.SOURCE, "weight": number(1.0, -1.0, 5.0), **cls.WINDOW}}

    def apply_ipadapter_flux(
        self, model: Any, ipadapter_flux: Any, image: Tensor, weight: float, start_percent: float, end_percent: float
    ) -> tuple[Any, ...]:
        pipeline = carried(ipadapter_flux, "Load IPAdapter Flux Model")
        schedule = WeightSchedule(strength=weight, start_percent=start_percent, end_percent=end_percent)
        return apply_picture(model, pipeline, image[:1], schedule, rules="IPAdapter-Flux")


class IPAdapterFluxLoaderAdvanced(IPAdapterFluxLoader):
    FUNCTION = "load_model_advanced"

    def load_model_advanced(self, ipadapter: str, clip_vision: str, provider: str) -> tuple[Any, ...]:
        return self.load_model(ipadapter, clip_vision, provider)


class ApplyIPAdapterFluxAdvanced(ShakkerNode):
    """``steps`` counted how many steps the weight took to its end; here it takes all of the window, whatever the sampler."""

    REPLACEMENT = "Encode Image Prompt, Adapter Schedule (curve) and Apply Adapter to Model"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter_flux_advanced"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                **cls.SOURCE,
                "weight_start": number(0.0, -1.0, 5.0),
                "weight_end": number(1.0, -1.0, 5.0),
                "steps": integer(10, 1, 100),
                **cls.WINDOW,
            }
        }

    def apply_ipadapter_flux_advanced(
        self, model: Any, ipadapter_flux: Any, image: Tensor, weight_start: float, weight_end: float, steps: int,
        start_percent: float, end_percent: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        pipeline = carried(ipadapter_flux, "Load IPAdapter Flux Model")
        start, end = min(start_percent, end_percent), max(start_percent, end_percent)
        curve = ((start, weight_start), (end, weight_end)) if steps > 1 else ((start, weight_end),)
        schedule = WeightSchedule(start_percent=start_percent, end_percent=end_percent, curve=curve)
        return apply_picture(model, pipeline, image[:1], schedule, rules="IPAdapter-Flux")
