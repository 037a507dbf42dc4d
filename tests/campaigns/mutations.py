"""Damage to the bytes of valid files: of any format, and of formats with a structure that blind damage would not pass."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

HUGE = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**30, float("nan"), float("inf"),
    float("-inf"), "", "x", "\x00", "\ud800", "../../outside", "/etc/passwd", "=1+1", "x" * 100_000, [], {}, [None],
    [[]], {"": {}}, [0] * 10_000, {"format": 10**9}, "1e400", "NaN", "\u202e",
]  # fmt: skip
Mutation = Callable[[bytes, random.Random], bytes]


def mutate(name: str, data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A damaged copy of the file `name` with the content `data`; `other` is another file of the kind, to splice."""
    kinds: list[Mutation] = [lambda data, rng: splice(data, other, rng), *BLIND]
    suffix = name.rpartition(".")[2]
    structured = STRUCTURED.get(suffix, [])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        choice = rng.choice(structured) if structured and rng.random() < 0.6 else rng.choice(kinds)
        try:
            data = choice(data, rng)
        except Exception:  # damaged already, so that its structure cannot be read
            data = rng.choice(BLIND)(data, rng)
    return data


# --- any bytes --------------------------------------------------------------------------------------------------------


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    near = rng.random() < 0.5  # headers are at the beginning
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(min(len(changed), 200) if near else len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def extreme(data: bytes, rng: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes becomes an extreme one."""
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(HUGE) & (1 << 8 * size) - 1).to_bytes(size, order)  # type: ignore[arg-type]
    at = rng.randrange(max(1, min(len(data), rng.choice((64, 512, len(data) or 1)))))
    if rng.random() < 0.2:
        at = max(0, len(data) - rng.randrange(1, 64))
    return data[:at] + value + data[at + size :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 100, 5000))
    block = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, b"[" * size, data[at : at + size]))
    return data[:at] + block + data[at:]


def delete(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 4, 100, 5000)) :]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def replace(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", b"\0" * 64, rng.randbytes(rng.choice((1, 50, 3000))), data[::-1], b"\xef\xbb\xbf" + data))


BLIND: list[Mutation] = [truncate, flip, flip, extreme, extreme, insert, delete, replace]

# --- JSON, and what holds JSON ----------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    places = [(value, key) for key in keys]
    for _, key in list(places):
        places += _places(value[key])
    return places


def change_value(value: Any, rng: random.Random) -> Any:
    """A JSON value of which a part is removed, renamed, repeated or replaced."""
    places = _places(value)
    if not places or rng.random() < 0.05:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    action = rng.random()
    if action < 0.2:
        del parent[key]
    elif action < 0.3 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "__class__", "\ud800", f"{key} "))] = parent.pop(key)
    elif action < 0.4:
        source, other = rng.choice(places)
        parent[key] = source[other] if other in source or (isinstance(source, list) and other < len(source)) else None
        json.dumps(value)  # raises ValueError for a value that holds itself
    elif action < 0.5 and isinstance(parent, list):
        parent[:] = parent * rng.choice((2, 100))
    else:
        parent[key] = rng.choice(VALUES)
    return value


def json_value(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(change_value(json.loads(data), rng), ensure_ascii=rng.random() < 0.8).encode(
        errors="surrogatepass"
    )


def json_text(data: bytes, rng: random.Random) -> bytes:
    """JSON of which the text is hostile: deep nesting, long numbers, keys that are there twice."""
    depth, digits = rng.choice((500, 5000, 200_000)), rng.choice((400, 5000, 500_000))
    text = rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b"1" * digits, b"1e999", b"-"))
    at = data.find(b":", rng.randrange(max(1, len(data))))
    return data[: at + 1] + text + data[at + 1 :] if at >= 0 and rng.random() < 0.7 else text


def json_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((json_value, json_text))(lines[at], rng) + rng.choice((b"\n", b"", b"\r", b"\n\n"))
    return b"".join(lines)


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header and rng.random() < 0.6:
        metadata = header["__metadata__"]
        key = rng.choice(list(metadata))
        changed = json.dumps(change_value(json.loads(metadata[key]), rng)) if metadata[key][:1] in "{[" else "x"
        metadata[key] = changed
    else:
        change_value(header, rng)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.95 else rng.choice(HUGE)
    return (length & 2**64 - 1).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def safetensors_values(data: bytes, rng: random.Random) -> bytes:
    """Weights that are NaN, infinite or random."""
    start = 8 + int.from_bytes(data[:8], "little")
    body = bytearray(data[start:])
    value = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", rng.randbytes(4)))
    at = rng.randrange(max(1, len(body) - 4)) & ~3
    body[at : at + 4] = value
    return data[:start] + (value * (len(body) // 4 + 1) if rng.random() < 0.2 else bytes(body))[: len(body)]


def yaml_text(data: bytes, rng: random.Random) -> bytes:
    bombs = [b"a: &a [x]\n" + b"".join(b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*b%d" % (i - 1) if i else b"*a"] * 9))
                                       for i in range(9)),
             b"!!python/object/apply:os.system ['touch outside']\n", b"a: !!python/name:os.system\n", b"- " * 5000,
             b"{" * 5000, b"? " * 3000, b"a: *missing\n", b"&a [*a]\n", b"<<: 1\n", b"a: 2020-13-45\n", b"\t", b"a: 0x\n",
             b"a: " + b"9" * 6000 + b"\n", b"%YAML 9.9\n---\n", b"a: 1\na: 2\n", b"1: 2\n", b"[a]: 2\n"]  # fmt: skip
    return rng.choice((rng.choice(bombs), data + rng.choice(bombs)))


def yaml_value(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    key, _, _ = lines[at].partition(b":")
    lines[at] = key + b": " + json.dumps(rng.choice(VALUES)).encode() + b"\n"
    return b"".join(lines)


# --- archives, arrays, images -----------------------------------------------------------------------------------------


def zip_member(data: bytes, rng: random.Random) -> bytes:
    """A member of a zip archive (.npz, .pt) is damaged, is far larger than the archive, or has another name."""
    members = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info.filename, archive.read(info)] for info in archive.infolist()]
    chosen = rng.choice(members)
    bomb, action = "", rng.randrange(5)
    if action == 0:
        chosen[1] = rng.choice(BLIND)(chosen[1], rng)
    elif action == 1:
        chosen[0] = rng.choice(("../outside", "/tmp/outside", "", "a" * 300, chosen[0] + "x"))
    elif action == 2:
        bomb = chosen[0]
    elif action == 3:
        members.append(list(rng.choice(members)))
    else:
        chosen[1] = PICKLE
    buffer = io.BytesIO()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in members:
                with archive.open(name, "w", force_zip64=True) as member:
                    member.write(content)
    return with_bomb(buffer.getvalue(), bomb) if bomb else buffer.getvalue()


BOMB = 2000  # MiB of zeros
# Protocol 0: os.system("touch outside").
PICKLE = b"cos\nsystem\n(S'touch outside'\ntR."


@functools.cache
def zeros() -> tuple[bytes, int]:
    """(raw deflate stream of BOMB MiB of zeros, their crc32): 2 MB, made of one block that is repeated."""
    packer, block, crc = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20), 0
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(BOMB):
        crc = zlib.crc32(block, crc)
    return packed * BOMB + packer.flush(), crc


def with_bomb(archive: bytes, name: str) -> bytes:
    """The zip archive with BOMB MiB of zeros in the place of the member `name`, whose first bytes stay."""
    packed, crc = zeros()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename != name:
                new.writestr(member.filename, content)
                continue
            head = zlib.compressobj(1, zlib.DEFLATED, -15)
            first = head.compress(content[:256]) + head.flush(zlib.Z_FULL_FLUSH)
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.file_size, info.compress_size = (BOMB << 20) + len(content[:256]), len(first + packed)
            info.CRC, info.header_offset = crc if not content else 0, buffer.tell()
            buffer.write(info.FileHeader(zip64=False) + first + packed)
            new.filelist.append(info)
            new.NameToInfo[name] = info
            new.start_dir = buffer.tell()
    return buffer.getvalue()


def npy_header(data: bytes, rng: random.Random) -> bytes:
    """A shape, type or order that the rows do not have; object arrays are pickles."""
    shape = rng.choice(("(1000000000, 512)", "(2, 99999999999999)", "(-1, 512)", "()", "(0, 512)", "(512,)", "(1,)*99",
                        "(3, 512)", "(2**70, 2)", "[1, 2]", "(True, 512)"))  # fmt: skip
    kind = rng.choice(
        ("'<f4'", "'|O'", "'<f8'", "'<c16'", "'<U9'", "'|V8'", "[('a', '<f4')]", "'<f2'", "'<i8'", "'zz'")
    )
    header = f"{{'descr': {kind}, 'fortran_order': {rng.choice(('True', 'False', '0'))}, 'shape': {shape}, }}".encode()
    if rng.random() < 0.1:
        header = rng.choice((b"(" * 5000, b"{" + b"'a':1," * 9000 + b"}", b"__import__('os').system('touch outside')"))
    body = PICKLE if b"|O" in header else data[128:]
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(header), 65535)) + header + body


def npz_header(data: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, npy_header(old.read(name), rng) if name == chosen else old.read(name))
    return buffer.getvalue()


def pickle_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose pickle calls a function."""
    if rng.random() < 0.3:
        return PICKLE
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = rng.choice((PICKLE, rng.choice(BLIND)(content, rng), flip(content, rng)))
            new.writestr(name, content)
    return buffer.getvalue()


def png_chunk(data: bytes, rng: random.Random) -> bytes:
    """A chunk of a PNG file is changed, with a right checksum: dimensions, text that unpacks to far more, profiles."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += size + 12
    action = rng.randrange(4)
    if action == 0:
        sides = [rng.choice((0, 1, 31, 33, 65, 5000, 60_000, 2**31 - 1)) for _ in range(2)]
        chunks[0][1] = struct.pack(">II", *sides) + chunks[0][1][8:]
    elif action == 1:
        chunks[0][1] = chunks[0][1][:8] + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5))
    elif action == 2:
        bomb = b"\x78\x9c" + zeros()[0]
        text = rng.choice((bomb, zlib.compress(b"<" * 10**6), zlib.compress(b"<!DOCTYPE a [<!ENTITY b 'c'>]>&b;")))
        name = rng.choice((b"XML:com.adobe.xmp\0\1\0\0\0", b"Comment\0\1\0\0\0"))
        chunks.insert(1, [b"iTXt", name + text])
    else:
        chosen = rng.choice(chunks)
        chosen[1] = rng.choice(BLIND)(chosen[1], rng)
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return data[:8] + b"".join(packed)


def xmp_text(data: bytes, rng: random.Random) -> bytes:
    """Hostile XML in the place of the XMP packet of any image."""
    start, end = data.find(b"<x:xmpmeta"), data.find(b"</x:xmpmeta>")
    entities = b"".join(b"<!ENTITY e%d '%s'>" % (i, b"&e%d;" % (i - 1) * 10 if i else b"lol") for i in range(10))
    texts = [b"<!DOCTYPE x [" + entities + b"]><x:xmpmeta>&e9;</x:xmpmeta>", b"<a>" * 20_000, b"<x:xmpmeta/>", b"\0" * 99,
             b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>", b"<a b='" + b"x" * 10**6 + b"'/>"]  # fmt: skip
    return data[:start] + rng.choice(texts) + data[end:] if 0 <= start < end else flip(data, rng)


def csv_text(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    fields = lines[at].split(b",")
    fields[rng.randrange(len(fields))] = rng.choice(
        (b"nan", b"inf", b"1e999", b'"', b"", b"x" * 10**6, b"\0", b"0x1", b"=1")
    )
    lines[at] = b",".join(fields)
    return b"".join(lines)


STRUCTURED: dict[str, list[Mutation]] = {
    "json": [json_value, json_value, json_value, json_text],
    "jsonl": [json_line],
    "safetensors": [safetensors_header, safetensors_header, safetensors_values],
    "yaml": [yaml_text, yaml_value],
    "npy": [npy_header],
    "npz": [npz_header, zip_member],
    "pt": [pickle_checkpoint, zip_member],
    "png": [png_chunk, xmp_text],
    "jpg": [xmp_text],
    "webp": [xmp_text],
    "csv": [csv_text],
}
