"""The demo world's pictures: emoji of three studios, as one tensor, and the scenes drawn from them.

Sources (npm packages, unpacked below one folder): ``emoji-datasource-google`` (Noto Emoji, Apache-2.0),
``emoji-datasource-twitter`` (Twemoji, CC BY 4.0) and ``@lobehub/fluent-emoji-3d`` (Fluent Emoji, MIT).
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..images.files import read_picture, to_tensor

SIZE = 64
CATEGORIES = ("Animals & Nature", "Food & Drink")
"""Those that references are of."""
NO_SUBJECTS = ("Flags", "Component")
STUDIOS = ("noto", "twemoji", "fluent")
HOLD_OUT_EVERY = 12
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (20, 20, 24),
    "grey": (128, 128, 128),
    "red": (205, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "teal": (20, 150, 150),
    "sky": (130, 200, 250),
    "blue": (40, 70, 200),
    "purple": (130, 60, 170),
    "pink": (250, 150, 190),
}


@dataclass(frozen=True, slots=True)
class Pictures:
    """Cut-out pictures: ``rgba`` is ``p 4 64 64`` in 0..1 with premultiplied alpha; one entry per picture elsewhere.

    The last ``others`` are of other categories than CATEGORIES.
    """

    rgba: Tensor
    names: tuple[str, ...]
    studios: tuple[str, ...]
    held_out: Tensor
    others: int = 0

    def where(self, *, held_out: bool) -> Tensor:
        """Indices of the pictures that training may see (``held_out=False``) or must never see."""
        return torch.nonzero(self.held_out == held_out)[:, 0]


def load_pictures(folder: Path, *, everything: bool = False) -> Pictures:
    """Read the emoji from the ``node_modules`` folder that holds the three packages; ``everything``: of all categories of subjects.

    Every twelfth emoji is held out in all studios: no training in this package draws it.
    """
    google = folder / "emoji-datasource-google"
    if not (google / "emoji.json").is_file():
        raise FileNotFoundError(
            f"{google / 'emoji.json'} is missing; install the pictures with "
            "`npm install emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d` "
            "and pass the resulting node_modules folder"
        )
    entries: list[dict[str, Any]] = json.loads((google / "emoji.json").read_text(encoding="utf-8"))
    entries.sort(key=lambda entry: entry["sort_order"])
    usual = [entry for entry in entries if entry["category"] in CATEGORIES]
    more = [entry for entry in entries if entry["category"] not in (*CATEGORIES, *NO_SUBJECTS)] if everything else []
    rgba: list[Tensor] = []
    names: list[str] = []
    studios: list[str] = []
    held_out: list[bool] = []
    others = 0
    for position, entry in (*enumerate(usual), *enumerate(more)):
        code = entry["unified"].lower()
        files = {
            "noto": google / "img/google/64" / entry["image"],
            "twemoji": folder / "emoji-datasource-twitter/img/twitter/64" / entry["image"],
            "fluent": folder / "@lobehub/fluent-emoji-3d/assets" / f"{code}.webp",
        }
        for studio in STUDIOS:
            if not files[studio].is_file():  # a few recent emoji lack a Fluent picture
                continue
            rgba.append(_read(files[studio]))
            names.append(entry["short_name"].replace("_", " ").replace("-", " "))
            studios.append(studio)
            held_out.append(position % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2)
            others += entry["category"] not in CATEGORIES
    return Pictures(torch.stack(rgba), tuple(names), tuple(studios), torch.tensor(held_out), others)


def _read(path: Path) -> Tensor:
    picture = read_picture(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    rgba = to_tensor(picture).permute(2, 0, 1).contiguous()
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


def place(rgba: Tensor, generator: torch.Generator | None) -> Tensor:
    """Move each cut-out ``b 4 64 64``: scale 0.82..0.9, shift to 3 px, mirror, tilt; None centres it at 0.86."""
    b = rgba.shape[0]
    if generator is None:
        scale, shift = torch.full((b,), 0.86), torch.zeros(b, 2)
        mirror, angle = torch.ones(b), torch.zeros(b)
    else:
        scale = 0.82 + 0.08 * torch.rand(b, generator=generator)
        shift = (torch.rand(b, 2, generator=generator) * 2 - 1) * 3 / 32
        mirror = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
        tilted = torch.rand(b, generator=generator) < 0.1
        angle = torch.where(tilted, (torch.rand(b, generator=generator) * 2 - 1) * math.radians(12), 0.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [
            torch.stack([cos * mirror, -sin * mirror, -shift[:, 0] * mirror / scale], -1),
            torch.stack([sin, cos, -shift[:, 1] / scale], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(rgba: Tensor, angle: Tensor) -> Tensor:
    """Rotate the hue of premultiplied cut-outs by ``angle`` (radians, one per picture) about the grey axis."""
    c, s = angle.cos(), angle.sin()
    third, root = (1 - c) / 3, math.sqrt(1 / 3) * s
    rows = [c + third, third - root, third + root, third + root, c + third, third - root, third - root, third + root]
    matrix = torch.stack([*rows, c + third], -1).view(-1, 3, 3)
    alpha = rgba[:, 3:]
    rgb = torch.einsum("bij,bjyx->biyx", matrix, rgba[:, :3]).clamp(min=0)
    return torch.cat([torch.minimum(rgb, alpha), alpha], 1)


def on_background(rgba: Tensor, colours: Tensor) -> Tensor:
    """Composite premultiplied cut-outs ``b 4 y x`` on plain colours ``b 3`` (0..1); returns ``b 3 y x`` in 0..1."""
    return rgba[:, :3] + (1 - rgba[:, 3:]) * colours[:, :, None, None]


def colour_table() -> Tensor:
    """The named background colours, ``12 3`` in 0..1, in the order of BACKGROUNDS."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255


def caption(studio: str | None, name: str | None, background: str | None) -> str:
    """The world's caption grammar: ``fluent red apple on blue background``; an unknown part is left out."""
    words = [studio or "", name or "emoji", f"on {background} background" if background else ""]
    return " ".join(word for word in words if word)
