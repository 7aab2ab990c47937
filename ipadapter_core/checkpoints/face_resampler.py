"""FaceID portrait unnorm and InstantID's adapter, in plus' keys and shapes: a resampler reads one raw face embedding.

They differ in the face model (buffalo_l, antelopev2) and in that InstantID wants its ControlNet beside it.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..features import RAW_FACE
from ..files.state_dict import TensorFile
from ..models.unet import SDXL
from .plus import Plus


class InstantID(Plus):
    name = "instantid"
    label = "InstantID (raw face embedding; wants its ControlNet too)"
    feature = RAW_FACE
    unconditional = "zero_embeds"
    encoder = "InsightFace"
    before = ("plus",)
    trains = False

    def marks(self, file: TensorFile) -> bool:
        """A face embedding has 512 numbers, and both files are for SDXL's text tokens of 2048."""
        into, out, norm = (file.tensors.get(f"image_proj.{key}.weight") for key in ("proj_in", "proj_out", "norm_out"))
        widths = [tuple(t.shape[:1]) for t in (out, norm) if t is not None]
        return into is not None and tuple(into.shape[-1:]) == (512,) and (SDXL.text_width,) in widths

    def tokens(self, projector: nn.Module, features: Tensor, face_scale: float) -> Tensor:
        return projector(features[:, None])  # one token to read


class PortraitUnnorm(InstantID):
    name = "faceid-unnorm"
    label = "FaceID portrait unnorm (raw face embedding)"
    serves = (("portrait", 3),)
    before = ("instantid", "plus")

    def marks(self, file: TensorFile) -> bool:
        """No shape tells it from InstantID's: metadata does, else the name."""
        told = file.metadata.get("family", "")
        named = told == self.name or (told != InstantID.name and "unnorm" in file.name.lower())
        return named and super().marks(file)


INSTANTID, UNNORM = InstantID(), PortraitUnnorm()
