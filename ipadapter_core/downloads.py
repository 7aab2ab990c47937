"""Public files that graphs of this pack name, and where each of them is: exact addresses alone, none that is guessed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Download:
    """A public file: ``name`` is what graphs call it, ``folder`` where it belongs below ComfyUI's ``models``.

    ``note`` is what one must know before, such as a licence to agree to.
    """

    name: str
    folder: str
    url: str
    note: str = ""

    @property
    def comes_as(self) -> str:
        """The name that it has where it is, if that is another; else nothing."""
        there = self.url.rsplit("/", 1)[-1]
        return "" if there == self.name else there

    @property
    def where(self) -> str:
        """One sentence's end for messages: which file from where, and what it must be called."""
        called = f" (there it is called {self.comes_as})" if self.comes_as else ""
        return f"{self.name} from {self.url}{called}"


def _files(folder: str, repository: str, *paths: str, note: str = "") -> tuple[Download, ...]:
    """Files of a repository on Hugging Face: paths there, or ``path -> name`` where graphs call it otherwise."""
    found: list[Download] = []
    for entry in paths:
        path, _, name = entry.partition(" -> ")
        url = f"https://huggingface.co/{repository}/resolve/main/{path}"
        found.append(Download(name or path.rsplit("/", 1)[-1], folder, url, note))
    return tuple(found)


_H94, _FACEID = "h94/IP-Adapter", "h94/IP-Adapter-FaceID"
_FACES = "https://github.com/deepinsight/insightface/releases/download/v0.7/"
_UNPACK = "unpack it there, into a folder of its name"

DOWNLOADS: dict[str, Download] = {
    download.name: download
    for download in (
        *_files("ipadapter", _H94, *(f"models/{name}" for name in (
            "ip-adapter_sd15.safetensors", "ip-adapter_sd15_light.safetensors", "ip-adapter_sd15_light_v11.bin",
            "ip-adapter_sd15_vit-G.safetensors", "ip-adapter-plus_sd15.safetensors",
            "ip-adapter-plus-face_sd15.safetensors", "ip-adapter-full-face_sd15.safetensors",
        ))),
        *_files("ipadapter", _H94, *(f"sdxl_models/{name}" for name in (
            "ip-adapter_sdxl.safetensors", "ip-adapter_sdxl_vit-h.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors",
            "ip-adapter-plus-face_sdxl_vit-h.safetensors",
        ))),
        *_files("ipadapter", _FACEID, *(f"ip-adapter-faceid{name}.bin" for name in (
            "_sd15", "_sdxl", "-plus_sd15", "-plusv2_sd15", "-plusv2_sdxl", "-portrait_sd15", "-portrait-v11_sd15",
            "-portrait_sdxl", "-portrait_sdxl_unnorm",
        ))),
        *_files("loras", _FACEID, *(f"ip-adapter-faceid{name}_lora.safetensors" for name in (
            "_sd15", "_sdxl", "-plus_sd15", "-plusv2_sd15", "-plusv2_sdxl",
        ))),
        *_files(
            "ipadapter", "ostris/ip-composition-adapter",
            "ip_plus_composition_sd15.safetensors", "ip_plus_composition_sdxl.safetensors",
        ),
        *_files("ipadapter", "Kwai-Kolors/Kolors-IP-Adapter-Plus", "ip_adapter_plus_general.bin"),
        *_files(
            "ipadapter", "XLabs-AI/flux-ip-adapter", "ip_adapter.safetensors -> flux-ip-adapter.safetensors"
        ),
        *_files(
            "ipadapter", "XLabs-AI/flux-ip-adapter-v2", "ip_adapter.safetensors -> flux-ip-adapter-v2.safetensors"
        ),
        *_files("ipadapter", "InstantX/FLUX.1-dev-IP-Adapter", "ip-adapter.bin -> flux-instantx-ip-adapter.bin"),
        *_files("ipadapter", "InstantX/SD3.5-Large-IP-Adapter", "ip-adapter.bin -> sd35-large-ip-adapter.bin"),
        *_files("ipadapter", "tencent/InstantCharacter", "instantcharacter_ip-adapter.bin"),
        *_files("ipadapter", "LuciferTC/Anima-IP-Adapter", "ip_adapter-Character_Reference-10.safetensors"),
        *_files("clip_vision", _H94,
            "models/image_encoder/model.safetensors -> CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            "sdxl_models/image_encoder/model.safetensors -> CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
        ),
        *_files(
            "clip_vision", "openai/clip-vit-large-patch14", "model.safetensors -> clip-vit-large-patch14.safetensors"
        ),
        *_files(
            "clip_vision", "Kwai-Kolors/Kolors-IP-Adapter-Plus",
            "image_encoder/pytorch_model.bin -> clip-vit-large-patch14-336.bin",
        ),
        *_files("clip_vision", "Comfy-Org/sigclip_vision_384", "sigclip_vision_patch14_384.safetensors"),
        *_files(
            "clip_vision", "google/siglip-so400m-patch14-384",
            "model.safetensors -> siglip-so400m-patch14-384.safetensors",
        ),
        *_files(
            "clip_vision", "google/siglip2-base-patch16-512",
            "model.safetensors -> siglip2-base-patch16-512.safetensors",
        ),
        *_files("checkpoints", "Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly.safetensors"),
        *_files("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
        *_files(
            "checkpoints", "stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors",
            note="agree to its licence there first",
        ),
        *_files("diffusion_models", "Comfy-Org/flux1-dev", "flux1-dev.safetensors"),
        *_files(
            "diffusion_models", "circlestone-labs/Anima", "split_files/diffusion_models/anima-base-v1.0.safetensors"
        ),
        *_files("text_encoders", "comfyanonymous/flux_text_encoders", "clip_l.safetensors", "t5xxl_fp16.safetensors"),
        *_files("text_encoders", "Comfy-Org/stable-diffusion-3.5-fp8", "text_encoders/clip_g.safetensors"),
        *_files("text_encoders", "circlestone-labs/Anima", "split_files/text_encoders/qwen_3_06b_base.safetensors"),
        *_files("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors"),
        *_files("vae", "circlestone-labs/Anima", "split_files/vae/qwen_image_vae.safetensors"),
        Download("buffalo_l.zip", "insightface/models", f"{_FACES}buffalo_l.zip", _UNPACK),
        Download("antelopev2.zip", "insightface/models", f"{_FACES}antelopev2.zip", _UNPACK),
    )
}  # fmt: skip
"""By the names that graphs have."""

TWINS = {"ip-adapter_sd15_light_v11.bin": "ip-adapter_sd15_light.safetensors"}
"""Files that are pickles, and what there is of them as safetensors (the first version, of this one)."""


def find_download(name: str) -> Download | None:
    """The public file of a name, folders before it aside; None for one that is not in the table."""
    return DOWNLOADS.get(name.replace("\\", "/").rsplit("/", 1)[-1])
