"""Pictures that cannot be used, and some that can."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

FLAG = "--instance_data_dir"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\0\x08mdat"


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def animation(kind: str) -> bytes:
    first, *others = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue"))
    return encoded(first, kind, save_all=True, append_images=others)


def png_by_header(side: int) -> bytes:
    """A whole 1-bit PNG of side x side pixels: a few kilobytes that unpack to megabytes, and to gigabytes as
    RGB floats."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def damaged_png() -> bytes:
    data = bytearray(encoded(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    """Fifty megabytes of text in a chunk of as many kilobytes: Pillow raises ValueError for it, not
    OSError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 50_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


# --- pictures that cannot be used


def written(data: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data())


def image_file(kind: str, dtype: type) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(np.ones((64, 64), dtype)).save(path, kind)


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated JPEG": ("cut.jpg", written(lambda: encoded(noise(), "JPEG")[:-500]), "truncated"),
    "truncated PNG": ("cut.png", written(lambda: encoded(noise(), "PNG")[:-500]), "truncated"),
    "truncated WEBP": (
        "cut.webp",
        written(lambda: encoded(noise(), "WEBP", lossless=True)[:-500]),
        "not a whole picture",
    ),
    "header alone": ("head.png", written(lambda: encoded(noise(), "PNG")[:20]), "not a whole picture"),
    "flipped bits": ("flip.png", written(damaged_png), "not a whole picture"),
    "text": ("text.png", written(b"a photo of sks dog\n"), "by its content a text file"),
    "SVG": (
        "drawing.png",
        written(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "by its content an SVG drawing",
    ),
    "no bytes": ("empty.jpg", written(b""), "by its content an empty file"),
    "animated GIF as WEBP": ("moving.webp", written(lambda: animation("GIF")), "animated; save the frame"),
    "animated WEBP": ("moving.webp", written(lambda: animation("WEBP")), "animated; save the frame"),
    "animated PNG": ("moving.png", written(lambda: animation("PNG")), "animated; save the frame"),
    "bomb of 169 million pixels": (
        "bomb.png",
        written(lambda: png_by_header(13_000)),
        "13000 x 13000 is over 64,000,000 pixels; make it smaller",
    ),
    "bomb of 400 million pixels": (
        "bomb.png",
        written(lambda: png_by_header(20_000)),
        "is over 64,000,000 pixels; make it smaller",
    ),
    "one row too many": (
        "large.png",
        written(lambda: png_by_header(8_001)),
        "8001 x 8001 is over 64,000,000 pixels",
    ),
    "bomb of text": ("text.png", written(text_bomb), "not a whole picture"),
    "32-bit float": ("depth.tif", image_file("TIFF", np.float32), "a picture of mode F"),
    "32-bit integer": ("depth.tiff", image_file("TIFF", np.int32), "a picture of mode I"),
    "one pixel": ("dot.png", lambda path: noise(1, 1).save(path), "1 x 1 pixels is too small"),
    "thin": (
        "thin.png",
        lambda path: noise(200, 15).save(path),
        "200 x 15 pixels is too small; each side must have at least 16",
    ),
    "pipe": ("pipe.png", os.mkfifo, "not a regular file"),
    "folder": ("folder.png", os.mkdir, "cannot be read: Is a directory"),
    "device": ("zero.png", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "link to nothing": (
        "link.png",
        lambda path: path.symlink_to("nowhere.png"),
        "cannot be read: No such file or directory",
    ),
    "link to itself": (
        "loop.png",
        lambda path: path.symlink_to(path),
        "cannot be read: Too many levels of symbolic links",
    ),
}
