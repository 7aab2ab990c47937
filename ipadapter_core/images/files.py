"""Picture files of strangers, cameras and scanners as upright 8-bit pictures. The one reader of them.

Colour profiles are ignored, as by ComfyUI and by the other trainers. Of animations and of files with several pages the first
picture is taken. Metadata never costs the picture: whatever is odd about it, the pixels are read.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import importlib
import io
import os
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from ..errors import AdapterError, CorruptFileError, quoted, reason
from ..files.text import read_bytes

EXTENSIONS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".tga", ".qoi",
)  # fmt: skip
"""What names of pictures end in, in lower case; earlier ones win where several files make one sample."""

MAX_FILE = 2**30
"""Bytes of a picture file; 178 million pixels of 16 bits have as many without compression."""

MAX_PIXELS = 178_956_970
"""Pillow's own limit, past which it speaks of a decompression bomb. Repeated here because other packs switch that one off."""

FREE_PIXELS = 2**25
PIXELS_PER_BYTE = 4096
"""More pixels than FREE_PIXELS need a file of a size: no picture of something has more per byte (blank 8-bit PNGs: 1,030)."""

# no EPS (Pillow starts Ghostscript for it), and none of the formats that accept nearly any bytes
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JXL", "JPEG2000", "QOI", "PSD")
_ADDED_BY = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_Read = TypeVar("_Read", Image.Image, Tensor)
_TIFF_TILE = (322, 323)  # width, length


def shown(name: object) -> str:
    """A picture's name for a message; of long ones the end, which tells them apart."""
    text = str(name)
    return quoted(text if len(text) <= 80 else f"…{text[-79:]}")


def decode_picture(content: bytes, name: str) -> Image.Image:
    """An upright picture in RGB, or RGBA where it can be transparent, 8 bits each; ``name`` is the file's, for messages.

    Grey of 16 bits is divided by 257, floating point in 0..1 multiplied by 255. Raises CorruptFileError naming the file.
    """

    def colours(image: Image.Image) -> Image.Image:
        return _in_colours(image, name)

    return _guarded(content, name, colours)


def decode_grey(content: bytes, name: str) -> Tensor:
    """A picture as grey levels ``y x`` in 0..1, of 16-bit and floating point files at their full precision.

    Colours are averaged, transparency does not count. Raises as ``decode_picture``.
    """

    def levels(image: Image.Image) -> Tensor:
        return _grey(image, name)

    return _guarded(content, name, levels)


def upright(image: Image.Image) -> Image.Image:
    """A picture in memory as ``decode_picture`` gives one of a file. Raises CorruptFileError."""
    return _in_memory(image, _in_colours)


def grey_levels(image: Image.Image) -> Tensor:
    """A picture in memory as ``decode_grey`` gives one of a file. Raises CorruptFileError."""
    return _in_memory(image, _grey)


def _in_memory(image: Image.Image, read: Callable[[Image.Image, str], _Read]) -> _Read:
    name = str(getattr(image, "filename", "") or "the picture")
    try:
        image.load()
        return read(_turned(image, _orientation(image.getexif, image.info.get("exif"))), name)
    except AdapterError:
        raise
    except Exception as error:  # a file that Pillow opened is read only now
        raise CorruptFileError(f"{shown(name)} cannot be read as a picture: {reason(error)}") from error


def _grey(image: Image.Image, name: str) -> Tensor:
    """Grey levels ``y x`` in 0..1."""
    if _is_deep(image):
        return torch.from_numpy(_levels(image, name))
    return to_tensor(image if image.mode == "L" else _in_colours(image, name))[..., :3].mean(-1)


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file as ``decode_picture`` gives it. Raises also FileNotFoundError, InvalidInputError for no plain file."""
    return decode_picture(read_bytes(path, MAX_FILE), str(path))


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels ``y x c`` in 0..1, float32."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels /= 255
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])


def _guarded(content: bytes, name: str, read: Callable[[Image.Image], _Read]) -> _Read:
    """What ``read`` makes of the upright picture; whatever Pillow and its plugins raise becomes one sentence."""
    try:
        try:
            return read(_opened(content, name))
        except AdapterError:
            raise
        except Exception:
            bare, exif = _without_metadata(content)
            if bare is None:
                raise
            return read(_turned(_opened(bare, name), _orientation(lambda: _exif(exif), exif)))
    except AdapterError:
        raise
    except Exception as error:  # plugins raise of every kind: struct.error, KeyError, OverflowError, MemoryError, …
        raise CorruptFileError(f"{shown(name)} cannot be read as a picture: {_why(error, content, name)}") from error


def _why(error: Exception, content: bytes, name: str) -> str:
    if not content:
        return "it is empty"
    extension = os.path.splitext(name)[1].lower()
    if isinstance(error, Image.UnidentifiedImageError):
        plugin = _ADDED_BY.get(extension)
        if plugin and not _formats().intersection(("HEIF", "JXL")):
            return f"Pillow reads {extension} only with {plugin}; pip install {plugin}, or convert it to PNG"
        return "it is in no format that is known here, or its beginning is damaged"
    return reason(error)


def _opened(content: bytes, name: str) -> Image.Image:
    """The first picture of a file, decoded and upright, in its own mode."""
    image = _lazy(content, name)
    _check_size(image, len(content), name)
    # before the pixels: Pillow's TIFF reader turns pictures itself, and fails with odd entries
    orientation = _orientation(image.getexif, image.info.get("exif"))
    if image.format == "TIFF":
        image.load_end = _nothing
    image.load()
    return _turned(image, orientation)


def _lazy(content: bytes, name: str) -> Any:
    file = io.BytesIO(content)
    if content.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(file)  # Image.open would look for a second picture, and may fail over it
    formats = [one for one in _FORMATS if one in _formats()]
    if name.lower().endswith(".tga"):
        formats.append("TGA")  # has no mark of its own: nearly any bytes can be one
    return Image.open(file, formats=formats)


def _nothing() -> None:
    pass


@lru_cache
def _formats() -> set[str]:
    """What this Pillow reads, with the plugins that are installed."""
    Image.init()
    for plugin, register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", "")):
        try:
            module = importlib.import_module(plugin)
            if register:
                getattr(module, register)()
        except Exception:  # absent, or too old for this Pillow
            continue
    return set(Image.OPEN)


def _check_size(image: Image.Image, file_size: int, name: str) -> None:
    """Nothing that a header declares may take more memory than the file's size makes believable."""
    width, height = image.size
    pixels = width * height
    limit = min(MAX_PIXELS, max(FREE_PIXELS, file_size * PIXELS_PER_BYTE))
    if not 0 < pixels <= limit:
        what = f"at most {limit:,} can be used" + ("" if limit == MAX_PIXELS else f" from {file_size:,} bytes")
        raise CorruptFileError(f"{shown(name)} declares {width:,}x{height:,} pixels; {what}")
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2")  # noqa: B009
        tile = [side for side in (tags.get(tag, 0) for tag in _TIFF_TILE) if isinstance(side, int)]
        if len(tile) == 2 and tile[0] * tile[1] > max(4 * pixels, 2**20):
            raise CorruptFileError(f"{shown(name)} declares tiles of {tile[0]:,}x{tile[1]:,} pixels; it is damaged")


def _orientation(read: Callable[[], Image.Exif], block: object) -> int:
    """EXIF's (or XMP's) orientation, 1 where it cannot be read. The block is never written anew, as Pillow's own does."""
    try:
        value: object = read().get(_ORIENTATION)
    except Exception:  # entries of other types than they should have, offsets to nowhere
        value = None
    if value is None and isinstance(block, bytes):
        value = _orientation_in(block.removeprefix(b"Exif\0\0"))  # Pillow before 13 gives up at the first odd entry
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


def _orientation_in(block: bytes) -> int | None:
    """The one entry that matters, looked for in the first table of a TIFF block."""
    order: Literal["little", "big"] = "little" if block[:2] == b"II" else "big"
    first = int.from_bytes(block[4:8], order) + 2
    for at in range(first, min(len(block) - 11, first + 12 * int.from_bytes(block[first - 2 : first], order)), 12):
        if int.from_bytes(block[at : at + 2], order) == _ORIENTATION:
            size = {3: 2, 4: 4}.get(int.from_bytes(block[at + 2 : at + 4], order), 0)  # a SHORT, or a LONG by mistake
            return int.from_bytes(block[at + 8 : at + 8 + size], order)
    return None


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _in_colours(image: Image.Image, name: str) -> Image.Image:
    """RGB or RGBA, 8 bits."""
    if _is_deep(image):
        eight_bits = Image.fromarray((_levels(image, name) * 255 + 0.5).astype(np.uint8))
        clear = image.info.get("transparency")
        if not isinstance(clear, int):
            return eight_bits.convert("RGB")
        colours = eight_bits.convert("RGBA")
        colours.putalpha(Image.fromarray(((np.asarray(image) != clear) * 255).astype(np.uint8)))
        return colours
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode == "La":
        image = image.convert("LA")
    transparent = image.mode in ("RGBA", "RGBa", "LA", "PA") or (
        "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    )
    mode = "RGBA" if transparent else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _is_deep(image: Image.Image) -> bool:
    """Grey of more than 8 bits, which Pillow's convert() would clip at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _levels(image: Image.Image, name: str) -> Any:
    """Deep grey as float32 ``y x`` in 0..1."""
    values: Any = np.asarray(image)
    low, high = values.min(), values.max()
    white, what = (1, "floating point pictures hold 0..1") if image.mode == "F" else (65535, "16-bit ones 0..65535")
    if not (low >= 0 and high <= white):  # also for NaN
        raise CorruptFileError(
            f"{shown(name)} holds grey values from {low:.6g} to {high:.6g}, and what is white in it is unknown; {what}"
        )
    return values.astype(np.float32) / np.float32(white)


# --- metadata -----------------------------------------------------------------------------------------------------------

_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
"""JPEG's application segments and comments, but for JFIF and Adobe's word on colours."""
_JPEG_EXIF, _PNG_EXIF, _PNG_TRANSPARENCY = 0xE1, 0x65584966, 0x74524E53


def _without_metadata(content: bytes) -> tuple[bytes | None, bytes]:
    """The same picture without what is not needed to draw it, and its EXIF block; None where there is nothing to leave out."""
    if content.startswith(b"\xff\xd8"):
        parts = _jpeg_parts(content)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        parts = _png_parts(content)
    else:
        return None, b""
    kept: list[bytes] = []
    exif = b""
    dropped = False
    for kind, start, data, end in parts:
        if kind not in _METADATA and not _may_be_ignored(kind):
            kept.append(content[start:end])
            continue
        dropped = True
        if kind == _PNG_EXIF:
            exif = content[data : end - 4]
        elif kind == _JPEG_EXIF and content[data : data + 6] == b"Exif\0\0":
            exif = content[data:end]
    return (b"".join(kept) if dropped else None), exif


def _may_be_ignored(kind: int) -> bool:
    """A chunk of a PNG whose name begins in lower case, but for transparency."""
    return kind > 0xFF and bool(kind & 0x20000000) and kind != _PNG_TRANSPARENCY


def _jpeg_parts(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(marker, start, start of its data, end) of the segments before the first scan, then the rest as one."""
    at = 2
    yield 0xD8, 0, 2, 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        yield content[at + 1], at, at + 4, end
        at = end
    yield 0xDA, at, at, len(content)


def _png_parts(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, start, start of its data, end) of all chunks; the signature is a part of the first."""
    start, at = 0, 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">II", content, at)
        end = at + 12 + length
        yield kind, start, at + 8, end
        start = at = end
