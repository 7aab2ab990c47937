"""Image prompts for diffusion models, independent of any user interface.

```python
from ipadapter_core import image_prompt

with image_prompt(pipeline, "ip-adapter-plus_sd15.safetensors", "cat.png", strength=0.8):
    pictures = pipeline("a garden").images
```

The same in its steps, each of which has more to set:

```python
from ipadapter_core import TransformersImageEncoder, WeightSchedule, bake, encode_image_prompt, layout_of, load_adapter
from ipadapter_core.backends.diffusers import apply

adapter = load_adapter("ip-adapter_sd15.safetensors")
encoder = TransformersImageEncoder.from_pretrained("image_encoder")
prompt = encode_image_prompt(adapter, encoder, "cat.png")
patch = bake(adapter, prompt, layout_of(unet), WeightSchedule(strength=0.8))
with apply(unet, patch):
    pictures = pipeline("a garden").images  # the pipeline that the UNet is of
```
"""

from .attention.call import ModelCall, SiteCall
from .attention.masks import RegionMask
from .attention.maths import KeyValue, Scale, add_image_attention, attend, scale_for
from .attention.patch import AdapterPatch
from .attention.presets import PRESETS, SiteRule, parse_layers, parse_site_factors
from .attention.recording import AttentionMaps, Recorder
from .attention.schedule import (
    SCALINGS,
    WeightSchedule,
    Window,
    parse_curve,
    parse_numbers,
)
from .bake import bake, check_adapter
from .checkpoints import FORMATS, AdapterSpec, AdapterWeights, describe_adapter, load_adapter, save_adapter
from .compatibility import COMPATIBILITIES, Compatibility, Rules, rules_for
from .errors import (
    AdapterError,
    CorruptFileError,
    IncompatibleAdapterError,
    IncompatibleEncoderError,
    InvalidInputError,
    UnknownFormatError,
    UnsafeFileError,
)
from .features import ENCODERS, EncoderSpec, ImageEncoder, ImageFeatures
from .hub import file_on_disk
from .images.encoder import TowerEncoder, TransformersImageEncoder, load_image_encoder
from .images.pictures import Picture, as_mask, as_picture
from .images.preprocess import preprocess
from .models import layout_of
from .models.sites import BaseModel, ModelLayout, Site
from .prompt.combine import combine_features, combine_prompts
from .prompt.encode import encode_features, encode_image_prompt, prompt_from_features, unconditional_features
from .prompt.faces import encode_face_prompt
from .prompt.file import load_prompt, save_prompt
from .prompt.image_prompt import ImagePrompt
from .prompt.model_projection import project_by_model
from .prompt.options import EncodeOptions
from .report import describe_fit, describe_spec, spec_facts
from .steering import image_prompt
from .training.processors import AttnProcessor, IPAttnProcessor, build_processors

CrossAttentionSite = Site  # the name of version 0.1

__version__ = "0.2.0"

__all__ = [
    "COMPATIBILITIES",
    "ENCODERS",
    "FORMATS",
    "PRESETS",
    "SCALINGS",
    "AdapterError",
    "AdapterPatch",
    "AdapterSpec",
    "AdapterWeights",
    "AttentionMaps",
    "AttnProcessor",
    "BaseModel",
    "Compatibility",
    "CorruptFileError",
    "CrossAttentionSite",
    "EncodeOptions",
    "EncoderSpec",
    "IPAttnProcessor",
    "ImageEncoder",
    "ImageFeatures",
    "ImagePrompt",
    "IncompatibleAdapterError",
    "IncompatibleEncoderError",
    "InvalidInputError",
    "KeyValue",
    "ModelCall",
    "ModelLayout",
    "Picture",
    "Recorder",
    "RegionMask",
    "Rules",
    "Scale",
    "Site",
    "SiteCall",
    "SiteRule",
    "TowerEncoder",
    "TransformersImageEncoder",
    "UnknownFormatError",
    "UnsafeFileError",
    "WeightSchedule",
    "Window",
    "add_image_attention",
    "as_mask",
    "as_picture",
    "attend",
    "bake",
    "build_processors",
    "check_adapter",
    "combine_features",
    "combine_prompts",
    "describe_adapter",
    "describe_fit",
    "describe_spec",
    "encode_face_prompt",
    "encode_features",
    "encode_image_prompt",
    "file_on_disk",
    "image_prompt",
    "layout_of",
    "load_adapter",
    "load_image_encoder",
    "load_prompt",
    "parse_curve",
    "parse_layers",
    "parse_numbers",
    "parse_site_factors",
    "preprocess",
    "project_by_model",
    "prompt_from_features",
    "rules_for",
    "save_adapter",
    "save_prompt",
    "scale_for",
    "spec_facts",
    "unconditional_features",
]
