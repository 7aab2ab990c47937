"""The one reader of picture files: every mode, every orientation, odd metadata, and headers that promise too much."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import ipadapter_core.images.files as picture_files
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.generate import read_image, read_mask
from ipadapter_core.images.files import decode_grey, decode_picture, read_picture

RAMP = np.linspace(0, 65535, 40 * 24).round().astype(np.uint16).reshape(24, 40)
COLOURS = Image.fromarray(np.stack([RAMP >> 8, RAMP[::-1] >> 8, RAMP[:, ::-1] >> 8], -1).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def quarters() -> Image.Image:
    """Another colour in every corner, so that no two of the eight orientations look alike."""
    image = Image.new("RGB", (48, 32), "black")
    for colour, at in (("red", (0, 0)), ("lime", (24, 0)), ("blue", (0, 16)), ("white", (24, 16))):
        image.paste(colour, (*at, at[0] + 24, at[1] + 16))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    w, h = image.width - 4, image.height - 4
    return [tuple(round(v / 255) for v in image.getpixel(at)) for at in ((4, 4), (w, 4), (4, h), (w, h))]  # type: ignore[union-attr]


# --- orientation and other metadata ------------------------------------------------------------------------------------


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """An EXIF block with entries (tag, type, count, value), as broken as they are."""
    start, body = 8 + 2 + 12 * len(entries) + 4, b""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        if len(value) > 4:
            at, body = start + len(body), body + value
            value = struct.pack(order + "I", at)
        out += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    return out + struct.pack(order + "I", 0) + body


EXIF_MARK = {"JPEG": b"Exif\0\0", "PNG": b"", "WEBP": b""}


def turned(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(order + "H", value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_all_orientations_of_all_formats_are_pillows(form: str) -> None:
    from PIL import ImageOps

    if form not in Image.SAVE:
        Image.init()
    if form not in Image.SAVE:
        return  # AVIF comes with Pillow 11.3
    for value in range(1, 9):
        block = Image.Exif()
        block[0x0112] = value
        content = saved(quarters(), form, exif=block)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        got = decode_picture(content, "a")
        assert (got.size, got.mode) == (expected.size, "RGB")
        assert corners(got) == corners(expected), (form, value)


ODD = {
    "resolution as text": (0x011A, 2, 4, b"72\0\0"),
    "resolution over zero": (0x011A, 5, 1, struct.pack("<II", 72, 0)),
    "unknown type": (0x9999, 99, 4, b"abcd"),
    "huge count": (0x010F, 2, 2**32 - 1, b"\x40\0\0\0"),
    "offset to nowhere": (0x010F, 2, 400, b"\xff\xff\xff\x7f"),
    "sub-directory to nowhere": (0x8769, 4, 1, b"\xff\xff\xff\x7f"),
    "sub-directory as text": (0x8769, 2, 4, b"abcd"),
    "sub-directory into itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "GPS as float": (0x8825, 11, 1, struct.pack("<f", 3e38)),
    "no value": (0x0132, 2, 0, b""),
    "tile sizes": (0x0142, 4, 1, struct.pack("<I", 2**31)),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_entries_cost_neither_the_picture_nor_its_orientation(odd: tuple[int, int, int, bytes], form: str) -> None:
    for entries in ((turned(6), odd), (odd, turned(6))):
        assert decode_picture(saved(quarters(), form, exif=EXIF_MARK[form] + exif(*entries)), "a.jpg").size == (32, 48)


@pytest.mark.parametrize(
    "block",
    [b"", b"II", b"rubbish that is no EXIF", exif(turned(9)), exif(turned(0)), exif((0x0112, 2, 2, b"6\0")), exif((0x0112, 5, 1, bytes(8)))],
)  # fmt: skip
def test_an_orientation_that_cannot_be_read_is_none(block: bytes) -> None:
    assert decode_picture(saved(quarters(), "PNG", exif=block), "a.png").size == (48, 32)


@settings(max_examples=150, deadline=None)
@given(block=st.binary(max_size=80), cut=st.integers(0, 60), at=st.integers(0, 57), byte=st.integers(0, 255))
def test_no_exif_block_costs_a_picture(block: bytes, cut: int, at: int, byte: int) -> None:
    real = bytearray(exif(turned(6), (0x011A, 5, 1, struct.pack("<II", 72, 1)), (0x8769, 4, 1, b"\x08\0\0\0")))
    real[at] = byte
    for one in (block, bytes(real[:cut]), bytes(real)):
        assert decode_picture(saved(COLOURS, "JPEG", exif=EXIF_MARK["JPEG"] + one), "a.jpg").width in (24, 40)
        assert decode_picture(saved(COLOURS, "PNG", exif=one), "a.png").width in (24, 40)


def test_orientation_from_xmp() -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("XML:com.adobe.xmp", packet.decode())
    assert decode_picture(saved(quarters(), "PNG", pnginfo=chunk), "a.png").size == (32, 48)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_texts_and_profiles_that_pillow_refuses_cost_no_picture() -> None:
    """Compressed texts and profiles above 1 MB, a damaged text chunk, an index of pictures (MPF) that is none."""
    block = Image.Exif()
    block[0x0112] = 6
    plain = saved(quarters(), "PNG", exif=block)
    bomb = zlib.compress(bytes(3_000_000))
    bad_sum = png_chunk(b"tEXt", b"a\0b")[:-4] + b"abcd"
    for extra in (
        png_chunk(b"zTXt", b"workflow\0\0" + bomb),
        png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + bomb),
        png_chunk(b"iCCP", b"profile\0\0" + bomb),
        bad_sum,
    ):
        for place in (33, len(plain) - 12):  # behind the header, before the end
            got = decode_picture(plain[:place] + extra + plain[place:], "a.png")
            assert (got.size, corners(got)) == ((32, 48), corners(decode_picture(plain, "a.png")))
    photo = saved(quarters(), "JPEG", exif=block)
    for odd in (b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0", b"MPF\0rubbish", b"ICC_PROFILE\0\xff\xff", b"ICC_PROFILE\0"):
        segment = b"\xff\xe2" + struct.pack(">H", len(odd) + 2) + odd
        assert decode_picture(photo[:2] + segment + photo[2:], "a.jpg").size == (32, 48)


# --- depth and modes -----------------------------------------------------------------------------------------------------


def deep_files() -> dict[str, bytes]:
    height, width = RAMP.shape
    signed, real = Image.fromarray(RAMP.astype(np.int32)), Image.fromarray(RAMP.astype(np.float32) / 65535)
    big = saved(Image.fromarray(RAMP), "TIFF").replace(b"II*\0", b"II*\0")
    pgm = f"P5\n{width} {height}\n65535\n".encode() + RAMP.astype(">u2").tobytes()
    rgb = f"P6\n{width} {height}\n65535\n".encode() + RAMP.astype(">u2")[..., None].repeat(3, -1).tobytes()
    return {
        "a.png": saved(Image.fromarray(RAMP), "PNG"),
        "la.png": png_16(RAMP[..., None].repeat(2, -1), 4),
        "rgb.png": png_16(RAMP[..., None].repeat(3, -1), 2),
        "a.tif": big,
        "i.tif": saved(signed, "TIFF"),
        "f.tif": saved(real, "TIFF"),
        "a.pgm": pgm,
        "a.ppm": rgb,
        "big.tif": tiff_big_endian(RAMP),
    }


def png_16(values: Any, colour: int) -> bytes:
    height, width = values.shape[:2]
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def tiff_big_endian(values: Any) -> bytes:
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, height), (279, 2 * width * height)]  # fmt: skip
    out = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    out += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    return out + values.astype(">u2").tobytes()


@pytest.mark.parametrize("name", deep_files())
def test_deep_pictures_keep_their_grey(name: str) -> None:
    """A ramp from black to white is one, not white from 255 of 65535 on."""
    got = np.asarray(decode_picture(deep_files()[name], name), dtype=np.float32)
    assert np.abs(got[..., :3] - RAMP[..., None] / 257).max() <= 1, (
        "8-bit channels of deep colours are cut, not rounded"
    )
    if name in ("a.png", "a.tif", "i.tif", "f.tif", "a.pgm", "big.tif"):
        assert np.abs(got - RAMP[..., None] / 257).max() <= 0.501
        grey = decode_grey(deep_files()[name], name)
        assert torch.allclose(grey, torch.from_numpy(RAMP / np.float32(65535)), atol=1e-6), "masks keep all bits"


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (np.float32([[0, 0.5, 300]]), "from 0 to 300"),
        (np.float32([[0, np.nan]]), "nan"),
        (np.float32([[np.inf, 1]]), "to inf"),
        (np.float32([[-0.1, 1]]), "from -0.1"),
        (np.int32([[0, 70000]]), "to 70000"),
        (np.int32([[-5, 7]]), "from -5"),
    ],
)
def test_grey_whose_white_is_unknown_is_refused(values: Any, seen: str) -> None:
    for read in (decode_picture, decode_grey):
        with pytest.raises(CorruptFileError, match=rf"'a\.tif' holds grey values .*{seen}"):
            read(saved(Image.fromarray(values), "TIFF"), "a.tif")


def test_every_mode_becomes_rgb_or_rgba() -> None:
    clear = COLOURS.convert("RGBA")
    clear.putalpha(Image.fromarray((RAMP >> 8).astype(np.uint8)))
    palette = COLOURS.quantize(16)
    grey = COLOURS.convert("L")
    cases: list[tuple[bytes, str]] = [
        (saved(COLOURS, "PNG"), "RGB"),
        (saved(clear, "PNG"), "RGBA"),
        (saved(clear.convert("LA"), "PNG"), "RGBA"),
        (saved(palette, "PNG"), "RGB"),
        (saved(palette, "PNG", transparency=3), "RGBA"),
        (saved(palette, "PNG", transparency=bytes([0, 128, 255])), "RGBA"),
        (saved(COLOURS, "PNG", transparency=(0, 255, 9)), "RGBA"),
        (saved(grey, "PNG", transparency=7), "RGBA"),
        (saved(grey.convert("1"), "PNG"), "RGB"),
        (saved(grey, "JPEG"), "RGB"),
        (saved(COLOURS.convert("CMYK"), "JPEG"), "RGB"),
        (saved(COLOURS.convert("CMYK"), "TIFF"), "RGB"),
        # before 13, Pillow cannot read the YCbCr that it writes
        *([(saved(COLOURS.convert("YCbCr"), "TIFF"), "RGB")] if int(PIL.__version__.split(".")[0]) >= 13 else []),
        (saved(clear, "TIFF"), "RGBA"),
        (saved(palette, "GIF", transparency=3), "RGBA"),
        (saved(COLOURS, "GIF", save_all=True, append_images=[grey]), "RGB"),
        (saved(COLOURS, "BMP"), "RGB"),
        (saved(clear, "WEBP", lossless=True), "RGBA"),
        (saved(COLOURS, "TGA"), "RGB"),
        (saved(clear, "PSD") if "PSD" in Image.SAVE else saved(COLOURS, "PPM"), "RGB"),
    ]
    for number, (content, mode) in enumerate(cases):
        got = decode_picture(content, "a.tga")
        assert (got.mode, got.size) == (mode, COLOURS.size), number
        assert decode_grey(content, "a.tga").shape == (24, 40)


def test_one_clear_grey_of_16_bits() -> None:
    content = saved(Image.fromarray(RAMP), "PNG")
    clear = png_chunk(b"tRNS", struct.pack(">H", int(RAMP[3, 5])))
    got = np.asarray(decode_picture(content[:33] + clear + content[33:], "a.png"))
    assert got.shape == (24, 40, 4)
    assert np.argwhere(got[..., 3] == 0).tolist() == [[3, 5]]


def test_lab_becomes_srgb() -> None:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(COLOURS, srgb, lab, outputMode="LAB")
    assert converted is not None
    got = np.asarray(decode_picture(saved(converted, "TIFF"), "a.tif"), dtype=int)
    assert np.abs(got - np.asarray(COLOURS, dtype=int)).mean() < 4


# --- damage, limits, special files --------------------------------------------------------------------------------------


def declared(width: int, height: int) -> dict[str, bytes]:
    """Files of a few bytes whose headers promise pictures of a size."""
    png = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + png_chunk(
        b"IDAT", zlib.compress(b"\0")
    )
    bmp = bytearray(saved(COLOURS, "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    tif = saved(COLOURS, "TIFF")
    for tag, value in ((256, width), (257, height)):
        at = tif.find(struct.pack("<HH", tag, 3) if struct.pack("<HH", tag, 3) in tif else struct.pack("<HH", tag, 4))
        tif = tif[:at] + struct.pack("<HHII", tag, 4, 1, value) + tif[at + 12 :]
    tga = saved(COLOURS, "TGA", compression="tga_rle")
    return {
        "a.png": b"\x89PNG\r\n\x1a\n" + png,
        "a.bmp": bytes(bmp),
        "a.tif": tif,
        "a.ppm": f"P6 {width} {height} 255\n".encode(),
        "a.tga": tga[:12] + struct.pack("<HH", width % 65536, height % 65536) + tga[16:],
    }


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.tga"])
@pytest.mark.parametrize("size", [(60000, 60000), (8192, 8192)], ids=["above the limit", "unbelievable for its bytes"])
def test_nothing_is_allocated_for_what_bytes_do_not_justify(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("pixels were asked for")

    monkeypatch.setattr(Image.core, "new", never)
    monkeypatch.setattr(Image.core, "fill", never)
    with pytest.raises(CorruptFileError, match=r"declares|exceeds limit"):
        decode_picture(declared(*size)[name], name)


def test_the_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(CorruptFileError, match=r"declares 60,000x60,000 pixels; at most 33,554,432 can be used from"):
        decode_picture(declared(60000, 60000)["a.png"], "a.png")
    blank = saved(Image.new("L", (6000, 6000)), "PNG")
    assert decode_picture(blank, "a.png").size == (6000, 6000), "blank pictures of real tools pass"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"nothing", b"P5\n99999999999 1\n255\n", b"P5\n1 99999999999\n255\n", b"P5\n-4 4\n255\n", b"P5\n4 4\n0\n", b"P3\n1 1\n255\n" + b"9" * 5000,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff\xe1\0\0" * 9, b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0\xff\xff", b"GIF89a\xff\xff\xff\xff", b"RIFF\xff\xff\xff\xffWEBPVP8X",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.png", "a.tga", "a\nb\x1b[31m.jpg"])
def test_what_is_no_picture_is_one_sentence(content: bytes, name: str) -> None:
    for read in (decode_picture, decode_grey):
        with pytest.raises(CorruptFileError) as raised:
            read(content, name)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 300


def formats() -> dict[str, bytes]:
    block = Image.Exif()
    block[0x0112] = 6
    made: dict[str, Callable[[], bytes]] = {
        "a.png": lambda: saved(COLOURS, "PNG", exif=block),
        "d.png": lambda: saved(Image.fromarray(RAMP), "PNG"),
        "a.jpg": lambda: saved(COLOURS, "JPEG", exif=block),
        "m.jpg": lambda: saved(COLOURS, "MPO", save_all=True, append_images=[COLOURS]),
        "a.webp": lambda: saved(COLOURS, "WEBP", exif=block),
        "a.gif": lambda: saved(COLOURS, "GIF", save_all=True, append_images=[COLOURS.convert("L")]),
        "a.bmp": lambda: saved(COLOURS, "BMP"),
        "a.ppm": lambda: saved(COLOURS, "PPM"),
        "a.tga": lambda: saved(COLOURS, "TGA", compression="tga_rle"),
        "a.tif": lambda: saved(COLOURS, "TIFF", exif=block),
        "z.tif": lambda: saved(COLOURS, "TIFF", compression="tiff_adobe_deflate"),
        "f.tif": lambda: saved(Image.fromarray(RAMP / np.float32(65535)), "TIFF"),
    }
    return {name: make() for name, make in made.items()}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_pictures_raise_our_error_or_are_read(data: st.DataObject) -> None:
    """Each byte may be another one, anything may be missing or added."""
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    messages: list[str] = []
    for read in (decode_picture, decode_grey):
        try:
            read(bytes(content), name)
        except CorruptFileError as error:
            messages.append(str(error))
    assert all(message.isprintable() for message in messages)


FILES = formats()


def test_every_exception_of_a_plugin_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (struct.error("x"), KeyError(3), OverflowError("x"), MemoryError(), ZeroDivisionError("x"), RecursionError("x"), AssertionError()):  # fmt: skip

        def fails(*args: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(picture_files, "_lazy", fails)
        with pytest.raises(CorruptFileError, match=r"'a\.png' cannot be read as a picture"):
            decode_picture(FILES["a.png"], "a.png")


def test_formats_that_need_a_plugin_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = picture_files._formats() - {"HEIF", "JXL"}
    monkeypatch.setattr(picture_files, "_formats", lambda: known)
    with pytest.raises(CorruptFileError, match=r"only with pillow-heif; pip install pillow-heif"):
        decode_picture(b"\0\0\0\x18ftypheic" + bytes(40), "photo.HEIC")


def test_pipes_folders_and_missing_files_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_picture, read_image, read_mask):
        for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), Path("a\0b")):
            with pytest.raises(InvalidInputError):
                read(path)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(tmp_path / "no.png")


def test_the_command_reads_what_training_reads(tmp_path: Path) -> None:
    for name, content in (*deep_files().items(), *FILES.items()):
        (tmp_path / name).write_bytes(content)
        pixels = np.asarray(decode_picture(content, name), dtype=np.float32) / np.float32(255)
        assert torch.equal(read_image(tmp_path / name)[0], torch.from_numpy(pixels))
        assert read_mask(tmp_path / name).values.shape[1:] == pixels.shape[:2]
    assert read_mask(tmp_path / "a.pgm").values.mean() == pytest.approx(0.5, abs=1e-4)
