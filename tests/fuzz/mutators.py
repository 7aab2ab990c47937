"""Ways to damage a file: its bytes, and the structure that its format has. Each takes a random source, so a seed repeats it.

A mutator gives the damaged content; those in a table named ``REFUSED`` make what must not load (numbers that are none, missing or
truncated tensors): if it loads all the same, that is a silent failure.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from ipadapter_core.files.pickles import MAGIC
from ipadapter_core.files.state_dict import SAFETENSORS_DTYPES

Bytes = Callable[[Random, bytes], bytes]
State = dict[str, Tensor]

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
    10**30,
)
FLOATS = (float("nan"), float("inf"), float("-inf"), 1e308, 3e38, 1e-45, -0.0, 0.5)
NAMES = (
    "", " ", "a\nb", "a\x1b[31mb", "\0", "\u202egnp", "\ud800", "..", "../../x", "/etc/passwd", "x" * 5000, "猫", "é", "😀",
    "lora_unet_", "image_proj.", "ip_adapter.99999.to_k_ip.weight", "ip_adapter.0.to_k_ip.weight", "module." * 300, "a.b.c.d",
    "%s%n", "{0}", "'; --", "-rf", "con", "__metadata__", "embeds", "negative",
)  # fmt: skip
TEXTS = (
    *NAMES, "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "1_0", "١", "[" * 3000, "{" * 3000, "(" * 3000, "re:(a+)+$",
    "all", "all:", "all: 1", ":", ",", ";", "\r\n", "\t", "\u2028", "A" * 100_000, "=", "#", '"', "'''", "\\", "\ufeff", "{1..9999999}",
    "*" * 60, "**/" * 40, "pipe:true", "http://127.0.0.1:9/x.tar", "file:///etc/passwd", "true", "null",
)  # fmt: skip


# --- bytes -------------------------------------------------------------------------------------------------------


def _at(rng: Random, raw: bytes) -> int:
    """A place, more often near the front, where headers are."""
    return int(rng.random() ** rng.choice((1, 3)) * len(raw))


def flip(rng: Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            out[_at(rng, raw)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: Random, raw: bytes) -> bytes:
    at = _at(rng, raw)
    new = rng.choice((
        rng.randbytes(rng.randrange(1, 9)), b"\xff" * 4, b"\0" * 8, b"\xff\xff\xff\x7f", b"\x7f" * 8, struct.pack("<Q", 2**62),
        struct.pack(">I", 2**31), struct.pack("<d", float("nan")), b"{" * 40, b"\n", b"\x1b[2J",
    ))  # fmt: skip
    return raw[:at] + new + raw[at + len(new) :]


def truncate(rng: Random, raw: bytes) -> bytes:
    return raw[: _at(rng, raw)]


def cut_out(rng: Random, raw: bytes) -> bytes:
    at = _at(rng, raw)
    return raw[:at] + raw[at + rng.choice((1, 4, 16, len(raw) // 4)) :]


def repeat(rng: Random, raw: bytes) -> bytes:
    at, length = _at(rng, raw), rng.choice((1, 8, 64, 512))
    return raw[:at] + raw[at : at + length] * rng.choice((2, 3, 50)) + raw[at + length :]


def insert(rng: Random, raw: bytes) -> bytes:
    at = _at(rng, raw)
    return raw[:at] + rng.choice((b"\0", b"\n", rng.randbytes(5), b"[" * 200, b"\xef\xbb\xbf")) + raw[at:]


def swap(rng: Random, raw: bytes) -> bytes:
    a, b, length = _at(rng, raw), _at(rng, raw), rng.choice((1, 4, 32))
    out = bytearray(raw)
    out[a : a + length], out[b : b + length] = out[b : b + length], out[a : a + length]
    return bytes(out)


def append(rng: Random, raw: bytes) -> bytes:
    return raw + rng.choice((b"\0" * 64, b"\n", raw[:64], rng.randbytes(33)))


def empty(rng: Random, raw: bytes) -> bytes:
    return b""


BYTES: tuple[Bytes, ...] = (flip, flip, overwrite, overwrite, truncate, cut_out, repeat, insert, swap, append, empty)


# --- JSON and other texts ----------------------------------------------------------------------------------------


def json_value(rng: Random) -> Any:
    return rng.choice((
        None, True, [], {}, [[]], {"": {}}, rng.choice(NUMBERS), rng.choice(FLOATS), rng.choice(TEXTS), rng.choice(NAMES),
        [rng.choice(NUMBERS)] * 3, [None], -5, 0.1, "0", [rng.choice(NAMES)],
    ))  # fmt: skip


def _paths(tree: Any, path: tuple[Any, ...] = (), depth: int = 0) -> list[tuple[Any, ...]]:
    found = [path]
    if depth < 12:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree[:40]) if isinstance(tree, list) else ()
        for key, value in items:
            found += _paths(value, (*path, key), depth + 1)
    return found


def edit_tree(rng: Random, tree: Any) -> Any:
    """One change somewhere: replaced, removed, doubled, renamed, wrapped, moved."""
    tree = json.loads(json.dumps(tree))
    path = rng.choice(_paths(tree))
    if not path:
        return rng.choice((tree, [tree], {"a": tree}, json_value(rng)))
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    match rng.randrange(7):
        case 0 | 1 | 2:
            owner[key] = json_value(rng)
        case 3:
            del owner[key]
        case 4 if isinstance(owner, dict):
            owner[rng.choice(NAMES)] = owner.pop(key)
        case 4 | 5:
            owner[key] = rng.choice(([owner[key]], {"a": owner[key]}, str(owner[key])))
        case _:
            other = tree
            for part in rng.choice(_paths(tree)):
                other = other[part]
            owner[key] = json.loads(json.dumps(other))
    return tree


def write_text(rng: Random, text: str) -> bytes:
    """Mostly UTF-8, at times as Windows and others write it."""
    encoding = rng.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16", "utf-16-le", "cp1252", "shift_jis", "utf-32"))
    return text.encode(encoding, "replace" if encoding in ("cp1252", "shift_jis") else "surrogatepass")


def json_bytes(rng: Random, tree: Any) -> bytes:
    return write_text(rng, json.dumps(tree, ensure_ascii=rng.random() < 0.5))


def edit_text(rng: Random, text: str) -> str:
    """Characters, words and lines removed, doubled, swapped, replaced by what is odd."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice((0, 1, 3, 20)))
        new = rng.choice(("", rng.choice(TEXTS), str(rng.choice(NUMBERS)), str(rng.choice(FLOATS)), text[at:end] * rng.choice((2, 9)),
                          chr(rng.randrange(1, 0x3000)), "".join(rng.choices(",.;:-=!()[]{}*?|+^$#@ \t\n", k=rng.randrange(1, 6)))))  # fmt: skip
        text = text[:at] + new + text[end:]
    return text


# --- tables of tensors -------------------------------------------------------------------------------------------


def _pick(rng: Random, state: State) -> str:
    return rng.choice(sorted(state))


def _of_some(change: Callable[[Random, State], State]) -> Callable[[Random, State], State]:
    """A change that needs a tensor; earlier ones may have taken away the last."""
    return lambda rng, state: change(rng, state) if state else state


def drop_tensor(rng: Random, state: State) -> State:
    key = _pick(rng, state)
    return {k: t for k, t in state.items() if k != key}


def rename_tensor(rng: Random, state: State) -> State:
    old = _pick(rng, state)
    new = rng.choice((rng.choice(NAMES), old + rng.choice(NAMES), old[:-1], old.upper(), old.replace(".", "_"), rng.choice(NAMES) + old,
                      old.replace("1", str(rng.choice(NUMBERS))), old.replace(".0.", ".99."), old.replace("weight", "bias")))  # fmt: skip
    return {(new if k == old else k): t for k, t in state.items()}


def add_tensor(rng: Random, state: State) -> State:
    return {**state, rng.choice(NAMES) + rng.choice(("", _pick(rng, state))): torch.ones(rng.choice((0, 1, 3)))}


def reshape_tensor(rng: Random, state: State) -> State:
    key = _pick(rng, state)
    own = state[key]
    t = own if own.ndim else own[None]
    new = rng.choice((
        t.flatten(), t.reshape(-1, 1), t[None], t[:0], t[:1], t.mT if t.ndim > 1 else t[:, None], torch.cat([t, t]), t[..., None, None],
        t.flatten()[:3], torch.tensor(1.0), torch.zeros(0, 5), torch.ones(1, 1, 1, 1), torch.ones(4, 2, 2), torch.ones(3, 3),
    ))  # fmt: skip
    return {**state, key: new.contiguous().clone()}


def cast_tensor(rng: Random, state: State) -> State:
    dtype = rng.choice((
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.uint8,
    ))  # fmt: skip
    keys = sorted(state) if rng.random() < 0.3 else [_pick(rng, state)]
    return {k: t.to(dtype) if k in keys else t for k, t in state.items()}


def scale_tensor(rng: Random, state: State) -> State:
    key, factor = _pick(rng, state), rng.choice((0.0, -1.0, 1e30, 1e-30, 3e38, 1e4))
    return {**state, key: (state[key].double() * factor).clamp(-3e38, 3e38).to(state[key].dtype)}


def with_nan(rng: Random, state: State) -> State:
    """One number that is none, in a tensor of floating point numbers."""
    keys = sorted(k for k, t in state.items() if t.is_floating_point() and t.numel() and t.itemsize > 1)
    if not keys:
        return state
    key = rng.choice(keys)
    t = state[key].clone()
    t.view(-1)[rng.randrange(t.numel())] = rng.choice((float("nan"), float("inf"), float("-inf")))
    return {**state, key: t}


STATES: tuple[Callable[[Random, State], State], ...] = tuple(map(_of_some, (
    drop_tensor, rename_tensor, add_tensor, reshape_tensor, reshape_tensor, cast_tensor, scale_tensor, with_nan,
)))  # fmt: skip


# --- safetensors -------------------------------------------------------------------------------------------------


def edit_header(rng: Random, raw: bytes) -> bytes:
    """Shapes, types, places, names, metadata, duplicates; the length before it, at times a lie."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header: Any = json.loads(raw[8 : 8 + length])
        name = rng.choice(sorted(header))
    except Exception:  # an earlier change damaged it
        return flip(rng, raw)
    entry = header[name]
    match rng.randrange(9):
        case 0 if isinstance(entry, dict) and "shape" in entry:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
        case 1 if isinstance(entry, dict):
            entry["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "F8_E4M3", "F4", "C64", "BOOL", "U8", "", None, 3, "x" * 999)
            )
        case 2 if isinstance(entry, dict):
            entry["data_offsets"] = rng.choice(
                ([0, 0], [0, 4], [4, 0], [rng.choice(NUMBERS), rng.choice(NUMBERS)], [], None)
            )
        case 3:
            header[rng.choice(NAMES)] = entry
        case 4:
            header[rng.choice(NAMES)] = header.pop(name)
        case 5:
            header["__metadata__"] = rng.choice((json_value(rng), {"a": 1}, {rng.choice(NAMES): rng.choice(TEXTS)}))
        case 6:
            text = json.dumps(header)
            text = (
                text[:-1] + "," + text[1:] if rng.random() < 0.5 else text.replace("{", "{" * rng.choice((2, 500)), 1)
            )
            return len(text.encode()).to_bytes(8, "little") + text.encode() + raw[8 + length :]
        case 7:
            return struct.pack("<Q", rng.choice((0, 1, length + 1, length - 1, 10**8, 2**31, 2**47, 2**63))) + raw[8:]
        case _:
            header = edit_tree(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


# --- pickles -----------------------------------------------------------------------------------------------------


def _steps(raw: bytes) -> list[tuple[str, int, int]]:
    found = [(opcode.name, at) for opcode, _, at in pickletools.genops(raw)]
    ends = [at for _, at in found[1:]] + [len(raw)]
    return [(name, at, end) for (name, at), end in zip(found, ends, strict=True)]


PIECES = (
    b"0", b"1", b"2", b"(", b"t", b")", b"}", b"]", b"R", b"b", b"s", b"u", b"a", b"e", b"\x85", b"\x86", b"\x87", b"N", b"\x88",
    b"K\x01", b"J\xff\xff\xff\x7f", b"h\x00", b"h\xff", b"j\xff\xff\xff\x7f", b"q\x00", b"Q", b"\x81", b"\x8a\x09" + b"\xff" * 9,
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(ios\nsystem\n",
    b"\x8d" + struct.pack("<Q", 2**40), b"\x95" + struct.pack("<Q", 2**60), b"X\xff\xff\xff\x7f", b"G" + struct.pack(">d", float("nan")),
    b"c__builtin__\ngetattr\n", b"\x93", b"\x94", b"V[\n", b"I99\n", b"L99999L\n", b".", b"]" * 2000, b"(" * 2000,
)  # fmt: skip


def edit_pickle(rng: Random, raw: bytes) -> bytes:
    """One step of a pickle removed, doubled, moved, replaced, or given another number."""
    try:
        steps = _steps(raw)
    except Exception:
        return flip(rng, raw)
    name, at, end = rng.choice(steps)
    match rng.randrange(6):
        case 0:
            return raw[:at] + raw[end:]
        case 1:
            return raw[:end] + raw[at:end] * rng.choice((1, 2, 300)) + raw[end:]
        case 2:
            return raw[:at] + rng.choice(PIECES) + raw[end:]
        case 3:
            return raw[:at] + rng.choice(PIECES) + raw[at:]
        case 4 if name in ("BININT", "BININT1", "BININT2", "LONG1"):
            return raw[:at] + b"J" + struct.pack("<i", rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 10**6))) + raw[end:]
        case _:
            _, other, last = rng.choice(steps)
            return raw[:at] + raw[other:last] + raw[end:]


def edit_zip(rng: Random, raw: bytes) -> bytes:
    """The pickle inside, or a member: renamed, doubled, dropped, compressed, cut; or a size in the list of members."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            members = {name: file.read(name) for name in file.namelist()}
    except Exception:
        return flip(rng, raw)
    name = next((n for n in members if n.endswith("data.pkl")), "")
    way = rng.randrange(8)
    if way <= 3 and name:
        members[name] = edit_pickle(rng, members[name])
    elif way == 4:
        old = rng.choice(sorted(members))
        members[rng.choice((*NAMES[:-8], "data.pkl", "archive/constants.pkl", "archive/data/0"))[:200] or "x"] = (
            members.pop(old)
        )
    elif way == 5:
        old = rng.choice(sorted(members))
        members[old] = rng.choice((b"", members[old][:-1], members[old] * 2, b"\0" * 8))
    elif way == 6:
        out = bytearray(raw)
        at = raw.rfind(b"PK\x01\x02", 0, rng.randrange(len(raw)) + 1)
        if at >= 0:
            field = at + rng.choice((10, 16, 20, 24, 28, 30, 32, 42))
            out[field : field + 4] = struct.pack("<I", rng.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
        return bytes(out)
    made = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if way == 7 else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", method) as file:
        for key, content in members.items():
            try:
                file.writestr(zipfile.ZipInfo(key), content, method)  # of 1980: a seed repeats
            except (ValueError, UnicodeError, IndexError):  # names that no archive can have
                file.writestr(zipfile.ZipInfo("odd"), content)
    return made.getvalue()


# --- tar ---------------------------------------------------------------------------------------------------------


def edit_tar(rng: Random, raw: bytes) -> bytes:
    """A header's field, with its checksum made right again; or members of odd kinds, names and sizes."""
    heads = [at for at in range(0, len(raw) - 511, 512) if raw[at + 257 : at + 262] == b"ustar"]
    if not heads:
        return flip(rng, raw)
    out, at = bytearray(raw), rng.choice(heads)
    match rng.randrange(6):
        case 0:
            name = rng.choice(NAMES).encode("utf-8", "surrogatepass")[:99]
            out[at : at + 100] = (name + rng.choice((b"", b".png", b".json", b".txt"))).ljust(100, b"\0")[:100]
        case 1:
            out[at + 124 : at + 136] = rng.choice(
                (
                    b"77777777777\0",
                    b"00000000000\0",
                    b"\x80" + b"\xff" * 11,
                    b"-0000000001\0",
                    b"xxxxxxxxxxx\0",
                    b"00000010000\0",
                )
            )
        case 2:
            out[at + 156 : at + 157] = rng.choice(
                (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"\xff")
            )
        case 3:
            out[at + rng.randrange(512)] = rng.randrange(256)
        case 4:
            del out[at : at + 512]
            return bytes(out)
        case _:
            out[at:at] = out[at : at + 512]
            return bytes(out)
    out[at + 148 : at + 156] = b" " * 8
    out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def tar_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


# --- pictures ----------------------------------------------------------------------------------------------------


def edit_png(rng: Random, raw: bytes) -> bytes:
    """A chunk's content with its checksum made right again, or chunks dropped, doubled, moved."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        chunks.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return flip(rng, raw)
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    match rng.randrange(5):
        case 0:
            size = struct.pack(">II", *(rng.choice((0, 1, 16, 40_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
            head = bytes((rng.choice((0, 1, 2, 8, 16, 64)), rng.choice((0, 2, 3, 4, 6, 9)), 0, 0, rng.choice((0, 1))))
            chunks[0] = (b"IHDR", (size if rng.random() < 0.5 else chunks[0][1][:8]) + head)
        case 1:
            chunks[number] = (kind, flip(rng, content) if content else b"\xff")
        case 2:
            del chunks[number]
        case 3:
            chunks.insert(number, (kind, content))
        case _:
            odd = rng.choice((
                (b"tEXt", b"parameters\0" + rng.choice(TEXTS).encode("utf-8", "replace")), (b"eXIf", exif(rng)), (b"PLTE", rng.randbytes(7)),
                (b"tRNS", rng.randbytes(9)), (b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 300)), (b"gAMA", b"\0\0\0\0"),
                (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**24)), (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 2**22)),
            ))  # fmt: skip
            chunks.insert(1, odd)
    return raw[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def exif(rng: Random) -> bytes:
    """A block of a few entries of any type and count."""
    order, pack = rng.choice((("II", "<"), ("MM", ">")))
    entries = b""
    count = rng.randrange(1, 5)
    for _ in range(count):
        tag = rng.choice((0x0112, 0x011A, 0x011B, 0x0128, 0x8769, 0x8825, 0xA005, 0x9286, 0x010F, 0x0103, 0x0111))
        entries += struct.pack(
            f"{pack}HHII", tag, rng.choice((1, 2, 3, 4, 5, 7, 9, 10, 12, 99)), rng.choice((0, 1, 2, 9, 2**31)), rng.choice((1, 6, 8, 26, 2**32 - 1))
        )  # fmt: skip
    return (
        order.encode() + struct.pack(f"{pack}HIH", 42, 8, count) + entries + struct.pack(f"{pack}I", rng.choice((0, 8)))
    )


def edit_jpeg(rng: Random, raw: bytes) -> bytes:
    """An EXIF block of odd entries, or the sizes in the frame's header."""
    if rng.random() < 0.6:
        block = b"Exif\0\0" + exif(rng)
        return raw[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + raw[2:]
    at = raw.find(b"\xff\xc0")
    if at < 0:
        return flip(rng, raw)
    return raw[: at + 5] + struct.pack(">HH", rng.choice((0, 1, 65535)), rng.choice((0, 1, 65535))) + raw[at + 9 :]


def edit_tiff(rng: Random, raw: bytes) -> bytes:
    """A field of the first directory: its type, how many values, where they are."""
    pack = "<" if raw[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(f"{pack}I", raw, 4)
        (count,) = struct.unpack_from(f"{pack}H", raw, at)
        entry = at + 2 + 12 * rng.randrange(max(1, count))
        out = bytearray(raw)
        field, size = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I")))
        struct.pack_into(pack + size, out, entry + field, rng.choice((0, 1, 2, 3, 8, 16, 255, 256, 2**15, *((2**31, 2**32 - 1) if size == "I" else ()))))  # fmt: skip
    except struct.error:
        return flip(rng, raw)
    return bytes(out)


def picture_edit(rng: Random, raw: bytes) -> bytes:
    """What fits the format that the picture has."""
    if raw[:4] == b"\x89PNG":
        return edit_png(rng, raw)
    if raw[:2] == b"\xff\xd8":
        return edit_jpeg(rng, raw)
    if raw[:2] in (b"II", b"MM"):
        return edit_tiff(rng, raw)
    if raw[:1] == b"P":
        head = f"{rng.choice(NUMBERS)} {rng.choice(NUMBERS)}\n{rng.choice(NUMBERS)}\n".encode()
        return raw[:3] + head + raw[12:]
    at = rng.randrange(4, 40)  # sizes lie there in BMP, GIF and WebP
    return raw[:at] + struct.pack("<I", rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1))) + raw[at + 4 :]


DTYPES = {getattr(torch, name): code for code, name in SAFETENSORS_DTYPES.items() if hasattr(torch, name)}


def safetensors_bytes(state: State, metadata: dict[str, str] | None = None) -> bytes:
    """A file of the tensors, under whatever names. (The library refuses some, and writes metadata in another order every time.)"""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for key, t in state.items():
        content = t.contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        header[key] = {
            "dtype": DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def pickle_bytes(state: Any, *, zipped: bool, protocol: int = 2) -> bytes:
    """What ``torch.save`` writes, today's format or the one of before 1.6."""
    made = io.BytesIO()
    if zipped:
        torch.save(state, made, pickle_protocol=protocol)
    else:
        _save_legacy(state, made, protocol)
    return made.getvalue()


class _LegacyPickler(pickle.Pickler):
    """Names storages by number; ``torch.save`` names them by address, so that a seed would not repeat."""

    storages: list[Any]

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, (torch.storage.TypedStorage, torch.UntypedStorage)):
            return None
        typed = isinstance(obj, torch.storage.TypedStorage)
        untyped = obj._untyped_storage if typed else obj
        count = untyped.nbytes() // (obj.dtype.itemsize if typed else 1)
        same = (n for n, known in enumerate(self.storages) if known[0].data_ptr() == untyped.data_ptr() and count)
        key = next(same, len(self.storages))
        if key == len(self.storages):
            self.storages.append((untyped, count))
        kind = getattr(torch, obj._pickle_storage_type()) if typed else torch.UntypedStorage
        return "storage", kind, str(key), "cpu", count, None


def _save_legacy(state: Any, file: io.BytesIO, protocol: int) -> None:
    for head in (
        MAGIC,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    ):
        pickle.dump(head, file, protocol)
    pickler = _LegacyPickler(file, protocol)
    pickler.storages = []
    pickler.dump(state)
    pickle.dump([str(key) for key in range(len(pickler.storages))], file, protocol)
    for storage, count in pickler.storages:
        file.write(struct.pack("<q", count) + torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
